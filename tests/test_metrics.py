"""The scores: integer for integer those of the Cityscapes benchmark, and worked by hand where it has none."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as benchmark
from PIL import Image

from cityseg_hf.data.cityscapes import read_instances, read_label
from cityseg_hf.data.synthetic import render_street
from cityseg_hf.labels import CATEGORY_NAMES, CLASS_NAMES, ID_TO_TRAIN_ID, IGNORE, LABELS, TRAIN_ID_TO_ID, TRAIN_LABELS
from cityseg_hf.metrics import INSTANCE_CATEGORIES, INSTANCE_CLASSES, SegmentationCounts

REAL_MAPS = os.environ.get("CITYSEG_REAL_MAPS")
"""A folder with ``gtFine/**/*_gtFine_{labelIds,instanceIds}.png`` of real Cityscapes, where there is one."""

Triple = tuple[np.ndarray, np.ndarray, np.ndarray]
"""labelIds ``uint8[H, W]``, instanceIds ``int32[H, W]``, predicted train ids ``uint8[H, W]``."""

NUMBERED = np.array([label.id for label in LABELS if label.has_instances])


def random_triple(rng: np.random.Generator, size: tuple[int, int], ids: list[int], guesses: list[int]) -> Triple:
    """Blocks of the given labelIds, predicted as themselves or as one of the guesses (train ids).

    A quarter of the pixels has no instance number, as the groups of Cityscapes.
    """
    label_ids = np.kron(rng.choice(ids, (size[0] // 3 + 1, size[1] // 4 + 1)), np.ones((3, 4)))[: size[0], : size[1]]
    label_ids = label_ids.astype(np.uint8)
    numbers = rng.integers(-1, 3, size)  # -1: belongs to no instance
    has_number = np.isin(label_ids, NUMBERED) & (numbers >= 0)
    instance_ids = np.where(has_number, label_ids.astype(np.int32) * 1000 + numbers, label_ids)
    return label_ids, instance_ids, corrupt(label_ids, rng, guesses)


def corrupt(label_ids: np.ndarray, rng: np.random.Generator, guesses: list[int]) -> np.ndarray:
    """The true train ids; void, a fifth of the pixels and a few rectangles replaced by any of the guesses."""
    truth = ID_TO_TRAIN_ID[label_ids]
    noise = rng.choice(guesses, truth.shape)
    predicted = np.where((truth == IGNORE) | (rng.random(truth.shape) < 0.2), noise, truth)
    for _ in range(4):
        top, left = (int(rng.integers(side)) for side in truth.shape)
        predicted[top : top + truth.shape[0] // 4, left : left + truth.shape[1] // 4] = rng.choice(guesses)
    return predicted.astype(np.uint8)


def ask_benchmark(triples: list[Triple], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``cityscapesscripts`` says of the same maps, written as a user of the benchmark would."""
    # cityscapesscripts still calls what numpy 2.4 has dropped.
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    monkeypatch.setattr(benchmark.args, "JSONOutput", False)
    monkeypatch.setattr(benchmark.args, "quiet", True)
    predictions, truths = [], []
    for index, (label_ids, instance_ids, predicted) in enumerate(triples):
        stem = folder / f"city_{index:06d}_000019"
        for suffix, content in (
            ("gtFine_labelIds", label_ids),
            ("gtFine_instanceIds", instance_ids.astype(np.uint16)),
            ("pred_labelIds", TRAIN_ID_TO_ID[predicted]),
        ):
            Image.fromarray(content).save(f"{stem}_{suffix}.png")
        predictions.append(f"{stem}_pred_labelIds.png")
        truths.append(f"{stem}_gtFine_labelIds.png")
    return benchmark.evaluateImgLists(predictions, truths, benchmark.args)


def count(triples: list[Triple], folder: Path) -> SegmentationCounts:
    """Our counts of the same files, through our own readers."""
    counts = SegmentationCounts()
    for index, (_, _, predicted) in enumerate(triples):
        stem = folder / f"city_{index:06d}_000019"
        labels, instances = read_label(f"{stem}_gtFine_labelIds.png"), read_instances(f"{stem}_gtFine_instanceIds.png")
        counts.update(*map(torch.from_numpy, (predicted.copy(), labels, instances)))
    return counts


def expected_scores(theirs: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The benchmark's results under our names."""
    yield "miou", theirs["averageScoreClasses"]
    yield "iiou", theirs["averageScoreInstClasses"]
    yield "category_iou", theirs["averageScoreCategories"]
    yield "category_iiou", theirs["averageScoreInstCategories"]
    for name in CLASS_NAMES:
        yield f"iou/{name}", theirs["classScores"][name]
    for train_id in INSTANCE_CLASSES:
        yield f"iiou/{CLASS_NAMES[train_id]}", theirs["classInstScores"][CLASS_NAMES[train_id]]
    for name in CATEGORY_NAMES:
        yield f"category_iou/{name}", theirs["categoryScores"][name]
    for name in INSTANCE_CATEGORIES:
        yield f"category_iiou/{name}", theirs["categoryInstScores"][name]


def assert_agrees(triples: list[Triple], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float | None]:
    """Compares everything the benchmark reports; gives our scores back."""
    theirs = ask_benchmark(triples, folder, monkeypatch)
    counts = count(triples, folder)
    ids = [label.id for label in TRAIN_LABELS]
    assert np.array_equal(counts.confusion.numpy(), np.array(theirs["confMatrix"])[np.ix_(ids, ids)])
    scores = dict(counts.scores())
    for name, value in expected_scores(theirs):
        assert scores[name] == (None if np.isnan(value) else pytest.approx(value, rel=0, abs=1e-12)), name
    # Nothing that the benchmark scores is missing here, and nothing is scored here that it knows not.
    assert {name for name, value in theirs["classInstScores"].items() if not np.isnan(value)} <= {
        CLASS_NAMES[train_id] for train_id in INSTANCE_CLASSES
    }
    assert {name for name, value in theirs["categoryInstScores"].items() if not np.isnan(value)} <= set(
        INSTANCE_CATEGORIES
    )
    return scores


@pytest.mark.parametrize(
    ("ids", "guesses", "all_exist"),
    [
        (list(range(34)), list(range(19)), True),
        # Most scores do not exist. 29 and 30, caravan and trailer, have instances but do not count.
        ([0, 3, 7, 11, 24, 26, 29, 30], [0, 2, 11, 13], False),
        ([0, 4, 9, 29], list(range(19)), False),
    ],
    ids=["all", "few", "void"],
)
def test_random_maps_score_as_the_benchmark_scores_them(
    ids: list[int], guesses: list[int], all_exist: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(len(ids))
    triples = [random_triple(rng, (int(h), int(w)), ids, guesses) for h, w in rng.integers(9, 60, (170, 2))]
    scores = assert_agrees(triples, tmp_path, monkeypatch)
    assert all(value is not None for value in scores.values()) is all_exist


def test_streets_score_as_the_benchmark_scores_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    triples = []
    for seed in range(8):
        street = render_street((96, 192), seed)
        triples.append((street.label_ids, street.instance_ids, corrupt(street.label_ids, rng, list(range(19)))))
    assert_agrees(triples, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif(REAL_MAPS is None, reason="CITYSEG_REAL_MAPS names no folder with real maps")
def test_real_maps_score_as_the_benchmark_scores_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    triples = []
    for path in sorted(Path(REAL_MAPS).glob("gtFine/**/*_gtFine_labelIds.png")):
        with (
            Image.open(path) as labels,
            Image.open(str(path).replace("_labelIds", "_instanceIds")) as instances,
        ):
            label_ids, instance_ids = np.array(labels), np.array(instances).astype(np.int32)
        triples.append((label_ids, instance_ids, corrupt(label_ids, rng, list(range(19)))))
    assert triples, f"no maps below {REAL_MAPS}/gtFine"
    assert_agrees(triples, tmp_path, monkeypatch)


def scores_of(predictions: list[list[int]], labels: list[list[int]]) -> dict[str, float | None]:
    """The scores of one map."""
    counts = SegmentationCounts()
    counts.update(torch.tensor(predictions), torch.tensor(labels))
    return dict(counts.scores())


def test_a_map_of_six_pixels_by_hand() -> None:
    # Confusion: road right 1, road -> sidewalk 1, sidewalk right 2, building -> road 1; one pixel is void.
    scores = scores_of([[0, 1, 1], [1, 0, 0]], [[0, 0, 1], [1, IGNORE, 2]])
    by_hand = {
        "iou/road": 1 / 3,
        "iou/sidewalk": 2 / 3,
        "iou/building": 0.0,
        "miou": 1 / 3,
        "dice/road": 2 * 1 / (2 + 2),
        "dice/sidewalk": 2 * 2 / (2 + 3),
        "dice/building": 0.0,
        "dice": (0.5 + 0.8 + 0.0) / 3,
        "accuracy/road": 1 / 2,
        "accuracy/sidewalk": 1.0,
        "accuracy/building": 0.0,
        "mean_accuracy": 0.5,
        "pixel_accuracy": 3 / 5,
        "category_iou/flat": 4 / 5,
        "category_iou/construction": 0.0,
        "category_iou": 0.4,
    }
    assert {name: value for name, value in scores.items() if value is not None} == pytest.approx(by_hand, abs=1e-15)
    assert scores["iou/wall"] is None and "loss" not in scores and "iiou" not in scores


def test_dice_is_a_share_and_follows_from_iou() -> None:
    """The original had 2 I / union, which is 2 for a perfect map."""
    perfect = scores_of([[0, 1], [2, 2]], [[0, 1], [2, 2]])
    assert perfect["dice"] == perfect["miou"] == 1.0
    maps = torch.randint(19, (2, 40, 40), generator=torch.Generator().manual_seed(1)).tolist()
    scores = scores_of(*maps)
    for name in CLASS_NAMES:
        iou, dice = scores[f"iou/{name}"], scores[f"dice/{name}"]
        assert 0 <= dice <= 1 and dice == pytest.approx(2 * iou / (1 + iou), abs=1e-12)


def test_void_pixels_count_nowhere() -> None:
    """Whatever is predicted on them: no class gains a false positive, no accuracy a pixel."""
    labels = [[0, 1, IGNORE], [1, IGNORE, IGNORE]]
    for guess in (0, 1, 18):
        scores = scores_of([[0, 1, guess], [0, guess, guess]], labels)
        assert scores == scores_of([[0, 1, 0]], [[0, 1, 1]])
    assert scores["pixel_accuracy"] == pytest.approx(2 / 3)


def test_a_class_that_is_only_predicted_scores_zero_and_one_that_is_nowhere_has_no_score() -> None:
    """In the original false positives of absent classes vanished, and classes that are nowhere scored 0."""
    scores = scores_of([[0, 0, 13], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]])
    assert scores["iou/car"] == scores["dice/car"] == 0.0
    assert scores["iou/road"] == scores["pixel_accuracy"] == pytest.approx(5 / 6)
    assert scores["miou"] == pytest.approx((5 / 6 + 0) / 2)
    assert scores["category_iou"] == pytest.approx((5 / 6 + 0) / 2)
    # It has no pixel that could be recalled.
    assert scores["accuracy/car"] is None and scores["mean_accuracy"] == pytest.approx(5 / 6)
    assert [name for name in CLASS_NAMES if scores[f"iou/{name}"] is not None] == ["road", "car"]


def test_an_instance_weighs_as_much_as_one_of_mean_size() -> None:
    """Two persons, of 1 pixel (found) and of 3 pixels (one found), and one false positive on the road."""
    counts = SegmentationCounts()
    labels = torch.tensor([[11, 11, 11, 11], [0, 0, 0, 0]])
    instances = torch.tensor([[24000, 24001, 24001, 24001], [7, 7, 7, 7]], dtype=torch.int32)
    counts.update(torch.tensor([[11, 11, 0, 12], [11, 0, 0, 0]]), labels, instances)
    scores, mean_size = dict(counts.scores()), 3462.4756337644
    right, missed = mean_size * (1 + 1 / 3), mean_size * 2 / 3
    assert scores["iiou/person"] == pytest.approx(right / (right + missed + 1), abs=1e-12)
    # As a category, the pixel taken for a rider is right.
    right, missed = mean_size * (1 + 2 / 3), mean_size * 1 / 3
    assert scores["category_iiou/human"] == pytest.approx(right / (right + missed + 1), abs=1e-12)
    # Rider: predicted, and no instance of it anywhere.
    assert scores["iiou/rider"] == 0.0 and scores["iiou/car"] is None


def test_instance_scores_need_the_map_of_every_image() -> None:
    labels = torch.full((2, 2), 11)
    counts = SegmentationCounts()
    counts.update(labels, labels, torch.full((2, 2), 24000, dtype=torch.int32))
    assert dict(counts.scores())["iiou"] == 1.0
    counts.update(labels, labels)
    assert "iiou" not in dict(counts.scores())


@pytest.fixture(scope="module")
def maps() -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and labels ``long[12, 30, 40]``, of which each image has other classes and another share of void."""
    generator = torch.Generator().manual_seed(5)
    predictions = torch.randint(19, (12, 30, 40), generator=generator)
    classes = torch.arange(12).view(12, 1, 1)
    labels = torch.where(torch.rand(12, 30, 40, generator=generator) < 0.5, predictions, classes + predictions % 3)
    labels[torch.rand(12, 30, 40, generator=generator) < torch.linspace(0, 1, 12).view(12, 1, 1)] = IGNORE
    return predictions, labels


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_scores_do_not_depend_on_batches_and_processes(
    batch_size: int, maps: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """The original averaged scores over batches."""
    predictions, labels = maps
    # The oracle goes over all pixels at once, class by class.
    valid = labels != IGNORE
    iou = {}
    for train_id, name in enumerate(CLASS_NAMES):
        mine, theirs = (predictions == train_id) & valid, (labels == train_id) & valid
        iou[f"iou/{name}"] = ((mine & theirs).sum() / (mine | theirs).sum()).item()
    processes = [SegmentationCounts(), SegmentationCounts()]
    parts = zip(predictions.split(batch_size), labels.split(batch_size), strict=True)
    for number, (some_predictions, some_labels) in enumerate(parts):
        processes[number % 2].update(some_predictions, some_labels)
    for total, other in zip(processes[0].tensors(), processes[1].tensors(), strict=True):
        total += other
    scores = dict(processes[0].scores())
    assert {name: scores[name] for name in iou} == pytest.approx(iou, abs=1e-6)
    whole = SegmentationCounts()
    whole.update(predictions, labels)
    assert scores == dict(whole.scores())
    assert processes[0].images.tolist() == [12, 0]


def test_dtypes_do_not_matter(maps: tuple[torch.Tensor, torch.Tensor]) -> None:
    """uint8 maps as they are read from disk: nothing wraps around at 256."""
    whole, small = SegmentationCounts(), SegmentationCounts()
    whole.update(*maps)
    small.update(*(tensor.to(torch.uint8) for tensor in maps))
    assert torch.equal(whole.confusion, small.confusion)


def test_memory_is_flat(maps: tuple[torch.Tensor, torch.Tensor]) -> None:
    counts = SegmentationCounts()
    before = [(tensor.data_ptr(), tensor.numel()) for tensor in counts.tensors()]
    for _ in range(20):
        counts.update(*maps)
    assert [(tensor.data_ptr(), tensor.numel()) for tensor in counts.tensors()] == before
    assert sum(numel for _, numel in before) < 500
    assert not [value for value in vars(counts).values() if isinstance(value, list | dict)]


def test_loss_is_the_mean_over_pixels() -> None:
    counts = SegmentationCounts()
    counts.loss += torch.tensor([3.0, 4.0])
    counts.loss += torch.tensor([1.0, 4.0])
    assert dict(counts.scores())["loss"] == 0.5


def test_nothing_counted_has_no_scores() -> None:
    scores = dict(SegmentationCounts().scores())
    assert scores["miou"] is scores["dice"] is scores["pixel_accuracy"] is None and set(scores.values()) == {None}


def test_maps_of_other_sizes_are_refused() -> None:
    counts = SegmentationCounts()
    with pytest.raises(ValueError, match=r"\(4, 4\).*\(4, 5\)"):
        counts.update(torch.zeros(4, 4, dtype=torch.long), torch.zeros(4, 5, dtype=torch.long))
    assert not counts.confusion.any() and not counts.images.any()
