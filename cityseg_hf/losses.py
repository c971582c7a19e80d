"""Losses as sums over pixels, so that the mean over a global batch is exact however it is cut up."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cityseg_hf.labels import IGNORE
from cityseg_hf.models.keyed_dropout import key_dropout
from cityseg_hf.upsampled import cross_entropy_sum


def count_valid(labels: Tensor) -> Tensor:
    """How many pixels count: ``int64`` scalar on the labels' device."""
    return (labels != IGNORE).sum()


def class_weights(pixels: Tensor, kind: Literal["enet", "enet_sqrt"] = "enet") -> Tensor:
    """Weights that make rare classes heard: ``1 / ln(1.02 + share)`` (Paszke et al., *ENet*, 2016, section 5.1).

    They lie between 1.4 and 50.5: a class that fills a third of the images weighs 3.3, one of a thousandth 48. With
    such weights rare classes are found, and found too often: ``enet_sqrt``, their square roots, costs less precision.

    Args:
        pixels: ``int64[C]``, how many pixels of each class the training labels hold.
        kind: which of the two.

    Returns:
        ``float32[C]``.
    """
    share = pixels.double() / pixels.sum().clamp(min=1)
    weights = 1 / torch.log(1.02 + share)
    return (weights.sqrt() if kind == "enet_sqrt" else weights).float()


def label_mass(labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """What a summed loss is divided by for its mean: the valid pixels, each with its class's weight.

    Returns:
        ``float32`` scalar on the labels' device.
    """
    if weights is None:
        return count_valid(labels).float()
    by_value = F.pad(weights, (0, IGNORE + 1 - len(weights)))  # void weighs nothing
    return by_value.to(labels.device).index_select(0, labels.flatten().int()).sum()


class Criterion(nn.Module):
    """Network and loss in one module.

    This is what Accelerate wraps (data parallelism, autocast), so the network inside stays as it is: validation runs it
    in its own precision and on shards of unequal length.

    Args:
        network: anything whose output has ``logits``, and perhaps ``auxiliary_logits``. Its dropout is made a function
            of the sample (``models.keyed_dropout``).
        auxiliary_weight: weight of the loss of the auxiliary logits.
        weights: ``float32[C]``, one for each class; 1 without.
        compiled: the loss in one kernel (``upsampled.cross_entropy_sum``).
    """

    def __init__(
        self, network: nn.Module, auxiliary_weight: float, weights: Tensor | None = None, *, compiled: bool = False
    ) -> None:
        super().__init__()
        self.network, self.auxiliary_weight, self.compiled = network, auxiliary_weight, compiled
        self.register_buffer("weights", weights, persistent=False)
        self.randomness = key_dropout(network)

    def forward(self, pixel_values: Tensor, labels: Tensor, keys: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """``float[B, 3, H, W]``, labels ``integer[B, H, W]``, B keys -> summed loss, ``float[B, 19, h, w]``."""
        self.randomness.begin(keys)
        outputs = self.network(pixel_values=pixel_values)
        loss = cross_entropy_sum(outputs.logits, labels, self.weights, compiled=self.compiled)
        auxiliary = getattr(outputs, "auxiliary_logits", None)
        if auxiliary is not None:
            loss = loss + self.auxiliary_weight * cross_entropy_sum(
                auxiliary, labels, self.weights, compiled=self.compiled
            )
        return loss, outputs.logits.detach()
