"""Judging a network on a split. The same code serves training, testing and the command line."""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from cityseg_hf.data.loading import EvalBatches, SegmentationDataset, make_loader, raise_errors, to_device
from cityseg_hf.data.transforms import normalize
from cityseg_hf.inference import native_logits
from cityseg_hf.losses import count_valid
from cityseg_hf.metrics import Scores, SegmentationCounts
from cityseg_hf.upsampled import argmax_and_loss
from cityseg_hf.views import PLAIN, Views


def evaluation_loader(dataset: SegmentationDataset, *, batch_size: int, num_workers: int) -> DataLoader:
    """This process's share of a split: over all processes, each image once."""
    state = PartialState()
    batches = EvalBatches(len(dataset), batch_size=batch_size, rank=state.process_index, world=state.num_processes)
    return make_loader(dataset, batches, num_workers=num_workers, pin_memory=state.device.type == "cuda")


def evaluate(model: PreTrainedModel, loader: DataLoader, *, title: str = "evaluate", views: Views = PLAIN) -> Scores:
    """Yields the scores of a network over a split, summed over all processes.

    The network runs in its own precision, without autocast, so that a reloaded model gets the scores its run got. Each
    prediction is judged at its label's own resolution; logits are never held at that size.

    Args:
        model: on its device; left in evaluation mode.
        loader: from ``evaluation_loader``.
        title: what the progress bar says.
        views: which views of an image are averaged.
    """
    counts = count(model, loader, title=title, views=views)
    yield from counts.scores()


@torch.no_grad()
def count(model: PreTrainedModel, loader: DataLoader, *, title: str, views: Views = PLAIN) -> SegmentationCounts:
    """The summed counts behind ``evaluate``."""
    state = PartialState()
    model.eval()
    device = next(model.parameters()).device
    counts = SegmentationCounts(device)
    with tqdm(total=len(loader), desc=title, disable=not state.is_main_process, leave=False) as bar:
        for batch in raise_errors(loader):
            _count_batch(model, to_device(batch, device), counts, views)
            bar.update()
    if state.num_processes > 1:
        for mine in counts.tensors():
            mine.copy_(reduce(mine, "sum"))
    return counts


def _count_batch(model: PreTrainedModel, batch: dict[str, Any], counts: SegmentationCounts, views: Views) -> None:
    sizes = [tuple(labels.shape) for labels in batch["labels"]]
    rows = native_logits(model, normalize(batch["pixel_values"]), sizes, views)
    maps = batch.get("instances", [None] * len(sizes))
    for logits, labels, instances in zip(rows, batch["labels"], maps, strict=True):
        predictions, loss = argmax_and_loss(logits, labels[None])  # uint8[1, H, W]
        counts.loss[0] += loss
        counts.loss[1] += count_valid(labels)
        counts.update(predictions[0], labels, instances)
