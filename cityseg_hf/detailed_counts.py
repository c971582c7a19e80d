"""The scores beside the benchmark's: contours, calibration, and the mean over images. All add up over images."""

import numpy as np
import torch
from torch import Tensor

from cityseg_hf.boundaries import boundary_counts
from cityseg_hf.labels import CLASS_NAMES, IGNORE, NUM_CLASSES
from cityseg_hf.metrics import Scores, SegmentationCounts, named, ratio

CONFIDENCE_BINS = 15
"""Bins of equal width that the calibration error looks at: those of Guo et al."""


class DetailedCounts(SegmentationCounts):
    """``SegmentationCounts`` that also yield

    - ``boundary_iou`` and ``boundary_iou/<class>``: intersection over union of the strips along contours
      (``boundaries.py``), summed over images as the IoU is;
    - ``image_miou``: the mean over images of the mIoU of the classes that are in an image or predicted there;
    - ``calibration_error``: the expected calibration error over all labelled pixels (Guo et al., *On Calibration of
      Modern Neural Networks*, 2017, equation 3), the sum over bins of confidence of ``|hits - confidence|``, as a share
      of the pixels.

    Attributes:
        boundary: ``int64[3, 19]``, see ``boundary_counts``.
        calibration: ``float64[15, 3]``: per bin the pixels, the sum of their confidences and how many are right.
        image_miou: ``float64[2]``: sum, and number of images with a labelled pixel.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.boundary = torch.zeros(3, NUM_CLASSES, dtype=torch.int64, device=device)
        self.calibration = torch.zeros(CONFIDENCE_BINS, 3, dtype=self.loss.dtype, device=device)
        self.image_miou = torch.zeros(2, dtype=self.loss.dtype, device=device)

    def tensors(self) -> tuple[Tensor, ...]:
        return *super().tensors(), self.boundary, self.calibration, self.image_miou

    def update(
        self,
        predictions: Tensor,
        labels: Tensor,
        instances: Tensor | None = None,
        confidence: Tensor | None = None,
    ) -> None:
        """Counts one image.

        Args:
            predictions: ``uint8[H, W]``, train ids 0..18.
            labels: ``uint8[H, W]``, train ids and ``IGNORE``.
            instances: ``int32[H, W]``, raw ``instanceIds``.
            confidence: ``float32[H, W]``, 0..1: the probability of the predicted class.
        """
        before = self.confusion.clone()
        super().update(predictions, labels, instances)
        miou = _miou(self.confusion - before)
        self.image_miou += torch.stack([miou.nan_to_num(), (~miou.isnan()).to(miou.dtype)])
        self.boundary += boundary_counts(predictions, labels)
        if confidence is not None:
            self.calibration += calibration_counts(predictions, labels, confidence).to(self.calibration)

    def vector(self) -> Tensor:
        """All counts in one: ``float64[D]``, exact, as integers are up to 2^53."""
        return torch.cat([counts.flatten().to(self.loss.dtype) for counts in self.tensors()])

    @classmethod
    def of(cls, vector: np.ndarray) -> "DetailedCounts":
        """The inverse of ``vector``, on the CPU."""
        counts, place = cls(), 0
        for mine in counts.tensors():
            part = torch.from_numpy(vector[place : place + mine.numel()])
            mine.copy_(part.reshape(mine.shape))
            place += mine.numel()
        return counts

    def scores(self) -> Scores:
        yield from super().scores()
        right, labelled, predicted = self.boundary.cpu().double()
        yield from named("boundary_iou", CLASS_NAMES, ratio(right, labelled + predicted - right))
        total, images = self.image_miou.cpu()
        yield "image_miou", ratio(total[None], images[None])[0]
        pixels, confidence, hits = self.calibration.cpu().double().T
        if pixels.sum():
            yield "calibration_error", ((hits - confidence).abs().sum() / pixels.sum()).item()


def _miou(confusion: Tensor) -> Tensor:
    """The mean IoU of one image without waiting for its numbers: NaN where nothing is labelled."""
    confusion = confusion.to(torch.float32 if confusion.device.type == "mps" else torch.float64)
    right = confusion.diag()
    return (right / (confusion.sum(0) + confusion.sum(1) - right)).nanmean()


def calibration_counts(predictions: Tensor, labels: Tensor, confidence: Tensor) -> Tensor:
    """``float64[15, 3]`` of one image, see ``DetailedCounts``; void pixels do not count.

    Bin m holds confidences of (m / 15, (m + 1) / 15], as the paper has it.
    """
    confidence = confidence.flatten().to(torch.float32 if confidence.device.type == "mps" else torch.float64)
    predictions, labels = predictions.flatten(), labels.flatten()
    bins = (confidence * CONFIDENCE_BINS).ceil_().long().sub_(1).clamp_(0, CONFIDENCE_BINS - 1)
    bins = torch.where(labels == IGNORE, CONFIDENCE_BINS, bins)  # void has a bin of its own, which is left out
    counts = confidence.new_zeros(3, CONFIDENCE_BINS + 1)
    hits = (predictions == labels).to(counts.dtype)
    for row, values in zip(counts, (torch.ones_like(hits), confidence, hits), strict=True):
        row.scatter_add_(0, bins, values)
    return counts[:, :CONFIDENCE_BINS].T
