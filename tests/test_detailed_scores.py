"""Contours, calibration, the mean over images, and how sure a score is: against definitions and hand-worked cases."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cityseg_hf import UserError, build_model, load_cityscapes
from cityseg_hf.boundaries import boundary_counts, contour_distance, near_contour
from cityseg_hf.data.loading import SegmentationDataset
from cityseg_hf.data.sources import file_sources
from cityseg_hf.data.transforms import EvalTransform
from cityseg_hf.detailed_counts import DetailedCounts, calibration_counts
from cityseg_hf.evaluation import Judgement, evaluate, evaluation_loader, judge
from cityseg_hf.intervals import Bootstrap, draw, middle
from cityseg_hf.labels import CLASS_NAMES, IGNORE, NUM_CLASSES
from cityseg_hf.metrics import SegmentationCounts
from cityseg_hf.upsampled import argmax_and_loss


def authors_boundary(mask: np.ndarray) -> np.ndarray:
    """Cheng et al.: the mask less the mask eroded by 3x3, as often as 2 % of the diagonal has pixels."""
    times = max(1, round(0.02 * np.hypot(*mask.shape)))
    eroded = np.pad(mask, 1)
    for _ in range(times):
        padded = np.pad(eroded, 1, constant_values=True)
        height, width = eroded.shape
        shifted = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
        eroded = np.logical_and.reduce(shifted)
    return mask & ~eroded[1:-1, 1:-1]


def blocks(rng: np.random.Generator, size: tuple[int, int], values: list[int], side: int) -> np.ndarray:
    coarse = rng.choice(values, (size[0] // side + 1, size[1] // side + 1))
    return np.kron(coarse, np.ones((side, side)))[: size[0], : size[1]].astype(np.uint8)


@pytest.mark.parametrize("size", [(40, 60), (97, 33), (210, 190), (9, 9)])
def test_strips_are_those_of_the_authors(size: tuple[int, int]) -> None:
    """Class by class, the counts of their erosion."""
    rng = np.random.default_rng(size[0])
    for _ in range(6):
        labels = blocks(rng, size, [0, 1, 5, 13, IGNORE], int(rng.integers(3, 30)))
        predictions = np.where(rng.random(size) < 0.02, 7, blocks(rng, size, [0, 1, 5, 13], 11)).astype(np.uint8)
        predictions = np.where(rng.random(size) < 0.5, predictions, np.where(labels == IGNORE, 0, labels))
        predictions = predictions.astype(np.uint8)
        found = boundary_counts(torch.from_numpy(predictions), torch.from_numpy(labels))
        valid = labels != IGNORE
        for train_id in range(NUM_CLASSES):
            truth = authors_boundary(labels == train_id)
            guess = authors_boundary((predictions == train_id) & valid)
            assert found[:, train_id].tolist() == [(truth & guess).sum(), truth.sum(), guess.sum()]


def test_a_square_by_hand() -> None:
    """A car of 8x8 in 30x40 (diagonal 50, strip of 1 pixel), predicted one pixel to the right."""
    labels, predictions = torch.zeros(2, 30, 40, dtype=torch.uint8)
    labels[10:18, 10:18] = 13
    predictions[10:18, 11:19] = 13
    assert contour_distance((30, 40)) == 1
    counts = DetailedCounts()
    counts.update(predictions, labels)
    scores = dict(counts.scores())
    # Each ring has 28 pixels; shared are the two rows from column 11 to 17, and no column.
    assert counts.boundary[:, 13].tolist() == [14, 28, 28]
    assert scores["boundary_iou/car"] == 14 / 42
    assert scores["iou/car"] == 56 / 72
    # The road: the frame of the image (136), and around the car the 36 pixels that touch it, of which the rows above
    # and below share 9 each.
    assert counts.boundary[:, 0].tolist() == [136 + 18, 136 + 36, 136 + 36]
    assert scores["boundary_iou"] == pytest.approx((14 / 42 + 154 / 190) / 2)
    assert scores["boundary_iou/bus"] is None


def test_what_is_right_where_it_is_judged_is_right_at_contours() -> None:
    rng = np.random.default_rng(2)
    labels = torch.from_numpy(blocks(rng, (60, 80), [0, 3, 11, IGNORE], 9))
    for guess in (0, 3, 18):
        counts = DetailedCounts()
        counts.update(torch.where(labels == IGNORE, guess, labels), labels)
        scores = dict(counts.scores())
        assert scores["boundary_iou"] == scores["miou"] == scores["image_miou"] == 1.0


def test_near_a_contour_of_the_image_itself() -> None:
    inside = ~near_contour(torch.full((12, 9), 4, dtype=torch.uint8), 2)
    assert inside.sum() == (12 - 4) * (9 - 4)
    assert inside[2:-2, 2:-2].all()


def test_calibration_by_hand_and_against_numpy() -> None:
    """Four pixels: two of 0.9 (one right), one of 0.5 (right), one void."""
    predictions = torch.tensor([[0, 0], [1, 2]], dtype=torch.uint8)
    labels = torch.tensor([[0, 1], [1, IGNORE]], dtype=torch.uint8)
    counts = DetailedCounts()
    counts.update(predictions, labels, confidence=torch.tensor([[0.9, 0.9], [0.5, 0.1]]))
    error = dict(counts.scores())["calibration_error"]
    assert error == pytest.approx((abs(1 - 1.8) + abs(1 - 0.5)) / 3, abs=1e-6)

    rng = np.random.default_rng(0)
    predictions, labels = rng.integers(0, 4, (2, 50, 60)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.1] = IGNORE
    confidence = rng.random(labels.shape).astype(np.float32)
    found = calibration_counts(*map(torch.from_numpy, (predictions, labels, confidence)))
    valid, edges, expected = labels != IGNORE, np.linspace(0, 1, 16), 0.0
    for low, high in pairwise(edges):
        inside = valid & (confidence > low) & (confidence <= high)
        if inside.any():
            gap = (predictions == labels)[inside].mean() - confidence[inside].mean(dtype=np.float64)
            expected += abs(gap) * inside.sum() / valid.sum()
    pixels, sure, hits = found.double().T
    assert pixels.sum() == valid.sum()
    assert ((hits - sure).abs().sum() / pixels.sum()).item() == pytest.approx(expected, abs=1e-9)


def test_the_mean_over_images_weighs_images_alike() -> None:
    counts, mious = DetailedCounts(), []
    rng = np.random.default_rng(1)
    for size in ((9, 9), (40, 70), (20, 5)):
        labels, predictions = (torch.from_numpy(blocks(rng, size, [0, 2, 9], 4)) for _ in range(2))
        counts.update(predictions, labels)
        alone = SegmentationCounts()
        alone.update(predictions, labels)
        mious.append(dict(alone.scores())["miou"])
    counts.update(torch.zeros(5, 5, dtype=torch.uint8), torch.full((5, 5), IGNORE, dtype=torch.uint8))  # has none
    assert dict(counts.scores())["image_miou"] == pytest.approx(np.mean(mious), abs=1e-12)


def test_confidence_is_torchs() -> None:
    logits = 5 * torch.randn(2, NUM_CLASSES, 13, 17)
    for size in ((13, 17), (52, 68), (40, 50)):
        labels = torch.randint(0, NUM_CLASSES, (2, *size), dtype=torch.uint8)
        confidence = torch.empty(2, *size)
        best, _ = argmax_and_loss(logits, labels, confidence=confidence)
        full = torch.nn.functional.interpolate(logits, size, mode="bilinear").softmax(1)
        torch.testing.assert_close(confidence, full.amax(1), rtol=1e-5, atol=1e-6)
        assert torch.equal(best, argmax_and_loss(logits, labels)[0])


def test_a_vector_holds_all_counts() -> None:
    counts = DetailedCounts()
    labels = torch.randint(0, NUM_CLASSES, (30, 40), dtype=torch.uint8)
    counts.update(labels.flip(0), labels, (labels.int() + 24) * 1000, torch.rand(30, 40))
    again = DetailedCounts.of(counts.vector().numpy())
    assert all(torch.equal(*pair) for pair in zip(counts.tensors(), again.tensors(), strict=True))
    assert dict(again.scores()) == dict(counts.scores())


# --- how sure


def judgement(rng: np.random.Generator, images: int, wrong: float) -> Judgement:
    """Of two classes, in images of 100 pixels; a share is wrong that differs from image to image."""
    rows = []
    for _ in range(images):
        labels = torch.from_numpy((np.arange(100) % 2).reshape(10, 10).astype(np.uint8))
        mistakes = torch.from_numpy(rng.random((10, 10)) < wrong * rng.random() * 2)
        counts = DetailedCounts()
        counts.update(torch.where(mistakes, 1 - labels, labels).to(torch.uint8), labels)
        rows.append(counts.vector().numpy())
    return Judgement([str(number) for number in range(images)], np.stack(rows))


def test_draws_are_draws() -> None:
    weights = draw(20, 300)
    assert weights.shape == (300, 20)
    assert (weights.sum(1) == 20).all()
    assert (weights == draw(20, 300)).all()
    assert weights.var() == pytest.approx(1 - 1 / 20, rel=0.1)  # binomial(20, 1/20)


def test_intervals_are_those_of_the_bootstrap_done_image_by_image() -> None:
    found = judgement(np.random.default_rng(0), 12, 0.2)
    bootstrap = Bootstrap(found, draws=40)
    for weights, drawn in zip(draw(12, 40), bootstrap.drawn["miou"], strict=True):
        counts = SegmentationCounts()
        for times, row in zip(weights, found.counts, strict=True):
            counts.confusion += int(times) * DetailedCounts.of(row).confusion
        assert dict(counts.scores())["miou"] == pytest.approx(drawn, abs=1e-12)
    low, high = bootstrap.interval("miou")
    assert low < bootstrap.scores["miou"] < high
    assert bootstrap.interval("iou/bus") is None
    assert middle(np.arange(1001.0)) == pytest.approx((25, 975))


def test_intervals_cover_and_narrow() -> None:
    """Of a mean of independent images: about 1.96 standard errors to either side."""
    images = 400
    mious = np.random.default_rng(5).random(images)
    rows = []
    for miou in mious:
        counts = DetailedCounts()
        counts.image_miou += torch.tensor([miou, 1.0])
        rows.append(counts.vector().numpy())
    bootstrap = Bootstrap(Judgement([str(number) for number in range(images)], np.stack(rows)))
    low, high = bootstrap.interval("image_miou")
    assert bootstrap.scores["image_miou"] == pytest.approx(mious.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * mious.std() / math.sqrt(images), rel=0.1)


def test_two_models_are_compared_on_the_same_draws() -> None:
    rng = np.random.default_rng(3)
    good, bad = judgement(rng, 30, 0.1), judgement(rng, 30, 0.25)
    good, bad = Bootstrap(good, draws=400), Bootstrap(bad, draws=400)
    better = good.less(bad)
    assert better.difference == good.scores["miou"] - bad.scores["miou"] > 0
    assert 0 < better.low < better.difference < better.high
    assert better.p_value == 1 / 400  # no draw says otherwise, of 400
    worse = bad.less(good)
    assert (worse.low, worse.high) == pytest.approx((-better.high, -better.low))
    same = good.less(good)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    assert good.less(bad, "iou/bus") is None
    with pytest.raises(UserError, match="same images"):
        good.less(Bootstrap(judgement(rng, 29, 0.1), draws=10))


def test_a_judgement_is_the_sum_of_its_images(streets: Path) -> None:
    """Whatever the batches; and what is written of it is what a report needs."""
    dataset = SegmentationDataset(
        file_sources(load_cityscapes(streets))["val"], EvalTransform((32, 64)), instances=True
    )
    torch.manual_seed(0)
    model = build_model("unet_small", hidden_sizes=[8, 16])
    judged = [judge(model, evaluation_loader(dataset, batch_size=size, num_workers=0)) for size in (1, 4)]
    assert judged[0].names == judged[1].names == dataset.source.names
    np.testing.assert_allclose(judged[0].counts, judged[1].counts, rtol=1e-4, atol=40)  # a batch rounds otherwise
    scores = dict(evaluate(model, evaluation_loader(dataset, batch_size=1, num_workers=0)))
    assert scores == dict(judged[0].scores())
    assert {"iiou", "boundary_iou", "image_miou", "calibration_error", "loss"} <= set(scores)
    record = judged[0].record()
    assert np.array(record["confusion"]).shape == (len(CLASS_NAMES),) * 2
    mious = [image["miou"] for image in record["images"].values()]
    assert np.mean(mious) == pytest.approx(scores["image_miou"])
