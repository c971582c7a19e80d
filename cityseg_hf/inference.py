"""From an image to train ids at its own resolution."""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, PreTrainedModel

from cityseg_hf.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize, resize_image
from cityseg_hf.errors import UserError, one_line
from cityseg_hf.labels import NUM_CLASSES
from cityseg_hf.models.weights import read_checkpoint
from cityseg_hf.pieces import Size
from cityseg_hf.upsampled import add_softmax, argmax
from cityseg_hf.views import PLAIN, Axis, Views, scaled_size


def load_model_folder(source: str | Path) -> tuple[PreTrainedModel, Any]:
    """A trained network and its image processor, from a model folder or the Hub. Reads safetensors only.

    Raises:
        UserError: there is no such folder or model, its weights are not whole, or it was not trained on the 19 classes
            and images normalised as ours.
    """
    model, missing, mismatched = read_checkpoint(AutoModelForSemanticSegmentation, source)
    try:
        processor = AutoImageProcessor.from_pretrained(source)
    except Exception as error:  # a broken file raises what the library that meets it raises
        if Path(source).is_dir() and not (Path(source) / "preprocessor_config.json").is_file():
            raise UserError(f"cannot load {source}: there is no preprocessor_config.json in it") from None
        raise UserError(f"cannot load the image processor of {source}: {one_line(error)}") from None
    if model.config.num_labels != NUM_CLASSES:
        raise UserError(
            f"{source} has {model.config.num_labels} classes, Cityscapes has {NUM_CLASSES}: fine-tune it first"
        )
    if missing:
        raise UserError(
            f"{source} lacks {len(missing)} of its weights, first {missing[0]}: train it first, or copy the whole file"
        )
    if mismatched:
        raise UserError(
            f"{source} has {len(mismatched)} weights of other sizes than its config.json says, first {mismatched[0]}"
        )
    means = (getattr(processor, "image_mean", None), getattr(processor, "image_std", None))
    if not getattr(processor, "do_normalize", False) or not np.allclose(
        means, (IMAGENET_MEAN, IMAGENET_STD), atol=1e-3
    ):
        raise UserError(
            f"{source} does not normalise images as ImageNet's (mean and deviation {means}): fine-tune it first"
        )
    return model.eval(), processor


def processor_size(processor: Any) -> Size | None:
    """The height and width that an image processor resizes to, or ``None`` where it does not resize."""
    if not getattr(processor, "do_resize", False):
        return None
    size = dict(processor.size)
    if "height" not in size:
        raise UserError(f"the image processor resizes by {size}: only a fixed height and width can be evaluated")
    return size["height"], size["width"]


@torch.no_grad()
def native_logits(
    model: PreTrainedModel, pixel_values: Tensor, sizes: Sequence[Size], views: Views = PLAIN
) -> Iterator[Tensor]:
    """What a network says of images, for ``upsampled.argmax`` and its like to take to the images' own resolution.

    The plain view goes through the network as one batch and gives the network's own logits. Otherwise images are taken
    one by one, and all that is kept of a view is added in place, in float32: memory grows with neither the windows,
    nor the views, nor the images.

    Windows of one view are averaged as logits, weighted so that they give way to one another smoothly: at the network's
    stride where windows and image lie on its grid, else at the image's size. Several scales or mirror images are
    averaged as probabilities at the size wanted, and the result is the logarithm of their mean, as mmsegmentation has
    both.

    Args:
        model: in evaluation mode.
        pixel_values: ``float[B, 3, h, w]``, normalised, on the model's device; of any type.
        sizes: height and width wanted of each image, B of them.
        views: what is averaged; scales and windows are counted in pixels of ``pixel_values``.

    Yields:
        ``float[1, C, h', w']``, image by image: of one view the logits at the network's or the image's resolution, of
        several ``float32`` logarithms of probabilities at the size wanted.
    """
    pixel_values = pixel_values.float()
    if views.plain:
        yield from _logits(model, pixel_values).split(1)
        return
    for image, size in zip(pixel_values.split(1), sizes, strict=True):
        yield _mean_of_views(model, image, size, views)


def _logits(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    # The network's own type: of float16 weights and float32 pixels torch makes nothing.
    return model(pixel_values=pixel_values.to(next(model.parameters()).dtype)).logits


def _mean_of_views(model: PreTrainedModel, image: Tensor, size: Size, views: Views) -> Tensor:
    """See ``native_logits``: one image ``float32[1, 3, h, w]``."""
    flips = (False, True) if views.flip else (False,)
    count, total = len(views.scales) * len(flips), None
    for scale in views.scales:
        scaled = image
        if scale != 1:
            size_there = scaled_size(tuple(image.shape[-2:]), scale)
            scaled = F.interpolate(image, size_there, mode="bilinear", antialias=True)
        for flipped in flips:
            logits = _slide(model, scaled.flip(-1) if flipped else scaled, views)
            if count == 1:
                return logits
            if total is None:
                total = torch.zeros(logits.shape[1], *size, device=logits.device)
            add_softmax(logits[0].flip(-1) if flipped else logits[0], total, 1 / count)
            del logits  # not needed while the next view goes through the network
    return total.clamp_(min=torch.finfo(total.dtype).tiny).log_()[None]


def _slide(model: PreTrainedModel, image: Tensor, views: Views) -> Tensor:
    """One view: ``float32[1, 3, h, w]`` -> logits ``[1, C, h', w']`` at the network's stride, or ``[1, C, h, w]``."""
    if views.window is None:
        return _logits(model, image)
    axes = views.axes(tuple(image.shape[-2:]))
    (height, width), places = (axis.window for axis in axes), list(product(*(axis.starts for axis in axes)))
    canvas = None
    for first in range(0, len(places), views.batch_size):
        some = places[first : first + views.batch_size]
        windows = torch.cat([image[..., y : y + height, x : x + width] for y, x in some])
        logits = _logits(model, windows).float()  # [windows, C, h'', w'']
        canvas = canvas or _Canvas(axes, logits)
        for place, part in zip(some, logits, strict=True):
            canvas.add(place, part)
    return canvas.logits[None]


class _Canvas:
    """The weighted mean of windows, in the making.

    Args:
        axes: where the windows lie in the image.
        first: logits of some of them, ``[N, C, h, w]``: they show the network's stride.
    """

    def __init__(self, axes: tuple[Axis, Axis], first: Tensor) -> None:
        strides = [axis.window // side for axis, side in zip(axes, first.shape[2:], strict=True)]
        pairs = list(zip(axes, strides, strict=True))
        whole = first.shape[2:] == tuple(axis.window // stride for axis, stride in pairs)
        aligned = whole and all(axis.fits(stride) for axis, stride in pairs)
        self.strides = strides if aligned else [1, 1]
        self.rows, self.columns = (axis.coarse(stride) for axis, stride in zip(axes, self.strides, strict=True))
        self.row_shares, self.column_shares = (axis.shares(first.device) for axis in (self.rows, self.columns))
        self.logits = first.new_zeros(first.shape[1], self.rows.side, self.columns.side)

    def add(self, place: tuple[int, int], part: Tensor) -> None:
        """Adds the logits ``[C, h, w]`` of the window that begins there in the image."""
        window = self.rows.window, self.columns.window
        if part.shape[1:] != window:
            part = F.interpolate(part[None], window, mode="bilinear", align_corners=False)[0]
        top, left = (start // stride for start, stride in zip(place, self.strides, strict=True))
        row = self.row_shares[self.rows.starts.index(top)]
        column = self.column_shares[self.columns.starts.index(left)]
        under = self.logits[:, top : top + window[0], left : left + window[1]]
        under.addcmul_(part, row[:, None] * column)


@torch.no_grad()
def predict(model: PreTrainedModel, pixel_values: Tensor, size: Size, views: Views = PLAIN) -> Tensor:
    """The best class of every pixel at a given resolution.

    Args:
        model: in evaluation mode.
        pixel_values: ``float[B, 3, h, w]``, normalised, on the model's device.
        size: height and width wanted.
        views: what is averaged, see ``native_logits``.

    Returns:
        ``uint8[B, *size]``, train ids 0..18.
    """
    sizes = [size] * len(pixel_values)
    return torch.cat([argmax(logits, size) for logits in native_logits(model, pixel_values, sizes, views)])


def segment(model: PreTrainedModel, processor: Any, image: np.ndarray, views: Views = PLAIN) -> np.ndarray:
    """Segments one image at its own resolution.

    Args:
        model, processor: as ``load_model_folder`` gives them.
        image: ``uint8[H, W, 3]``, RGB.
        views: what is averaged, see ``native_logits``.

    Returns:
        ``uint8[H, W]``, train ids 0..18.
    """
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)  # [H, W, 3] -> [3, H, W]
    size = processor_size(processor) or image.shape[:2]
    pixel_values = normalize(resize_image(pixels, size))[None].to(model.device)
    return predict(model, pixel_values, image.shape[:2], views)[0].cpu().numpy()
