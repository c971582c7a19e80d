"""The scores of the Cityscapes benchmark, from integer counts that add up over images and processes.

``cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling`` is the oracle: the tests compare integer for integer.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cityseg_hf.labels import (
    CATEGORY_NAMES,
    CLASS_NAMES,
    NUM_CLASSES,
    TRAIN_ID_TO_CATEGORY,
    TRAIN_LABELS,
)

INSTANCE_CLASSES: tuple[int, ...] = tuple(label.train_id for label in TRAIN_LABELS if label.has_instances)
"""Train ids of the eight classes that iIoU is defined for: person, rider and the vehicles."""

INSTANCE_CATEGORIES: tuple[str, ...] = tuple(
    name for name in CATEGORY_NAMES if all(label.has_instances for label in TRAIN_LABELS if label.category == name)
)
"""Categories whose classes all have instances: human and vehicle."""

MEAN_INSTANCE_SIZE: dict[str, float] = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}
"""Mean instance size in pixels over the Cityscapes training set, as the benchmark weights with."""

PIECE = 2**17
"""Pixels counted at a time on a CPU: what is made of them stays in the cache."""

Scores = Iterator[tuple[str, float | None]]
"""``(name, value)`` pairs; ``None`` where a score does not exist."""


class SegmentationCounts:
    """Everything the scores need, streamed: memory does not grow with the number of images.

    Args:
        device: where to count; predictions and labels must be there.

    Attributes:
        confusion: ``int64[19, 19]``, rows are labels, columns predictions.
        instances: ``float64[19, 4]``: per class the pixels of its instances that are right and wrong as a class, then
            as a category, each weighted by mean size / size (Cordts et al., 2016, section 4.1).
        loss: ``float64[2]``: sum of the cross-entropy, number of pixels.
        images: how many images were counted, and how many of them had an instance map.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.confusion = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64, device=device)
        # Apple's GPUs have no float64.
        real = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.instances = torch.zeros(NUM_CLASSES, 4, dtype=real, device=device)
        self.loss = torch.zeros(2, dtype=real, device=device)
        self.images = torch.zeros(2, dtype=torch.int64, device=device)
        self._category = torch.from_numpy(TRAIN_ID_TO_CATEGORY).to(device)

    def tensors(self) -> tuple[Tensor, ...]:
        """The counts, for summing over processes."""
        return self.confusion, self.instances, self.loss, self.images

    def update(self, predictions: Tensor, labels: Tensor, instances: Tensor | None = None) -> None:
        """Counts one image or batch.

        Args:
            predictions: ``integer[..., H, W]``, train ids 0..18.
            labels: ``integer[..., H, W]``, train ids; values outside 0..18 are void.
            instances: ``int32[H, W]``, raw ``instanceIds``, for a single image.
        """
        if predictions.shape != labels.shape:
            raise ValueError(f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} differ in size")
        self.confusion += confusion_matrix(predictions, labels)
        self.images[0] += 1 if labels.ndim == 2 else labels.shape[0]
        if instances is not None:
            self.images[1] += 1
            self._update_instances(predictions, instances)

    def _update_instances(self, predictions: Tensor, instances: Tensor) -> None:
        found, inverse = torch.unique(instances, return_inverse=True)  # int32[N], int64[H, W]
        label_ids = found // 1000
        sizes = torch.bincount(inverse.flatten(), minlength=len(found))
        # Per class: which instances are of it, and where it was predicted. Eight small sums, no loop over instances.
        for train_id in INSTANCE_CLASSES:
            label = TRAIN_LABELS[train_id]
            chosen = (found > 1000) & (label_ids == label.id)
            weights = torch.where(chosen, MEAN_INSTANCE_SIZE[label.name] / sizes.to(self.instances.dtype), 0.0)
            right = predictions == train_id
            in_category = self._category[predictions.long()] == self._category[train_id]
            for column, hit in ((0, right), (2, in_category)):
                hits = torch.bincount(inverse[hit], minlength=len(found))
                self.instances[train_id, column] += (hits * weights).sum()
                self.instances[train_id, column + 1] += ((sizes - hits) * weights).sum()

    def scores(self) -> Scores:
        """Yields every score of the contract; a class with neither label nor prediction is ``None``."""
        confusion = self.confusion.cpu().double()
        loss, pixels = self.loss.tolist()
        if pixels:
            yield "loss", loss / pixels
        yield from class_scores(confusion)
        yield from _category_scores(confusion)
        if int(self.images[1]) == int(self.images[0]) > 0:
            yield from _instance_scores(confusion, self.instances.cpu().double())


def confusion_matrix(predictions: Tensor, labels: Tensor) -> Tensor:
    """``int64[19, 19]`` of two maps of train ids; pixels whose label is void do not count."""
    bins = NUM_CLASSES**2
    predictions, labels = predictions.flatten(), labels.flatten()
    if predictions.is_cuda:  # bincount waits for the largest value there; sums of integers are exact in any order
        pairs = _pairs(predictions, labels).long()
        counts = torch.zeros(bins + NUM_CLASSES, dtype=torch.int64, device=pairs.device)
        counts.scatter_add_(0, pairs, torch.ones_like(pairs))
    else:
        parts = zip(predictions.split(PIECE), labels.split(PIECE), strict=True)
        counts = sum(torch.bincount(_pairs(*part), minlength=bins + NUM_CLASSES) for part in parts)
    return counts[:bins].reshape(NUM_CLASSES, NUM_CLASSES)


def _pairs(predictions: Tensor, labels: Tensor) -> Tensor:
    """Number of row and column of each pixel in one: ``integer[N]`` twice -> ``int16[N]``, 19 * 19 and more for void.

    Void goes into a row of its own: picking the valid pixels would make the host wait for their number.
    """
    if labels.dtype == torch.uint8:
        rows = labels.clamp(max=NUM_CLASSES)
    else:
        rows = torch.where((labels >= 0) & (labels < NUM_CLASSES), labels, NUM_CLASSES)
    return rows.to(torch.int16).mul_(NUM_CLASSES).add_(predictions)


def ratio(numerator: Tensor, denominator: Tensor) -> list[float | None]:
    """The quotients of two vectors; ``None`` where there is nothing to divide by."""
    pairs = zip(numerator.tolist(), denominator.tolist(), strict=True)
    return [top / bottom if bottom else None for top, bottom in pairs]


def mean(values: list[float | None]) -> float | None:
    """The mean of the values that exist."""
    existing = [value for value in values if value is not None]
    return sum(existing) / len(existing) if existing else None


def named(name: str, parts: tuple[str, ...], values: list[float | None], each: str | None = None) -> Scores:
    """The mean of some values under a name, then each of them under ``<name or each>/<part>``."""
    yield name, mean(values)
    for part, value in zip(parts, values, strict=True):
        yield f"{each or name}/{part}", value


def class_scores(confusion: Tensor) -> Scores:
    """``miou``, ``iou/<class>``, ``dice``, ``mean_accuracy`` and ``pixel_accuracy`` of a ``[19, 19]`` matrix."""
    confusion = confusion.double()
    right, labelled, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    union = labelled + predicted - right
    yield from named("miou", CLASS_NAMES, ratio(right, union), each="iou")
    yield from named("dice", CLASS_NAMES, ratio(2 * right, labelled + predicted))
    # A class that was only predicted has no recall: left out, as in the field.
    yield from named("mean_accuracy", CLASS_NAMES, ratio(right, labelled), each="accuracy")
    yield "pixel_accuracy", ratio(right.sum()[None], confusion.sum()[None])[0]


def _category_scores(confusion: Tensor) -> Scores:
    # [19, 19] -> [7, 7]: confusion within a category is no error.
    member = torch.nn.functional.one_hot(torch.from_numpy(TRAIN_ID_TO_CATEGORY)).double()  # [19, 7]
    grouped = member.T @ confusion @ member
    right = grouped.diag()
    yield from named("category_iou", CATEGORY_NAMES, ratio(right, grouped.sum(1) + grouped.sum(0) - right))


def _instance_scores(confusion: Tensor, instances: Tensor) -> Scores:
    # False positives belong to no instance: they count as plain pixels, as the benchmark has it.
    wrong = confusion.sum(0) - confusion.diag()
    chosen = list(INSTANCE_CLASSES)
    right, missed = instances[chosen, 0], instances[chosen, 1]
    names = tuple(CLASS_NAMES[train_id] for train_id in chosen)
    yield from named("iiou", names, ratio(right, right + missed + wrong[chosen]))
    category = torch.from_numpy(TRAIN_ID_TO_CATEGORY)
    ious: list[float | None] = []
    for name in INSTANCE_CATEGORIES:
        inside = category == CATEGORY_NAMES.index(name)
        right, missed = instances[inside, 2].sum(), instances[inside, 3].sum()
        wrong_here = confusion[~inside][:, inside].sum()
        ious += ratio(right[None], (right + missed + wrong_here)[None])
    yield from named("category_iiou", INSTANCE_CATEGORIES, ious)
