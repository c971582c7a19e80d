"""Losses against hand-worked values, their definitions, and torchvision; class weights; crops of rare classes."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY_UNET, read_lines
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from cityseg_hf.data.transforms import RandomScaleCrop
from cityseg_hf.image_losses import IMAGE_LOSSES, image_loss_sum
from cityseg_hf.labels import IGNORE
from cityseg_hf.losses import class_weights, label_mass, loss_sum

RunTrain = Callable[..., Path]
NAMES = tuple(IMAGE_LOSSES)


def case(size: tuple[int, int] = (5, 7), classes: int = 4, images: int = 2) -> tuple[Tensor, Tensor]:
    """Logits ``float64[B, C, h, w]`` and labels twice their size, a fifth of them void."""
    torch.manual_seed(3)
    labels = torch.randint(classes, (images, 2 * size[0], 2 * size[1]))
    labels[torch.rand(labels.shape) < 0.2] = IGNORE
    return 2 * torch.randn(images, classes, *size, dtype=torch.float64), labels


def flat(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities ``[N, C]`` and labels ``[N]`` of the valid pixels of one image, at the size of the label."""
    full = F.interpolate(logits[None], labels.shape, mode="bilinear", align_corners=False)[0]
    valid = labels != IGNORE
    return full.permute(1, 2, 0)[valid].softmax(1), labels[valid]


def jaccard_loss(wrong: Tensor, labels: Tensor) -> float:
    """One minus the intersection over union when the pixels ``wrong`` are."""
    predicted = labels ^ wrong
    return 1 - (predicted & labels).sum().item() / (predicted | labels).sum().item()


def plain_lovasz(p: Tensor, labels: Tensor) -> float:
    """The extension of a set function, as an integral: over all t, the loss when errors of t and more are mistakes."""
    losses = []
    for c in labels.unique():
        mine = labels == c
        errors = (mine.double() - p[:, c]).abs()
        steps = torch.cat([torch.zeros(1, dtype=torch.float64), errors.sort().values])
        losses.append(sum(float(b - a) * jaccard_loss(errors >= b, mine) for a, b in itertools.pairwise(steps)))
    return sum(losses) / len(losses)


def plain_dice(p: Tensor, labels: Tensor) -> float:
    one_hot = F.one_hot(labels, p.shape[1]).double()
    scores = [2 * (p[:, c] @ one_hot[:, c]) / ((p[:, c] ** 2).sum() + one_hot[:, c].sum()) for c in labels.unique()]
    return float(1 - sum(scores) / len(scores))


def plain_ohem(p: Tensor, labels: Tensor) -> float:
    mine = p.gather(1, labels[:, None])[:, 0].sort().values
    kept = max(int((mine <= 0.7).sum()), math.ceil(len(mine) / 16))
    return float(-mine[:kept].log().mean())


def plain_focal(p: Tensor, labels: Tensor) -> float:
    mine = p.gather(1, labels[:, None])[:, 0]
    return float((-((1 - mine) ** 2) * mine.log()).mean())


@pytest.mark.parametrize("plain", [plain_lovasz, plain_dice, plain_ohem, plain_focal])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_losses_are_their_definitions(plain, scale: float) -> None:
    logits, labels = case()
    expected = sum(
        plain(*flat(scale * image, label)) * int((label != IGNORE).sum())
        for image, label in zip(logits, labels, strict=True)
    )
    name = plain.__name__.removeprefix("plain_")
    assert image_loss_sum(scale * logits, labels, {name: 1.0}, None).item() == pytest.approx(expected, rel=1e-9)


def test_focal_loss_is_torchvisions() -> None:
    """The softmax of two classes is the sigmoid of their difference."""
    logits, labels = case((6, 6), classes=2, images=1)
    logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    valid = labels != IGNORE
    expected = sigmoid_focal_loss((logits[:, 1] - logits[:, 0])[valid], labels[valid].double(), alpha=-1, gamma=2)
    torch.testing.assert_close(image_loss_sum(logits, labels, {"focal": 1.0}, None), expected.sum())


def scores_of(labels: Tensor, certainty: float = 60.0) -> Tensor:
    """Logits that say what a map of two classes says: ``[H, W]`` -> ``float[1, 2, H, W]``."""
    return certainty * F.one_hot(labels, 2).permute(2, 0, 1)[None].double()


def test_lovasz_of_hard_predictions_is_the_jaccard_loss() -> None:
    """Four pixels: class 0 has an IoU of 1/2, class 1 of 2/3."""
    labels, said = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 1]])
    value = image_loss_sum(scores_of(said), labels[None], {"lovasz": 1.0}, None) / 4
    assert value.item() == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_boundaries_by_hand() -> None:
    """An edge one or two pixels away is found, one four away is not; half an edge is half a recall."""
    labels = torch.zeros(16, 16, dtype=torch.long)
    labels[:, 8:] = 1

    def value(said: Tensor) -> float:
        return image_loss_sum(scores_of(said), labels[None], {"boundary": 1.0}, None).item() / labels.numel()

    assert value(labels) == pytest.approx(0, abs=1e-6)
    assert value(labels.roll(1, 1).index_fill(1, torch.tensor([0]), 0)) == pytest.approx(0, abs=1e-6)
    assert value(torch.zeros_like(labels)) == pytest.approx(1, abs=1e-6)
    far = torch.zeros_like(labels)
    far[:, 13:] = 1
    assert value(far) == pytest.approx(1, abs=1e-6)
    # Each class has one column of boundary, 16 pixels. Its upper half is found; the other half lies at the end of the
    # map, five columns away, and where the edge bends.
    half = labels.clone()
    half[8:, 8:13] = 0
    assert 0.3 < value(half) < 0.7


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_are_those_of_the_loss(name: str, weighted: bool) -> None:
    logits, labels = case((4, 5))
    weights = torch.tensor([1.0, 3.0, 0.5, 2.0]) if weighted else None
    share = {name: 0.7}
    assert torch.autograd.gradcheck(
        lambda x: image_loss_sum(x, labels, share, weights), (logits / 4).requires_grad_(), atol=1e-4
    )


@pytest.mark.parametrize("name", ("ce", *NAMES))
def test_void_and_other_images_change_nothing(name: str) -> None:
    """Void is neither right nor wrong, and a batch is its images: so the mean is exact however it is cut up."""
    _, labels = case()
    logits = torch.randn(2, 4, *labels.shape[1:])
    before = loss_sum(logits, labels, {name: 1.0})
    parts = [loss_sum(image[None], label[None], {name: 1.0}) for image, label in zip(logits, labels, strict=True)]
    torch.testing.assert_close(sum(parts), before)
    noise = 9 * torch.randn_like(logits) * (labels == IGNORE)[:, None]
    torch.testing.assert_close(loss_sum(logits + noise, labels, {name: 1.0}), before)
    torch.testing.assert_close(loss_sum(logits, labels.to(torch.uint8), {name: 1.0}), before)


@pytest.mark.parametrize("name", ("ce", *NAMES))
def test_all_void_and_narrow_logits(name: str) -> None:
    logits = torch.randn(2, 19, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.full((2, 8, 8), IGNORE, dtype=torch.uint8)
    loss = loss_sum(logits, labels, {name: 1.0})
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == 0 and not logits.grad.any()
    labels[0, :4] = 3
    (slope,) = torch.autograd.grad(loss_sum(logits, labels, {name: 1.0}), logits)
    assert slope.dtype == torch.bfloat16 and slope.isfinite().all() and not slope[1].any()


def test_a_sum_is_a_sum() -> None:
    logits, labels = case()
    weights = torch.tensor([1.0, 3.0, 0.5, 2.0])
    total = loss_sum(logits, labels, {"ce": 1.0, "lovasz": 0.5, "dice": 2.0}, weights)
    parts = [
        share * loss_sum(logits, labels, {name: 1.0}, weights)
        for name, share in (("ce", 1.0), ("lovasz", 0.5), ("dice", 2.0))
    ]
    torch.testing.assert_close(total, sum(parts))
    # A loss of 1 for each image is 1 in the mean, whatever the classes weigh.
    certain = F.one_hot((labels + 1).clamp(max=4) % 4, 4).permute(0, 3, 1, 2) * 60.0
    mean = loss_sum(certain, labels, {"dice": 1.0}, weights) / label_mass(labels, weights)
    assert mean.item() == pytest.approx(1, abs=1e-3)


def test_a_training_with_all_losses_and_however_it_is_cut(run_train: RunTrain, streets) -> None:
    loss = "0.5*ce+0.25*focal+ohem+dice+lovasz+0.1*boundary"
    argv = ("-d", streets, *TINY_UNET, "--max_steps", 3, "--loss", loss, "--class_weights", "median")
    argv += ("-a", "standard", "--rare_class_crops", 0.5, "--logging_steps", 1)
    runs = [
        run_train(*argv, "-b", 4, name="one"),
        run_train(*argv, "-b", 2, "--gradient_accumulation_steps", 2, name="two"),
    ]
    curves = [[line["loss"] for line in read_lines(run) if line["split"] == "train"] for run in runs]
    assert len(curves[0]) == 3 and curves[0] == pytest.approx(curves[1], rel=1e-5)


# --- class weights

COUNTS = torch.tensor([[98, 2, 0], [4, 1, 0], [100, 40, 0]])
"""Of 100 pixels in four images: one class in all of them, one in a single image of 40 pixels, one in none."""


def test_class_weights_by_hand() -> None:
    enet = class_weights(COUNTS, "enet")
    torch.testing.assert_close(enet, torch.tensor([1 / math.log(2.0), 1 / math.log(1.04), 1 / math.log(1.02)]))
    torch.testing.assert_close(class_weights(COUNTS, "enet_sqrt").square(), enet)
    torch.testing.assert_close(class_weights(COUNTS, "inverse"), torch.tensor([1 / 0.98, 50.0, 100.0]))
    # Frequencies 0.98 and 0.05, their median 0.515; a class of one pixel in one image of one pixel has 1.
    torch.testing.assert_close(class_weights(COUNTS, "median"), torch.tensor([0.515 / 0.98, 0.515 / 0.05, 0.515]))
    # b = 3/4; the effective number of 4 images is (1 - 0.75^4) / 0.25, of one image 1.
    torch.testing.assert_close(class_weights(COUNTS, "effective"), torch.tensor([0.25 / (1 - 0.75**4), 1.0, 1.0]))


# --- crops


def test_crops_around_rare_classes() -> None:
    """A class of a thousandth of the pixels is in every second crop when one of two classes is drawn for each."""
    label = torch.zeros(256, 512, dtype=torch.uint8)
    label[100:109, 300:309] = 7
    image = label.expand(3, -1, -1)
    found = {}
    for share in (0.0, 1.0):
        crop = RandomScaleCrop((256, 512), (48, 64), (1.0, 1.0), max_class_share=1.0, rare_class_crops=share)
        torch.manual_seed(0)
        found[share] = sum(bool((crop(image, label)[1] == 7).any()) for _ in range(300)) / 300
    assert found[0.0] < 0.1 and 0.45 < found[1.0] < 0.65
    torch.manual_seed(0)
    assert crop(image, torch.full_like(label, IGNORE))[1].eq(IGNORE).all()
