"""What the device does to a batch is what torchvision's functions for uint8 images do to each image alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as F

from cityseg_hf.config import DataConfig
from cityseg_hf.data import augment
from cityseg_hf.data.augment import BLUR, CONTRAST, HUE, OPERATIONS, SATURATION, SCALE, SHARPNESS, SHIFT, Augment
from cityseg_hf.data.loading import seeded
from cityseg_hf.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize

NAMES = ("none", "flip", "original", "standard")
SIZES = [(64, 96), (37, 53), (33, 32)]
RANGES = {
    SHARPNESS: (2.0, 2.0),
    SCALE: (0.5, 1.5),
    CONTRAST: (0.5, 1.5),
    SATURATION: (0.5, 1.5),
    HUE: (-0.5, 0.5),
    BLUR: (0.1, 2.0),
    SHIFT: (-32, 32),
}
ORACLES: dict[int, Callable[[Tensor, float], Tensor]] = {
    SHARPNESS: F.adjust_sharpness,
    SCALE: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
    BLUR: lambda image, sigma: F.gaussian_blur(image, [3, 3], [sigma, sigma]),
    SHIFT: lambda image, shift: (image.to(torch.int16) + int(shift)).clamp_(0, 255).to(torch.uint8),
}


def pictures(size: tuple[int, int], batch: int = 4) -> Tensor:
    """``uint8[B, 3, H, W]``: noise, smooth colours, greys and the darkest levels in turn."""
    noise = torch.randint(256, (batch, 3, *size), dtype=torch.uint8)
    smooth = F.resize(torch.randint(256, (batch, 3, 5, 7), dtype=torch.uint8), list(size))
    kinds = (noise, smooth, noise[:, :1].expand(-1, 3, -1, -1), noise // 64)
    return torch.stack([kinds[index % 4][index] for index in range(batch)])


def levels(pixel_values: Tensor) -> Tensor:
    """Undoes the normalisation: 0..255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixel_values * std + mean) * 255


def by_torchvision(image: Tensor, parameters: Tensor) -> Tensor:
    """One image ``uint8[3, H, W]``, one function after the other."""
    flip, *steps = parameters.tolist() or [0.0]
    image = F.horizontal_flip(image) if flip else image
    for number, value in zip(steps[::2], steps[1::2], strict=True):
        image = ORACLES[int(number)](image, value) if number else image
    return image


def draw(transform: Augment, batch: int, seed: int = 0) -> Tensor:
    rows = []
    for index in range(batch):
        with seeded(seed, index):
            rows.append(transform.draw())
    return torch.stack(rows)


# --- each operation, and all together


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("number", OPERATIONS)
def test_an_operation_is_torchvisions(number: int, size: tuple[int, int]) -> None:
    """To the level; a blur's sum may fall to either side of a half."""
    images = pictures(size, batch=12)
    values = torch.empty(12).uniform_(*RANGES[number])
    values = values.round() if number == SHIFT else values
    found = images.float()
    augment._operate(OPERATIONS[number], list(found), list(range(12)), values)
    expected = torch.stack([ORACLES[number](*pair) for pair in zip(images, values.tolist(), strict=True)])
    difference = (found - expected).abs()
    assert difference.max() <= (1 if number == BLUR else 0)
    assert (difference > 0).float().mean() < 1e-3
    assert torch.equal(found, found.round()) and found.min() >= 0 and found.max() <= 255


def test_hue_of_every_colour() -> None:
    """All that are multiples of 15, with the greys and ties between channels that random ones rarely hit."""
    steps = torch.arange(0, 256, 15, dtype=torch.uint8)
    colours = torch.cartesian_prod(steps, steps, steps).T.reshape(3, 54, 108).contiguous()
    for turn in (-0.5, -1 / 3, -0.2, -0.05, 0.0, 1e-4, 1 / 6, 0.2, 0.5):
        turn = torch.tensor([turn])
        found = colours.float()[None]
        augment._operate(OPERATIONS[HUE], list(found), [0], turn)
        assert torch.equal(found[0], F.adjust_hue(colours, turn.item()).float()), turn


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_what_torchvision_makes_of_each_image(name: str, size: tuple[int, int]) -> None:
    transform, images = Augment(DataConfig(augmentation=name)), pictures(size, batch=24)
    labels = torch.randint(256, (24, *size), dtype=torch.uint8)
    parameters = draw(transform, 24)
    pixel_values, found = transform(images, labels, parameters)
    assert pixel_values.shape == images.shape and pixel_values.dtype == torch.float32 and pixel_values.is_contiguous()
    assert found.dtype == torch.uint8
    expected = torch.stack([by_torchvision(*pair) for pair in zip(images, parameters, strict=True)])
    difference = (levels(pixel_values) - expected).abs()
    assert difference.max() < 1.01 and (difference > 0.01).float().mean() < 1e-3
    flips = parameters[:, 0] if name != "none" else torch.zeros(24)
    for label, flipped, given in zip(labels, found, flips, strict=True):
        assert torch.equal(flipped, label.flip(-1) if given else label)


# --- batches


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    """Bit for bit: alone, in another order, in tiles of another size, and twice."""
    transform, images = Augment(DataConfig(augmentation=name)), pictures((40, 64), batch=6)
    labels, parameters = (
        torch.randint(19, (6, 40, 64), dtype=torch.uint8),
        draw(Augment(DataConfig(augmentation=name)), 6),
    )
    whole = transform(images, labels, parameters)
    for part in ([0], [5, 2], [3, 3, 1], [0, 1, 2, 3, 4, 5]):
        for found, expected in zip(transform(images[part], labels[part], parameters[part]), whole, strict=True):
            assert torch.equal(found, expected[part])


def test_tiles_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    transform, images = Augment(DataConfig(augmentation="original")), pictures((45, 64), batch=8)
    labels, parameters = (
        torch.zeros(8, 45, 64, dtype=torch.uint8),
        draw(Augment(DataConfig(augmentation="original")), 8),
    )
    whole, _ = transform(images, labels, parameters)
    for pixels in (1, 64 * 7, 64 * 44):
        monkeypatch.setattr(augment, "TILE_PIXELS", pixels)
        assert torch.equal(transform(images, labels, parameters)[0], whole)


@pytest.mark.parametrize("name", ["original", "standard"])
def test_other_devices_take_all_samples_of_an_operation_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, walked on the CPU."""
    transform, images = Augment(DataConfig(augmentation=name)), pictures((40, 64), batch=8)
    labels, parameters = torch.zeros(8, 40, 64, dtype=torch.uint8), draw(Augment(DataConfig(augmentation=name)), 8)
    expected, _ = transform(images, labels, parameters)
    monkeypatch.setattr(augment, "_one_by_one", lambda device: False)
    found, _ = transform(images, labels, parameters)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_input_is_left_alone_whatever_its_strides(name: str) -> None:
    transform, images = Augment(DataConfig(augmentation=name)), pictures((40, 64))
    labels, parameters = (
        torch.randint(19, (4, 40, 64), dtype=torch.uint8),
        draw(Augment(DataConfig(augmentation=name)), 4),
    )
    given = images.clone(), labels.clone(), parameters.clone()
    expected = transform(*given)
    assert all(torch.equal(one, other) for one, other in zip(given, (images, labels, parameters), strict=True))
    # Channels last, and every second column of something wider.
    strided = images.contiguous(memory_format=torch.channels_last), labels.repeat_interleave(2, -1)[..., ::2]
    assert not strided[1].is_contiguous()
    for found, wanted in zip(transform(*strided, parameters), expected, strict=True):
        assert torch.equal(found, wanted)


class NoSync(TorchDispatchMode):
    """Fails where a value of a tensor decides what the host does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.index)
        assert function.overloadpacket not in waits, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_host_does_not_wait(name: str, one_by_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "_one_by_one", lambda device: one_by_one)
    transform, images = Augment(DataConfig(augmentation=name)), pictures((32, 32))
    parameters = draw(transform, 4)
    with NoSync():
        transform(images, images[:, 0], parameters)


# --- what is drawn


def test_none_draws_nothing() -> None:
    before = torch.get_rng_state()
    assert Augment(DataConfig(augmentation="none")).draw().shape == (0,)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", NAMES)
def test_draws_are_repeatable(name: str) -> None:
    transform = Augment(DataConfig(augmentation=name))
    once, again, other = (draw(transform, 20, seed) for seed in (1, 1, 2))
    assert once.dtype == torch.float32 and torch.equal(once, again)
    assert name == "none" or not torch.equal(once, other)


def even(values: Tensor, low: float, high: float) -> bool:
    """Whether values fill a range and no more, evenly: its mean and deviation within four of theirs."""
    middle, deviation, count = (low + high) / 2, (high - low) / 12**0.5, len(values)
    inside = bool((values >= low - 1e-6).all() and (values <= high + 1e-6).all())
    return (
        inside and abs(values.mean() - middle) < 4 * deviation / count**0.5 and abs(values.std() / deviation - 1) < 0.1
    )


def test_the_draws_of_original_are_torchvisions() -> None:
    rows = draw(Augment(DataConfig(augmentation="original")), 2000)
    assert rows.shape == (2000, 13)
    assert 900 < rows[:, 0].sum() < 1100
    assert 900 < (rows[:, 1] == SHARPNESS).sum() < 1100 and set(rows[rows[:, 1] > 0, 2].tolist()) == {2.0}
    numbers, values = rows[:, 3:11:2], rows[:, 4:11:2]
    orders, counts = numbers.unique(dim=0, return_counts=True)
    assert len(orders) == 24 and counts.min() > 45 and counts.max() < 130, "83 each, with a deviation of 9"
    for number in (SCALE, CONTRAST, SATURATION):
        assert even(values[numbers == number], 0.8, 1.2)
    assert even(values[numbers == HUE], -0.2, 0.2)
    assert (rows[:, 11] == BLUR).all() and even(rows[:, 12], 0.1, 2.0)


def test_the_draws_of_standard_are_the_papers() -> None:
    rows = draw(Augment(DataConfig(augmentation="standard")), 2000)
    assert rows.shape == (2000, 11)
    applied = rows[:, 1::2] > 0
    assert 900 < rows[:, 0].sum() < 1100
    share = applied.float().mean(0)
    assert (abs(share - torch.tensor([0.5, 0.25, 0.5, 0.5, 0.25])) < 0.05).all(), "contrast in one of two places"
    assert not (applied[:, 1] & applied[:, 4]).any()
    for place, (number, low, high) in enumerate(
        [(SHIFT, -32, 32), (SCALE, 0.5, 1.5), (SATURATION, 0.5, 1.5), (HUE, -0.05, 0.05), (SCALE, 0.5, 1.5)]
    ):
        chosen = rows[applied[:, place]][:, [1 + 2 * place, 2 + 2 * place]]
        assert (chosen[:, 0] == number).all() and even(chosen[:, 1], low, high)
    # Nothing at all happens to one image in 16 (125, with a deviation of 11).
    assert 75 < (~applied).all(1).sum() < 175


def test_distortion_of_greys_by_hand() -> None:
    """Grey has no colour: brightness adds, contrast multiplies, saturation and hue do nothing."""
    transform = Augment(DataConfig(augmentation="standard"))
    image = torch.tensor([0, 10, 100, 250], dtype=torch.uint8).expand(1, 3, 1, 4)

    def distorted(*steps: float) -> list[int]:
        parameters = torch.tensor([[0.0, *steps, *[0.0] * (10 - len(steps))]])
        pixel_values, _ = transform(image, image[:, 0], parameters)
        found = levels(pixel_values).round()
        assert (found == found[:, :1]).all()
        return found[0, 0, 0].int().tolist()

    assert distorted() == [0, 10, 100, 250]
    assert distorted(SHIFT, 32) == [32, 42, 132, 255]
    assert distorted(SHIFT, -32) == [0, 0, 68, 218]
    assert distorted(SCALE, 0.5) == [0, 5, 50, 125]
    assert distorted(SCALE, 1.5) == [0, 15, 150, 255]
    assert distorted(SHIFT, 10, SCALE, 0.5) == [5, 10, 55, 127]
    # A grey's share of itself is 0.2989 + 0.587 + 0.114: torchvision's grey of 100 is 99.
    assert distorted(HUE, 0.05) == [0, 10, 100, 250]


def test_normalisation_may_be_in_place() -> None:
    image = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    own = image.float()
    assert normalize(own, out=own) is own and torch.equal(own, normalize(image))
