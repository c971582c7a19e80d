"""What a benchmark is asked for, and what it works with."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cityseg_hf.models import build_model

MODELS: dict[str, tuple[str, dict]] = {
    "unet": ("unet_small", {}),
    "resnet": ("resnet_50", {"dilation": True}),  # what torchvision calls fcn_resnet50
    # For trying the benchmark out, and for its tests.
    "tiny_unet": ("unet_small", {"hidden_sizes": [8, 16]}),
    "tiny_resnet": ("resnet_18", {}),
    "tiny_segformer": (
        "segformer_b0",
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16},
    ),
}
"""Short names of networks: preset and settings. Every other name is a preset's."""


@dataclass(frozen=True)
class Options:
    """Settings of one run.

    Args:
        device: where the networks are.
        folder: an empty folder for what has to lie on disk.
        peers: also measure what the extra ``bench`` installs.
        models: names of ``MODELS`` or of presets.
        size: height and width of the network's input (train, data), or of the image (eval, infer, metric).
        batch_size: images of an optimiser step.
        precisions: ``"no"`` and ``"bf16"``.
        images: numbers of images over which the metrics' memory is measured.
        root: a Cityscapes tree; synthetic streets without it.
    """

    device: torch.device
    folder: Path
    size: tuple[int, int]
    peers: bool = False
    models: tuple[str, ...] = ("segformer_b0",)
    batch_size: int = 2
    precisions: tuple[str, ...] = ("no", "bf16")
    images: tuple[int, ...] = (10, 200)
    root: str | None = None

    def settings(self) -> dict[str, Any]:
        """What of it can be written down."""
        return {**dataclasses.asdict(self), "device": str(self.device), "folder": None}

    def build(self, name: str) -> nn.Module:
        """A network with random weights, the same each time, on the device."""
        torch.manual_seed(0)
        preset, settings = MODELS.get(name, (name, {}))
        return build_model(preset, **settings).to(self.device)

    def autocast(self, precision: str) -> torch.autocast:
        """The context in which accelerate would run a network."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
