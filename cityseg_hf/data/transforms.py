"""What the loader's worker does to an image and its label, jointly, and the way from bytes to what a network sees.

Everything random here draws from torch's global generator, which ``data.loading`` seeds with a pure function of
(seed, epoch, sample index) around each sample.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from cityseg_hf.labels import IGNORE

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

GRID = 8
"""Pixels between those that are looked at for which classes an image has, and where."""

COUNTED_ROWS = 64
"""At least so many rows of a crop are looked at for what it shows, or all of them."""

Size = tuple[int, int]
Transform = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""``(uint8[3, H, W], uint8[H, W]) -> (uint8[3, h, w], uint8[h', w'])``, in training with the parameters of the
augmentation, ``float32[K]``. What comes out may be a view of what went in."""


def resize_image(image: Tensor, size: Size) -> Tensor:
    """Resizes ``uint8[..., 3, H, W]`` as the saved image processor does: bilinear, antialiased, on uint8."""
    if image.shape[-2:] == size:
        return image
    return F.resize(image, list(size), interpolation=v2.InterpolationMode.BILINEAR, antialias=True)


def resize_label(label: Tensor, size: Size) -> Tensor:
    """Resizes ``uint8[H, W]`` to the nearest pixel's centre; never mixes ids."""
    if label.shape[-2:] == size:
        return label
    rows, columns = (_nearest_centres(*sides) for sides in zip(label.shape, size, strict=True))
    # Whole rows are picked at once, pixels of a row one by one: of the fewer rows. Still, torch's kernel takes twice or
    # three times as long.
    if size[0] < label.shape[0]:
        return label.index_select(0, rows).gather(1, columns.expand(len(rows), -1))
    return label.gather(1, columns.expand(len(label), -1)).index_select(0, rows)


def _nearest_centres(side: int, size: int) -> Tensor:
    """Which of ``side`` pixels has its centre nearest to that of each of ``size``, by torch: ``long[size]``."""
    places = torch.arange(side, dtype=torch.float32)
    return nn.functional.interpolate(places[None, None], size, mode="nearest-exact")[0, 0].long()


def normalize(image: Tensor, out: Tensor | None = None) -> Tensor:
    """Levels 0..255 ``[..., 3, H, W]``, ``uint8`` or float -> ``float32``, ImageNet mean 0 and deviation 1.

    On the image's device; ``out`` may be the image itself where that is ``float32``.
    """
    mean, std = _mean_and_deviation(image.device)
    if image.dtype == torch.uint8:  # packed or not: what follows is fast for planes, and for floats
        image = image.to(torch.float32, memory_format=torch.contiguous_format)
        out = image if out is None else out
    return torch.sub(image, mean, out=out).div_(std)


@cache
def _mean_and_deviation(device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept: to send them anew for each batch would make the host wait for the device.
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean.to(device), std.to(device)


class RandomScaleCrop:
    """Scale jitter, then a random crop in which no class fills more than a given share.

    The recipe of DeepLab and of every Cityscapes result since. Only the region that the crop shows is read and resized,
    so that of an image on disk no more than its rows are fetched.

    Args:
        image_size: the size that scale 1 means; pairs of another size are resized to it first.
        crop_size: the size of what comes out; smaller images are padded with 0 and ``IGNORE``.
        scales: range of the scale, drawn evenly.
        max_class_share: a crop is drawn again, ten times at most, while one class has more than this share of its
            pixels (void apart; of a high crop, of those in every second, third, ... row).
        rare_class_crops: share of the crops that are laid around a pixel of a class drawn evenly of those in the
            image, whatever fills them: a class that has few pixels is seen as often as the road.
    """

    def __init__(
        self,
        image_size: Size,
        crop_size: Size,
        scales: tuple[float, float] = (0.5, 2.0),
        max_class_share: float = 0.75,
        rare_class_crops: float = 0.0,
    ) -> None:
        self.image_size, self.crop_size = image_size, crop_size
        self.scales, self.max_class_share, self.rare_class_crops = scales, max_class_share, rare_class_crops

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """``uint8[3, H, W], uint8[H, W]`` -> the same of ``crop_size``. Draws the scale, then top and left of each try.

        The image is fastest as a view of ``uint8[H, W, 3]``.
        """
        image, label = resize_image(image, self.image_size), resize_label(label, self.image_size)
        scale = torch.empty(1).uniform_(*self.scales).item()
        axes = [_window(side, crop, scale) for side, crop in zip(self.image_size, self.crop_size, strict=True)]
        (height, width), size = (tuple(numbers) for numbers in zip(*axes, strict=True))
        rare = self.rare_class_crops > 0 and torch.rand(()).item() < self.rare_class_crops
        top, left = self._around_a_class(label, (height, width)) if rare else self._choose(label, (height, width))
        label = resize_label(label[top : top + height, left : left + width], size)
        # Packed as [H, W, 3]: torch has a fast kernel for that.
        region = image[:, top : top + height, left : left + width].permute(1, 2, 0).contiguous().permute(2, 0, 1)
        image = resize_image(region, size)
        image = _padded(image.permute(1, 2, 0), self.crop_size, 0).permute(2, 0, 1)
        return image, _padded(label, self.crop_size, IGNORE)

    def _choose(self, label: Tensor, window: Size) -> Size:
        """The top and left of a window of ``uint8[H, W]``; even over all positions."""
        (height, width), positions = window, [side - taken + 1 for side, taken in zip(label.shape, window, strict=True)]
        for _ in range(10):
            top, left = (int(torch.randint(count, ())) for count in positions)
            # Shares are counted before the resize, which keeps them, and in some of the rows, which is near enough.
            rows = slice(top, top + height, max(1, height // COUNTED_ROWS))
            counts = torch.bincount(label[rows, left : left + width].flatten(), minlength=256)[:IGNORE]
            # A crop that is all void has no class that could fill it: draw again.
            if 0 < int(counts.max()) <= self.max_class_share * int(counts.sum()) or positions == [1, 1]:
                break
        return top, left

    def _around_a_class(self, label: Tensor, window: Size) -> Size:
        """The top and left of a window with a pixel of a class drawn evenly, somewhere in it."""
        grid = label[::GRID, ::GRID]  # [H / 8, W / 8]
        classes = torch.bincount(grid.flatten(), minlength=256)[:IGNORE].nonzero()[:, 0]
        if not len(classes):
            return self._choose(label, window)
        places = (grid == classes[torch.randint(len(classes), ())]).nonzero()
        place = (places[torch.randint(len(places), ())] * GRID).tolist()
        starts = (centre - int(torch.randint(taken, ())) for centre, taken in zip(place, window, strict=True))
        top, left = (
            min(max(0, start), side - taken) for start, side, taken in zip(starts, label.shape, window, strict=True)
        )
        return top, left


def _padded(pixels: Tensor, size: Size, value: int) -> Tensor:
    """``uint8[h, w, ...]`` -> ``uint8[H, W, ...]``: to the right and below, as in the field."""
    height, width, *channels = pixels.shape
    if (height, width) == size:
        return pixels
    padded = pixels.new_full((*size, *channels), value)
    padded[:height, :width] = pixels
    return padded


def _window(side: int, crop: int, scale: float) -> tuple[int, int]:
    """How many pixels of an axis a crop shows, and how many it makes of them; fewer than ``crop`` are padded later."""
    scaled = max(1, round(side * scale))
    return (side, scaled) if scaled <= crop else (min(side, max(1, round(crop / scale))), crop)


class EvalTransform:
    """Validation and test: the image is resized, the label stays at its own size, nothing is random.

    Without an ``image_size`` the image keeps its own too.
    """

    def __init__(self, image_size: Size | None) -> None:
        self.image_size = image_size

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """``uint8[3, H, W], uint8[H', W']`` -> ``uint8[3, h, w], uint8[H', W']``."""
        return resize_image(image, self.image_size or tuple(image.shape[-2:])), label
