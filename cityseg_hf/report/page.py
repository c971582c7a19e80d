"""The page: everything in one HTML file that asks no network for anything."""

import shlex
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from plotly.offline import get_plotlyjs

from cityseg_hf.cli import train_command
from cityseg_hf.labels import CLASS_NAMES, TRAIN_LABELS
from cityseg_hf.report import figures
from cityseg_hf.report.comparison import MISSING, SHORT, Configuration, Statistic, mean_of, run_labels
from cityseg_hf.report.pictures import Pictures
from cityseg_hf.report.reading import Note, Run
from cityseg_hf.report.tables import COST_COLUMNS, SCORE_COLUMNS, SIZE_COLUMNS, TRAINING, Column, deviation, written

HERE = Path(__file__).parent
NO_BREAK = "\N{NO-BREAK SPACE}"
CONFUSED = 8
"""How many of a run's most frequent confusions are spelled out."""


class Cell(NamedTuple):
    """A table's cell: what is read, what it is sorted by, and what stands small behind or below it."""

    text: str
    value: str | float | None
    small: str = ""
    share: float | None = None
    """0..1, shown as the length of a bar."""


class Table(NamedTuple):
    """Rows of cells under heads: columns of words, then numbers, then words again."""

    heads: list[str]
    rows: list[list[Cell]]
    first_words: int
    last_words: int = 0

    def kind(self, column: int) -> str:
        """``word`` or ``number``: what a column is sorted and aligned as."""
        return "number" if self.first_words <= column < len(self.heads) - self.last_words else "word"


class Confused(NamedTuple):
    """Pixels of one class that were taken for another."""

    label: str
    prediction: str
    share: float
    pixels: int


def page_html(configurations: Sequence[Configuration], notes: Sequence[Note], folder: str, pictures: Pictures) -> str:
    """The whole page.

    Args:
        configurations: best first.
        notes: what is left out.
        folder: the model folder that is judged: ``best_miou``, ``best_loss`` or ``last``.
        pictures: from ``make_gallery``.
    """
    labels = run_labels(configurations)
    runs = [run for configuration in configurations for run in configuration.runs]
    evaluated = [run for run in runs if folder in run.evaluations]
    plots = {**figures.curves(configurations, labels), "classes": figures.class_bars(configurations, folder)}
    if evaluated:
        plots["confusion"] = figures.confusions(evaluated, folder)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["together"] = _together
    return environment.get_template("page.html").render(
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        runs=runs,
        labels=labels,
        notes=notes,
        folder=folder,
        splits=sorted({run.split for run in runs}),
        configurations=configurations,
        colors=[figures.COLORS[rank % len(figures.COLORS)] for rank in range(len(configurations))],
        best_of_family=_best_of_family(configurations, folder),
        leaderboard=_leaderboard(configurations, folder),
        classes=_class_table(configurations, folder),
        evaluated=evaluated,
        confused={run.path: most_confused(run.evaluations[folder].confusion) for run in evaluated},
        pictures=pictures,
        palette=[(label.name, "#{:02x}{:02x}{:02x}".format(*label.color)) for label in TRAIN_LABELS],
        costs=_cost_table(configurations, labels),
        commands={run.path: command_parts(run) for run in runs},
        data={"figures": plots, "traces": list(_traces(configurations))},
    )


def _together(label: str) -> str:
    """A label that breaks only between its settings, behind a dot."""
    return label.replace(" ", NO_BREAK).replace(f"{NO_BREAK}·{NO_BREAK}", f"{NO_BREAK}· ")


def _traces(configurations: Sequence[Configuration]) -> Iterator[list[int]]:
    """For each configuration the numbers of its traces in the plots of curves."""
    first = 0
    for configuration in configurations:
        yield list(range(first, first + len(configuration.runs)))
        first += len(configuration.runs)


def _best_of_family(configurations: Sequence[Configuration], folder: str) -> list[tuple[Configuration, str, str]]:
    """Of each family the first, with its mIoU and the deviation."""
    best: dict[str, Configuration] = {}
    for one in configurations:
        best.setdefault(one.family, one)
    scores = {one.family: one.score("miou", folder) for one in best.values()}
    return [
        (one, written(scores[family] and scores[family].mean, "%"), deviation(scores[family], "%"))
        for family, one in best.items()
    ]


def _cell(statistic: Statistic | None, column: Column, scale: float | None = None) -> Cell:
    around = deviation(statistic, column.unit)
    value = None if statistic is None else statistic.mean
    share = None if scale is None or value is None else max(0.0, value) / scale
    return Cell(written(value, column.unit), value, f"± {around}" if around else "", share)


def _aligned(rows: list[list[Cell]]) -> list[list[Cell]]:
    """With an empty place for the deviation where others of the column have one: digits stand under one another."""
    wide = [any(cell.small for cell in column) for column in zip(*rows, strict=True)]
    return [
        [cell._replace(small=cell.small or " ") if room else cell for cell, room in zip(row, wide, strict=True)]
        for row in rows
    ]


def _leaderboard(configurations: Sequence[Configuration], folder: str) -> Table:
    """A row for each configuration; the settings in which they differ follow in columns of their own, to sort by."""
    settings = [name for name in configurations[0].varied if name != "model_type"]
    scores = [column for column in SCORE_COLUMNS if any(one.score(column.name, folder) for one in configurations)]
    sizes = [column for column in (TRAINING, *SIZE_COLUMNS) if any(one.cost(column.name) for one in configurations)]
    top = max(0.0, mean_of(configurations[0].score("miou", folder))) or 1.0
    rows = [
        [
            _named(one.label),
            *(
                _cell(one.score(column.name, folder), column, top if column.name == "miou" else None)
                for column in scores
            ),
            Cell(str(len(one.runs)), len(one.runs)),
            *(_cell(one.cost(column.name), column)._replace(small="") for column in sizes),
            *(Cell(one.varied[name], _sortable(one.varied[name])) for name in settings),
        ]
        for one in configurations
    ]
    numbers = [*(column.title for column in scores), "seeds", *(column.title for column in sizes)]
    return Table(
        ["configuration", *numbers, *(SHORT.get(name, name) for name in settings)], _aligned(rows), 1, len(settings)
    )


def _named(label: str) -> Cell:
    """The model, and below it what sets the configuration or run apart."""
    model, _, others = label.partition(" · ")
    return Cell(model, label, others)


def _sortable(text: str) -> str | float | None:
    """A setting's value, so that 1e-05 sorts before 0.001."""
    try:
        return float(text)
    except ValueError:
        return None if text == MISSING else text


def _class_table(configurations: Sequence[Configuration], folder: str) -> Table:
    """IoU of each class by configuration."""
    column = Column("", "", "%")
    rows = []
    for one in configurations:
        found = [one.score(name, folder) for name in ("miou", *(f"iou/{name}" for name in CLASS_NAMES))]
        rows.append([_named(one.label), *(_cell(score, column, 1.0)._replace(small="") for score in found)])
    return Table(["configuration", "mIoU", *CLASS_NAMES], rows, 1)


def _cost_table(configurations: Sequence[Configuration], labels: dict[Path, str]) -> Table:
    """What each run cost, and on what."""
    rows = []
    for run in (run for one in configurations for run in one.runs):
        hardware = run.cost.get("hardware") or run.description.get("device")
        where = f"{run.description.get('num_processes', 1)}{NO_BREAK}\N{MULTIPLICATION SIGN}{NO_BREAK}{hardware}"
        numbers = [(run.cost.get(column.name), column.unit) for column in COST_COLUMNS]
        rows.append([_named(labels[run.path]), *(Cell(written(*one), one[0]) for one in numbers), Cell(where, where)])
    return Table(["run", *(column.title for column in COST_COLUMNS), "on"], rows, 1, last_words=1)


def most_confused(counts: np.ndarray) -> list[Confused]:
    """The pairs of classes that take the largest share of a label's pixels, largest first.

    Args:
        counts: ``int64[19, 19]``, rows are labels, columns predictions.
    """
    shares = np.nan_to_num(figures.row_shares(counts))
    np.fill_diagonal(shares, 0)
    order = np.argsort(-shares, axis=None, kind="stable")[:CONFUSED]
    pairs = [divmod(int(number), len(counts)) for number in order]
    return [
        Confused(CLASS_NAMES[row], CLASS_NAMES[column], float(shares[row, column]), int(counts[row, column]))
        for row, column in pairs
        if shares[row, column] > 0
    ]


def command_parts(run: Run) -> list[str]:
    """What repeats a run, from the root of the repository: the script, then each flag with its values."""
    processes, launcher = run.description.get("num_processes") or 1, "python"
    if processes > 1:
        launcher = f"accelerate launch --multi_gpu --num_processes {processes}"
        # Accelerate's name for several processes is that of GPUs, on CPUs as well.
        launcher = launcher if "cuda" in str(run.description.get("device")) else f"ACCELERATE_USE_CPU=1 {launcher}"
    parts = [[f"{launcher} scripts/train.py"]]
    for word in train_command(run.arguments):
        if word.startswith("--"):
            parts.append([])
        parts[-1].append(shlex.quote(word))
    return [" ".join(part) for part in parts if part]
