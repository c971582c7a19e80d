"""Scores of one model or several: a table for the terminal, JSON and CSV."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cityseg_hf.intervals import Bootstrap
from cityseg_hf.labels import CLASS_NAMES

COLUMNS = {"IoU": "iou", "Dice": "dice", "acc.": "accuracy", "iIoU": "iiou", "bIoU": "boundary_iou"}
"""What is told of each class, where one model is judged."""

MEANS = (
    "miou",
    "iiou",
    "boundary_iou",
    "category_iou",
    "category_iiou",
    "dice",
    "mean_accuracy",
    "pixel_accuracy",
    "image_miou",
    "calibration_error",
)
"""What is told of a split, in this order."""

COMPARED = ("miou", "iiou", "boundary_iou")
"""What models are compared in."""


def short_names(models: Sequence[str]) -> list[str]:
    """What tells models apart: their paths without the folders that all begin with, and without those all end with."""
    if len(models) == 1:
        return [Path(models[0]).name or models[0]]
    parts = [Path(model).parts for model in models]
    while len({words[0] if words else "" for words in parts}) == 1:
        parts = [words[1:] for words in parts]
    while min(map(len, parts)) > 1 and len({words[-1] for words in parts}) == 1:
        parts = [words[:-1] for words in parts]
    return [str(Path(*words)) for words in parts]


def table(judged: dict[str, Bootstrap]) -> Iterator[str]:
    """Lines for the terminal, in percent; models by name.

    One model: its scores class by class. Several: the IoU of each, class by class, the best of a line marked, and how
    sure the differences to the first are.
    """
    if len(judged) == 1:
        (only,) = judged.values()
        yield from _classes({head: _column(only, f"{kind}/") for head, kind in COLUMNS.items()})
        yield ""
        yield from _means(judged)
    else:
        yield from _classes({name: _column(one, "iou/") for name, one in judged.items()}, best=True)
        yield ""
        yield from _means(judged)
        yield ""
        yield from _differences(judged)


def _column(one: Bootstrap, prefix: str) -> list[float | None]:
    return [one.scores.get(prefix + name) for name in CLASS_NAMES]


def _classes(columns: dict[str, list[float | None]], best: bool = False) -> Iterator[str]:
    widths = {head: max(8, len(head) + 2) for head in columns}
    yield f"{'class':<16}" + "".join(f"{head:>{width}}" for head, width in widths.items()).rstrip()
    for row, name in enumerate(CLASS_NAMES):
        values = [column[row] for column in columns.values()]
        most = max((value for value in values if value is not None), default=None)
        cells = (
            _percent(value) + ("*" if best and value is not None and value == most else " " if best else "")
            for value in values
        )
        line = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths.values(), strict=True))
        yield f"{name:<16}{line}".rstrip()


def _means(judged: dict[str, Bootstrap]) -> Iterator[str]:
    names = [name for name in MEANS if any(one.scores.get(name) is not None for one in judged.values())]
    # "57.31 (55.02 to 59.41)" is 22 characters wide.
    widths = [max(24, len(name) + 2) for name in judged]
    if len(judged) > 1:
        yield f"{'mean':<18}" + "".join(f"{name:>{width}}" for name, width in zip(judged, widths, strict=True))
    for name in names:
        cells = (_with_interval(one, name) for one in judged.values())
        yield f"{name:<18}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    images = len(next(iter(judged.values())).images)
    yield f"(in brackets: 95 % of the draws of a bootstrap over {images} image{'s' * (images != 1)})"


def _with_interval(one: Bootstrap, name: str) -> str:
    if one.scores.get(name) is None:
        return "-"
    low, high = one.interval(name)
    return f"{_percent(one.scores[name])} ({_percent(low)} to {_percent(high)})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _differences(judged: dict[str, Bootstrap]) -> Iterator[str]:
    names = list(judged)
    for row in differences(judged):
        low, high = (f"{100 * row[end]:+.2f}" for end in ("low", "high"))
        yield (
            f"{row['model']} - {names[0]}: {row['score']} {100 * row['difference']:+.2f} ({low} to {high}), "
            f"p {row['p_value']:.3f}"
        )


def differences(judged: dict[str, Bootstrap]) -> list[dict[str, Any]]:
    """How each model but the first differs from the first, by paired bootstrap."""
    (first, reference), *others = judged.items()
    rows = []
    for name, one in others:
        for score in COMPARED:
            found = one.less(reference, score)
            if found is not None:
                rows.append({"model": name, "less": first, "score": score, **found._asdict()})
    return rows


def as_json(judged: dict[str, Bootstrap], split: str) -> dict[str, Any]:
    """``{split: scores, "intervals": {score: [low, high]}}`` of one model.

    Of several, ``{"models": {name: that}, "differences": [...]}``.
    """
    entries = {
        name: {split: one.scores, "intervals": {score: one.interval(score) for score in one.scores}}
        for name, one in judged.items()
    }
    if len(entries) == 1:
        return next(iter(entries.values()))
    return {"models": entries, "differences": differences(judged)}


def as_csv(judged: dict[str, Bootstrap], split: str) -> str:
    """A row a model: every score, and beside each of ``MEANS`` the ends of its interval."""
    rows = []
    for name, one in judged.items():
        row: dict[str, Any] = {"model": name, "split": split, "images": len(one.images)}
        for score, value in one.scores.items():
            row[score] = value
            if score in MEANS:
                row[f"{score}_low"], row[f"{score}_high"] = one.interval(score) or (None, None)
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
