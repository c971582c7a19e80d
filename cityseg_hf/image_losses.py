"""Losses that look at a whole image: overlap, its Lovász extension, hard pixels, boundaries.

Void is taken out once, in ``image_losses``; every loss here gets ``float32`` probabilities at the size of the label.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cityseg_hf.labels import IGNORE

FOCUS = 2.0
"""Exponent of the focal loss."""

HARD = 0.7
"""Pixels whose own class is less probable are hard; at least a sixteenth of the image is taken."""

TINY = 1e-6


class Judged(NamedTuple):
    """One image at the size of its label, ready for a loss."""

    log_probabilities: Tensor
    """``float32[C, H, W]``."""
    target: Tensor
    """``long[H, W]``, 0..C - 1; anything where void."""
    valid: Tensor
    """``bool[H, W]``: not void."""
    weight: Tensor
    """``float32[H, W]``: that of the pixel's class, 0 where void."""

    def cross_entropy(self) -> Tensor:
        """``float32[H, W]``, unweighted."""
        return -self.log_probabilities.gather(0, self.target[None])[0]

    def present(self) -> tuple[Tensor, Tensor]:
        """Probabilities ``float32[P, H, W]`` and labels ``float32[P, H, W]`` of the classes in the label; 0 at void."""
        classes = self.target[self.valid].unique()
        labels = (self.target == classes[:, None, None]) & self.valid
        return self.log_probabilities[classes].exp() * self.valid, labels.to(self.log_probabilities.dtype)


def focal(image: Judged) -> Tensor:
    """Mean of ``-(1 - p)^2 log p`` (Lin et al., *Focal Loss*, 2017, equation 4), each class with its weight."""
    loss = image.cross_entropy()
    # 1 - p with more digits than by subtraction, where p is next to 1.
    hardness = -torch.expm1(-loss)
    return (hardness**FOCUS * loss * image.weight).sum() / image.weight.sum().clamp(min=TINY)


def ohem(image: Judged) -> Tensor:
    """Mean cross-entropy of the hard pixels of an image (Shrivastava et al., *OHEM*, 2016, by pixels)."""
    loss = image.cross_entropy()
    with torch.no_grad():
        losses = loss[image.valid]
        floor = -torch.log(loss.new_tensor(HARD))
        if losses.numel():
            floor = torch.minimum(floor, losses.topk(-(-losses.numel() // 16)).values[-1])
        weight = image.weight * (loss >= floor)
    return (loss * weight).sum() / weight.sum().clamp(min=TINY)


def dice(image: Judged) -> Tensor:
    """``1 - 2 sum(p g) / (sum(p^2) + sum(g^2))`` (Milletari et al., *V-Net*, 2016), mean of the classes."""
    probabilities, labels = (part.flatten(1) for part in image.present())  # [P, H * W]
    overlap = 2 * (probabilities * labels).sum(1) / ((probabilities**2).sum(1) + labels.sum(1)).clamp(min=TINY)
    return _mean(1 - overlap)


def lovasz(image: Judged) -> Tensor:
    """Lovász-softmax (Berman et al., 2018, equations 9 and 12): mean over the classes present in the image.

    What it extends is one minus the intersection over union, so that it trains what is judged.
    """
    probabilities, labels = (part.flatten(1) for part in image.present())  # [P, H * W]
    # Void has no error, and comes last: it changes nothing for the others.
    errors, order = (labels - probabilities).abs().sort(dim=1, descending=True)
    return _mean((errors * _jaccard_slope(labels.gather(1, order))).sum(1))


@torch.no_grad()
def _jaccard_slope(labels: Tensor) -> Tensor:
    """How much each pixel adds to the Jaccard loss when those before it are wrong already (ibid., algorithm 1).

    Args:
        labels: ``float32[P, N]`` of 0 and 1, by falling error.

    Returns:
        ``float32[P, N]``.
    """
    in_all = labels.sum(1, keepdim=True)
    # Whole numbers: float32 is exact up to 16 million pixels.
    intersection = in_all - labels.cumsum(1)
    union = in_all + (1 - labels).cumsum(1)
    jaccard = 1 - intersection / union.clamp(min=1)
    return torch.diff(jaccard, prepend=torch.zeros_like(in_all))


def boundary(image: Judged) -> Tensor:
    """One minus the boundaries' F1 score (Bokhovkin and Burnaev, *Boundary Loss*, 2019, equations 1 to 6).

    A boundary is a pixel with another class within one pixel; it is found where the other map has one within two.
    Pixels beside void are left out. Mean over the classes present.
    """
    probabilities, labels = image.present()  # [P, H, W]
    inside = 1 - _widest((~image.valid).float()[None], 1)  # [1, H, W]
    ours, theirs = (((_widest(1 - part, 1) - (1 - part)) * inside) for part in (probabilities, labels))
    precision = (ours * _widest(theirs, 2)).sum((1, 2)) / ours.sum((1, 2)).clamp(min=TINY)
    recall = (theirs * _widest(ours, 2)).sum((1, 2)) / theirs.sum((1, 2)).clamp(min=TINY)
    score = 2 * precision * recall / (precision + recall).clamp(min=TINY)
    has_boundary = theirs.sum((1, 2)) > 0
    return _mean((1 - score)[has_boundary])


def _widest(maps: Tensor, radius: int) -> Tensor:
    """The largest value within a square: ``float[P, H, W]``."""
    return F.max_pool2d(maps[:, None], 2 * radius + 1, stride=1, padding=radius)[:, 0]


def _mean(values: Tensor) -> Tensor:
    """Of none, 0 with a gradient of 0."""
    return values.sum() / max(1, len(values))


IMAGE_LOSSES: dict[str, Callable[[Judged], Tensor]] = {
    "focal": focal,
    "ohem": ohem,
    "dice": dice,
    "lovasz": lovasz,
    "boundary": boundary,
}


def image_loss_sum(logits: Tensor, labels: Tensor, shares: Mapping[str, float], weights: Tensor | None) -> Tensor:
    """Losses of whole images, added up; each image counts as much as its labelled pixels weigh.

    So the mean over a global batch is exact however it is cut up: images are never mixed. Memory is that of one image.

    Args:
        logits: ``float[B, C, h, w]``, upsampled to the size of the labels (bilinear, corners not aligned).
        labels: ``uint8`` or ``long[B, H, W]``, 255 is void.
        shares: how much each of ``IMAGE_LOSSES`` counts, by name.
        weights: ``float32[C]`` of the classes, for the losses that are means over pixels; 1 without.

    Returns:
        ``float32`` scalar, differentiable once by the logits.
    """
    return _ByImage.apply(logits, labels, shares, weights)


class _ByImage(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits: Tensor,
        labels: Tensor,
        shares: Mapping[str, float],
        weights: Tensor | None,
    ) -> Tensor:
        """See ``image_loss_sum``. The gradient is taken here, image by image, before the next one needs the memory."""
        gradient, wanted = torch.empty_like(logits), ctx.needs_input_grad[0]
        exact = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=logits.device)
        for image, label, mine in zip(logits.detach().unbind(), labels, gradient, strict=True):
            with torch.set_grad_enabled(wanted), torch.autocast(logits.device.type, enabled=False):
                coarse = image.to(exact).requires_grad_(wanted)
                loss = _loss_of(coarse, label, shares, weights)
                if wanted:
                    mine.copy_(torch.autograd.grad(loss, coarse)[0])
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(gradient.dtype), None, None, None


def _loss_of(logits: Tensor, label: Tensor, shares: Mapping[str, float], weights: Tensor | None) -> Tensor:
    """The weighted sum of one image's losses, times the weight of its pixels: ``float[C, h, w]``, ``[H, W]``."""
    scores = F.interpolate(logits[None], tuple(label.shape), mode="bilinear", align_corners=False)[0]  # [C, H, W]
    valid, target = label != IGNORE, label.long().clamp(max=len(logits) - 1)
    weight = valid.to(logits.dtype)
    if weights is not None:
        weight = weight * weights.to(logits.dtype)[target]
    image = Judged(scores.log_softmax(0), target, valid, weight)
    return weight.sum() * sum(share * IMAGE_LOSSES[name](image) for name, share in shares.items())
