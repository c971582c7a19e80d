"""Configuration of ``UNetForSemanticSegmentation``."""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig


class UNetConfig(PretrainedConfig):
    """The shape of a UNet.

    Args:
        num_channels: channels of the input.
        hidden_sizes: width of each level, from full resolution down; the last one is the bottleneck. Each level halves
            the resolution.
        norm: what follows each 3x3 convolution: ``"batch"``, ``"group"`` (32 groups; independent of the batch) or
            ``"none"`` (as Ronneberger et al. published it).
        semantic_loss_ignore_index: label that is left out of the loss.
    """

    model_type = "cityseg_unet"

    def __init__(
        self,
        num_channels: int = 3,
        hidden_sizes: Sequence[int] = (64, 128, 256, 512, 1024),
        norm: str = "batch",
        semantic_loss_ignore_index: int = 255,
        **kwargs: Any,
    ) -> None:
        if norm not in ("batch", "group", "none"):
            raise ValueError(f"norm must be batch, group or none, got {norm!r}")
        self.num_channels = num_channels
        self.hidden_sizes = list(hidden_sizes)
        self.norm = norm
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        super().__init__(**kwargs)
