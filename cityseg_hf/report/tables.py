"""The report's numbers for other programs and for text: ``results.csv`` and ``results.md``."""

import csv
from collections.abc import Iterator, Sequence
from io import StringIO
from typing import Any, NamedTuple

from cityseg_hf.labels import CLASS_NAMES
from cityseg_hf.report.comparison import MISSING, SHORT, Configuration, Statistic
from cityseg_hf.report.reading import MODEL_FOLDERS, Run


class Column(NamedTuple):
    """A score or a part of the cost: its name in the files, its title, and how it is written."""

    name: str
    title: str
    unit: str
    """``%``, ``""`` (a plain number), ``M``, ``G``, ``s`` or ``B``."""


SCORE_COLUMNS = (
    Column("miou", "mIoU", "%"),
    Column("iiou", "iIoU", "%"),
    Column("boundary_iou", "bIoU", "%"),
    Column("category_iou", "cat. IoU", "%"),
    Column("dice", "Dice", "%"),
    Column("pixel_accuracy", "pixel acc.", "%"),
    Column("mean_accuracy", "mean acc.", "%"),
    Column("loss", "loss", ""),
)
SIZE_COLUMNS = (Column("parameters", "parameters", "M"), Column("forward_flops", "FLOPs", "G"))
TRAINING = Column("train_seconds", "training", "s")
COST_COLUMNS = (
    TRAINING,
    Column("validation_seconds", "validation", "s"),
    Column("images", "images", "n"),
    Column("images_per_second", "images/s", "1"),
    Column("peak_memory", "peak memory", "B"),
    *SIZE_COLUMNS,
)


def written(value: float | None, unit: str) -> str:
    """A number as a reader sees it; a dash where there is none."""
    if value is None:
        return MISSING
    if unit == "s":
        return _duration(value)
    if unit == "B":
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
    formats = {"%": f"{100 * value:.2f}", "": f"{value:.3f}", "n": f"{value:,.0f}", "1": f"{value:,.1f}"}
    if unit in formats:
        return formats[unit]
    scaled = value / {"M": 1e6, "G": 1e9}[unit]
    return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def deviation(statistic: Statistic | None, unit: str) -> str:
    """The deviation over seeds in the unit of its mean; nothing for a single run."""
    if statistic is None or statistic.deviation is None:
        return ""
    return written(statistic.deviation, unit)


def csv_text(runs: Sequence[Run]) -> str:
    """One row a run: folder, family, split, every argument, cost, and every score of the three model folders.

    Scores are fractions, times seconds, memory bytes, as in the files they come from; what a run lacks is empty.
    """
    rows = [dict(_csv_cells(run)) for run in runs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_cells(run: Run) -> Iterator[tuple[str, Any]]:
    yield from (("run", run.name), ("path", str(run.path)), ("family", run.family), ("split", run.split))
    for name, value in run.arguments.items():
        yield name, " ".join(map(str, value)) if isinstance(value, list) else value
    for name in ("git_commit", "data_fingerprint", "device", "num_processes"):
        yield name, run.description.get(name)
    for column in COST_COLUMNS:
        yield f"cost/{column.name}", run.cost.get(column.name)
    for folder in MODEL_FOLDERS:
        for name, value in run.results[folder].items():
            yield f"{folder}/{name}", value


def markdown_text(configurations: Sequence[Configuration], folder: str) -> str:
    """Tables over all runs, for each family, and of the classes for the best of each family."""
    splits = sorted({run.split for one in configurations for run in one.runs})
    count = sum(len(one.runs) for one in configurations)
    parts = [
        "# Results",
        f"Runs: {count}. The model folder `{folder}` of each is judged on {' and '.join(splits)}. Scores in percent, "
        "mean ± sample deviation where several seeds were run. FLOPs: one forward pass of an image, a "
        "multiply-add is two.",
        "## Overall",
        _scores_table(configurations, folder),
    ]
    families = {family: [one for one in configurations if one.family == family] for family in _families(configurations)}
    for family, members in families.items():
        parts += [f"## {family}", _scores_table(members, folder)]
    best = [members[0] for members in families.values()]
    rows = [[name, *(_cell(one.score(f"iou/{name}", folder), "%") for one in best)] for name in CLASS_NAMES]
    title = "## IoU of each class, of the best of each family"
    return "\n\n".join([*parts, title, _table(["class", *(one.label for one in best)], rows, words=1)]) + "\n"


def _families(configurations: Sequence[Configuration]) -> list[str]:
    """By the rank of their best."""
    return list(dict.fromkeys(one.family for one in configurations))


def _scores_table(configurations: Sequence[Configuration], folder: str) -> str:
    settings = list(configurations[0].varied)
    columns = [column for column in SCORE_COLUMNS if any(one.score(column.name, folder) for one in configurations)]
    heads = [*(SHORT.get(name, name) for name in settings), "seeds", *(column.title for column in columns)]
    rows = [
        [
            *one.varied.values(),
            str(len(one.runs)),
            *(_cell(one.score(column.name, folder), column.unit) for column in columns),
            *(_cell(one.cost(column.name), column.unit, spread=False) for column in SIZE_COLUMNS),
            _cell(one.cost("train_seconds"), "s", spread=False),
        ]
        for one in configurations
    ]
    return _table([*heads, *(column.title for column in SIZE_COLUMNS), "training"], rows, words=len(settings))


def _cell(statistic: Statistic | None, unit: str, *, spread: bool = True) -> str:
    around = deviation(statistic, unit) if spread else ""
    return written(statistic and statistic.mean, unit) + (f" ± {around}" if around else "")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """A Markdown table; the first columns are words, the others numbers."""
    lines = [heads, ["---" if number < words else "---:" for number in range(len(heads))], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
