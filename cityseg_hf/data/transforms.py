"""What is done to an image and its label, jointly, before the network sees them.

Everything random here draws from torch's global generator, which ``data.loading`` seeds with a pure function of
(seed, epoch, sample index) around each sample.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from cityseg_hf.config import DataConfig
from cityseg_hf.labels import IGNORE

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Size = tuple[int, int]
Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(uint8[3, H, W], uint8[H, W]) -> (float[3, h, w] normalised, long[h, w])``."""


def resize_image(image: Tensor, size: Size) -> Tensor:
    """Resizes ``uint8[..., 3, H, W]`` as the saved image processor does: bilinear, antialiased, on uint8."""
    if image.shape[-2:] == size:
        return image
    return F.resize(image, list(size), interpolation=v2.InterpolationMode.BILINEAR, antialias=True)


def resize_label(label: Tensor, size: Size) -> Tensor:
    """Resizes ``uint8[H, W]`` to the nearest pixel's centre; never mixes ids."""
    if label.shape[-2:] == size:
        return label
    # The kernel for masks takes the nearest corner, half a pixel off; NEAREST_EXACT takes the nearest centre.
    label = label.as_subclass(Tensor)
    return F.resize(label[None], list(size), interpolation=v2.InterpolationMode.NEAREST_EXACT)[0]


def normalize(image: Tensor) -> Tensor:
    """``uint8[..., 3, H, W]`` -> ``float32``, ImageNet mean 0 and deviation 1."""
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (image.as_subclass(Tensor).float() - mean) / std


class RandomScaleCrop:
    """Scale jitter, then a random crop in which no class fills more than a given share.

    The recipe of DeepLab and of every Cityscapes result since. Image and label are resized once, straight from their
    own size to the jittered one.

    Args:
        image_size: the size that scale 1 means.
        crop_size: the size of what comes out; smaller images are padded with 0 and ``IGNORE``.
        scales: range of the scale, drawn evenly.
        max_class_share: a crop is drawn again, ten times at most, while one class has more than this share of its
            pixels (void apart).
    """

    def __init__(
        self,
        image_size: Size,
        crop_size: Size,
        scales: tuple[float, float] = (0.5, 2.0),
        max_class_share: float = 0.75,
    ) -> None:
        self.image_size, self.crop_size = image_size, crop_size
        self.scales, self.max_class_share = scales, max_class_share

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.empty(1).uniform_(*self.scales).item()
        size = (max(1, round(self.image_size[0] * scale)), max(1, round(self.image_size[1] * scale)))
        label = resize_label(label, size)  # uint8[h, w]
        pad_h, pad_w = (max(0, crop - side) for crop, side in zip(self.crop_size, size, strict=True))
        # Padding goes to the right and below, as in the field, before the crop is chosen: the crop is then never short.
        label = nn.functional.pad(label, (0, pad_w, 0, pad_h), value=IGNORE)
        top, left = self._choose(label)
        label = label[top : top + self.crop_size[0], left : left + self.crop_size[1]]
        image = resize_image(image, size)
        image = nn.functional.pad(image, (0, pad_w, 0, pad_h))
        return image[:, top : top + self.crop_size[0], left : left + self.crop_size[1]], label

    def _choose(self, label: Tensor) -> Size:
        height, width = self.crop_size
        for _ in range(10):
            top = int(torch.randint(label.shape[0] - height + 1, ()))
            left = int(torch.randint(label.shape[1] - width + 1, ()))
            counts = torch.bincount(label[top : top + height, left : left + width].flatten(), minlength=256)[:IGNORE]
            # A crop that is all void has no class that could fill it: draw again.
            if 0 < int(counts.max()) <= self.max_class_share * int(counts.sum()):
                break
        return top, left


class PhotometricDistortion:
    """Brightness, contrast, saturation and hue, each with probability 0.5, contrast before or after the colours.

    Liu et al., *SSD*, 2016, as published for images in 0..255 (brightness +-32, contrast and saturation 0.5 to 1.5, hue
    +-18 degrees), without the channel swap. Brightness is added, not multiplied.
    """

    def __call__(self, image: Tensor) -> Tensor:
        draws = torch.rand(9).tolist()
        image = image.as_subclass(Tensor)
        if draws[0] < 0.5:
            shift = round((draws[1] * 2 - 1) * 32)
            image = (image.to(torch.int16) + shift).clamp_(0, 255).to(torch.uint8)
        contrast_first = draws[2] < 0.5
        contrast = 0.5 + draws[4] if draws[3] < 0.5 else None
        if contrast is not None and contrast_first:
            image = _scale_around_zero(image, contrast)
        if draws[5] < 0.5:
            image = F.adjust_saturation(image, 0.5 + draws[6])
        if draws[7] < 0.5:
            image = F.adjust_hue(image, (draws[8] * 2 - 1) * 18 / 360)
        if contrast is not None and not contrast_first:
            image = _scale_around_zero(image, contrast)
        return image


def _scale_around_zero(image: Tensor, factor: float) -> Tensor:
    # SSD's contrast multiplies the pixel values; torchvision's adjust_brightness is that very operation.
    return F.adjust_brightness(image, factor)


class TrainTransform:
    """The way from a decoded pair to a training sample, by the name of the augmentation.

    Args:
        config: names the augmentation and the crop.
        image_size: the size whole images are resized to.
    """

    def __init__(self, config: DataConfig, image_size: Size) -> None:
        crop = tuple(config.crop_size or image_size)
        self.image_size = image_size
        self.geometry: Transform | None = None
        self.augment: Callable | None = None
        if config.augmentation == "standard":
            self.geometry = RandomScaleCrop(image_size, crop)
            self.augment = v2.Compose([v2.RandomHorizontalFlip(0.5), _OnImage(PhotometricDistortion())])
        elif config.augmentation == "flip":
            self.augment = v2.RandomHorizontalFlip(0.5)
        elif config.augmentation == "original":
            self.augment = v2.Compose(
                [
                    v2.RandomHorizontalFlip(0.5),
                    v2.RandomAdjustSharpness(2, p=0.5),
                    v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2),
                    v2.GaussianBlur(kernel_size=3, sigma=(0.1, 2.0)),
                ]
            )

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        if self.geometry is not None:
            image, label = self.geometry(image, label)
        else:
            # Resize before the colours: a quarter of the pixels to jitter, the same look.
            image, label = resize_image(image, self.image_size), resize_label(label, self.image_size)
        if self.augment is not None:
            image, label = self.augment(tv_tensors.Image(image), tv_tensors.Mask(label))
        return normalize(image), label.as_subclass(Tensor).long()


class _OnImage(nn.Module):
    """Applies a function to the image of a pair and leaves the label alone."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(image), label


class EvalTransform:
    """Validation and test: the image is resized and normalised, the label stays at its own size, nothing is random.

    Without an ``image_size`` the image keeps its own too.
    """

    def __init__(self, image_size: Size | None) -> None:
        self.image_size = image_size

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        return normalize(resize_image(image, self.image_size or tuple(image.shape[-2:]))), label.long()
