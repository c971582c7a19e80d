"""The augmentation of training: geometry in the loader's worker, flips and colours batched on the device.

A worker hands over ``uint8`` pixels and the few numbers that say what is to be done to them. Those are drawn from
torch's global generator, which ``data.loading`` seeds with a pure function of (seed, epoch, sample index). The device
does it with torchvision's arithmetic for ``uint8`` images: levels are float32, but whole numbers in 0..255 after each
operation, so that what comes out is what torchvision makes of each image alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cityseg_hf.config import DataConfig
from cityseg_hf.data.transforms import RandomScaleCrop, Size, normalize, resize_image, resize_label

TILE_PIXELS = 32768
"""What a thread of a CPU works on at a time; torch gives a thread no less."""

Step = tuple[int, float]
"""An operation's number in ``OPERATIONS``, 0 for none, and its value."""


class TrainTransform:
    """The worker's part of the augmentation: from a decoded pair to a small one, and what is still to be done to it.

    Args:
        config: names the augmentation and the crop.
        image_size: the size whole images are resized to.
    """

    def __init__(self, config: DataConfig, image_size: Size) -> None:
        self.image_size, self.augment = image_size, Augment(config)
        self.geometry: RandomScaleCrop | None = None
        if config.augmentation == "standard":
            crop_size, scales = tuple(config.crop_size or image_size), tuple(config.scale_range or (0.5, 2.0))
            self.geometry = RandomScaleCrop(image_size, crop_size, scales, rare_class_crops=config.rare_class_crops)

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``uint8[3, H, W], uint8[H, W]`` -> ``uint8[3, h, w], uint8[h, w]``, parameters ``float32[K]``.

        The draws are the scale and the crops first, then those of ``Augment.draw``.
        """
        if self.geometry is not None:
            image, label = self.geometry(image, label)
        else:
            # Resize before the colours: a quarter of the pixels to jitter, the same look.
            image, label = resize_image(image, self.image_size), resize_label(label, self.image_size)
        return image, label, self.augment.draw()


class Augment:
    """Flips and colours of a batch, each sample by parameters of its own.

    - none: nothing.
    - flip: a horizontal flip, with probability 0.5.
    - original: flip; sharpness 2 with probability 0.5; brightness, contrast, saturation (0.8 to 1.2) and hue (+-0.2 of
      a turn) in random order; a Gaussian blur of 3x3, sigma 0.1 to 2.
    - standard: flip; the photometric distortion of Liu et al., *SSD*, 2016, as published for images in 0..255
      (brightness +-32, contrast and saturation 0.5 to 1.5, hue +-18 degrees; each with probability 0.5; contrast before
      or after the colours), without the channel swap. Brightness is added and contrast multiplies.

    Args:
        config: names the augmentation.
    """

    def __init__(self, config: DataConfig) -> None:
        self.name = config.augmentation
        self._draw_steps = {"original": _draw_original, "standard": _draw_distortion}.get(self.name, list)

    def draw(self) -> Tensor:
        """Parameters of one sample: ``float32[K]``, K = 0 for "none".

        The first is 1 for a flip, then come the number and the value of each operation in turn. Drawn are the flip,
        then what ``_draw_original`` or ``_draw_distortion`` say.
        """
        if self.name == "none":
            return torch.empty(0)
        flip = float(torch.rand(()) < 0.5)
        return torch.tensor([flip, *(number for step in self._draw_steps() for number in step)])

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Augments and normalises a batch where it lies; a sample's result does not depend on the others.

        Args:
            images: ``uint8[B, 3, H, W]``, any stride; left alone.
            labels: ``uint8[B, H, W]``; left alone.
            parameters: ``float32[B, K]`` from ``draw``. On the CPU, wherever the images are: they decide what is
                launched, and the host must not wait for the device.

        Returns:
            ``pixel_values float32[B, 3, H, W]``, normalised, and ``labels`` of the dtype that they had.
        """
        plan = parameters.tolist()
        if self.name != "none":
            flips = [row[0] > 0 for row in plan]
            # Packed, as the loader gives them, images are flipped pixel by pixel.
            images = _flip(images.permute(0, 2, 3, 1), flips).permute(0, 3, 1, 2)
            labels = _flip(labels, flips)
        if parameters.shape[1] <= 1:
            return normalize(images), labels
        levels = images.to(torch.float32, memory_format=torch.contiguous_format)
        values = parameters.to(levels.device, non_blocking=True)
        rows = list(levels)  # views float[3, H, W]
        samples = rows.copy()
        for column in range(1, parameters.shape[1], 2):
            for number, operation in OPERATIONS.items():
                members = [index for index, row in enumerate(plan) if row[column] == number]
                _operate(operation, samples, members, values[:, column + 1])
        if any(sample is not row for sample, row in zip(samples, rows, strict=True)):
            levels = torch.stack(samples)
        return normalize(levels, out=levels), labels


def _draw_original() -> list[Step]:
    """``torch.rand(6)``: sharpness?, brightness, contrast, saturation, hue, blur; then the order of the middle four."""
    sharpen, brightness, contrast, saturation, hue, blur = torch.rand(6).tolist()
    jitter = [
        (SCALE, 0.8 + 0.4 * brightness),
        (CONTRAST, 0.8 + 0.4 * contrast),
        (SATURATION, 0.8 + 0.4 * saturation),
        (HUE, -0.2 + 0.4 * hue),
    ]
    ordered = [jitter[place] for place in torch.randperm(4).tolist()]
    return [(SHARPNESS, 2.0) if sharpen < 0.5 else NOTHING, *ordered, (BLUR, 0.1 + 1.9 * blur)]


def _draw_distortion() -> list[Step]:
    """``torch.rand(9)``: brightness?, by how much, contrast first?, contrast?, how much, saturation?, .., hue?, .."""
    draws = torch.rand(9).tolist()
    scale = (SCALE, 0.5 + draws[4]) if draws[3] < 0.5 else NOTHING
    return [
        (SHIFT, float(round((draws[1] * 2 - 1) * 32))) if draws[0] < 0.5 else NOTHING,
        scale if draws[2] < 0.5 else NOTHING,
        (SATURATION, 0.5 + draws[6]) if draws[5] < 0.5 else NOTHING,
        (HUE, (draws[8] * 2 - 1) * 18 / 360) if draws[7] < 0.5 else NOTHING,
        scale if draws[2] >= 0.5 else NOTHING,
    ]


def _flip(batch: Tensor, flips: list[bool]) -> Tensor:
    """Some of ``[B, H, W, ...]``."""
    if not any(flips):
        return batch
    return torch.stack([row.flip(1) if flip else row for row, flip in zip(batch, flips, strict=True)])


def _one_by_one(device: torch.device) -> bool:
    """A CPU is fastest on what fits its cache, a GPU on much at once."""
    return device.type == "cpu"


def _operate(
    operation: Callable[[Tensor, Tensor], None], samples: list[Tensor], members: list[int], values: Tensor
) -> None:
    """Applies an operation to some of the samples ``float[3, H, W]``, with ``values float[B]``; replaces them in place.

    A CPU takes them one by one, where they lie. Elsewhere they are stacked: one launch for all of them.
    """
    if _one_by_one(values.device):
        for index in members:
            operation(samples[index][None], values[index].view(1, 1, 1, 1))
    elif members:
        # Views and a stack, not an index: that would wait for its way to the device.
        stacked = torch.stack([samples[index] for index in members])
        operation(stacked, torch.stack([values[index] for index in members]).view(-1, 1, 1, 1))
        for index, row in zip(members, stacked, strict=True):
            samples[index] = row


# --- the operations: on levels float[n, 3, H, W], whole numbers in 0..255, in place, with value float[n, 1, 1, 1]


def _tiles(levels: Tensor) -> tuple[Tensor, ...]:
    """On a CPU bands of rows whose temporaries stay in the cache, large enough that every thread gets its share."""
    if not _one_by_one(levels.device):
        return (levels,)
    return levels.split(max(1, TILE_PIXELS * torch.get_num_threads() // levels.shape[-1]), dim=-2)


def _shift(levels: Tensor, value: Tensor) -> None:
    for tile in _tiles(levels):
        tile.add_(value).clamp_(0, 255)


def _scale(levels: Tensor, value: Tensor) -> None:
    """``F.adjust_brightness``."""
    for tile in _tiles(levels):
        tile.mul_(value).clamp_(0, 255).floor_()


def _blend(tile: Tensor, other: Tensor, share: Tensor) -> None:
    tile.mul_(share).addcmul_(other, 1 - share).clamp_(0, 255).floor_()


def _grey(levels: Tensor) -> Tensor:
    red, green, blue = levels.unbind(1)
    # float[n, 1, H, W]. In this order: at a whole number another rounding would be another level.
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()[:, None]


def _contrast(levels: Tensor, value: Tensor) -> None:
    """``F.adjust_contrast``. The mean is exact, so that threads, tiles and batches do not change it."""
    # Sums of whole numbers: a row's is exact in float32, the image's in float64.
    rows = torch.cat([_grey(tile).sum(-1) for tile in _tiles(levels)], dim=-1)  # [n, 1, H]
    mean = (rows.double().sum(-1) / (levels.shape[-2] * levels.shape[-1])).float()
    # A row of it, [n, 1, 1, W]: torch's loops are slow where two operands are single numbers.
    mean = mean[..., None, None].expand(-1, -1, -1, levels.shape[-1]).contiguous()
    for tile in _tiles(levels):
        _blend(tile, mean, value)


def _saturation(levels: Tensor, value: Tensor) -> None:
    """``F.adjust_saturation``."""
    for tile in _tiles(levels):
        _blend(tile, _grey(tile), value)


def _hue(levels: Tensor, value: Tensor) -> None:
    """``F.adjust_hue``."""
    for tile in _tiles(levels):
        _turn_hue(tile, value[:, 0])


def _turn_hue(levels: Tensor, turn: Tensor) -> None:
    """RGB -> HSV -> RGB (Smith, *Color gamut transform pairs*, 1978), in torchvision's roundings.

    Of a pixel's three levels the highest and the lowest only change channels; the one between moves with the hue. Masks
    are numbers 0 and 1 here: on a CPU torch's ``where`` costs as much as twenty sums.
    """
    red, green, blue = levels.unbind(1)  # [n, H, W] each, as all below
    high = torch.maximum(red, green)
    high = torch.maximum(high, blue, out=high)
    below = high - 1
    is_red = (red - below).clamp_(min=0)
    is_green = (green - below).sub_(is_red).clamp_(min=0)  # red has the word where two are highest
    # The hue in sixths of a turn is base + first - second: the two other channels, in cyclic order, as distances from
    # the highest in shares of the spread. Base is 0, 2 or 4 where red, green or blue is highest.
    first = torch.addcmul(green, is_red, blue - green).addcmul_(is_green, red - green)
    second = torch.add(red, green).add_(blue).sub_(high).sub_(first)
    low = torch.minimum(first, second)
    base = is_red.mul_(-4).add_(is_green, alpha=-2).add_(4)
    value = high * (1 / 255)
    spread = value - low * (1 / 255)
    # A spread of 0 has distances of 0 and a saturation of 0, whatever they are divided by.
    divisor = spread.clamp(min=1e-3)
    hue = torch.sub(value, first.mul_(1 / 255), out=first).div_(divisor).add_(base)
    hue.sub_(torch.sub(value, second.mul_(1 / 255), out=second).div_(divisor))
    hue.mul_(1 / 6).add_(1).frac_().add_(turn)
    hue.sub_(hue.floor()).mul_(6)
    middle = _middle_level(hue, spread.div_(value.clamp(min=1e-3)), value)
    for channel, away in ((red, (hue - 3).abs_()), (green, 3 - (hue - 2).abs_()), (blue, 3 - (hue - 4).abs_())):
        # Above 2 the channel is the highest, below 1 the lowest; on the borders the middle equals what it takes over.
        away.sub_(away.clamp(1, 2))
        torch.add(middle, away, alpha=1e10, out=away)
        torch.maximum(torch.minimum(away, high, out=away), low, out=channel)


def _middle_level(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The level between highest and lowest: it rises in the even sixths of a turn and falls in the odd ones."""
    sector = hue.floor()
    falling = (hue - sector).mul_(saturation)
    rising = (1 - saturation).add_(falling)
    falling.neg_().add_(1)
    is_odd = sector.mul_(0.5).frac_().mul_(2)
    middle = falling.mul_(is_odd).addcmul_(rising, 1 - is_odd)
    return middle.mul_(value).mul_(255.999).floor_()


def _sharpness(levels: Tensor, value: Tensor) -> None:
    """``F.adjust_sharpness``: away from the mean of 3x3, the centre counted five times; the border stays."""
    if min(levels.shape[-2:]) < 3:
        return
    rows = levels[..., :-2, :] + levels[..., 1:-1, :]
    rows.add_(levels[..., 2:, :])
    inner = levels[..., 1:-1, 1:-1]
    smooth = rows[..., :-2] + rows[..., 1:-1]
    smooth.add_(rows[..., 2:]).add_(inner, alpha=4).div_(13).round_()
    inner.addcmul_(smooth.sub_(inner), 1 - value)
    levels.clamp_(0, 255).floor_()


def _blur(levels: Tensor, value: Tensor) -> None:
    """``F.gaussian_blur`` with a kernel of 3x3: rows, then columns; the border mirrors."""
    # exp(-x^2 / 2 sigma^2) at x = -1, 0, 1, as shares of their sum
    weight = torch.exp(-0.5 / value**2)
    centre, side = 1 / (1 + 2 * weight), weight / (1 + 2 * weight)
    for axis in (-2, -1):
        length = levels.shape[axis]
        mixed = levels * centre
        mixed.narrow(axis, 1, length - 1).addcmul_(levels.narrow(axis, 0, length - 1), side)
        mixed.narrow(axis, 0, length - 1).addcmul_(levels.narrow(axis, 1, length - 1), side)
        mixed.narrow(axis, 0, 1).addcmul_(levels.narrow(axis, 1, 1), side)
        mixed.narrow(axis, length - 1, 1).addcmul_(levels.narrow(axis, length - 2, 1), side)
        levels.copy_(mixed)
    levels.round_()


SHARPNESS, SCALE, CONTRAST, SATURATION, HUE, BLUR, SHIFT = range(1, 8)
NOTHING: Step = (0, 0.0)
OPERATIONS: dict[int, Callable[[Tensor, Tensor], None]] = {
    SHARPNESS: _sharpness,
    SCALE: _scale,
    CONTRAST: _contrast,
    SATURATION: _saturation,
    HUE: _hue,
    BLUR: _blur,
    SHIFT: _shift,
}
"""What can be done to a sample, by its number among the parameters."""
