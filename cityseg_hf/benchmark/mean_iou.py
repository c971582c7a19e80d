"""``evaluate``'s ``mean_iou``, which lives on the Hub and cannot be loaded offline, stated again for comparison.

Storage is ``evaluate``'s own: ``add_batch`` encodes every map as an image and keeps it. The arithmetic is that of
``evaluate`` 0.4.6 (``metrics/mean_iou/mean_iou.py``): three histograms over the pixels of each image that are not void.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


class MeanIoU(evaluate.Metric):
    """What ``evaluate.load("mean_iou")`` gives."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()})
        return evaluate.MetricInfo(description="mean IoU", citation="", inputs_description="", features=features)

    def _compute(
        self, predictions: Sequence[Any], references: Sequence[Any], num_labels: int, ignore_index: int
    ) -> dict[str, Any]:
        totals = np.zeros((3, num_labels))
        for prediction, reference in zip(predictions, references, strict=True):
            totals += areas(np.array(prediction), np.array(reference), num_labels, ignore_index)
        intersection, predicted, labelled = totals
        with np.errstate(invalid="ignore"):  # classes that do not occur
            iou = intersection / (predicted + labelled - intersection)
            accuracy = intersection / labelled
        return {
            "mean_iou": np.nanmean(iou),
            "mean_accuracy": np.nanmean(accuracy),
            "overall_accuracy": intersection.sum() / labelled.sum(),
            "per_category_iou": iou,
            "per_category_accuracy": accuracy,
        }


def areas(prediction: np.ndarray, reference: np.ndarray, num_labels: int, ignore_index: int) -> np.ndarray:
    """``int64[3, num_labels]``: pixels of the intersection, of the prediction and of the reference, by class."""
    mask = reference != ignore_index
    prediction, reference = prediction[mask], reference[mask]
    parts = (prediction[prediction == reference], prediction, reference)
    return np.stack([np.histogram(part, bins=num_labels, range=(0, num_labels - 1))[0] for part in parts])
