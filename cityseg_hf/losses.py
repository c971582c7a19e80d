"""Losses as sums over pixels, so that the mean over a global batch is exact however it is cut up."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cityseg_hf.labels import IGNORE
from cityseg_hf.models.keyed_dropout import key_dropout


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits ``[B, C, h, w]`` at the labels' resolution: ``float32[B, C, H, W]``, bilinear, corners not aligned."""
    if logits.shape[-2:] == size:
        return logits.float()
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def cross_entropy_sum(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum of the cross-entropy over all pixels that are not void, at the labels' resolution.

    Args:
        logits: ``float[B, C, h, w]``, any stride.
        labels: ``long[B, H, W]``, train ids and ``IGNORE``.
        weights: ``float32[C]``, one for each class; 1 without.

    Returns:
        ``float32`` scalar; 0, with zero gradients, where every pixel is void.
    """
    scores = upsample(logits, labels.shape[-2:])
    return F.cross_entropy(scores, labels, weight=weights, ignore_index=IGNORE, reduction="sum")


def count_valid(labels: Tensor) -> Tensor:
    """How many pixels count: ``int64`` scalar on the labels' device."""
    return (labels != IGNORE).sum()


def class_weights(pixels: Tensor) -> Tensor:
    """Weights that make rare classes heard: ``1 / ln(1.02 + share)`` (Paszke et al., *ENet*, 2016, section 5.1).

    They lie between 1.4 and 50.5: a class that fills a third of the images weighs 3.3, one of a thousandth 48.

    Args:
        pixels: ``int64[C]``, how many pixels of each class the training labels hold.

    Returns:
        ``float32[C]``.
    """
    share = pixels.double() / pixels.sum().clamp(min=1)
    return (1 / torch.log(1.02 + share)).float()


def label_mass(labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """What a summed loss is divided by for its mean: the valid pixels, each with its class's weight.

    Returns:
        ``float32`` scalar on the labels' device.
    """
    if weights is None:
        return count_valid(labels).float()
    by_value = F.pad(weights, (0, IGNORE + 1 - len(weights)))  # void weighs nothing
    return by_value.to(labels.device)[labels].sum()


class Criterion(nn.Module):
    """Network and loss in one module.

    This is what Accelerate wraps (data parallelism, autocast), so the network inside stays as it is: validation runs it
    in its own precision and on shards of unequal length.

    Args:
        network: anything whose output has ``logits``, and perhaps ``auxiliary_logits``. Its dropout is made a function
            of the sample (``models.keyed_dropout``).
        auxiliary_weight: weight of the loss of the auxiliary logits.
        weights: ``float32[C]``, one for each class; 1 without.
    """

    def __init__(self, network: nn.Module, auxiliary_weight: float, weights: Tensor | None = None) -> None:
        super().__init__()
        self.network, self.auxiliary_weight = network, auxiliary_weight
        self.register_buffer("weights", weights, persistent=False)
        self.randomness = key_dropout(network)

    def forward(self, pixel_values: Tensor, labels: Tensor, keys: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """``float[B, 3, H, W]``, ``long[B, H, W]``, B keys -> summed loss, ``logits float[B, 19, h, w]``."""
        self.randomness.begin(keys)
        outputs = self.network(pixel_values=pixel_values)
        loss = cross_entropy_sum(outputs.logits, labels, self.weights)
        auxiliary = getattr(outputs, "auxiliary_logits", None)
        if auxiliary is not None:
            loss = loss + self.auxiliary_weight * cross_entropy_sum(auxiliary, labels, self.weights)
        return loss, outputs.logits.detach()
