"""Which pixels lie near the contour of their class, for Boundary IoU.

Cheng et al., *Boundary IoU: Improving Object-Centric Image Segmentation Evaluation*, CVPR 2021, equation 3. Their code
erodes the mask of one class with a square of 3x3, as often as ``contour_distance`` says, in an image framed by
nothing; what that takes away is near the contour. So a pixel is near a contour exactly if the square of
``2 distance + 1`` pixels around it holds another class or leaves the image, whatever the class: one look at a map
serves all classes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cityseg_hf.labels import IGNORE, NUM_CLASSES

DILATION_RATIO = 0.02
"""Width of the strip along contours, as a share of the image's diagonal: that of the paper."""


def contour_distance(size: tuple[int, int]) -> int:
    """How many pixels from a contour are near it, in an image of a height and width: 46 for 1024x2048."""
    return max(1, round(DILATION_RATIO * math.hypot(*size)))


def near_contour(train_ids: Tensor, distance: int) -> Tensor:
    """Where the square of ``2 distance + 1`` pixels around a pixel is not of one value.

    Args:
        train_ids: ``uint8[H, W]``; ``IGNORE`` where there is no class, as beyond the image.
        distance: in pixels.

    Returns:
        ``bool[H, W]``; of no meaning where there is no class.
    """
    framed = F.pad(train_ids[None], (distance,) * 4, value=IGNORE)[0]  # [H + 2 distance, W + 2 distance]
    extremes = []
    for of_two in (torch.minimum, torch.maximum):
        across = _in_windows(framed, 2 * distance + 1, 1, of_two)  # [H + 2 distance, W]
        extremes.append(_in_windows(across, 2 * distance + 1, 0, of_two))  # [H, W]
    return extremes[0] != extremes[1]


def _in_windows(values: Tensor, window: int, axis: int, of_two: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Minimum or maximum of every window along an axis of n values -> n - window + 1 values.

    Windows of 1, 2, 4, ... values are made of two halves; the last one of two that overlap.
    """
    width, length = 1, values.shape[axis]
    while width < window:
        step = min(width, window - width)
        left = values.narrow(axis, 0, length - width - step + 1)
        values = of_two(left, values.narrow(axis, step, length - width - step + 1))
        width += step
    return values


def boundary_counts(predictions: Tensor, labels: Tensor) -> Tensor:
    """Per class, the pixels near contours: right ones, those of the label, those of the prediction.

    Void pixels are taken out of the prediction before its contours are drawn: a prediction that is right wherever it is
    judged is right at contours too, whatever it says of void.

    Args:
        predictions: ``uint8[H, W]``, train ids 0..18.
        labels: ``uint8[H, W]``, train ids and ``IGNORE``.

    Returns:
        ``int64[3, 19]``.
    """
    distance = contour_distance(tuple(labels.shape))
    predictions = torch.where(labels == IGNORE, IGNORE, predictions)
    # 19 and more is not counted: [H, W] of each map near its own contours.
    strips = [torch.where(near_contour(classes, distance), classes, IGNORE) for classes in (labels, predictions)]
    right = torch.where(strips[0] == strips[1], strips[0], IGNORE)
    counts = [torch.bincount(one.flatten(), minlength=IGNORE + 1)[:NUM_CLASSES] for one in (right, *strips)]
    return torch.stack(counts)
