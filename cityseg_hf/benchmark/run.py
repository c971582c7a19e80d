"""One benchmark from its options to the content of its JSON file."""

from collections.abc import Callable, Iterator
from typing import Any

from cityseg_hf.benchmark import data, ends, scores, train
from cityseg_hf.benchmark.machine import describe_machine
from cityseg_hf.benchmark.options import Options
from cityseg_hf.benchmark.report import describe, tables
from cityseg_hf.benchmark.timing import Group, compare, measure
from cityseg_hf.launch import use_cpu_well

MODES: dict[str, Callable[[Options], Iterator[Group]]] = {
    "data": data.groups,
    "train": train.groups,
    "eval": ends.eval_groups,
    "infer": ends.infer_groups,
    "metric": scores.metric_groups,
}


def benchmark(mode: str, options: Options, rounds: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures a mode, group by group; each group is said as soon as it is known.

    Returns:
        The content of the JSON file: ``mode``, ``settings``, ``machine`` and ``groups``.
    """
    if options.device.type == "cpu":
        use_cpu_well()  # for all contenders alike
    machine = describe_machine(options.device)
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    say(f"{where}, torch {machine['versions']['torch']}")
    groups = []
    for group in MODES[mode](options):  # each is built when the one before is done, and then forgotten
        rows = measure(group, rounds, options.device)
        groups.append(describe(group, rows, compare(rows)))
        say(tables(groups[-1]))
    return {"mode": mode, "settings": {**options.settings(), "rounds": rounds}, "machine": machine, "groups": groups}
