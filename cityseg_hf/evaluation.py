"""Judging a network on a split. The same code serves training, testing and the command line."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from cityseg_hf.data.loading import EvalBatches, SegmentationDataset, make_loader, raise_errors, to_device
from cityseg_hf.data.transforms import normalize
from cityseg_hf.detailed_counts import DetailedCounts
from cityseg_hf.inference import native_logits
from cityseg_hf.losses import count_valid
from cityseg_hf.metrics import Scores
from cityseg_hf.upsampled import argmax_and_loss
from cityseg_hf.views import PLAIN, Views


def evaluation_loader(dataset: SegmentationDataset, *, batch_size: int, num_workers: int) -> DataLoader:
    """This process's share of a split: over all processes, each image once."""
    state = PartialState()
    batches = EvalBatches(len(dataset), batch_size=batch_size, rank=state.process_index, world=state.num_processes)
    return make_loader(dataset, batches, num_workers=num_workers, pin_memory=state.device.type == "cuda")


@dataclass(frozen=True)
class Judgement:
    """What was counted of each image of a split: all scores are functions of sums of it.

    Attributes:
        names: of the images, in the order of the split.
        counts: ``float64[N, D]``, a row of ``DetailedCounts.vector`` each: 4 KB.
    """

    names: list[str]
    counts: np.ndarray

    @cached_property
    def total(self) -> DetailedCounts:
        """The counts of all images."""
        return DetailedCounts.of(self.counts.sum(0))

    def scores(self) -> Scores:
        """The scores of the split."""
        return self.total.scores()

    def record(self) -> dict[str, Any]:
        """For a file: the confusion matrix (rows are labels, columns predictions) and the mIoU of each image."""
        images = {}
        for name, counts in zip(self.names, self.counts, strict=True):
            images[name] = {"miou": dict(DetailedCounts.of(counts).scores())["image_miou"]}
        return {"confusion": self.total.confusion.tolist(), "images": images}


def evaluate(model: PreTrainedModel, loader: DataLoader, *, title: str = "evaluate", views: Views = PLAIN) -> Scores:
    """Yields the scores of ``judge``."""
    yield from judge(model, loader, title=title, views=views).scores()


@torch.no_grad()
def judge(model: PreTrainedModel, loader: DataLoader, *, title: str = "evaluate", views: Views = PLAIN) -> Judgement:
    """Counts what a network says of a split, over all processes.

    The network runs in its own precision, without autocast, so that a reloaded model gets the scores its run got. Each
    prediction is judged at its label's own resolution; logits are never held at that size.

    Args:
        model: on its device; left in evaluation mode.
        loader: from ``evaluation_loader``.
        title: what the progress bar says.
        views: which views of an image are averaged.
    """
    state = PartialState()
    model.eval()
    device = next(model.parameters()).device
    rows: list[tuple[int, Tensor]] = []
    with tqdm(total=len(loader), desc=title, disable=not state.is_main_process, leave=False) as bar:
        for batch in raise_errors(loader):
            indices = [index for _, _, index in batch["key"]]
            rows += zip(indices, _count_batch(model, to_device(batch, device), views), strict=True)
            bar.update()
    table = [(index, row.cpu().double().numpy()) for index, row in rows]
    if state.num_processes > 1:
        table = gather_object(table)
    table.sort(key=lambda row: row[0])
    names = loader.dataset.source.names
    return Judgement([names[index] for index, _ in table], np.stack([row for _, row in table]))


def _count_batch(model: PreTrainedModel, batch: dict[str, Any], views: Views) -> Iterator[Tensor]:
    """The counts of each image of a batch, ``float64[D]`` on the device: the host need not wait for them."""
    sizes = [tuple(labels.shape) for labels in batch["labels"]]
    rows = native_logits(model, normalize(batch["pixel_values"]), sizes, views)
    maps = batch.get("instances", [None] * len(sizes))
    for logits, labels, instances in zip(rows, batch["labels"], maps, strict=True):
        counts = DetailedCounts(labels.device)
        confidence = torch.empty(1, *labels.shape, device=labels.device)
        predictions, loss = argmax_and_loss(logits, labels[None], confidence=confidence)  # uint8[1, H, W]
        counts.loss[0] += loss
        counts.loss[1] += count_valid(labels)
        counts.update(predictions[0], labels, instances, confidence[0])
        yield counts.vector()
