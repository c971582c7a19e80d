"""The scores as an ``evaluate.Metric``: loaded by path, offline."""

import evaluate
import numpy as np
import pytest
import torch

import cityseg_hf


@pytest.fixture
def maps() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = random.integers(0, 19, (4, 20, 30)).astype(np.uint8)
    labels[random.random(labels.shape) < 0.1] = 255
    predictions = np.where(random.random(labels.shape) < 0.7, labels % 19, random.integers(0, 19, labels.shape))
    return predictions.astype(np.uint8), labels


def test_equals_our_scores_and_streams(maps: tuple[np.ndarray, np.ndarray], tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    predictions, labels = maps
    counts = cityseg_hf.SegmentationCounts()
    counts.update(torch.from_numpy(predictions), torch.from_numpy(labels))
    expected = dict(counts.scores())

    metric = evaluate.load(cityseg_hf.EVALUATE_METRIC)
    assert metric.compute(predictions=predictions, references=labels) == expected
    for prediction, label in zip(predictions, labels, strict=True):
        metric.add_batch(predictions=prediction[None], references=label[None])
    assert metric.compute() == expected
    assert metric.compute()["miou"] is None, "compute starts anew"


def test_equals_the_mean_iou_of_numpy(maps: tuple[np.ndarray, np.ndarray]) -> None:
    predictions, labels = maps
    metric = evaluate.load(cityseg_hf.EVALUATE_METRIC)
    scores = metric.compute(predictions=predictions, references=labels)
    valid = labels != 255
    ious = []
    for train_id in range(19):
        predicted, labelled = (predictions == train_id) & valid, labels == train_id
        ious.append((predicted & labelled).sum() / (predicted | labelled).sum())
    assert scores["miou"] == pytest.approx(np.mean(ious), abs=1e-12)


def test_lengths_that_differ_are_named() -> None:
    metric = evaluate.load(cityseg_hf.EVALUATE_METRIC)
    with pytest.raises(ValueError, match="2 predictions but 1 references"):
        metric.add_batch(predictions=np.zeros((2, 4, 4)), references=np.zeros((1, 4, 4)))


def test_predictions_that_are_no_train_ids_are_refused() -> None:
    """Counted, label 0 with prediction 20 would be a hit for class 1."""
    metric = evaluate.load(cityseg_hf.EVALUATE_METRIC)
    with pytest.raises(ValueError, match=r"train ids 0..18, got 20..20"):
        metric.add_batch(predictions=np.full((1, 4, 4), 20), references=np.zeros((1, 4, 4)))
