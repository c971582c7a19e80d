"""Bilinear upsampling in pieces: which coarse pixels make which fine ones.

By a whole factor s (corners not aligned) it has only s different weights along an axis: the centre of output pixel y
lies at ``(y + 1/2) / s - 1/2`` between two coarse rows, so the pixels y, y + s, y + 2 s, ... all mix their two
neighbours in the same proportion. Such a *phase* is one ``lerp`` of the coarse map with itself moved by a row,
contiguous and without any index. Small maps and other factors go through bands of output rows.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 2**19
"""Floats of a piece on a CPU, 2 MiB: what the caches of two cores hold. Other devices take an image at a time."""

PHASE_PIXELS = 3000
"""Coarse pixels below which phases are too small to be worth their number: a stride of 32 has 1,024 of them."""

Size = tuple[int, int]


class Phase(NamedTuple):
    """Every s-th output pixel of an axis: those that mix their coarse neighbours in one proportion.

    Output pixel ``start + s * j`` is ``lerp(p[first + j], p[first + j + 1], weight)`` of the coarse line p with one
    pixel repeated at both ends.
    """

    start: int
    first: int
    weight: float


def phases(factor: int) -> list[Phase]:
    """The phases of a whole factor, as torch places pixels without aligned corners."""
    # (y + 1/2) / s + 1/2 in the padded line: for even s halfway between the steps of 1 / s, for odd s on them.
    shift = (factor + 1) // 2
    found = []
    for k in range(factor):
        first = 0 if k >= shift else 1
        found.append(Phase(k - shift + first * factor, first, weight_of_step(k, factor)))
    return found


def weight_of_step(step: int, factor: int) -> float:
    """How far pixel ``step`` of the ``factor`` pixels of a cell is on the way to the cell's second corner."""
    return (step + 0.5) / factor if factor % 2 == 0 else step / factor


class PhasePiece(NamedTuple):
    """The pixels of one phase in some rows of an image.

    Attributes:
        lines: ``float32[C, r + 2, w]``: the coarse rows, and one more on each side, upsampled along their length for
            one phase.
        rows, columns: which output pixels these are.
        row: the phase of the rows.
    """

    lines: Tensor
    rows: slice
    columns: slice
    row: Phase

    def neighbours(self) -> tuple[Tensor, Tensor, float]:
        """What the logits of these pixels are mixed of: two of ``float32[C, r, w]``, and the share of the second."""
        count = self.lines.shape[1] - 2
        top, bottom = (self.lines[:, self.row.first + one : self.row.first + one + count] for one in (0, 1))
        return top, bottom, self.row.weight

    def scores(self, into: Tensor | None = None) -> Tensor:
        """The logits of these pixels, ``float32[C, r, w]``: in the place of ``into`` where that fits, else new."""
        return lerp(*self.neighbours(), into)

    def of(self, image: Tensor) -> Tensor:
        """These pixels of a map ``[H, W]``: a view ``[r, w]``."""
        return image[self.rows, self.columns]


class BandPiece(NamedTuple):
    """A band of output rows, for factors that are not whole.

    Attributes:
        coarse: ``float32[C, r, w]``: the coarse rows that the band lies between.
        mix: ``float32[R, r]``: how each row of the band mixes them.
        first: which coarse row is the first of these.
        width: of the output.
        rows: which output rows these are.
    """

    coarse: Tensor
    mix: Tensor
    first: int
    width: int
    rows: slice

    def scores(self, into: Tensor | None = None) -> Tensor:
        """The logits of these pixels: a new ``float32[C, R, W]``."""
        size = (self.coarse.shape[1], self.width)
        lines = F.interpolate(self.coarse[None], size=size, mode="bilinear", align_corners=False)[0]
        with torch.autocast(lines.device.type, enabled=False):
            return self.mix @ lines  # [R, r] @ [C, r, W] -> [C, R, W]

    def of(self, image: Tensor) -> Tensor:
        """These pixels of a map ``[H, W]``: a view ``[R, W]``."""
        return image[self.rows]


def phase_factors(image: Tensor, size: Size) -> Size | None:
    """By what factors ``[C, h, w]`` must grow to a size, where they are whole and phases are the faster way."""
    height, width = image.shape[-2:]
    if size[0] % height or size[1] % width or height * width < PHASE_PIXELS:
        return None
    return size[0] // height, size[1] // width


def pieces(image: Tensor, size: Size) -> Iterator[PhasePiece | BandPiece]:
    """Cuts the upsampling of ``float32[C, h, w]`` into pieces that together are each output pixel once."""
    factors = phase_factors(image, size)
    if factors is None:
        yield from band_pieces(image, size)
        return
    band = lines = None
    for first, count in bands(image):
        del band  # its memory is there for the next one
        band = padded_band(image, first, count)
        for column in phases(factors[1]):
            lines = along_columns(band, column, lines)  # whoever got the last piece is done with it
            yield from phase_pieces(lines, first, column, factors)


def bands(image: Tensor) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each band of ``[C, h, w]``."""
    classes, height, width = image.shape
    rows = max(1, TILE // (classes * width)) if image.is_cpu else height
    for first in range(0, height, rows):
        yield first, min(rows, height - first)


def padded_band(image: Tensor, first: int, count: int) -> Tensor:
    """Some rows of ``[C, h, w]`` with a pixel more on each side, the border's own repeated: ``[C, r + 2, w + 2]``."""
    at_top, at_bottom = int(first == 0), int(first + count == image.shape[-2])
    padded = image.new_empty(len(image), count + 2, image.shape[-1] + 2)
    inner = padded[:, at_top : count + 2 - at_bottom]
    inner[..., 1:-1] = image[:, first - 1 + at_top : first + count + 1 - at_bottom]
    inner[..., 0], inner[..., -1] = inner[..., 1], inner[..., -2]
    if at_top:
        padded[:, 0] = padded[:, 1]
    if at_bottom:
        padded[:, -1] = padded[:, -2]
    return padded


def along_columns(padded: Tensor, column: Phase, into: Tensor | None = None) -> Tensor:
    """Upsamples the rows of a band for one phase: ``[C, r + 2, w + 2]`` -> ``[C, r + 2, w]``, see ``lerp``."""
    width = padded.shape[-1] - 2
    left, right = (padded[..., column.first + one : column.first + one + width] for one in (0, 1))
    return lerp(left, right, column.weight, into)


def phase_pieces(lines: Tensor, first: int, column: Phase, factors: Size) -> Iterator[PhasePiece]:
    """The pieces of the upsampled rows ``[C, r + 2, w]`` of the band that begins at coarse row ``first``."""
    count, width = lines.shape[1] - 2, lines.shape[2]
    columns = slice(column.start, column.start + factors[1] * (width - 1) + 1, factors[1])
    for row in phases(factors[0]):
        start = row.start + factors[0] * first
        yield PhasePiece(lines, slice(start, start + factors[0] * (count - 1) + 1, factors[0]), columns, row)


def band_pieces(image: Tensor, size: Size) -> Iterator[BandPiece]:
    """The pieces of ``[C, h, w]`` for any size, larger or smaller."""
    classes, height, _ = image.shape
    rows = max(1, TILE // (classes * size[1])) if image.is_cpu else size[0]
    for mix, first, where in _row_bands(height, size[0], rows, image.dtype, image.device):
        yield BandPiece(image[:, first : first + mix.shape[1]], mix, first, size[1], where)


@functools.lru_cache(maxsize=64)
def _row_bands(
    height: int, size: int, rows: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, int, slice]]:
    """How bands of output rows are mixed of ``height`` coarse ones: ``mix`` and ``first`` of ``BandPiece``, and which.

    Kept: to send it anew for each image would make the host wait for the device.
    """
    # [H, h]: how torch itself mixes the coarse rows, two of them for each output row.
    eye = torch.eye(height, dtype=dtype)
    mix = F.interpolate(eye[None, None], (size, height), mode="bilinear", align_corners=False)[0, 0]
    found = []
    for start in range(0, size, rows):
        band = mix[start : start + rows]
        used = band.any(0).nonzero()
        first, last = int(used[0]), int(used[-1]) + 1
        found.append((band[:, first:last].to(device), first, slice(start, start + len(band))))
    return found


def lerp(top: Tensor, bottom: Tensor, share: float, into: Tensor | None = None) -> Tensor:
    """``(1 - share) top + share bottom``, in the place of ``into`` where that has its size, else a new tensor."""
    if into is None or into.shape != top.shape:
        into = torch.empty_like(top, memory_format=torch.contiguous_format)
    return into.copy_(top) if share == 0 else torch.lerp(top, bottom, share, out=into)


def add_back(to: Tensor, gradient: Tensor, phase: Phase, axis: int) -> None:
    """The transpose of a phase's ``lerp``: gives each of two neighbours along an axis its part of the gradient."""
    count = gradient.shape[axis]
    to.narrow(axis, phase.first, count).add_(gradient, alpha=1 - phase.weight)
    if phase.weight:
        to.narrow(axis, phase.first + 1, count).add_(gradient, alpha=phase.weight)


def unpad(padded: Tensor) -> Tensor:
    """The transpose of the padding: what the repeated pixels got goes to those they repeat."""
    for axis in (1, 2):
        size = padded.shape[axis]
        for repeated, pixel in ((0, 1), (size - 1, size - 2)):
            padded.select(axis, pixel).add_(padded.select(axis, repeated))
    return padded[:, 1:-1, 1:-1]
