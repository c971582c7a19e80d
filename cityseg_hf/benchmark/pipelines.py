"""How the peers make a training sample of a row: image and label decoded by PIL, then each its own transforms.

Both work from train ids, which Cityscapes does not ship: the labelIds are looked up in a table, the fastest usual way.
"""

import random
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from cityseg_hf.benchmark.peers import require
from cityseg_hf.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Size
from cityseg_hf.labels import ID_TO_TRAIN_ID, IGNORE

Pipeline = Callable[[dict[str, Any]], tuple[Tensor, Tensor]]
"""A row of ``load_cityscapes`` -> ``float32[3, h, w]`` normalised, ``int64[h, w]``."""


def train_ids_of(row: dict[str, Any]) -> np.ndarray:
    """``uint8[H, W]``."""
    return ID_TO_TRAIN_ID[np.asarray(row["label"])]


def torchvision_reference(size: Size, *, crop: bool) -> Pipeline:
    """``references/segmentation/presets.py``: resize (by 0.5 to 2 where it crops), flip, crop, tensor, normalise."""

    def sample(row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        image, label = row["image"].convert("RGB"), Image.fromarray(train_ids_of(row))
        # There the shorter side is resized; the images of Cityscapes keep their proportions.
        target = random.randint(size[0] // 2, 2 * size[0]) if crop else list(size)
        image = F.resize(image, target, antialias=True)
        label = F.resize(label, target, interpolation=F.InterpolationMode.NEAREST)
        if random.random() < 0.5:
            image, label = F.hflip(image), F.hflip(label)
        if crop:
            image, label = _random_crop(image, label, size)
        pixels = F.convert_image_dtype(F.pil_to_tensor(image), torch.float32)
        labels = torch.as_tensor(np.array(label), dtype=torch.int64)
        return F.normalize(pixels, IMAGENET_MEAN, IMAGENET_STD), labels

    return sample


def _random_crop(image: Image.Image, label: Image.Image, size: Size) -> tuple[Image.Image, Image.Image]:
    """Pads to the right and below where a side is too short, and crops."""
    padding = [0, 0, max(0, size[1] - image.width), max(0, size[0] - image.height)]
    image, label = F.pad(image, padding, fill=0), F.pad(label, padding, fill=IGNORE)
    top, left = random.randint(0, image.height - size[0]), random.randint(0, image.width - size[1])
    return F.crop(image, top, left, *size), F.crop(label, top, left, *size)


def transformers_example(size: Size, *, crop: bool) -> Pipeline:
    """``run_semantic_segmentation_no_trainer.py``: albumentations; resized as for validation without a crop."""
    albumentations, to_tensor = require("albumentations"), require("albumentations.pytorch").ToTensorV2
    require("cv2").setNumThreads(1)  # the others have one too
    height, width = size
    geometry = [albumentations.Resize(height=height, width=width)]
    if crop:
        pad = albumentations.PadIfNeeded(height, width, border_mode=0, fill=0, fill_mask=IGNORE)
        geometry = [pad, albumentations.RandomCrop(height=height, width=width)]
    transform = albumentations.Compose(
        [
            *geometry,
            albumentations.HorizontalFlip(p=0.5),
            albumentations.Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD, max_pixel_value=255.0),
            to_tensor(),
        ]
    )

    def sample(row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        made = transform(image=np.array(row["image"].convert("RGB")), mask=train_ids_of(row))
        return made["image"].to(torch.float), made["mask"].to(torch.long)

    return sample


def read_all(rows: datasets.Dataset, pipeline: Pipeline) -> Callable[[], None]:
    """Makes a sample of each row."""

    def run() -> None:
        for index in range(len(rows)):
            pipeline(rows[index])

    return run
