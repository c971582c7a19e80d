"""Which views of an image are averaged: windows that slide over it, scales, and its mirror image. And their flags."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cityseg_hf.errors import UserError
from cityseg_hf.pieces import Size

FIELD_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""What the field means by multi-scale testing on Cityscapes (Chen et al., DeepLab, and mmsegmentation since)."""

SMALLEST = 32
"""The least height and width that a network takes; scaled sides are multiples of it, so that every stride divides."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Views:
    """How a network looks at an image. The default is the plain view: once, whole, as it is.

    Attributes:
        window: height and width of the windows, in pixels of the image at each scale; a side that the image does not
            have is the image's. ``None``: the whole image at once.
        stride: how far apart windows begin, at most; three quarters of the window where ``None``. The last window is
            flush with the border.
        scales: by what the image's sides are multiplied.
        flip: each view also as its mirror image.
        batch_size: how many windows go through the network at a time.

    Raises:
        UserError: a value out of range, in the words of the flags.
    """

    window: Size | None = None
    stride: Size | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.window is None and self.stride is not None:
            raise UserError("--stride says how far apart windows begin: give --window too")
        if self.window is not None and min(self.window) < SMALLEST:
            raise UserError(f"--window takes a height and a width of at least {SMALLEST}, got {_words(self.window)}")
        if self.stride is not None and not all(0 < s <= w for s, w in zip(self.stride, self.window, strict=True)):
            raise UserError(
                f"--stride must be at least 1 and at most --window {_words(self.window)}, got {_words(self.stride)}"
            )
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise UserError(f"--scales must be numbers above 0, got {_words(self.scales)}")
        if self.batch_size < 1:
            raise UserError(f"--batch_size must be at least 1, got {self.batch_size}")

    @property
    def plain(self) -> bool:
        """Whether there is nothing to average."""
        return self.window is None and self.scales == (1.0,) and not self.flip

    def axes(self, size: Size) -> tuple["Axis", "Axis"]:
        """Where windows lie along the rows and the columns of an image of that height and width."""
        window = self.window or size
        stride = self.stride or tuple(max(1, side * 3 // 4) for side in window)
        found = []
        for side, wide, step in zip(size, window, stride, strict=True):
            last = max(0, side - wide)
            found.append(Axis(side, min(side, wide), [*range(0, last, step), last]))
        return found[0], found[1]


PLAIN = Views()


class Axis(NamedTuple):
    """Windows along one axis: its length, theirs, and where each begins."""

    side: int
    window: int
    starts: list[int]

    def fits(self, stride: int) -> bool:
        """Whether all of it lies on the grid of a network's stride."""
        return all(place % stride == 0 for place in (self.side, self.window, *self.starts))

    def coarse(self, stride: int) -> "Axis":
        """The same on that grid."""
        return Axis(self.side // stride, self.window // stride, [start // stride for start in self.starts])

    def shares(self, device: torch.device) -> Tensor:
        """How much each window counts at each of its pixels: ``float32[len(starts), window]``, 1 for each pixel in sum.

        A Hann window, moved by half a pixel so that it is nowhere 0: what a network says at the border of a window,
        where it sees one side only, gives way smoothly to what it says in the middle of the next.
        """
        places = (torch.arange(self.window, dtype=torch.float64) + 0.5) / self.window
        bump = (math.pi * places).sin() ** 2
        total = torch.zeros(self.side, dtype=torch.float64)
        for start in self.starts:
            total[start : start + self.window] += bump
        # Of a single window x / x: its logits are left as they are, to the last bit.
        shares = [bump / total[start : start + self.window] for start in self.starts]
        return torch.stack(shares).float().to(device)


def scaled_size(size: Size, scale: float) -> Size:
    """Height and width at a scale, the nearest multiples of 32."""
    height, width = (max(1, round(side * scale / SMALLEST)) * SMALLEST for side in size)
    return height, width


def add_inference_flags(parser: argparse.ArgumentParser) -> None:
    """Adds ``--window``, ``--stride``, ``--tta``, ``--scales`` and ``--dtype``: see ``views_of``."""
    flags = parser.add_argument_group("how the network looks at an image")
    flags.add_argument(
        "--window", nargs="+", type=int, metavar="N", help="slide a window of height and width N, or N M"
    )
    flags.add_argument("--stride", nargs="+", type=int, metavar="N", help="how far windows are apart (default: 3/4)")
    flags.add_argument(
        "--tta", choices=["flip", "ms", "ms_flip"], help="average mirror images, six scales (0.5 to 1.75), or both"
    )
    flags.add_argument("--scales", nargs="+", type=float, metavar="S", help="average these scales (with ms: instead)")
    flags.add_argument("--dtype", default="float32", choices=list(DTYPES), help="what the network computes with")


def views_of(args: argparse.Namespace) -> Views:
    """The views that the flags ask for; ``args.batch_size`` is the number of windows at a time.

    Raises:
        UserError: see ``Views``.
    """
    scales = args.scales or (FIELD_SCALES if args.tta in ("ms", "ms_flip") else (1.0,))
    return Views(
        window=_pair("--window", args.window),
        stride=_pair("--stride", args.stride),
        scales=tuple(scales),
        flip=args.tta in ("flip", "ms_flip"),
        batch_size=args.batch_size,
    )


def _pair(flag: str, sides: list[int] | None) -> Size | None:
    if sides is None:
        return None
    if len(sides) > 2:
        raise UserError(f"{flag} takes one number, or a height and a width, got {_words(sides)}")
    return sides[0], sides[-1]


def _words(numbers: Sequence[float]) -> str:
    return " ".join(map(str, numbers))
