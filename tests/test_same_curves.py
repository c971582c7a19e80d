"""Each optimisation leaves the numbers alone: the losses of 200 steps in float32 agree with it and without it."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import SegformerForSemanticSegmentation as TransformersSegformer

from cityseg_hf import build_model, load_cityscapes, losses, optim
from cityseg_hf.config import DataConfig, OptimConfig
from cityseg_hf.data.augment import TrainTransform
from cityseg_hf.data.loading import SegmentationDataset, TrainBatches, make_loader
from cityseg_hf.data.sources import FileSource
from cityseg_hf.labels import IGNORE

STEPS = 200
SIZE = (64, 128)
NARROW = {
    "segformer_b0": {"hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32},
    "unet_small": {"hidden_sizes": [8, 16, 24]},
}


def batches(streets: Path) -> list[dict]:
    """An epoch's worth of batches of two, flipped and coloured on the way."""
    transform = TrainTransform(DataConfig(augmentation="standard"), SIZE)
    dataset = SegmentationDataset(FileSource(load_cityscapes(streets)["train"]), transform, seed=3)
    loader = make_loader(dataset, TrainBatches(len(dataset), batch_size=2, seed=3, last_step=12), num_workers=0)
    return [
        {**batch, "pixel_values": transform.augment(batch["pixel_values"], batch["labels"], batch["augmentation"])[0]}
        | {"labels": transform.augment(batch["pixel_values"], batch["labels"], batch["augmentation"])[1]}
        for batch in loader
    ]


def curve(model: torch.nn.Module, data: list[dict], memory_format: torch.memory_format) -> np.ndarray:
    """The loss of each step of a training as the loop does it."""
    model.to(memory_format=memory_format)
    criterion = losses.Criterion(model, 0.4).train()
    optimizer = optim.make_optimizer(model, OptimConfig(learning_rate=3e-5))
    found = []
    for step in range(STEPS):
        batch = data[step % len(data)]
        loss, _ = criterion(batch["pixel_values"], batch["labels"], batch["key"])
        loss = loss / losses.count_valid(batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return np.array(found)


def plain_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, compiled: bool = False) -> Tensor:
    scores = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(scores, labels.long(), weight=weights, ignore_index=IGNORE, reduction="sum")


def build(name: str, as_transformers: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(name, **NARROW[name])
    if as_transformers:
        theirs = TransformersSegformer(model.config)
        theirs.load_state_dict(model.state_dict())
        return theirs
    return model


def unfused(*args: object, fused: bool, **kwargs: object) -> torch.optim.Optimizer:
    return ADAMW(*args, foreach=False, **kwargs)


ADAMW = torch.optim.AdamW
WITHOUT: dict[str, Callable] = {
    "the loss in pieces": lambda: mock.patch.object(losses, "cross_entropy_sum", plain_loss),
    "the fused optimiser": lambda: mock.patch.object(torch.optim, "AdamW", unfused),
    "channels last": nullcontext,
    "the folded head": nullcontext,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "optimisation"),
    [
        *(("segformer_b0", what) for what in WITHOUT),
        ("unet_small", "the loss in pieces"),
        ("unet_small", "channels last"),
    ],
)
def test_losses_agree_with_and_without(name: str, optimisation: str, streets: Path) -> None:
    data = batches(streets)
    ours = curve(build(name), data, torch.channels_last)
    with WITHOUT[optimisation]():
        usual = curve(
            build(name, as_transformers=optimisation == "the folded head"),
            data,
            torch.contiguous_format if optimisation == "channels last" else torch.channels_last,
        )
    assert ours[-10:].mean() < 0.99 * ours[:10].mean(), "it learns"
    np.testing.assert_allclose(ours, usual, rtol=1e-4)
