"""The run folder: what a run leaves on disk, whatever the trackers do."""

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cityseg_hf.config import Config
from cityseg_hf.data.sources import Source
from cityseg_hf.errors import UserError, one_line

PACKAGES = ("cityseg_hf", "torch", "torchvision", "accelerate", "transformers", "datasets", "numpy")


class RunFolder:
    """``<save_model_path>/<run name>/``: run.json, metrics.jsonl, results.json, model folders and checkpoints.

    Only the main process writes; every process may read.
    """

    def __init__(self, path: Path, is_main: bool) -> None:
        self.path, self.is_main = path, is_main

    def open(self, description: dict[str, Any]) -> None:
        """Makes the folder and writes ``run.json``, or checks that the run in it is this one.

        Raises:
            UserError: the folder cannot be written, or holds a run with other settings.
        """
        file = self.path / "run.json"
        if file.is_file():
            try:
                before = dict(json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise UserError(f"{file} is damaged ({one_line(error)}): choose another --run_name") from None
            for name in ("settings", "data_fingerprint"):
                _require_same(before.get(name), description.get(name), name, self.path)
            return
        if not self.is_main:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(file, description)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; choose another --save_model_path") from None

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end and was tested."""
        return (self.path / "results.json").is_file()

    def log(self, step: int, epoch: float, split: str, scores: dict[str, Any]) -> None:
        """Appends a line to ``metrics.jsonl``."""
        if self.is_main:
            line = json.dumps(_finite({"step": step, "epoch": round(epoch, 6), "split": split, **scores}))
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def forget_after(self, step: int) -> None:
        """Drops what was logged but not saved, when a run goes on from ``step``: later steps, and final tests."""
        file = self.path / "metrics.jsonl"
        if self.is_main and file.is_file():
            lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in lines if (entry := json.loads(line))["step"] <= step and "model" not in entry]
            replace_file(file, "".join(kept))

    def sync(self) -> None:
        """Brings ``metrics.jsonl`` to the disk, before a checkpoint says that all up to its step is done."""
        file = self.path / "metrics.jsonl"
        if self.is_main and file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())

    def write_evaluation(self, records: dict[str, Any]) -> None:
        """Writes ``evaluation.json``: what the final test counted, for each of the saved models."""
        if self.is_main:
            write_json(self.path / "evaluation.json", records)

    def write_results(self, results: dict[str, Any]) -> None:
        """Writes ``results.json``, which also says that the run is finished."""
        if self.is_main:
            write_json(self.path / "results.json", results)


def _require_same(before: Any, now: Any, name: str, folder: Path) -> None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            _require_same(before.get(key), now.get(key), f"--{key}", folder)
    elif before != now:
        mend = f"use {name} {before}, or another --run_name" if name.startswith("--") else "choose another --run_name"
        raise UserError(f"{folder} holds a run with {name} {before}, this command has {now}: {mend}")


def _finite(content: Any) -> Any:
    """JSON has no NaN: a score that is not a number becomes null."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    replace_file(path, json.dumps(_finite(content), indent=2) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A place to write to, renamed to ``path`` when the block ends well and removed when it does not.

    A reader, or a crash, meets the old file or the new one.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def describe_run(config: Config, accelerator: Accelerator, sources: Mapping[str, Source]) -> dict[str, Any]:
    """The content of ``run.json``: all that is needed to know what a run was. No secrets: no environment."""
    settings = config.identity(accelerator.num_processes)
    settings.pop("base_dataset_path")  # where the data lies may change; what it is may not: the fingerprint says
    return {
        "settings": json.loads(json.dumps(settings)),
        "arguments": config.to_dict(),
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}},
        "git_commit": git_commit(),
        "data_fingerprint": fingerprint(sources),
        "images": {split: len(source) for split, source in sources.items()},
        "device": str(accelerator.device),
        "precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
    }


def fingerprint(sources: Mapping[str, Source]) -> str:
    """A hash of which images are in which split (names, not pixels)."""
    names = {split: source.names for split, source in sources.items()}
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()[:16]


def package_version(package: str) -> str | None:
    """The installed version; ``None`` where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None
