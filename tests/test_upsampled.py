"""Coarse logits judged at full resolution: against torch's own upsampling, cross-entropy and argmax."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cityseg_hf import pieces, upsampled
from cityseg_hf.labels import IGNORE
from cityseg_hf.upsampled import argmax, argmax_and_loss, cross_entropy_sum


@pytest.fixture(autouse=True, params=["phases", "bands"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs both ways wherever the factor is whole."""
    monkeypatch.setattr(pieces, "PHASE_PIXELS", 0 if request.param == "phases" else 10**9)


# Coarse size and full size: even, odd and unlike whole factors, none at all, fractions, and smaller than the logits.
SIZES = [
    ((8, 16), (32, 64)),
    ((8, 16), (24, 80)),
    ((5, 6), (160, 192)),
    ((7, 9), (7, 9)),
    ((6, 8), (45, 61)),
    ((48, 64), (360, 480)),
    ((20, 30), (10, 15)),
    ((1, 1), (32, 32)),
]


def make(coarse: tuple[int, int], full: tuple[int, int], classes: int = 19) -> tuple[Tensor, Tensor]:
    """Logits ``float32[2, C, h, w]`` and labels ``uint8[2, H, W]``, a tenth of them void."""
    labels = torch.randint(classes, (2, *full), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < 0.1] = IGNORE
    return 3 * torch.randn(2, classes, *coarse), labels


def plain(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    scores = F.interpolate(logits, labels.shape[-2:], mode="bilinear")
    return F.cross_entropy(scores, labels.long(), weight=weights, ignore_index=IGNORE, reduction="sum")


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


@pytest.mark.parametrize("tile", [pieces.TILE, 5000])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("coarse", "full"), SIZES)
def test_loss_and_gradient_are_torchs(
    coarse: tuple[int, int], full: tuple[int, int], weighted: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "TILE", tile)
    logits, labels = make(coarse, full)
    logits = logits.double().requires_grad_()
    weights = torch.rand(19, dtype=torch.float64) + 0.5 if weighted else None
    ours, theirs = cross_entropy_sum(logits, labels, weights), plain(logits, labels, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits), rtol=1e-6, atol=1e-9)
    assert torch.equal(cross_entropy_sum(logits, labels.long(), weights), ours)


@pytest.mark.parametrize(("coarse", "full"), [((3, 4), (12, 12)), ((3, 4), (3, 4)), ((3, 4), (8, 7))])
def test_the_gradient_is_the_slope(coarse: tuple[int, int], full: tuple[int, int]) -> None:
    """By finite differences in float64."""
    logits, labels = make(coarse, full, classes=5)
    assert torch.autograd.gradcheck(lambda x: cross_entropy_sum(x, labels), logits.double().requires_grad_())
    weights = torch.rand(5) + 0.5
    assert torch.autograd.gradcheck(lambda x: cross_entropy_sum(x, labels, weights), logits.double().requires_grad_())


def test_the_gradient_meets_what_comes_before_and_after() -> None:
    logits, labels = make((8, 8), (32, 32))
    logits.requires_grad_()
    ours, theirs = ((f(2 * logits, labels) * 0.25) for f in (cross_entropy_sum, plain))
    torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits), rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused() -> None:
    logits, labels = make((4, 4), (16, 16))
    logits.requires_grad_()
    (slope,) = torch.autograd.grad(cross_entropy_sum(logits, labels).square(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    logits, labels = make((8, 16), (32, 64))
    narrow = logits.to(dtype).requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    loss, expected = cross_entropy_sum(narrow, labels), plain(wide, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    slope = gradient(loss, narrow)
    assert slope.dtype == dtype
    torch.testing.assert_close(slope.float(), gradient(expected, wide), rtol=1e-2, atol=1e-3)


def test_autocast_changes_nothing() -> None:
    for coarse, full in SIZES[:6]:
        logits, labels = make(coarse, full)
        expected = cross_entropy_sum(logits, labels)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(cross_entropy_sum(logits, labels), expected)
            assert torch.equal(cross_entropy_sum(logits.requires_grad_(), labels).detach(), expected) or torch.allclose(
                cross_entropy_sum(logits, labels), expected, rtol=1e-6
            )


def test_void_weighs_nothing() -> None:
    logits, labels = make((4, 4), (16, 16))
    labels.fill_(IGNORE)
    logits.requires_grad_()
    loss = cross_entropy_sum(logits, labels)
    assert loss == 0 and (gradient(loss, logits) == 0).all()


def test_confident_logits_do_not_overflow() -> None:
    logits, labels = make((4, 4), (16, 16))
    logits = (1e4 * logits).requires_grad_()
    ours, theirs = cross_entropy_sum(logits, labels), plain(logits, labels)
    assert torch.isfinite(ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mixed", [0.0, 2.0])
@pytest.mark.parametrize(("coarse", "full"), SIZES)
def test_argmax_is_torchs(
    coarse: tuple[int, int], full: tuple[int, int], mixed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether each cell is looked at or only those whose corners disagree; equal but where two scores almost are."""
    monkeypatch.setattr(upsampled, "MIXED_CELLS", mixed)
    logits, labels = make(coarse, full)
    scores = F.interpolate(logits, full, mode="bilinear")
    found = argmax(logits, full)
    assert found.dtype == torch.uint8 and found.shape == (2, *full)
    best, second = scores.topk(2, dim=1).values.unbind(1)
    clear = best - second > 1e-5
    assert clear.float().mean() > 0.999
    assert torch.equal(found[clear].long(), scores.argmax(1)[clear])
    both, loss = argmax_and_loss(logits, labels)
    assert torch.equal(both[clear], found[clear])
    torch.testing.assert_close(loss, plain(logits, labels), rtol=1e-5, atol=0)


def test_argmax_of_a_street(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large areas of one class, as networks answer: most cells need no look, and the result is the same."""
    areas = F.interpolate(torch.randint(19, (1, 1, 4, 8)).float(), (64, 128))[0, 0].long()
    logits = 8 * F.one_hot(areas, 19).permute(2, 0, 1)[None].float() + torch.randn(1, 19, 64, 128)
    looked_at = []
    first_best = upsampled._first_best
    monkeypatch.setattr(upsampled, "_first_best", lambda x: looked_at.append(x[0].numel()) or first_best(x))
    assert torch.equal(
        argmax(logits, (256, 512))[0].long(), F.interpolate(logits, (256, 512), mode="bilinear").argmax(1)[0]
    )
    if pieces.PHASE_PIXELS == 0:
        assert sum(looked_at) < 0.5 * 256 * 512


@pytest.mark.parametrize("classes", [8, 19, 24, 25, 150])
def test_the_first_of_equals_wins(classes: int) -> None:
    logits = torch.zeros(1, classes, 4, 4)
    logits[:, [3, 7]] = 1
    for size in ((16, 16), (4, 4), (9, 7)):
        assert (argmax(logits, size) == 3).all()


def test_logits_that_are_no_numbers_give_a_class_that_exists() -> None:
    logits = torch.full((1, 19, 4, 4), float("nan"))
    assert (argmax(logits, (16, 16)) < 19).all()
    labels = torch.zeros(1, 16, 16, dtype=torch.uint8)
    assert torch.isnan(cross_entropy_sum(logits, labels)) and torch.isnan(
        cross_entropy_sum(logits.requires_grad_(), labels)
    )


@pytest.mark.parametrize("factor", range(1, 9))
def test_phases_are_where_torch_puts_pixels(factor: int) -> None:
    """Each output pixel belongs to one phase and has torch's value."""
    line = torch.rand(5, dtype=torch.float64)
    expected = F.interpolate(line[None, None], scale_factor=factor, mode="linear")[0, 0]
    padded, found = F.pad(line[None], (1, 1), mode="replicate")[0], torch.full((5 * factor,), torch.nan).double()
    for phase in pieces.phases(factor):
        left, right = (padded[phase.first + one : phase.first + one + 5] for one in (0, 1))
        found[phase.start :: factor] = torch.lerp(left, right, phase.weight)
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_a_compiled_loss_is_the_same() -> None:
    for coarse, full in (SIZES[0], SIZES[4]):
        logits, labels = make(coarse, full)
        logits.requires_grad_()
        ours, theirs = (cross_entropy_sum(logits, labels, compiled=compiled) for compiled in (True, False))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits), rtol=1e-5, atol=1e-6)
