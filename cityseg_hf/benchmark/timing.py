"""Contenders measured in turns, and what that says of their ratios.

A shared machine slows down and recovers from minute to minute. So contenders take turns, A B A B, and a ratio is known
from the rounds, in which both met about the same machine, as well as from the medians.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch

from cityseg_hf.benchmark.memory import exact_allocations, peak_extra_memory


class Contender(NamedTuple):
    """One way of doing a piece of work.

    Attributes:
        name: as the table shows it.
        run: does the work once.
        ours: this project's way; all others are peers.
        precision: ``"no"`` (float32) or ``"bf16"``, as accelerate has it.
        note: what a reader must know of it.
        pieces: how many pieces of work (samples) a run does; times are for one.
        same_work: a ratio to ours means something.
    """

    name: str
    run: Callable[[], Any]
    ours: bool = False
    precision: str = "no"
    note: str = ""
    pieces: int = 1
    same_work: bool = True


class Group(NamedTuple):
    """Contenders for the same work.

    Attributes:
        title: which work.
        contenders: in the order of their turns.
        facts: what else was found, such as how many pixels of two results differ.
        memory: also measure the peak of the extra memory.
        rounds: turns of each; the caller's number without it.
        warm_up: run each once before.
    """

    title: str
    contenders: list[Contender]
    facts: dict[str, Any] | None = None
    memory: bool = False
    rounds: int | None = None
    warm_up: bool = True


@dataclass
class Row:
    """What was measured of a contender: seconds of each round, and the peak of its extra memory in bytes."""

    name: str
    precision: str = "no"
    ours: bool = False
    note: str = ""
    same_work: bool = True
    seconds: list[float] = field(default_factory=list)
    peak_extra_bytes: int | None = None

    def summary(self) -> dict[str, Any]:
        """The row of the JSON file."""
        low, middle, high = min(self.seconds), median(self.seconds), max(self.seconds)
        return {**self.__dict__, "min": low, "median": middle, "max": high}


class Ratio(NamedTuple):
    """How many times as long a peer takes as one of ours: of the medians, and the extremes over the rounds.

    ``memory`` is the ratio of the peaks of extra memory, ``None`` where they were not measured.
    """

    peer: str
    peer_precision: str
    ours: str
    our_precision: str
    ratio: float
    lowest: float
    highest: float
    memory: float | None = None


def take_turns(
    group: Group, rounds: int, synchronize: Callable[[], None], clock: Callable[[], float] = time.perf_counter
) -> list[Row]:
    """Runs each contender once to warm up, then all of them in turns, ``rounds`` times."""
    contenders = group.contenders
    rows = [Row(one.name, one.precision, one.ours, one.note, one.same_work) for one in contenders]
    for one in contenders if group.warm_up else []:
        one.run()
    synchronize()
    for _ in range(rounds):
        for one, row in zip(contenders, rows, strict=True):
            start = clock()
            one.run()
            synchronize()
            row.seconds.append((clock() - start) / one.pieces)
    return rows


def measure(group: Group, rounds: int, device: torch.device) -> list[Row]:
    """Times of a group, then, in a pass of its own, the peaks of memory."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rows = take_turns(group, group.rounds or rounds, synchronize)
    if group.memory:
        with exact_allocations() if device.type == "cpu" else nullcontext():
            for one, row in zip(group.contenders, rows, strict=True):
                row.peak_extra_bytes = peak_extra_memory(one.run, device)
    return rows


def compare(rows: list[Row]) -> list[Ratio]:
    """Every peer against ours at the same precision, and the peers' default, float32, against all of ours."""
    ratios = []
    for peer in (row for row in rows if row.same_work and not row.ours):
        for our in (row for row in rows if row.ours):
            if peer.precision in (our.precision, "no"):
                each = [theirs / mine for theirs, mine in zip(peer.seconds, our.seconds, strict=True)]
                memory = None
                if peer.peak_extra_bytes is not None and our.peak_extra_bytes:
                    memory = peer.peak_extra_bytes / our.peak_extra_bytes
                of_medians = median(peer.seconds) / median(our.seconds)
                names = (peer.name, peer.precision, our.name, our.precision)
                ratios.append(Ratio(*names, of_medians, min(each), max(each), memory))
    return ratios
