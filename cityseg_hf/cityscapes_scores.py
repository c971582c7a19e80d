"""The Cityscapes scores as an ``evaluate.Metric`` that loads from this package, without a network:

    evaluate.load(cityseg_hf.EVALUATE_METRIC)

Unlike ``evaluate``'s own ``mean_iou`` it streams: ``add_batch`` counts and forgets, so memory does not grow.
"""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from cityseg_hf.labels import NUM_CLASSES
from cityseg_hf.metrics import SegmentationCounts

_DESCRIPTION = "Mean IoU, Dice, accuracies and category IoU as the Cityscapes benchmark defines them, from train ids."
_INPUTS = """
Args:
    predictions: maps of train ids 0..18, each [H, W], or one array [B, H, W].
    references: likewise; 255 is void.

Returns:
    miou, iou/<class>, dice, dice/<class>, mean_accuracy, accuracy/<class>, pixel_accuracy, category_iou,
    category_iou/<category>: fractions in 0..1, None where a class has neither label nor prediction.
"""
_CITATION = "Cordts et al., The Cityscapes Dataset for Semantic Urban Scene Understanding, CVPR 2016"


class CityscapesScores(evaluate.Metric):
    """Streams predictions into integer counts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counts = SegmentationCounts()

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("uint8")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": maps, "references": maps}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Counts a batch of maps, each ``[H, W]``; sizes may differ from map to map."""
        if kwargs:
            raise ValueError(f"unknown inputs {sorted(kwargs)}: give predictions and references")
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions but {len(references)} references")
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Counts one pair of maps ``[H, W]``."""
        # numpy takes lists, arrays and CPU tensors alike
        prediction, reference = (np.array(value, dtype=np.int64) for value in (prediction, reference))
        if prediction.size and not 0 <= prediction.min() <= prediction.max() < NUM_CLASSES:
            found = f"{prediction.min()}..{prediction.max()}"
            raise ValueError(f"predictions must be train ids 0..{NUM_CLASSES - 1}, got {found}: are they labelIds?")
        self.counts.update(torch.from_numpy(prediction), torch.from_numpy(reference))

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float | None]:
        """The scores of everything added, and of the maps given here; starts anew."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references, **kwargs)
        scores = dict(self.counts.scores())
        self.counts = SegmentationCounts()
        return scores
