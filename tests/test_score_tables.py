"""evaluate.py for one model and several: what is printed, and what is written."""

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import load_script

from cityseg_hf import UserError, build_model
from cityseg_hf.checkpoint import image_processor, save_model_folder
from cityseg_hf.score_tables import short_names


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        folder = tmp_path_factory.getbasetemp() / f"saved/run_{seed}/best_miou"
        model = build_model("unet_small", hidden_sizes=[8, 16])
        torch.nn.init.normal_(model.classifier.weight)  # all classes occur
        save_model_folder(folder, model, image_processor((32, 64)))
        folders.append(str(folder))
    return folders


def test_names_are_what_tells_apart() -> None:
    assert short_names(["a/b/best_miou"]) == ["best_miou"]
    assert short_names(["a/b/best_miou", "a/c/best_miou"]) == ["b", "c"]
    assert short_names(["a/b/best_miou", "a/b/last"]) == ["best_miou", "last"]
    assert short_names(["a/b", "a/b/last"]) == [".", "last"]
    assert short_names(["/x/run_1/last", "org/model"]) == ["/x/run_1/last", "org/model"]


def test_one_model(models: list[str], streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    outputs = [tmp_path / "scores.json", tmp_path / "scores.csv"]
    load_script("evaluate").main(["--model", models[0], "-d", str(streets), "--num_workers", "0",
                                  "--output", *map(str, outputs)])  # fmt: skip
    found = json.loads(outputs[0].read_text())
    assert set(found) == {"val", "intervals"}
    low, high = found["intervals"]["miou"]
    assert low <= found["val"]["miou"] <= high
    (row,) = csv.DictReader(outputs[1].open())
    assert float(row["miou"]) == found["val"]["miou"]
    assert (float(row["miou_low"]), float(row["miou_high"])) == (low, high)
    assert row["iou/road"] and "iou/road_low" not in row
    said = capsys.readouterr().out
    assert f"miou {100 * found['val']['miou']:>18.2f} ({100 * low:.2f} to {100 * high:.2f})".split() in [
        line.split() for line in said.splitlines()
    ]
    assert max(map(len, said.splitlines())) <= 80


def test_two_models(models: list[str], streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "scores.json"
    load_script("evaluate").main(["--model", *models, "-d", str(streets), "--num_workers", "0",
                                  "--output", str(output)])  # fmt: skip
    found = json.loads(output.read_text())
    first, second = (found["models"][name]["val"]["miou"] for name in ("run_0", "run_1"))
    (difference,) = [row for row in found["differences"] if row["score"] == "miou"]
    assert (difference["model"], difference["less"]) == ("run_1", "run_0")
    assert difference["difference"] == pytest.approx(second - first)
    assert difference["low"] <= difference["difference"] <= difference["high"]
    said = capsys.readouterr().out
    assert f"run_1 - run_0: miou {100 * (second - first):+.2f}" in said
    assert said.splitlines()[0].split() == ["class", "run_0", "run_1"]
    assert "*" in said


def test_a_model_named_twice_is_one_line(models: list[str], streets: Path) -> None:
    with pytest.raises(UserError, match="names one model twice"):
        load_script("evaluate").main(["--model", models[0], models[0] + "/", "-d", str(streets)])
