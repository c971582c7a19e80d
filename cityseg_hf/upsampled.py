"""Coarse logits judged at the labels' resolution, without ever holding them at that size.

Networks answer at a stride of 4, 8 or 32. The usual way blows ``[B, 19, h, w]`` up to the labels' size, walks over it
several times, and is bound by memory. Here it is made and used in pieces that stay in the processor's cache.

Results are those of ``F.interpolate(mode="bilinear")`` followed by ``F.cross_entropy`` or ``argmax``, up to float32's
rounding.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cityseg_hf.labels import IGNORE
from cityseg_hf.pieces import (
    TILE,
    Size,
    add_back,
    along_columns,
    band_pieces,
    bands,
    lerp,
    padded_band,
    phase_factors,
    phase_pieces,
    phases,
    pieces,
    unpad,
    weight_of_step,
)

MIXED_CELLS = 0.4
"""Above this share of cells whose corners disagree, looking at each cell of an image costs more than it saves."""

LossOfPiece = Callable[[Tensor, Tensor, float, Tensor, Tensor], tuple[Tensor, Tensor]]
"""See ``_loss_and_gradient``."""


def cross_entropy_sum(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, compiled: bool = False
) -> Tensor:
    """The sum of the cross-entropy over all pixels that are not void, at the labels' resolution.

    The gradient is computed on the way, so that nothing but a map of the logits' own size is kept for it.

    Args:
        logits: ``float[B, C, h, w]``, any stride.
        labels: ``uint8`` or ``long[B, H, W]``, train ids and ``IGNORE``.
        weights: ``float32[C]``, one for each class; 1 without.
        compiled: makes one kernel of a piece's work, with the compiler that ``torch.compile`` finds (a C++ compiler for
            CPUs, Triton for GPUs).

    Returns:
        ``float32`` scalar; 0, with zero gradients, where every pixel is void. Differentiable once.
    """
    return _CrossEntropySum.apply(logits, labels, weights, _compiled_loss() if compiled else _loss_and_gradient)


@torch.no_grad()
def argmax(logits: Tensor, size: Size) -> Tensor:
    """The best class of every pixel at a given resolution, the first of equals.

    Args:
        logits: ``float[B, C, h, w]``, C of at most 255.
        size: height and width wanted.

    Returns:
        ``uint8[B, *size]``.
    """
    out = torch.empty(len(logits), *size, dtype=torch.uint8, device=logits.device)
    scores = None
    for image, best in zip(logits.unbind(), out, strict=True):
        image = _exact(image).contiguous()
        factors = phase_factors(image, size)
        if logits.is_cpu and factors not in (None, (1, 1)) and _argmax_of_mixed_cells(image, best, factors):
            continue
        for piece in pieces(image, size):
            scores = piece.scores(scores)  # in the memory of the last piece: it is in the cache
            piece.of(best).copy_(_first_best(scores)[0])
    return out


@torch.no_grad()
def argmax_and_loss(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, confidence: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``argmax`` and ``cross_entropy_sum`` at the resolution of the labels, in one pass and without gradients.

    Args:
        logits: ``float[B, C, h, w]``.
        labels: ``uint8`` or ``long[B, H, W]``.
        weights: ``float32[C]``, of the loss.
        confidence: ``float32[B, H, W]``, to be filled with the probability of the best class, 0..1.

    Returns:
        ``uint8[B, H, W]`` and a ``float32`` scalar.
    """
    out = torch.empty_like(labels, dtype=torch.uint8)
    total, scores = _exact(logits.new_zeros(())), None
    sure = [None] * len(labels) if confidence is None else confidence
    for image, label, best, how_sure in zip(logits.unbind(), labels, out, sure, strict=True):
        image = _exact(image).contiguous()
        for piece in pieces(image, tuple(label.shape)):
            scores, mine = piece.scores(scores), piece.of(label)
            found, most = _first_best(scores)
            piece.of(best).copy_(found)
            scores -= most
            picked = scores.gather(0, _target(mine, len(scores))[None])[0]
            mass = scores.exp_().sum(0)
            if how_sure is not None:
                piece.of(how_sure).copy_(mass.reciprocal())
            total += ((mass.log_() - picked) * _weight_of(mine, weights, image.dtype)).sum()
    return out, total


@torch.no_grad()
def argmax_and_confidence(logits: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """``argmax``, and the probability of that class (the softmax's), in one pass.

    Args:
        logits: ``float[B, C, h, w]``, C of at most 255.
        size: height and width wanted.

    Returns:
        ``uint8[B, *size]`` and ``float32[B, *size]``, 0..1.
    """
    out = torch.empty(len(logits), *size, dtype=torch.uint8, device=logits.device)
    confidence = torch.empty(out.shape, dtype=torch.float32, device=logits.device)
    scores = None
    for image, best, sure in zip(logits.unbind(), out, confidence, strict=True):
        for piece in pieces(_exact(image).contiguous(), size):
            scores = piece.scores(scores)
            found, most = _first_best(scores)
            piece.of(best).copy_(found)
            scores -= most
            piece.of(sure).copy_(scores.exp_().sum(0).reciprocal_())
    return out, confidence


@torch.no_grad()
def add_softmax(logits: Tensor, total: Tensor, share: float) -> None:
    """Adds ``share`` times the softmax of upsampled logits to a sum, without holding them at its size.

    Args:
        logits: ``float[C, h, w]``.
        total: ``float32[C, H, W]``: is written to.
        share: a factor.
    """
    scores = None
    for piece in pieces(_exact(logits).contiguous(), tuple(total.shape[-2:])):
        scores = piece.scores(scores)
        scores -= scores.amax(0)
        scores /= scores.exp_().sum(0)
        # Pieces know pixels of [H, W]: the classes go last for a moment, [C, H, W] -> [r, w, C] -> [C, r, w].
        piece.of(total.permute(1, 2, 0)).permute(2, 0, 1).add_(scores, alpha=share)


def _exact(logits: Tensor) -> Tensor:
    """In float32, or in the float64 of a check."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _weight_of(label: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What each pixel counts: ``uint8`` or ``long[r, w]`` -> ``[r, w]`` of a dtype, 0 for void."""
    if weights is None:
        return (label != IGNORE).to(dtype)
    by_label = F.pad(weights.to(dtype), (0, IGNORE + 1 - len(weights))).to(label.device)
    return by_label.index_select(0, label.flatten().int()).view(label.shape)


def _target(label: Tensor, classes: int) -> Tensor:
    """Where a pixel's score lies: ``uint8`` or ``long[r, w]`` -> ``long[r, w]``, anything that exists for void."""
    return label.clamp(max=classes - 1).long()


def _first_best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of contiguous ``float[C, ...]``: the first class that has it ``long[...]``, and it ``float[...]``.

    Where there are scores that are no numbers, the class is one of theirs.
    """
    if not scores.is_cpu:
        most, best = scores.max(0)
        return best, most
    # On a CPU pooling is twenty times as fast: it works on whole vectors of channels, and here these are pixels, of an
    # image that is C pixels high. It has a power of two of columns, for the threads.
    classes, columns = len(scores), math.gcd(scores[0].numel(), 64)
    image = scores.view(1, classes, columns, -1).permute(0, 3, 1, 2)  # [1, N, C, columns], channels last
    most, place = F.max_pool2d(image, (classes, 1), return_indices=True)  # [1, N, 1, columns]
    best = place.bitwise_right_shift_(columns.bit_length() - 1)  # place = class * columns + column
    return tuple(found.permute(0, 2, 3, 1).reshape(scores.shape[1:]) for found in (best, most))


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        loss_of_piece: LossOfPiece,
    ) -> Tensor:
        """See ``cross_entropy_sum``."""
        if not ctx.needs_input_grad[0]:
            return argmax_and_loss(logits, labels, weights)[1]
        # As the logits, in their layout too: a gradient in another one slows every layer that it passes.
        gradient = torch.empty_like(logits)
        total = _exact(logits.new_zeros(()))
        for image, label, mine in zip(logits.unbind(), labels, gradient, strict=True):
            factors, image = phase_factors(image, tuple(label.shape)), _exact(image).contiguous()
            if factors is None:
                loss, slope = _by_bands(image, label, weights, loss_of_piece)
            else:
                loss, slope = _by_phases(image, label, weights, loss_of_piece, factors)
            total += loss
            mine.copy_(slope)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # The factor of the mean, or of a gradient scaler: float32 until the product, whatever the logits are.
        return (gradient * upstream).to(gradient.dtype), None, None, None


def _loss_and_gradient(
    top: Tensor, bottom: Tensor, share: float, target: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of a piece, summed, and its gradient by the scores.

    Args:
        top, bottom, share: the scores are ``lerp(top, bottom, share)``, ``float32[C, r, w]``.
        target: ``long[r, w]``.
        weight: ``float32[r, w]``, what each pixel counts.

    Returns:
        ``float32`` scalar and ``float32[C, r, w]``.
    """
    scores = lerp(top, bottom, share)
    scores -= scores.amax(0)
    picked = scores.gather(0, target[None])[0]
    norm = scores.exp_().sum(0)
    # softmax - one-hot, each pixel times its weight.
    scores *= weight / norm
    scores.scatter_add_(0, target[None], -weight[None])
    return ((norm.log_() - picked) * weight).sum(), scores


@functools.cache
def _compiled_loss() -> LossOfPiece:
    """``_loss_and_gradient`` as one kernel: nothing is written in place, and no index is followed."""

    def loss_and_gradient(top: Tensor, bottom: Tensor, share: Tensor, target: Tensor, weight: Tensor):
        scores = torch.lerp(top, bottom, share)
        scores = scores - scores.amax(0)
        exponents = scores.exp()
        norm = exponents.sum(0)
        hot = torch.arange(len(scores), device=scores.device)[:, None, None] == target
        picked = torch.where(hot, scores, 0.0).sum(0)
        gradient = exponents * (weight / norm) - torch.where(hot, weight, 0.0)
        return ((norm.log() - picked) * weight).sum(), gradient

    kernel = torch.compile(loss_and_gradient, dynamic=True)
    # A share that is a tensor is no reason to compile anew; filled where it is needed, it makes no host wait.
    return lambda top, bottom, share, target, weight: kernel(top, bottom, top.new_full((), share), target, weight)


def _by_phases(
    image: Tensor, label: Tensor, weights: Tensor | None, loss_of_piece: LossOfPiece, factors: Size
) -> tuple[Tensor, Tensor]:
    """The loss of one image ``float32[C, h, w]`` and its gradient, for whole factors."""
    total = image.new_zeros(())
    gradient = image.new_zeros(len(image), image.shape[1] + 2, image.shape[2] + 2)
    for first, count in bands(image):
        band, band_gradient = padded_band(image, first, count), gradient[:, first : first + count + 2]
        for column in phases(factors[1]):
            lines = along_columns(band, column)
            lines_gradient = torch.zeros_like(lines)
            for piece in phase_pieces(lines, first, column, factors):
                mine = piece.of(label)
                loss, slope = loss_of_piece(
                    *piece.neighbours(), _target(mine, len(image)), _weight_of(mine, weights, image.dtype)
                )
                total += loss
                add_back(lines_gradient, slope, piece.row, axis=1)
            add_back(band_gradient, lines_gradient, column, axis=2)
    return total, unpad(gradient)


def _by_bands(
    image: Tensor, label: Tensor, weights: Tensor | None, loss_of_piece: LossOfPiece
) -> tuple[Tensor, Tensor]:
    """The loss of one image ``float32[C, h, w]`` and its gradient, for any factors."""
    total, gradient = image.new_zeros(()), torch.zeros_like(image)
    for piece in band_pieces(image, tuple(label.shape)):
        coarse = piece.coarse.detach().requires_grad_()
        with torch.enable_grad():
            scores = piece._replace(coarse=coarse).scores()
        mine, values = piece.of(label), scores.detach()
        loss, slope = loss_of_piece(
            values, values, 0.0, _target(mine, len(image)), _weight_of(mine, weights, image.dtype)
        )
        total += loss
        (part,) = torch.autograd.grad(scores, coarse, slope)
        gradient[:, piece.first : piece.first + part.shape[1]] += part
    return total, gradient


def _argmax_of_mixed_cells(image: Tensor, out: Tensor, factors: Size) -> bool:
    """``argmax`` of one image on a CPU by looking closely only where that can matter.

    Between four coarse pixels with the same best class that class is the best: each score there is a mean of the four
    corners' with the same weights. Of a street's cells, nine in ten are like that.

    Args:
        image: ``float32[C, h, w]``.
        out: ``uint8[H, W]``: is written to.
        factors: by how much it is larger.

    Returns:
        Whether it was done; not where too many cells have corners that disagree.
    """
    best = _first_best(image)[0].to(torch.uint8)
    best = padded_band(best[None], 0, len(best))[0]  # uint8[h + 2, w + 2]
    corner = best[:-1, :-1]  # [h + 1, w + 1]: the cells, each by its upper left pixel
    mixed = (corner != best[:-1, 1:]) | (corner != best[1:, :-1]) | (corner != best[1:, 1:])
    if int(mixed.sum()) > MIXED_CELLS * mixed.numel():
        return False
    # uint8[h + 1, s, w + 1, s] -> [(h + 1) s, (w + 1) s]: the image, and half a cell around it.
    wide = corner[:, None, :, None].expand(-1, factors[0], -1, factors[1]).flatten(2).flatten(0, 1)
    if mixed.any():
        _write_mixed_cells(image, mixed.flatten().nonzero()[:, 0], wide.flatten(), factors)
    top, left = ((factor + 1) // 2 for factor in factors)
    out.copy_(wide[top : top + out.shape[0], left : left + out.shape[1]])
    return True


def _write_mixed_cells(image: Tensor, cells: Tensor, wide: Tensor, factors: Size) -> None:
    """Writes the best classes of the pixels of some cells.

    Args:
        image: ``float32[C, h, w]``.
        cells: ``long[P]``, numbers of cells, ``h + 1`` rows of ``w + 1``.
        wide: ``uint8[(h + 1) * s * (w + 1) * s]``: is written to.
        factors: rows and columns that a cell becomes.
    """
    classes, height, width = image.shape
    flat, line = image.flatten(1), (width + 1) * factors[1]  # pixels of a row of ``wide``
    for some in cells.split(max(1, TILE // (8 * classes))):
        row, column = some // (width + 1), some % (width + 1)
        above, below = (row - 1).clamp(min=0) * width, row.clamp(max=height - 1) * width
        left, right = (column - 1).clamp(min=0), column.clamp(max=width - 1)
        # Four of [C, P]
        corners = [flat.index_select(1, y + x) for y in (above, below) for x in (left, right)]
        place, scores = row * (factors[0] * line) + column * factors[1], None
        for x in range(factors[1]):
            across = weight_of_step(x, factors[1])
            top, bottom = torch.lerp(corners[0], corners[1], across), torch.lerp(corners[2], corners[3], across)
            for y in range(factors[0]):
                scores = lerp(top, bottom, weight_of_step(y, factors[0]), scores)
                wide[place + (y * line + x)] = _first_best(scores)[0].to(torch.uint8)
