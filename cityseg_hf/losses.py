"""Losses as sums over pixels, so that the mean over a global batch is exact however it is cut up."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cityseg_hf.image_losses import image_loss_sum
from cityseg_hf.labels import IGNORE
from cityseg_hf.models.keyed_dropout import key_dropout
from cityseg_hf.upsampled import cross_entropy_sum


def count_valid(labels: Tensor) -> Tensor:
    """How many pixels count: ``int64`` scalar on the labels' device."""
    return (labels != IGNORE).sum()


ClassWeights = Literal["enet", "enet_sqrt", "inverse", "median", "effective"]


def class_weights(counts: Tensor, kind: ClassWeights) -> Tensor:
    """Weights that make rare classes heard. Only their ratios matter: the loss is divided by their sum over pixels.

    ``enet``: ``1 / ln(1.02 + share)`` (Paszke et al., *ENet*, 2016, section 5.1), between 1.4 and 50.5: a class that
    fills a third of the images weighs 3.3, one of a thousandth 48. Rare classes are found, and found too often.
    ``enet_sqrt``: the square roots of these, which cost less precision.
    ``inverse``: ``1 / share``.
    ``median``: the median of all frequencies over the class's own, which is its share of the images that have it (Eigen
    and Fergus, *Predicting Depth, Surface Normals and Semantic Labels*, 2015, section 6.3).
    ``effective``: ``(1 - b) / (1 - b^n)`` of the n images that have a class, with ``b = (N - 1) / N``, N those of the
    commonest class (Cui et al., *Class-Balanced Loss*, 2019, equation 2).

    Args:
        counts: ``int64[3, C]`` of the training labels, see ``data.sources.class_counts``.
        kind: which of these.

    Returns:
        ``float32[C]``; classes that no label has weigh as those of one pixel, or of one image.
    """
    pixels, images, around = counts.double().clamp(min=1)
    share = pixels / counts[0].sum().clamp(min=1)
    match kind:
        case "enet" | "enet_sqrt":
            weights = 1 / torch.log(1.02 + counts[0] / counts[0].sum().clamp(min=1))
            weights = weights.sqrt() if kind == "enet_sqrt" else weights
        case "inverse":
            weights = 1 / share
        case "median":
            frequency = pixels / around
            weights = frequency[counts[0] > 0].quantile(0.5) / frequency
        case "effective":
            base = 1 - 1 / images.max().clamp(min=2)
            weights = (1 - base) / (1 - base**images)
    return weights.float()


def label_mass(labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """What a summed loss is divided by for its mean: the valid pixels, each with its class's weight.

    Returns:
        ``float32`` scalar on the labels' device.
    """
    if weights is None:
        return count_valid(labels).float()
    by_value = F.pad(weights, (0, IGNORE + 1 - len(weights)))  # void weighs nothing
    return by_value.to(labels.device).index_select(0, labels.flatten().int()).sum()


def loss_sum(
    logits: Tensor,
    labels: Tensor,
    shares: Mapping[str, float],
    weights: Tensor | None = None,
    *,
    compiled: bool = False,
) -> Tensor:
    """A weighted sum of losses over all pixels; divided by ``label_mass`` it is the mean.

    Args:
        logits: ``float[B, C, h, w]``.
        labels: ``uint8`` or ``long[B, H, W]``.
        shares: how much each counts: ``ce``, and those of ``image_losses.IMAGE_LOSSES``.
        weights: ``float32[C]`` of the classes.
        compiled: cross-entropy in one kernel.

    Returns:
        ``float32`` scalar.
    """
    of_images = {name: share for name, share in shares.items() if name != "ce"}
    total = image_loss_sum(logits, labels, of_images, weights) if of_images else 0.0
    if "ce" in shares:
        total = shares["ce"] * cross_entropy_sum(logits, labels, weights, compiled=compiled) + total
    return total


class Criterion(nn.Module):
    """Network and loss in one module.

    This is what Accelerate wraps (data parallelism, autocast), so the network inside stays as it is: validation runs it
    in its own precision and on shards of unequal length.

    Args:
        network: anything whose output has ``logits``, and perhaps ``auxiliary_logits``. Its dropout is made a function
            of the sample (``models.keyed_dropout``).
        auxiliary_weight: weight of the loss of the auxiliary logits.
        weights: ``float32[C]``, one for each class; 1 without.
        shares: what the loss is made of, see ``loss_sum``; cross-entropy without.
        compiled: the loss in one kernel (``upsampled.cross_entropy_sum``).
    """

    def __init__(
        self,
        network: nn.Module,
        auxiliary_weight: float,
        weights: Tensor | None = None,
        *,
        shares: Mapping[str, float] | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.auxiliary_weight, self.compiled = network, auxiliary_weight, compiled
        self.shares = dict(shares or {"ce": 1.0})
        self.register_buffer("weights", weights, persistent=False)
        self.randomness = key_dropout(network)

    def forward(self, pixel_values: Tensor, labels: Tensor, keys: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """``float[B, 3, H, W]``, labels ``integer[B, H, W]``, B keys -> summed loss, ``float[B, 19, h, w]``."""
        self.randomness.begin(keys)
        outputs = self.network(pixel_values=pixel_values)
        loss = loss_sum(outputs.logits, labels, self.shares, self.weights, compiled=self.compiled)
        auxiliary = getattr(outputs, "auxiliary_logits", None)
        if auxiliary is not None:
            auxiliary_loss = loss_sum(auxiliary, labels, self.shares, self.weights, compiled=self.compiled)
            loss = loss + self.auxiliary_weight * auxiliary_loss
        return loss, outputs.logits.detach()
