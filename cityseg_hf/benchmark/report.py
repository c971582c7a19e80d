"""Measurements as tables and as JSON."""

from collections.abc import Iterator, Sequence
from typing import Any

from cityseg_hf.benchmark.timing import Group, Ratio, Row

UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def describe(group: Group, rows: list[Row], ratios: list[Ratio]) -> dict[str, Any]:
    """A group's part of the JSON file. Times are in seconds, memory in bytes."""
    return {
        "title": group.title,
        "rows": [row.summary() for row in rows],
        "ratios": [ratio._asdict() for ratio in ratios],
        "facts": group.facts or {},
    }


def tables(described: dict[str, Any]) -> str:
    """A group as a reader sees it: times, ratios, facts."""
    parts = ["", described["title"], *_lines(list(_times(described["rows"])))]
    if described["ratios"]:
        parts += ["", *_lines(list(_ratios(described["ratios"])))]
    for name, value in described["facts"].items():
        parts.append(f"  {name.replace('_', ' ')}: {f'{value:.1e}' if isinstance(value, float) else value}")
    return "\n".join(parts)


def _times(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    scale, unit = next(((s, u) for s, u in UNITS if min(row["median"] for row in rows) >= s), UNITS[-1])
    yield ["contender", "precision", "min", "median", "max", "unit", "extra memory", "note"]
    for row in rows:
        times = [f"{row[name] / scale:.2f}" for name in ("min", "median", "max")]
        yield [row["name"], row["precision"], *times, unit, _megabytes(row["peak_extra_bytes"]), row["note"]]


def _ratios(ratios: list[dict[str, Any]]) -> Iterator[list[str]]:
    yield ["peer / ours", "precisions", "lowest", "ratio", "highest", "", "extra memory", ""]
    for one in ratios:
        numbers = [f"{one[name]:.2f}" for name in ("lowest", "ratio", "highest")]
        memory = "-" if one["memory"] is None else f"{one['memory']:.2f}"
        pair, precisions = f"{one['peer']} / {one['ours']}", f"{one['peer_precision']} / {one['our_precision']}"
        yield [pair, precisions, *numbers, "", memory, ""]


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.1f} MiB"


def _lines(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        # The first two columns and the note are words, the rest are numbers.
        padded = [
            cell.ljust(width) if column in (0, 1, 5, 7) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield ("  " + "  ".join(padded)).rstrip()
