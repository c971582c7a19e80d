"""Geometry is that of image and label alike, and validation sees what a user's image processor sees."""

from itertools import pairwise

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from cityseg_hf.checkpoint import image_processor
from cityseg_hf.config import DataConfig
from cityseg_hf.data import transforms
from cityseg_hf.data.augment import TrainTransform
from cityseg_hf.data.loading import seeded
from cityseg_hf.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvalTransform,
    RandomScaleCrop,
    normalize,
    resize_image,
    resize_label,
)
from cityseg_hf.labels import IGNORE

SIZE = (64, 96)
GREYS = torch.tensor([40, 80, 120], dtype=torch.uint8)
"""The grey of train ids 0, 1, 2: apart enough that no distortion swaps or merges two of them."""


def blocks(size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    """A label ``uint8[H, W]`` of large random blocks of the train ids 0, 1, 2; no symmetry of any kind."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(3, (4, 6), generator=generator, dtype=torch.uint8)
    return resize_label(coarse, size)


def painted(label: Tensor) -> Tensor:
    """The image ``uint8[3, H, W]`` in which the grey of a pixel tells its class."""
    return GREYS[label.long()].expand(3, *label.shape).contiguous()


def grey(pixel_values: Tensor) -> Tensor:
    """Undoes the normalisation: ``float[H, W]``, 0..255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((pixel_values * std + mean) * 255).mean(0)


def inside(label: Tensor, margin: int) -> Tensor:
    """The pixels ``bool[H, W]`` whose whole neighbourhood is of their own class: no blur or resize mixes those."""
    window = label.float()[None, None]
    high, low = (torch.nn.functional.max_pool2d(sign * window, 2 * margin + 1, stride=1) for sign in (1, -1))
    # What lay beyond the border of a crop is not known.
    return torch.nn.functional.pad((high == -low)[0, 0], (margin,) * 4, value=False)


def assert_aligned(pixel_values: Tensor, label: Tensor) -> None:
    """Each class is painted in one grey, and darker classes are darker."""
    image, certain = grey(pixel_values), inside(label, margin=2)
    greys = [image[certain & (label == train_id)] for train_id in range(3)]
    spans = [(values.min().item(), values.max().item()) for values in greys if len(values)]
    assert len(spans) > 0
    assert all(high - low < 4 for low, high in spans), spans
    assert all(below[1] + 4 < above[0] for below, above in pairwise(spans)), spans


def trained_on(transform: TrainTransform, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Both parts of the augmentation: ``float32[3, h, w]`` normalised, ``uint8[h, w]``."""
    images, labels, parameters = (part[None] for part in transform(image, label))
    pixel_values, labels = transform.augment(images, labels, parameters)
    return pixel_values[0], labels[0]


# --- training


@pytest.mark.parametrize("augmentation", ["original", "standard"])
def test_image_and_label_move_together(augmentation: str) -> None:
    """The original flipped the image and left the label where it was."""
    config = DataConfig(augmentation=augmentation, crop_size=[48, 48] if augmentation == "standard" else None)
    transform = TrainTransform(config, SIZE)
    for draw in range(60):
        label = blocks(seed=draw)
        with seeded(draw):
            assert_aligned(*trained_on(transform, painted(label), label))


def test_original_flips_half_of_the_pairs_and_does_nothing_else_to_labels() -> None:
    label, transform = blocks(), TrainTransform(DataConfig(augmentation="original"), SIZE)
    flipped = 0
    for draw in range(200):
        with seeded(draw):
            pixel_values, found = trained_on(transform, painted(label), label)
        is_flipped = torch.equal(found, label.flip(-1))
        assert is_flipped or torch.equal(found, label)
        # The image tells by itself which way round it is.
        image, straight = grey(pixel_values), painted(label)[0].float()
        nearer = (image - straight.flip(-1)).abs().mean() < (image - straight).abs().mean()
        assert bool(nearer) is is_flipped
        flipped += is_flipped
    assert 70 < flipped < 130  # 100 with a deviation of 7


def test_none_only_resizes_and_draws_nothing() -> None:
    transform = TrainTransform(DataConfig(augmentation="none"), (32, 48))
    label = blocks()
    before = torch.get_rng_state()
    image, found, parameters = transform(painted(label), label)
    assert torch.equal(torch.get_rng_state(), before) and parameters.numel() == 0
    assert torch.equal(image, EvalTransform((32, 48))(painted(label), label)[0])
    assert torch.equal(found, F.resize(label[None], [32, 48], v2.InterpolationMode.NEAREST_EXACT)[0])


@pytest.mark.parametrize("augmentation", ["none", "original", "standard"])
@pytest.mark.parametrize("size", [(64, 96), (37, 53), (33, 32)])
def test_labels_hold_only_what_was_there(augmentation: str, size: tuple[int, int]) -> None:
    """Interpolated labels would invent classes: between 3 and 18 lie fourteen others."""
    transform = TrainTransform(DataConfig(augmentation=augmentation), size)
    label = torch.tensor([3, 18, IGNORE], dtype=torch.uint8)[torch.randint(3, (45, 71))]
    for _ in range(10):
        image, found, parameters = transform(torch.randint(256, (3, 45, 71), dtype=torch.uint8), label)
        assert image.shape == (3, *size) and found.shape == size
        assert (image.dtype, found.dtype, parameters.dtype) == (torch.uint8, torch.uint8, torch.float32)
        assert type(image) is type(found) is Tensor
        assert set(found.unique().tolist()) <= {3, 18, IGNORE}


@pytest.mark.parametrize("augmentation", ["none", "original", "standard"])
def test_the_input_is_left_alone(augmentation: str) -> None:
    image, label = painted(blocks()), blocks()
    TrainTransform(DataConfig(augmentation=augmentation), SIZE)(image, label)
    assert torch.equal(image, painted(blocks())) and torch.equal(label, blocks())


# --- scale and crop


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The sizes of the label before and after each resize of the crops to come."""
    seen = []

    def resize(label: Tensor, size: tuple[int, int]) -> Tensor:
        seen.append((tuple(label.shape), size))
        return resize_label(label, size)

    monkeypatch.setattr(transforms, "resize_label", resize)
    return seen


def test_crops_have_their_size_and_scales_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch)
    crop = RandomScaleCrop((640, 960), (50, 70), max_class_share=1.0)
    wide = torch.arange(3, dtype=torch.uint8).repeat_interleave(320).expand(640, 960)
    for draw in range(300):
        with seeded(draw):
            image, label = crop(painted(wide), wide)
        assert image.shape == (3, 50, 70) and label.shape == (50, 70) and image.dtype == label.dtype == torch.uint8
    scales = torch.tensor(
        [[new / old for old, new in zip(*sizes, strict=True)] for sizes in seen if sizes[1] == (50, 70)]
    )
    assert len(scales) == 300 and scales.min() >= 0.49 and scales.max() <= 2.01
    # Even: 1.25 on average, and one aspect for both sides up to rounding.
    assert scales.min() < 0.55 and scales.max() > 1.95 and abs(scales.mean() - 1.25) < 0.1
    assert abs(scales.std() - 1.5 / 12**0.5) < 0.04
    assert (scales[:, 0] / scales[:, 1] - 1).abs().max() < 0.04


def test_every_position_is_as_likely() -> None:
    """A crop of 32x32 at scale 1 has 5 x 9 places in 36x40 pixels; each pixel tells its own."""
    label = torch.arange(36 * 40).remainder(19).to(torch.uint8).view(36, 40)
    rows, columns = torch.meshgrid(torch.arange(36), torch.arange(40), indexing="ij")
    image = torch.stack([rows, columns, rows]).to(torch.uint8)
    crop = RandomScaleCrop((36, 40), (32, 32), scales=(1.0, 1.0))
    counts = torch.zeros(5, 9)
    for draw in range(1800):
        with seeded(draw):
            cut, found = crop(image, label)
        top, left = cut[0, 0, 0].item(), cut[1, 0, 0].item()
        assert torch.equal(found, label[top : top + 32, left : left + 32])
        counts[top, left] += 1
    assert counts.min() > 15 and counts.max() < 75, "40 each, with a deviation of 6"


@pytest.mark.parametrize("scale", [0.5, 0.9, 1.0, 1.6, 2.0])
def test_a_crop_is_its_region_resized(scale: float) -> None:
    """Exactly ``resize_image`` and ``resize_label`` of a rectangle of the source, wherever it lies."""
    image, label = torch.randint(256, (3, 64, 96), dtype=torch.uint8), torch.randint(19, (64, 96), dtype=torch.uint8)
    height, width = round(24 / scale), round(40 / scale)
    cut, found = RandomScaleCrop((64, 96), (24, 40), scales=(scale, scale))(image, label)
    places = [(top, left) for top in range(65 - height) for left in range(97 - width)]
    regions = ((slice(top, top + height), slice(left, left + width)) for top, left in places)
    (region,) = [where for where in regions if torch.equal(resize_label(label[where], (24, 40)), found)]
    assert torch.equal(resize_image(image[:, region[0], region[1]], (24, 40)), cut)


class LargestRead(TorchDispatchMode):
    """The largest tensor that any operation but a view was given."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.numel = max([self.numel, *(part.numel() for part in args if isinstance(part, Tensor))])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("scale", [0.7, 1.0, 2.0])
def test_only_the_region_is_read(scale: float) -> None:
    """Of an image on disk: a view of [H, W, 3], of which a copy would fetch every row."""
    image, label = torch.randint(256, (512, 512, 3), dtype=torch.uint8).permute(2, 0, 1), blocks((512, 512))
    crop = RandomScaleCrop((512, 512), (64, 64), scales=(scale, scale))
    with LargestRead() as largest:
        crop(image, label)
    assert largest.numel <= 3 * max(64, round(64 / scale)) ** 2


def test_a_pair_of_another_size_is_resized_to_image_size_first() -> None:
    image, label = painted(blocks((128, 192))), blocks((128, 192))
    crop = RandomScaleCrop((64, 96), (40, 50))
    for draw in range(5):
        with seeded(draw):
            found = crop(image, label)
        with seeded(draw):
            expected = crop(resize_image(image, (64, 96)), resize_label(label, (64, 96)))
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale", [0.5, 0.8, 1.0, 1.7, 2.0])
def test_crops_are_aligned_to_the_pixel(scale: float, axis: int) -> None:
    """An edge of the image, at half its height, lies where the label's does: half a pixel off would show."""
    label = torch.zeros(64, 96, dtype=torch.uint8)
    label.narrow(axis, 27, label.shape[axis] - 27).fill_(2)
    crop = RandomScaleCrop((64, 96), (32, 48), scales=(scale, scale), max_class_share=1.0)
    for _ in range(10):
        image, found = crop(painted(label), label)
        from_image = torch.where(image[0].float() > 80, 2, 0).to(torch.uint8)
        # A pixel that the edge halves may fall to either side.
        certain = (image[0].float() - 80).abs() > 2
        assert torch.equal(from_image[certain], found[certain]) and certain.float().mean() > 0.9


def test_padding_is_void_and_lies_outside_only() -> None:
    """At half the size, a 64x96 image fills the upper left 32x48 of its crop."""
    image, label = torch.full((3, 64, 96), 200, dtype=torch.uint8), torch.full((64, 96), 5, dtype=torch.uint8)
    crop = RandomScaleCrop((64, 96), (64, 96), scales=(0.5, 0.5))
    image, label = crop(image, label)
    outside = torch.ones(64, 96, dtype=torch.bool)
    outside[:32, :48] = False
    assert torch.equal(label == IGNORE, outside) and torch.equal(label == 5, ~outside)
    assert (image[:, outside] == 0).all() and (image[:, ~outside] == 200).all()


def test_larger_images_are_never_padded() -> None:
    crop = RandomScaleCrop((64, 96), (64, 96), scales=(1.0, 2.0))
    for _ in range(20):
        assert (crop(painted(blocks()), blocks())[1] != IGNORE).all()


def test_no_class_fills_a_crop_where_that_can_be_helped() -> None:
    """A left half of road and a right half of sky: one crop in two is of one class only."""
    label = torch.zeros(32, 128, dtype=torch.uint8)
    label[:, 64:] = 10
    label[:8, :] = IGNORE
    image = torch.zeros(3, 32, 128, dtype=torch.uint8)

    def largest_shares(limit: float) -> Tensor:
        crop = RandomScaleCrop((32, 128), (32, 64), scales=(1.0, 1.0), max_class_share=limit)
        found = []
        for draw in range(300):
            with seeded(draw):
                _, cut = crop(image, label)
            counts = torch.bincount(cut[cut != IGNORE], minlength=19)
            found.append(counts.max() / counts.sum())
        return torch.stack(found)

    assert (largest_shares(1.0) > 0.75).float().mean() > 0.4
    # Half of the draws are good enough: all ten of a crop fail once in a thousand.
    assert (largest_shares(0.75) > 0.75).float().mean() < 0.02


def test_a_crop_of_one_class_is_taken_where_there_is_no_other() -> None:
    for train_id in (4, IGNORE):
        label = torch.full((32, 64), train_id, dtype=torch.uint8)
        crop = RandomScaleCrop((32, 64), (32, 32), scales=(1.0, 1.0))
        assert torch.equal(crop(torch.zeros(3, 32, 64, dtype=torch.uint8), label)[1], label[:, :32])


# --- validation


@pytest.mark.parametrize("image_size", [(64, 96), (33, 47), (128, 200), (50, 50)])
@pytest.mark.parametrize("own_size", [(64, 96), (61, 97)])
def test_evaluation_does_what_the_saved_processor_does(own_size: tuple[int, int], image_size: tuple[int, int]) -> None:
    image = torch.randint(256, (3, *own_size), dtype=torch.uint8)
    label = torch.randint(19, own_size, dtype=torch.uint8)
    before = torch.get_rng_state()
    resized, found = EvalTransform(image_size)(image, label)
    assert torch.equal(torch.get_rng_state(), before), "nothing is random"
    assert resized.dtype == torch.uint8
    pixel_values = normalize(resized)
    # The label stays at its own size: predictions are judged there.
    assert torch.equal(found, label)
    processor = image_processor(image_size)
    array = image.permute(1, 2, 0).numpy()
    for given in (array, Image.fromarray(array)):
        theirs = processor(given, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixel_values, theirs, rtol=0, atol=1e-6)


def test_normalisation_is_torchvisions() -> None:
    image = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256).contiguous()
    expected = v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)(v2.functional.to_dtype(image, torch.float32, scale=True))
    torch.testing.assert_close(normalize(image), expected, rtol=0, atol=1e-6)
    batch = torch.stack([image, image.flip(-1)])
    assert torch.equal(normalize(batch)[1], normalize(image).flip(-1)) and normalize(batch).dtype == torch.float32


def test_images_of_the_right_size_are_not_touched() -> None:
    image, label = torch.randint(256, (3, *SIZE), dtype=torch.uint8), torch.randint(19, SIZE, dtype=torch.uint8)
    assert resize_image(image, SIZE) is image and resize_label(label, SIZE) is label


@pytest.mark.parametrize("size", [(2, 3), (3, 5), (8, 12), (5, 6)])
def test_labels_take_the_nearest_centre(size: tuple[int, int]) -> None:
    """By the formula: the centre of pixel i of n lies at (i + 1/2) / n of the side."""
    label = torch.arange(24, dtype=torch.uint8).view(4, 6)
    rows = ((torch.arange(size[0]) + 0.5) * 4 / size[0]).floor().long()
    columns = ((torch.arange(size[1]) + 0.5) * 6 / size[1]).floor().long()
    assert torch.equal(resize_label(label, size), label[rows][:, columns])


def test_labels_are_resized_as_by_torch() -> None:
    """To the pixel, where rounding decides too, and of views."""
    for _ in range(50):
        old, size = ((int(side) for side in torch.randint(1, 300, (2,))) for _ in range(2))
        label, size = torch.randint(19, (300, 400), dtype=torch.uint8)[7:, 9:][: next(old), : next(old)], tuple(size)
        assert torch.equal(
            resize_label(label, size), F.resize(label[None], list(size), v2.InterpolationMode.NEAREST_EXACT)[0]
        )
