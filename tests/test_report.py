"""What runs left, read and compared, against numpy and the files it comes from."""

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import rewrite

from cityseg_hf.errors import UserError
from cityseg_hf.labels import CLASS_NAMES
from cityseg_hf.report.comparison import compare, run_labels
from cityseg_hf.report.reading import read_runs
from cityseg_hf.report.tables import csv_text, markdown_text, written

Change = Callable[[Path], object]


def test_runs_that_differ_only_by_seed_are_one_configuration(runs: Path) -> None:
    """numpy's mean and deviation of a sample are the oracle."""
    best, other = compare(read_runs([runs])[0], "best_miou")
    assert [run.seed for run in best.runs] == [0, 1, 2]
    scores = [0.5, 0.6, 0.7]
    assert best.score("miou", "last") == pytest.approx((np.mean(scores), np.std(scores, ddof=1)))
    assert other.score("miou", "last") == (0.4, None)
    assert best.score("no such score", "last") is None
    assert (best.label, other.label) == ("unet_small · lr 0.01", "unet_small · lr 0.0001")
    labels = run_labels([best, other])
    assert labels[runs / "unet_seed1"] == "unet_small · lr 0.01 · seed 1"
    assert len(set(labels.values())) == 4


def test_the_same_run_twice_has_two_labels(runs: Path) -> None:
    shutil.copytree(runs / "lower", runs / "again")
    labels = run_labels(compare(read_runs([runs])[0], "best_miou"))
    assert len(set(labels.values())) == 5


def test_runs_on_other_images_are_no_repetition(runs: Path) -> None:
    rewrite("run.json", lambda content: content.update(data_fingerprint="another"))(runs / "unet_seed2")
    best, *others = compare(read_runs([runs])[0], "best_miou")
    assert [len(one.runs) for one in (best, *others)] == [1, 2, 1]
    assert best.varied["data"] == "streets anothe"


def test_where_the_images_lie_does_not_matter(runs: Path) -> None:
    moved = rewrite("run.json", lambda content: content["arguments"].update(base_dataset_path="/mnt/other"))
    moved(runs / "unet_seed2")
    best = compare(read_runs([runs])[0], "best_miou")[0]
    assert len(best.runs) == 3 and "data" not in best.varied


def test_the_csv_file_holds_every_argument_and_score(runs: Path) -> None:
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(csv_text(read_runs([runs])[0])))}
    assert len(rows) == 4
    for name, row in rows.items():
        arguments = json.loads((runs / name / "run.json").read_text())["arguments"]
        assert arguments.keys() <= row.keys()
        assert float(row["learning_rate"]) == arguments["learning_rate"]
        assert row["model_args"] == " ".join(arguments["model_args"])
        for folder, scores in json.loads((runs / name / "results.json").read_text()).items():
            for score, value in scores.items():
                said = row[f"{folder}/{score.removeprefix('test/')}"]
                assert said == "" if value is None else float(said) == value
        assert int(row["cost/images"]) == 24


def test_the_markdown_file_has_a_table_for_all_and_for_each_family(runs: Path) -> None:
    text = markdown_text(compare(read_runs([runs])[0], "best_miou"), "best_miou")
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Overall", "## unet", "## IoU of each class, of the best of each family"]
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
    first = dict(zip(*([cell.strip() for cell in tables[0][line].split("|")] for line in (0, 2)), strict=True))
    assert (first["lr"], first["seeds"], first["mIoU"]) == ("0.01", "3", "60.00 ± 10.00")
    assert len(tables[-1]) == 2 + len(CLASS_NAMES)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.12345, "%", "12.35"),
        (59.96, "s", "60.0 s"),
        (61, "s", "1 min 01 s"),
        (7384, "s", "2 h 03 min"),
        (3 * 2**29, "B", "1.50 GiB"),
        (2**20, "B", "1 MiB"),
        (3_716_000, "M", "3.72 M"),
        (64e6, "M", "64.0 M"),
        (123e9, "G", "123 G"),
        (1234567, "n", "1,234,567"),
        (None, "%", "\N{EN DASH}"),
    ],
)
def test_numbers_are_written_for_readers(value: float | None, unit: str, text: str) -> None:
    assert written(value, unit) == text


BROKEN = [
    ("run.json is damaged", lambda run: (run / "run.json").write_text("{")),
    ("run.json is damaged .it holds no object", lambda run: (run / "run.json").write_text("3")),
    ("run.json lacks settings or arguments", lambda run: (run / "run.json").write_text("{}")),
    ("run.json: No such file", lambda run: (run / "run.json").unlink()),
    ("not finished, at step 6: run its command again to go on", lambda run: (run / "results.json").unlink()),
    ("metrics.jsonl is damaged in line 1", lambda run: (run / "metrics.jsonl").write_text("[]\n")),
    ("results.json is damaged", lambda run: (run / "results.json").write_bytes(b"\xff\xfe")),
    ("results.json is damaged .no scores of last", rewrite("results.json", lambda c: c.update(last=[]))),
    ("results.json is damaged .no miou of last", rewrite("results.json", lambda c: c.update(last={}))),
    ("cost.json is damaged .images is no number", rewrite("cost.json", lambda c: c.update(images="many"))),
    ("evaluation.json is damaged", rewrite("evaluation.json", lambda c: c["last"].update(confusion=[[1]]))),
    ("evaluation.json is damaged", rewrite("evaluation.json", lambda c: c["last"].update(images={"a": 1}))),
]


@pytest.mark.parametrize(("line", "damage"), BROKEN, ids=[str(number) for number in range(len(BROKEN))])
def test_broken_runs_cost_a_line(line: str, damage: Change, runs: Path) -> None:
    """The others are read; so is what is whole of a run that lacks only its cost or its evaluation."""
    damage(runs / "lower")
    found, (note,) = read_runs([runs])
    assert note.path == runs / "lower"
    assert re.search(line, note.line) and "\n" not in note.line
    assert len(found) == (4 if re.match("cost|evaluation", line) else 3)


def test_folders_without_runs_are_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        read_runs([runs, tmp_path / "nowhere"])
    with pytest.raises(UserError, match="no run in"):
        read_runs([runs, runs / "lower/last"])
    assert len(read_runs([runs, runs / "lower"])[0]) == 4, "a run that is named twice is there once"
