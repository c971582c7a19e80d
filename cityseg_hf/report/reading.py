"""What runs left on the disk, checked once, so that the rest of the report meets no surprise."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cityseg_hf.errors import UserError, one_line
from cityseg_hf.labels import NUM_CLASSES

MODEL_FOLDERS = ("best_miou", "best_loss", "last")

Scores = dict[str, float | None]
"""Score by name, in 0..1 but for the loss; ``None`` where it does not exist."""


class Evaluation(NamedTuple):
    """What the final test of one model folder saw, from ``evaluation.json``."""

    split: str
    confusion: np.ndarray
    """``int64[19, 19]``: pixels, rows are labels, columns predictions, by train id."""
    images: dict[str, float | None]
    """mIoU by the name of the image (``CITY_SEQ_FRAME``)."""


class Note(NamedTuple):
    """What is not in the report, and why."""

    path: Path
    line: str


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: Path
    family: str
    """The network's ``model_type``: unet, fcn_resnet, segformer, or another of transformers."""
    split: str
    """What the final models were judged on."""
    description: dict[str, Any]
    """``run.json``."""
    results: dict[str, Scores]
    """``results.json`` by model folder, without the split's name."""
    lines: list[dict[str, Any]]
    """``metrics.jsonl``, without the final tests."""
    cost: dict[str, Any]
    """``cost.json``; empty for a run that did not write it."""
    evaluations: dict[str, Evaluation]
    """By model folder; empty for a run that did not write ``evaluation.json``."""

    @property
    def name(self) -> str:
        """The folder's."""
        return self.path.name

    @property
    def arguments(self) -> dict[str, Any]:
        """Every flag and its value."""
        return self.description["arguments"]

    @property
    def seed(self) -> Any:
        """What the random numbers started from."""
        return self.description["settings"].get("seed")


def read_runs(paths: Sequence[str | Path]) -> tuple[list[Run], list[Note]]:
    """Reads all finished runs in the folders given, which are runs or hold runs at any depth.

    Returns:
        The runs, and a note for each that is not finished or damaged, or of which a part is.

    Raises:
        UserError: a path is no folder or holds no run, or no run is finished.
    """
    runs, notes = [], []
    for folder in dict.fromkeys(folder for path in paths for folder in _run_folders(Path(path))):
        try:
            runs.append(_read_run(folder, notes))
        except _LeftOut as reason:
            notes.append(Note(folder, str(reason)))
    if not runs:
        others = f" (and {len(notes) - 1} more)" if len(notes) > 1 else ""
        raise UserError(f"no finished run to report on: {notes[0].path}: {notes[0].line}{others}")
    return runs, notes


class _LeftOut(Exception):
    """Why a run, or a part of it, is not in the report."""


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"no folder {path}: name run folders, or a folder that holds them")
    found = sorted(_walk(path.resolve()))
    if not found:
        raise UserError(f"no run in {path}: name run folders, or a folder that holds them, such as saved_models")
    return found


def _walk(path: Path) -> Iterator[Path]:
    for folder, inner, files in os.walk(path):
        if {"run.json", "metrics.jsonl"} & set(files):
            inner.clear()  # a run folder holds models and checkpoints, no runs
            yield Path(folder)


def _read_run(folder: Path, notes: list[Note]) -> Run:
    description = _read_json(folder / "run.json")
    if not all(isinstance(description.get(part), dict) for part in ("settings", "arguments")):
        raise _LeftOut("run.json lacks settings or arguments")
    lines = list(_read_lines(folder / "metrics.jsonl"))
    if not (folder / "results.json").is_file():
        step = max((line["step"] for line in lines), default=0)
        raise _LeftOut(f"not finished, at step {step}: run its command again to go on")
    split, results = _split_off(_read_json(folder / "results.json"))
    parts: dict[str, Any] = {"cost.json": {}, "evaluation.json": {}}
    for name, parse in (("cost.json", _parse_cost), ("evaluation.json", _parse_evaluations)):
        if (folder / name).is_file():
            try:
                parts[name] = parse(_read_json(folder / name))
            except _LeftOut as reason:
                notes.append(Note(folder, f"{reason}; the rest of the run is shown"))
    return Run(
        path=folder,
        family=_family(folder, description["arguments"]),
        split=split,
        description=description,
        results=results,
        lines=[line for line in lines if "model" not in line],
        cost=parts["cost.json"],
        evaluations=parts["evaluation.json"],
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_none)
    except OSError as error:
        raise _LeftOut(f"{path.name}: {error.strerror}") from None
    except ValueError as error:
        raise _LeftOut(f"{path.name} is damaged ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise _LeftOut(f"{path.name} is damaged (it holds no object)")
    return content


def _none(constant: str) -> None:
    """For NaN and infinity, which Python reads and browsers do not."""


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, start=1):
            try:
                line = json.loads(text, parse_constant=_none)
                ours = _is_number(line["step"]) and _is_number(line["epoch"]) and isinstance(line["split"], str)
            except (ValueError, TypeError, KeyError):
                ours = False
            if ours:
                yield line
            elif text.endswith("\n"):  # a run that goes on may be writing its last line
                raise _LeftOut(f"metrics.jsonl is damaged in line {number}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _split_off(content: dict[str, Any]) -> tuple[str, dict[str, Scores]]:
    """``{"last": {"val/miou": 0.5}}`` -> ``"val"``, ``{"last": {"miou": 0.5}}``."""
    results, split = {}, ""
    for folder in MODEL_FOLDERS:
        scores = content.get(folder)
        if not isinstance(scores, dict) or not all(value is None or _is_number(value) for value in scores.values()):
            raise _LeftOut(f"results.json is damaged (no scores of {folder})")
        split = next(iter(scores), "").partition("/")[0]
        results[folder] = {name.partition("/")[2]: value for name, value in scores.items()}
        if "miou" not in results[folder]:
            raise _LeftOut(f"results.json is damaged (no miou of {folder})")
    return split, results


def _parse_cost(content: dict[str, Any]) -> dict[str, Any]:
    numbers = ("train_seconds", "validation_seconds", "images", "images_per_second", "peak_memory", "parameters")
    for name in (*numbers, "forward_flops"):
        if content.get(name) is not None and not _is_number(content[name]):
            raise _LeftOut(f"cost.json is damaged ({name} is no number)")
    return content


def _parse_evaluations(content: dict[str, Any]) -> dict[str, Evaluation]:
    found = {}
    for folder in MODEL_FOLDERS:
        try:
            part = content[folder]
            confusion = np.array(part["confusion"], dtype=np.int64)
            images = {str(name): image["miou"] for name, image in part["images"].items()}
            whole = confusion.shape == (NUM_CLASSES, NUM_CLASSES) and confusion.min() >= 0
            if not whole or not all(value is None or _is_number(value) for value in images.values()):
                raise ValueError("its numbers")
            found[folder] = Evaluation(str(part["split"]), confusion, images)
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
            raise _LeftOut(f"evaluation.json is damaged (no confusion and images of {folder})") from None
    return found


def _family(folder: Path, arguments: dict[str, Any]) -> str:
    try:
        return str(_read_json(folder / "last" / "config.json")["model_type"]).removeprefix("cityseg_")
    except (_LeftOut, KeyError):  # model folders may have been moved away
        return str(arguments.get("model_type") or "unknown").partition("_")[0]
