"""The benchmark: the order of turns, what follows from times, and that every mode runs. No time is judged."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_script

from cityseg_hf import UserError, build_model, load_cityscapes
from cityseg_hf.benchmark import ends, memory
from cityseg_hf.benchmark.data import differing_samples
from cityseg_hf.benchmark.mean_iou import MeanIoU, areas
from cityseg_hf.benchmark.memory import exact_allocations, peak_extra_memory
from cityseg_hf.benchmark.options import MODELS, Options
from cityseg_hf.benchmark.peers import peers_of, require
from cityseg_hf.benchmark.pipelines import torchvision_reference
from cityseg_hf.benchmark.report import describe, tables
from cityseg_hf.benchmark.timing import Contender, Group, Row, compare, take_turns
from cityseg_hf.benchmark.train import our_step, peer_step, random_batch
from cityseg_hf.config import DataConfig
from cityseg_hf.data.augment import TrainTransform
from cityseg_hf.data.loading import SegmentationDataset
from cityseg_hf.data.sources import FileSource
from cityseg_hf.labels import IGNORE, NUM_CLASSES
from cityseg_hf.metrics import SegmentationCounts, confusion_matrix
from cityseg_hf.models import PRESETS

TINY = ("--size", "64", "128", "--rounds", "1", "--device", "cpu", "--images", "2", "3", "--precisions", "no")
CPU = torch.device("cpu")


def options(folder: Path, **settings: object) -> Options:
    return Options(**{"device": CPU, "folder": folder, "size": (64, 128), "precisions": ("no",), **settings})


# Turns and ratios


def test_contenders_take_turns_after_a_warm_up_of_each() -> None:
    order: list[str] = []
    ticks = iter(range(100))
    contenders = [
        Contender("a", lambda: order.append("a"), ours=True),
        Contender("b", lambda: order.append("b"), pieces=4),
    ]
    rows = take_turns(Group("work", contenders), 3, lambda: order.append("|"), lambda: float(next(ticks)))
    # Synchronised after the warm-up and within every timing, so that no contender pays for the one before.
    assert "".join(order) == "ab|" + "a|b|" * 3
    assert [row.seconds for row in rows] == [[1.0] * 3, [0.25] * 3]


def test_ratios_of_hand_made_times() -> None:
    rows = [
        Row("ours", "no", ours=True, seconds=[1.0, 2.0, 4.0], peak_extra_bytes=10),
        Row("peer", "no", seconds=[3.0, 3.0, 4.0], peak_extra_bytes=25),
        Row("ours", "bf16", ours=True, seconds=[1.0, 1.0, 0.5]),
        Row("peer", "bf16", seconds=[2.0, 1.5, 1.0]),
        Row("another network", "no", same_work=False, seconds=[1.0, 1.0, 1.0]),
    ]
    found = {(one.peer_precision, one.our_precision): one for one in compare(rows)}
    # The peer's bf16 is not held against our float32.
    assert set(found) == {("no", "no"), ("no", "bf16"), ("bf16", "bf16")}
    same = found["no", "no"]
    assert (same.ratio, same.lowest, same.highest, same.memory) == (1.5, 1.0, 3.0, 2.5)
    assert (found["no", "bf16"].ratio, found["no", "bf16"].lowest, found["no", "bf16"].highest) == (3.0, 3.0, 8.0)
    assert (found["bf16", "bf16"].ratio, found["bf16", "bf16"].memory) == (1.5, None)
    assert rows[0].summary() | {"min": 1.0, "median": 2.0, "max": 4.0, "name": "ours"} == rows[0].summary()


def test_tables_show_what_was_measured() -> None:
    rows = [
        Row("ours", ours=True, seconds=[0.010], peak_extra_bytes=2**20),
        Row("a peer", seconds=[0.025], note="of note"),
    ]
    text = tables(describe(Group("the work", [], {"differing_pixels": 3}), rows, compare(rows)))
    lines = text.splitlines()
    assert lines[1] == "the work"
    assert [line for line in lines if "ours" in line and "10.00" in line and "ms" in line and "1.0 MiB" in line]
    assert [line for line in lines if "a peer" in line and "25.00" in line and line.endswith("of note")]
    assert [line for line in lines if "a peer / ours" in line and "2.50" in line]
    assert lines[-1].strip() == "differing pixels: 3"


# Memory


@pytest.mark.skipif(not memory._CLEAR_REFS.exists(), reason="the kernel's high-water mark is Linux's")
def test_peak_of_extra_memory_is_what_is_held_at_once() -> None:
    """Two blocks of 32 MiB at once, three in all, beside one that was there before."""
    before = torch.ones(2**23)

    def run() -> torch.Tensor:
        first = before + 1
        second = first * 2
        del first
        return second + 1

    with exact_allocations():
        run()
        found = peak_extra_memory(run, CPU)
    if found is None:
        pytest.skip("this libc or kernel does not count")
    assert 60 <= found / 2**20 <= 72


# Peers


@pytest.mark.parametrize("name", ["tiny_segformer", "tiny_unet", "tiny_resnet"])
def test_peers_start_as_the_same_network(name: str, tmp_path: Path) -> None:
    """Same weights, same loss: what is timed is the same work. Without dropout, whose masks differ."""
    setting = options(tmp_path)
    preset, fields = MODELS[name]
    dropout = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0} if "segformer" in name else {}
    dropout = {"dropout": 0.0} if "resnet" in name else dropout
    torch.manual_seed(0)
    ours = build_model(preset, **fields, **dropout).train()
    (peer,) = peers_of(ours, extra=False)
    batch = random_batch(setting)
    expected = peer.loss(batch.pixel_values, batch.labels)
    loss = ours(pixel_values=batch.pixel_values, labels=batch.labels).loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    # And one step of each changes the weights.
    first = next(ours.parameters()).detach().clone()
    our_step(ours, batch)(setting.autocast("no"))
    peer_step(peer, batch)(setting.autocast("no"))
    assert not torch.equal(first, next(ours.parameters()))
    assert not torch.equal(first, next(peer.network.parameters()))


def test_names_of_the_benchmark_hide_no_preset() -> None:
    assert not set(MODELS) & set(PRESETS)
    assert {preset for preset, _ in MODELS.values()} <= set(PRESETS)


def test_a_missing_peer_is_one_line() -> None:
    with pytest.raises(UserError, match=r"--peers needs no_such_peer, .* pip install -e '\.\[bench\]'"):
        require("no_such_peer.part")


def test_missing_extra_stops_the_script_with_that_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)  # as if it were not installed
    with pytest.raises(UserError, match="--peers needs torchmetrics"):
        load_script("benchmark").main(["metric", *TINY, "--peers"])


def test_mean_iou_restated_agrees_with_the_counts(tmp_path: Path) -> None:
    """The same confusion, the same IoU: the peer is a faithful one."""
    labels = torch.randint(NUM_CLASSES + 1, (2, 40, 50))
    labels[labels == NUM_CLASSES] = IGNORE
    predictions = torch.randint(NUM_CLASSES, labels.shape)
    metric, counts = MeanIoU(cache_dir=str(tmp_path)), SegmentationCounts()
    for prediction, label in zip(predictions, labels, strict=True):
        metric.add_batch(predictions=prediction[None], references=label[None])
        counts.update(prediction, label)
    found, expected = metric.compute(num_labels=NUM_CLASSES, ignore_index=IGNORE), dict(counts.scores())
    assert found["mean_iou"] == pytest.approx(expected["miou"])
    assert found["overall_accuracy"] == pytest.approx(expected["pixel_accuracy"])
    intersection, _, labelled = areas(predictions[0].numpy(), labels[0].numpy(), NUM_CLASSES, IGNORE)
    confusion = confusion_matrix(predictions[0], labels[0]).numpy()
    np.testing.assert_array_equal(intersection, confusion.diagonal())
    np.testing.assert_array_equal(labelled, confusion.sum(1))


def test_plain_ways_agree_with_ours() -> None:
    labels = torch.from_numpy(ends.street((64, 128))[1]).long()
    logits = ends.street_logits(labels)
    assert logits.is_contiguous() and ends.random_logits((64, 128)).is_contiguous()
    predictions = ends.plain_argmax(logits, (64, 128))[0]
    assert (predictions == labels)[labels != IGNORE].float().mean() > 0.8
    assert torch.equal(ends.plain_confusion(predictions, labels), confusion_matrix(predictions, labels))


@pytest.mark.parametrize("crop", [False, True])
def test_torchvision_pipeline_gives_a_sample(crop: bool) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    row = {
        "image": Image.fromarray(rng.integers(0, 255, (96, 192, 3)).astype(np.uint8)),
        "label": Image.fromarray(rng.integers(0, 34, (96, 192)).astype(np.uint8)),
    }
    image, label = torchvision_reference((64, 128), crop=crop)(row)
    assert (image.shape, image.dtype, label.shape, label.dtype) == ((3, 64, 128), torch.float32, (64, 128), torch.int64)
    assert set(label.unique().tolist()) <= {*range(NUM_CLASSES), IGNORE}


def test_differing_samples_are_counted(streets: Path) -> None:
    """What a faster way of reading must not change."""
    source = FileSource(load_cityscapes(streets)["val"])

    class Altered(FileSource):
        def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            image, label = super().read(index)
            return (np.bitwise_xor(image, np.uint8(1)), label) if index == 1 else (image, label)

    altered = Altered(load_cityscapes(streets)["val"])
    transform = TrainTransform(DataConfig(augmentation="flip"), (64, 128))
    one, two, three = (SegmentationDataset(each, transform) for each in (source, source, altered))
    assert differing_samples([one, two]) == 0
    assert differing_samples([one, two, three]) == 1


# The script


@pytest.mark.parametrize("mode", ["data", "train", "eval", "infer", "metric"])
def test_every_mode_runs_and_writes_what_it_measured(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture, streets: Path
) -> None:
    output = tmp_path / "report.json"
    models = ["--models", "tiny_segformer", "tiny_resnet"] if mode in ("train", "infer") else []
    data = ["-d", str(streets)] if mode == "data" else []
    load_script("benchmark").main([mode, *TINY, *models, *data, "--output", str(output)])
    report = json.loads(output.read_text())
    assert (report["mode"], report["settings"]["size"], report["settings"]["rounds"]) == (mode, [64, 128], 1)
    machine = report["machine"]
    assert (
        machine["cpu"] and machine["threads"] >= 1 and machine["versions"]["torch"] == torch.__version__.split("+")[0]
    )
    assert {"cpu_flags", "cores", "gpu", "date", "git_commit"} <= set(machine)
    assert report["groups"]
    printed = capsys.readouterr().out
    for group in report["groups"]:
        assert sum(row["ours"] for row in group["rows"]) >= 1 and group["ratios"]
        for row in group["rows"]:
            assert 0 < row["min"] <= row["median"] <= row["max"] and len(row["seconds"]) == 1
        for ratio in group["ratios"]:
            assert 0 < ratio["lowest"] <= ratio["ratio"] <= ratio["highest"]
        assert group["facts"].get("differing_samples", 0) == 0
        # Rounding may choose another class between equals, and does no more.
        assert group["facts"].get("differing_pixels", 0) <= 0.001 * group["facts"].get("pixels", 1)
        assert group["title"] in printed


def test_both_precisions_are_measured(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    argv = ["train", *TINY[:-2], "--models", "tiny_unet", "--precisions", "no", "bf16", "--output", str(output)]
    load_script("benchmark").main(argv)
    (group,) = json.loads(output.read_text())["groups"]
    assert [row["precision"] for row in group["rows"]] == ["no", "no", "bf16", "bf16"]
    assert len(group["ratios"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["data", "train", "metric"])
def test_the_peers_of_the_extra_run(mode: str, tmp_path: Path) -> None:
    for name in ("segmentation_models_pytorch", "torchmetrics", "albumentations", "cityscapesscripts"):
        pytest.importorskip(name)
    output = tmp_path / "report.json"
    load_script("benchmark").main([mode, *TINY, "--models", "tiny_unet", "--peers", "--output", str(output)])
    names = {row["name"] for group in json.loads(output.read_text())["groups"] for row in group["rows"]}
    expected = {
        "data": {"transformers example"},
        "train": {"smp Unet resnet18"},
        "metric": {"torchmetrics", "torchmetrics, not validated", "cityscapesscripts"},
    }
    assert expected[mode] <= names


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--size", "8", "8"], "--size takes at least 64 64"),
        (["eval", "--output", "no/such/folder/x.json"], "--output"),
        (["bake"], "invalid choice"),
        (["train", "--models", "no_such_model", "--size", "64", "64"], "no_such_model"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_script("benchmark").main(argv)
