"""Runs that are killed at chosen points, and whether they end as one that was left in peace.

The victim is the real training script in a process of its own; only the place at which it dies is put into it.
"""

import functools
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from cityseg_hf.errors import EXIT_STOPPED

PLACES: dict[str, tuple[str, str]] = {
    "start": ("cityseg_hf.runs", "RunFolder.open"),
    "step": ("cityseg_hf.step", "TrainStep.__call__"),
    "update": ("cityseg_hf.step", "TrainStep._update"),
    "log": ("cityseg_hf.runs", "RunFolder.log"),
    "validation": ("cityseg_hf.evaluation", "_count_batch"),
    "model folder": ("cityseg_hf.checkpoint", "save_model_folder"),
    "swap": ("cityseg_hf.checkpoint", "_swap_in"),
    "save": ("cityseg_hf.checkpoint", "Checkpoints.save"),
    "write": ("cityseg_hf.checkpoint", "_write_to_disk"),
    "results": ("cityseg_hf.runs", "RunFolder.write_results"),
}
"""Where a run can be killed: the functions of these rooms, in which the clock starts."""

LONGEST = {"step": 0.1, "validation": 0.05, "start": 0.5}
"""Seconds within which the signal comes after that; 0.01 elsewhere."""


class Kill(NamedTuple):
    """A signal to one process of a run.

    Attributes:
        place: of ``PLACES``.
        call: which call of it, from 0.
        delay: seconds after its beginning; 0 is before it.
        signal: the signal's name.
        rank: which process gets it.
    """

    place: str
    call: int
    delay: float
    signal: str
    rank: int = 0

    def __str__(self) -> str:
        where = f"{self.place} {self.call}, {1000 * self.delay:.1f} ms"
        return f"{self.signal} to process {self.rank} in {where}"


def random_kills(count: int, processes: int, seed: int) -> Iterator[Kill]:
    """Kills at all places in turn, by SIGKILL and SIGTERM, at random calls and moments."""
    draw = random.Random(seed)
    places = draw.sample(list(PLACES), len(PLACES))
    for number in range(count):
        place = places[number % len(places)]
        call = 0 if place in ("start", "results") else draw.randrange(6)
        # Every third one exactly at the beginning, the others on the way.
        delay = 0.0 if number % 3 == 0 else draw.uniform(0, LONGEST.get(place, 0.01))
        rank = draw.randrange(processes) if place in ("start", "step", "update", "validation") else 0
        yield Kill(place, call, delay, draw.choice(["SIGKILL", "SIGKILL", "SIGTERM"]), rank)


def arm(kill: Kill) -> None:
    """Puts the signal into this process."""
    if int(os.environ.get("RANK", "0")) != kill.rank:
        return
    module, path = PLACES[kill.place]
    owner: Any = import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if calls == kill.call:
            strike = functools.partial(os.kill, os.getpid(), getattr(signal, kill.signal))
            threading.Timer(kill.delay, strike).start() if kill.delay else strike()
        calls += 1
        return function(*args, **kwargs)

    setattr(owner, name, struck)


def train_under(kill: Kill, script: Path, argv: Sequence[str]) -> None:
    """Runs the training script in this process, until the signal."""
    arm(kill)
    sys.argv = [str(script), *argv]
    runpy.run_path(str(script), run_name="__main__")


class Chaos:
    """Kills runs of one command and compares them with a quiet one.

    Args:
        scripts: the folder of ``train.py`` and ``chaos.py``.
        folder: gets the runs.
        argv: flags of the training.
        processes: how many train together.
    """

    def __init__(self, scripts: Path, folder: Path, argv: Sequence[str], processes: int = 1) -> None:
        self.scripts, self.folder, self.processes = scripts, folder, processes
        self.argv = [*argv, "-s", str(folder)]

    def quiet(self) -> Path:
        """The run that nobody kills.

        Raises:
            RuntimeError: it did not end well.
        """
        status, said = self._launch(["train.py", *self.argv, "--run_name", "quiet"])
        if status:
            raise RuntimeError(f"the quiet run ended with status {status}: {said}")
        return self.folder / "quiet"

    def strike(self, number: int, kill: Kill) -> str | None:
        """Kills a run, runs it again to the end and compares.

        Returns:
            What is wrong, or ``None``.
        """
        name = f"kill_{number:03d}"
        argv = [*self.argv, "--run_name", name]
        status, said = self._launch(["chaos.py", "--victim", json.dumps(kill), "--", *argv])
        # A point that the run does not come to leaves it alone; torchrun makes 1 of every status.
        fitting = {"SIGKILL": (-9, 137, 0, 1), "SIGTERM": (EXIT_STOPPED, -15, 143, 0, 1)}[kill.signal]
        # Whoever is asked to stop says so in one line; torchrun and what a killed process leaves behind talk more.
        talks = kill.signal == "SIGTERM" and self.processes == 1 and "Traceback" in said
        if status not in fitting or talks:
            return f"ended with status {status}: {said[-500:]}"
        status, said = self._launch(["train.py", *argv])
        if status:
            return f"went on and ended with status {status}: {said[-500:]}"
        return difference(self.folder / "quiet", self.folder / name)

    def _launch(self, command: list[str]) -> tuple[int, str]:
        script, *words = command
        launcher = [sys.executable, str(self.scripts / script)]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if self.processes > 1:
            launcher[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
            environment["ACCELERATE_USE_CPU"] = "1"
        done = subprocess.run([*launcher, *words], env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr


def difference(one: Path, other: Path) -> str | None:
    """What two runs left otherwise: lines, results, or bits of weights; ``None`` where all is the same."""
    for file in ("metrics.jsonl", "results.json"):
        if (one / file).read_text(encoding="utf-8") != (other / file).read_text(encoding="utf-8"):
            return f"{file} differs"
    for folder in ("best_miou", "best_loss", "last"):
        ours, theirs = (load_file(run / folder / "model.safetensors") for run in (one, other))
        if ours.keys() != theirs.keys() or any(not torch.equal(ours[name], theirs[name]) for name in ours):
            return f"weights of {folder} differ"
    return None


def survive(chaos: Chaos, kills: Sequence[Kill], say: Callable[[str], None]) -> int:
    """Strikes every kill; says a line of each.

    Returns:
        How many runs did not end as the quiet one.
    """
    chaos.quiet()
    wrong = 0
    for number, kill in enumerate(kills, start=1):
        found = chaos.strike(number, kill)
        wrong += found is not None
        say(f"{number}/{len(kills)} {kill}: {found or 'the same'}")
    return wrong
