"""The plots of the page, without colours of the page's own: those follow the reader's light or dark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from cityseg_hf.labels import CLASS_NAMES
from cityseg_hf.report.comparison import Configuration
from cityseg_hf.report.reading import Run

COLORS = ("#3b7ddd", "#e08a00", "#12a150", "#d6455d", "#8a5cd6", "#0aa2b8", "#c7519c", "#7d8b2e")
"""Of configurations, by rank, and again from the start: legible on white and on near-black."""

DASHES = ("solid", "dash", "dot", "dashdot")
"""Of the seeds of a configuration."""

POINTS = 300
"""Points of a curve at most: more than a plot has pixels for, and a page stays small."""


def curves(configurations: Sequence[Configuration], labels: dict[Path, str]) -> dict[str, dict[str, Any]]:
    """Validation mIoU, training loss and learning rate over epochs; the same run is the same trace in each."""
    figures = {"miou": _figure("%"), "loss": _figure("log"), "rate": _figure("power")}
    for rank, configuration in enumerate(configurations):
        for number, run in enumerate(configuration.runs):
            look = {"color": COLORS[rank % len(COLORS)], "dash": DASHES[number % len(DASHES)], "width": 2}
            for name, (x, y) in _series(run).items():
                percent = name == "miou"
                figures[name].add_scatter(
                    x=x,
                    y=y,
                    name=labels[run.path],
                    mode="lines+markers" if percent and len(x) < 40 else "lines",
                    line=look,
                    marker={"size": 5},
                    hovertemplate="%{fullData.name}<br>epoch %{x:.4~g}: <b>%{y:"
                    + (".2%" if percent else ".4~g")
                    + "}</b><extra></extra>",
                )
    return {name: figure.to_plotly_json() for name, figure in figures.items()}


def _series(run: Run) -> dict[str, tuple[list[float], list[float | None]]]:
    """Epochs and values of a run's three curves."""
    training = [line for line in run.lines if line["split"] == "train"]
    # What chose the best model: val, or the held-out cities.
    chosen = [line for line in run.lines if line["split"] not in ("train", "train_epoch")]
    return {
        "miou": _thinned(chosen, "miou"),
        "loss": _thinned(training, "loss"),
        "rate": _thinned(training, "learning_rate"),
    }


def _thinned(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float | None]]:
    """At most ``POINTS`` points, each the mean of as many neighbours as all others."""
    pairs = [(line["epoch"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
    width = -(-len(pairs) // POINTS) or 1
    parts = [np.mean(pairs[start : start + width], axis=0) for start in range(0, len(pairs), width)]
    return [_rounded(x) for x, _ in parts], [_rounded(y) for _, y in parts]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def class_bars(configurations: Sequence[Configuration], folder: str) -> dict[str, Any]:
    """IoU of each class: for each configuration a bar, and after all bars for each a mark to compare with."""
    figure = _figure()
    statistics = [[one.score(f"iou/{name}", folder) for name in CLASS_NAMES] for one in configurations]
    for configuration, found in zip(configurations, statistics, strict=True):
        means = [None if one is None else _rounded(one.mean) for one in found]
        spread = [None if one is None else one.deviation for one in found]
        figure.add_bar(
            y=CLASS_NAMES,
            x=means,
            orientation="h",
            name=configuration.label,
            error_x={"array": spread, "visible": any(spread), "thickness": 1.2, "width": 3},
            hovertemplate="%{y}: <b>%{x:.2%}</b><br>%{fullData.name}<extra></extra>",
        )
    for configuration, found in zip(configurations, statistics, strict=True):
        figure.add_scatter(
            y=CLASS_NAMES,
            x=[None if one is None else _rounded(one.mean) for one in found],
            mode="markers",
            name=configuration.label,
            marker={"symbol": "line-ns", "size": 13, "line": {"width": 3}},
            hovertemplate="%{y}: <b>%{x:.2%}</b><br>%{fullData.name}<extra></extra>",
        )
    figure.update_layout(
        xaxis={"range": [0, 1.005], "tickformat": ".0%", "fixedrange": True, "side": "top"},
        yaxis={"range": [len(CLASS_NAMES) - 0.5, -0.5], "fixedrange": True, "showgrid": False, "ticksuffix": " "},
        yaxis_automargin=True,
        barmode="overlay",
        bargap=0.4,
    )
    return figure.to_plotly_json()


def confusions(runs: Sequence[Run], folder: str) -> dict[str, Any]:
    """A heat map for each run: where the pixels of each label went, in shares of the label's pixels."""
    figure = _figure()
    for run in runs:
        counts = run.evaluations[folder].confusion
        shares = row_shares(counts)
        figure.add_heatmap(
            x=CLASS_NAMES,
            y=CLASS_NAMES,
            z=[[None if np.isnan(share) else _rounded(share) for share in row] for row in shares],
            # Below half a percent a number only hides the pattern.
            text=[["" if not share >= 0.005 else f"{100 * share:.0f}" for share in row] for row in shares],
            customdata=counts.tolist(),
            zmin=0,
            zmax=1,
            xgap=1,
            ygap=1,
            showscale=False,
            hovertemplate="label <b>%{y}</b><br>predicted <b>%{x}</b><br>%{z:.2%} of the label: "
            "%{customdata:,} pixels<extra></extra>",
        )
    figure.update_layout(
        xaxis={"side": "top", "tickangle": -60, "fixedrange": True, "showgrid": False, "title": {"text": "prediction"}},
        yaxis={"autorange": "reversed", "fixedrange": True, "showgrid": False, "title": {"text": "label"}},
    )
    for axis in (figure.layout.xaxis, figure.layout.yaxis):
        axis.update(automargin=True, ticks="", dtick=1)
    return figure.to_plotly_json()


def row_shares(counts: np.ndarray) -> np.ndarray:
    """``int64[19, 19]`` -> ``float64[19, 19]`` whose rows sum to 1; NaN for a class that has no label."""
    totals = counts.sum(axis=1, keepdims=True)  # [19, 1]
    return np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)


def _figure(y_axis: str = "") -> go.Figure:
    figure = go.Figure(layout={"template": go.layout.Template(), "showlegend": False, "hovermode": "closest"})
    if y_axis:
        figure.update_layout(xaxis={"title": {"text": "epoch"}, "rangemode": "tozero"}, yaxis={"automargin": True})
        formats = {"%": {"tickformat": ".0%"}, "log": {"type": "log"}, "power": {"exponentformat": "power"}}
        figure.update_layout(yaxis=formats[y_axis])
    return figure
