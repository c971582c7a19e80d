"""Windows, scales and mirror images against naive torch, and where they must change nothing."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from cityseg_hf import UserError, build_model
from cityseg_hf.data.transforms import EvalTransform
from cityseg_hf.inference import native_logits, predict
from cityseg_hf.labels import NUM_CLASSES
from cityseg_hf.upsampled import add_softmax, argmax, argmax_and_confidence
from cityseg_hf.views import FIELD_SCALES, Views, scaled_size

SEGFORMER = dict(hidden_sizes=[16] * 4, depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=16)


def network(name: str = "segformer_b0", **config: object) -> PreTrainedModel:
    """Small, with random weights that answer every class somewhere."""
    torch.manual_seed(0)
    model = build_model(name, **(config or SEGFORMER)).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.out_channels == NUM_CLASSES:
            nn.init.normal_(module.weight, std=40.0 if name == "segformer_b0" else 1.0)
    return model


def logits_of(model: PreTrainedModel, image: Tensor, size: tuple[int, int], views: Views) -> Tensor:
    (logits,) = native_logits(model, image, [size], views)
    return logits


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def naive_windows(
    see: Callable[[Tensor], Tensor], image: Tensor, window: tuple[int, int], stride: tuple[int, int], step: int = 1
) -> Tensor:
    """Sum of weight * logits over sum of weight, pixel by pixel of the image or of every ``step``-th."""
    height, width = image.shape[-2:]
    window = min(window[0], height), min(window[1], width)
    total = torch.zeros(1, NUM_CLASSES, height // step, width // step, dtype=torch.float64)
    weights = torch.zeros_like(total)
    bumps = [
        torch.tensor([math.sin(math.pi * (k + 0.5) / (side // step)) ** 2 for k in range(side // step)])
        for side in window
    ]
    for y in {*range(0, height - window[0], stride[0]), height - window[0]}:
        for x in {*range(0, width - window[1], stride[1]), width - window[1]}:
            part = upsample(see(image[..., y : y + window[0], x : x + window[1]]), tuple(s // step for s in window))
            rows = slice(y // step, (y + window[0]) // step)
            columns = slice(x // step, (x + window[1]) // step)
            total[..., rows, columns] += part * bumps[0][:, None] * bumps[1]
            weights[..., rows, columns] += bumps[0][:, None] * bumps[1]
    return (total / weights).float()


@pytest.mark.parametrize(
    ("size", "window", "stride", "step"),
    [
        ((96, 160), (64, 64), (32, 48), 4),  # all on the grid of stride 4: averaged there
        ((96, 160), (64, 64), (64, 64), 4),  # last windows flush with the border
        ((96, 160), (64, 64), (30, 41), 1),  # off the grid: at the image's size
        ((90, 150), (64, 64), (48, 48), 1),
        ((96, 160), (128, 64), (96, 32), 4),  # higher than the image
        ((50, 70), (33, 47), (20, 25), 1),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3])
@torch.no_grad()
def test_windows_are_a_weighted_mean(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], step: int, batch_size: int
) -> None:
    model, image = network(), torch.randn(1, 3, *size)
    views = Views(window=window, stride=stride, batch_size=batch_size)
    found = logits_of(model, image, size, views)
    expected = naive_windows(lambda x: model(pixel_values=x).logits, image, window, stride, step)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_windows_of_a_network_without_stride() -> None:
    """UNet's logits are as large as the image: the image's size is its grid."""
    model, image = network("unet_small", hidden_sizes=[8, 16]), torch.randn(1, 3, 60, 97)
    found = logits_of(model, image, (60, 97), Views(window=(40, 40), stride=(17, 23)))
    expected = naive_windows(lambda x: model(pixel_values=x).logits, image, (40, 40), (17, 23))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [(64, 96), (100, 200)])
@torch.no_grad()
def test_one_window_is_the_whole_image(window: tuple[int, int]) -> None:
    """To the last bit; an image smaller than the window is one window."""
    model, images = network(), torch.randn(2, 3, 64, 96)
    found = torch.cat(list(native_logits(model, images, [(70, 90)] * 2, Views(window=window))))
    torch.testing.assert_close(found, model(pixel_values=images).logits, rtol=0, atol=1e-5)  # a batch of two, and ones
    for image in images.split(1):
        assert torch.equal(
            logits_of(model, image, (70, 90), Views(window=window)), logits_of(model, image, (70, 90), Views())
        )


@torch.no_grad()
def test_the_plain_view_is_the_network() -> None:
    model, images = network(), torch.randn(2, 3, 64, 96)
    logits = model(pixel_values=images).logits
    assert torch.equal(torch.cat(list(native_logits(model, images, [(64, 96)] * 2))), logits)
    assert torch.equal(predict(model, images, (70, 90)), argmax(logits, (70, 90)))
    only = Views(scales=(1.0,), window=None, flip=False, batch_size=4)
    assert only.plain
    assert torch.equal(torch.cat(list(native_logits(model, images, [(64, 96)] * 2, only))), logits)


@pytest.mark.parametrize("window", [None, (32, 64)])
@torch.no_grad()
def test_views_are_averaged_as_probabilities(window: tuple[int, int] | None) -> None:
    """Against softmax at full size, summed over all scales and mirror images."""
    model, images, size = network(), torch.randn(2, 3, 64, 96), (70, 90)
    found = list(native_logits(model, images, [size] * 2, Views(scales=(0.5, 1.0, 1.5), flip=True, window=window)))
    for image, logits in zip(images.split(1), found, strict=True):
        probabilities = torch.zeros(1, NUM_CLASSES, *size)
        for scale in (0.5, 1.0, 1.5):
            there = scaled_size((64, 96), scale)
            scaled = F.interpolate(image, there, mode="bilinear", antialias=True) if scale != 1 else image
            for flip in (False, True):
                seen = scaled.flip(-1) if flip else scaled
                view = logits_of(model, seen, size, Views(window=window))
                view = upsample(view, size).softmax(1)
                probabilities += (view.flip(-1) if flip else view) / 6
        assert logits.shape == (1, NUM_CLASSES, *size)
        torch.testing.assert_close(logits.exp(), probabilities, rtol=1e-4, atol=1e-6)
        # What comes after takes it as it is.
        best, sure = argmax_and_confidence(logits, size)
        assert torch.equal(best[0].long(), logits[0].argmax(0))
        torch.testing.assert_close(sure, probabilities.amax(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("views", [Views(flip=True), Views(flip=True, scales=(0.5, 1.0), window=(32, 48))])
def test_mirror_images_get_mirrored_answers(views: Views) -> None:
    model, image = network(), torch.randn(1, 3, 64, 96)
    mirrored = logits_of(model, image.flip(-1), (70, 90), views).flip(-1)
    torch.testing.assert_close(mirrored, logits_of(model, image, (70, 90), views), rtol=1e-4, atol=1e-5)
    plain = logits_of(model, image.flip(-1), (70, 90), Views()).flip(-1)
    assert (plain - logits_of(model, image, (70, 90), Views())).abs().max() > 0.1  # the network itself has no symmetry


def test_images_of_one_batch_may_have_other_sizes() -> None:
    model, images = network(), torch.randn(2, 3, 64, 96)
    both = list(native_logits(model, images, [(70, 90), (33, 44)], Views(flip=True)))
    assert [tuple(logits.shape[-2:]) for logits in both] == [(70, 90), (33, 44)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_are_averaged_in_float32(dtype: torch.dtype) -> None:
    model, image = network(), torch.randn(1, 3, 64, 96)
    views = Views(window=(32, 48), stride=(32, 32), flip=True)
    expected = logits_of(model, image, (64, 96), views)
    found = logits_of(model.to(dtype), image, (64, 96), views)
    assert found.dtype == torch.float32
    assert (found.exp() - expected.exp()).abs().mean() < 0.02


def test_softmax_and_confidence_are_torchs() -> None:
    for coarse, full in (((60, 70), (240, 280)), ((13, 17), (40, 50)), ((20, 20), (20, 20)), ((64, 64), (50, 41))):
        logits = 5 * torch.randn(2, NUM_CLASSES, *coarse)
        probabilities = upsample(logits, full).softmax(1)
        best, sure = argmax_and_confidence(logits, full)
        assert torch.equal(best, argmax(logits, full))
        torch.testing.assert_close(sure, probabilities.amax(1), rtol=1e-5, atol=1e-6)
        total = torch.ones(NUM_CLASSES, *full)
        add_softmax(logits[0], total, 0.25)
        torch.testing.assert_close(total, 1 + probabilities[0] / 4, rtol=1e-5, atol=1e-6)


def test_windows_cover_every_pixel_once_in_sum() -> None:
    for size, window, stride in (((1024, 2048), (769, 769), (513, 513)), ((100, 333), (64, 64), (1, 64))):
        for axis in Views(window=window, stride=stride).axes(size):
            shares, total = axis.shares(torch.device("cpu")), torch.zeros(axis.side)
            for start, share in zip(axis.starts, shares, strict=True):
                total[start : start + axis.window] += share
            torch.testing.assert_close(total, torch.ones(axis.side))
            assert shares.min() > 0
            assert axis.starts[-1] + axis.window == axis.side


def test_the_default_stride_is_three_quarters() -> None:
    """SegFormer's own: windows of 1024, 768 apart."""
    rows, columns = Views(window=(1024, 1024)).axes((1024, 2048))
    assert (rows.starts, columns.starts) == ([0], [0, 768, 1024])
    assert [scaled_size((1024, 2048), scale) for scale in FIELD_SCALES][:2] == [(512, 1024), (768, 1536)]


@pytest.mark.parametrize(
    "settings",
    [
        dict(stride=(32, 32)),
        dict(window=(16, 64)),
        dict(window=(64, 64), stride=(65, 64)),
        dict(window=(64, 64), stride=(0, 64)),
        dict(scales=()),
        dict(scales=(1.0, math.nan)),
        dict(scales=(math.inf,)),
        dict(batch_size=0),
    ],
)
def test_views_that_make_no_sense_are_refused(settings: dict) -> None:
    with pytest.raises(UserError, match="--"):
        Views(**settings)


def test_evaluation_takes_views(streets: Path) -> None:
    """One window as large as the image scores as the whole image; other views give other scores."""
    from cityseg_hf import load_cityscapes
    from cityseg_hf.data.loading import SegmentationDataset
    from cityseg_hf.data.sources import file_sources
    from cityseg_hf.evaluation import evaluate, evaluation_loader

    dataset = SegmentationDataset(file_sources(load_cityscapes(streets))["val"], EvalTransform((32, 64)))
    model = network()

    def scores(views: Views) -> dict[str, float | None]:
        return dict(evaluate(model, evaluation_loader(dataset, batch_size=1, num_workers=0), views=views))

    plain = scores(Views())
    assert scores(Views(window=(32, 64))) == plain
    averaged = scores(Views(flip=True, scales=(0.5, 1.0, 1.75), window=(32, 32)))
    assert averaged != plain
