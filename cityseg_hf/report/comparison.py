"""Which runs repeat one another with another seed, in what the others differ, and how they rank."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from cityseg_hf.report.reading import Run

SHORT = {
    "model_type": "model",
    "model_args": "args",
    "init_from": "from",
    "augmentation": "aug",
    "learning_rate": "lr",
    "weight_decay": "wd",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "global_batch_size": "batch",
    "mixed_precision": "precision",
    "early_stopping_patience": "patience",
}
"""How settings are called where there is little room; others keep the names of their flags."""

MISSING = "\N{EN DASH}"
"""What stands where there is no value."""


class Statistic(NamedTuple):
    """Over the seeds of a configuration; the deviation is that of a sample, ``None`` for a single run."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Configuration:
    """Runs that differ only in their seed."""

    runs: tuple[Run, ...]
    varied: dict[str, str]
    """The settings in which the report's runs differ, as they are shown."""

    @property
    def family(self) -> str:
        """unet, fcn_resnet, segformer, or another."""
        return self.runs[0].family

    @property
    def label(self) -> str:
        """The model and what sets it apart; another configuration has another one."""
        model, *others = self.varied.items()
        shown = (f"{SHORT.get(name, name)} {value}" for name, value in others if value != MISSING)
        return " · ".join([model[1], *shown])

    def score(self, name: str, folder: str) -> Statistic | None:
        """A score of a model folder over the seeds that have it."""
        return _statistic([run.results[folder].get(name) for run in self.runs])

    def cost(self, name: str) -> Statistic | None:
        """A part of the cost over the runs that recorded it."""
        return _statistic([run.cost.get(name) for run in self.runs])


def _statistic(values: Sequence[float | None]) -> Statistic | None:
    there = [value for value in values if value is not None]
    if not there:
        return None
    return Statistic(mean(there), stdev(there) if len(there) > 1 else None)


def compare(runs: Sequence[Run], folder: str) -> list[Configuration]:
    """Groups runs by all but their seed; the best mean mIoU of a model folder comes first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_identity(run), sort_keys=True, default=str), []).append(run)
    identities = [_identity(group[0]) for group in groups.values()]
    names = ["model_type", *dict.fromkeys(name for identity in identities for name in identity)]
    differing = [name for name in dict.fromkeys(names) if len({_shown(one.get(name)) for one in identities}) > 1]
    found = [
        Configuration(
            tuple(sorted(group, key=lambda run: (str(run.seed).zfill(10), run.name))),
            {
                name: _data(group[0]) if name == "data" else _shown(identity.get(name))
                for name in dict.fromkeys(["model_type", *differing])
            },
        )
        for group, identity in zip(groups.values(), identities, strict=True)
    ]
    return sorted(found, key=lambda one: (-mean_of(one.score("miou", folder)), one.label))


def mean_of(statistic: Statistic | None) -> float:
    """For ranking: what has no score comes last."""
    return float("-inf") if statistic is None else statistic.mean


def _identity(run: Run) -> dict[str, Any]:
    settings = {name: value for name, value in run.description["settings"].items() if name != "seed"}
    # Scores on other images, or another split, are no repetition; where the images lie does not matter.
    return {**settings, "data": run.description.get("data_fingerprint"), "split": run.split}


def _data(run: Run) -> str:
    """The name of the data's folder, and the beginning of the fingerprint, which tells two of that name apart."""
    root = Path(str(run.arguments.get("base_dataset_path") or "data")).name
    return f"{root} {str(run.description.get('data_fingerprint'))[:6]}"


def _shown(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(_shown(one) for one in value)
    return str(value)


def run_labels(configurations: Sequence[Configuration]) -> dict[Path, str]:
    """A label for each run that no other has: its configuration's, its seed, and if need be its folder."""
    labels = {}
    for configuration in configurations:
        for run in configuration.runs:
            repeats = len(configuration.runs) > 1
            labels[run.path] = f"{configuration.label} · seed {run.seed}" if repeats else configuration.label
    times = Counter(labels.values())
    return {path: f"{label} · {path.name}" if times[label] > 1 else label for path, label in labels.items()}
