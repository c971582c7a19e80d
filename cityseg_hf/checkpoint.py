"""Saving and restoring: model folders for users, checkpoints to go on from."""

import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, SegformerImageProcessor

from cityseg_hf.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from cityseg_hf.errors import UserError, one_line

STATE, MANIFEST = "state.pt", "manifest.json"


class Stateful(Protocol):
    """What a run goes on from: a network, an optimiser, a schedule, a counter."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


@dataclass
class Progress:
    """Where a run is, beyond weights and optimiser. Part of every checkpoint."""

    step: int = 0
    best_miou: float | None = None
    best_loss: float | None = None
    validations_without_gain: int = 0
    stopped_early: bool = False
    tracker_run_id: str | None = None
    train_seconds: float = 0.0
    validation_seconds: float = 0.0
    peak_memory: int = 0
    """Bytes. These three are the cost so far (``cost.Stopwatch``): runs that are the same may differ in them."""

    def state_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes all fields."""
        self.__dict__.update(state)

    def note_validation(self, miou: float | None, loss: float) -> list[str]:
        """Takes in a validation's scores and returns the names of the model folders that are to be written anew."""
        better = []
        if self.best_miou is None or (miou or 0.0) > self.best_miou:
            self.best_miou = miou or 0.0
            better.append("best_miou")
        # A loss that is not a number is worse than every number; the first one is kept all the same.
        first_number = self.best_loss is not None and math.isnan(self.best_loss) and not math.isnan(loss)
        if self.best_loss is None or loss < self.best_loss or first_number:
            self.best_loss = loss
            better.append("best_loss")
        self.validations_without_gain = 0 if "best_loss" in better else self.validations_without_gain + 1
        return better


def image_processor(image_size: tuple[int, int]) -> SegformerImageProcessor:
    """The stock processor that does what ``EvalTransform`` does."""
    return SegformerImageProcessor(
        size={"height": image_size[0], "width": image_size[1]},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        do_reduce_labels=False,
    )


def save_model_folder(folder: Path, model: PreTrainedModel, processor: Any) -> None:
    """Writes config.json, model.safetensors and preprocessor_config.json; the folder changes as a whole.

    Raises:
        UserError: it cannot be written; the folder is as it was.
    """
    beside = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        model.save_pretrained(beside)
        processor.save_pretrained(beside)
        _swap_in(beside, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise _cannot_write(folder, error) from None


def _swap_in(beside: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _cannot_write(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or one_line(error)
    return UserError(f"cannot write {path} ({reason}): make room there and run the same command again to go on")


class Whole(NamedTuple):
    """A checkpoint that is what was written: its folder, and what its parts were when it was saved."""

    folder: Path
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run, ``checkpoints/step_00001234/``: ``state.pt`` and a manifest with its checksum.

    A checkpoint is written beside its place, brought to the disk and renamed, so that a name says that it is whole; the
    checksum says so again when it is read. Only the copy to the host's memory is waited for: a thread does the writing.

    Args:
        run: the run folder.
        keep: how many stay.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.folder, self.keep = run / "checkpoints", keep
        self.saved_step: int | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None

    def save(self, step: int, parts: Mapping[str, Stateful], *, writes: bool = True) -> None:
        """Saves the state of all parts, in the background.

        Called by the main process; by the others too where reading the state takes all of them, without ``writes``.

        Raises:
            UserError: the last one could not be written.
        """
        if step == self.saved_step:
            return
        self.wait()
        state = {name: _on_host(part.state_dict()) for name, part in parts.items()}
        self.saved_step = step
        if writes:
            self._writing = self._writer.submit(self._write, step, state)

    def wait(self) -> None:
        """Returns when what was saved lies on the disk.

        Raises:
            UserError: it could not be written; the checkpoints before it are whole.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except OSError as error:
                raise _cannot_write(self.folder, error) from None

    def _write(self, step: int, state: dict[str, Any]) -> None:
        target = self.folder / f"step_{step:08d}"
        beside = target.with_name(f".{target.name}.new")
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            content = BytesIO()
            torch.save(state, content)
            data = content.getbuffer()
            _write_to_disk(beside / STATE, data)
            manifest = {"step": step, "files": {STATE: {"bytes": len(data), "crc32": zlib.crc32(data)}}}
            _write_to_disk(beside / MANIFEST, json.dumps(manifest).encode())
            _swap_in(beside, target)
        except OSError:
            # What is half written would keep the disk full.
            shutil.rmtree(beside, ignore_errors=True)
            raise
        for old in self._found()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def _found(self) -> list[Path]:
        """Newest first."""
        named = (path for path in self.folder.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))
        return sorted(named, reverse=True)

    def newest(self) -> tuple[Whole | None, list[str]]:
        """The newest whole checkpoint, and a line for each newer one that is torn."""
        torn = []
        for folder in self._found():
            try:
                return Whole(folder, _read(folder)), torn
            except Exception as error:  # a torn file is met in every way there is
                torn.append(f"{folder} is damaged ({one_line(error)}): using the one before, or starting anew")
        return None, torn


def _on_host(value: Any) -> Any:
    """A copy that the next step does not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _on_host(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_on_host(item) for item in value]
    return value


def _write_to_disk(path: Path, data: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _read(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    data = (folder / STATE).read_bytes()
    if len(data) != manifest["files"][STATE]["bytes"] or zlib.crc32(data) != manifest["files"][STATE]["crc32"]:
        raise ValueError(f"{STATE} is not what {MANIFEST} says")
    return torch.load(BytesIO(data), map_location="cpu", weights_only=True)


def restore(whole: Whole, parts: Mapping[str, Stateful]) -> None:
    """Gives all parts their state back.

    Raises:
        UserError: the checkpoint is of another network or another version.
    """
    try:
        for name, part in parts.items():
            part.load_state_dict(whole.state[name])
    except Exception as error:  # torch's errors of all kinds: it does not fit
        reason = f"nothing of the {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(
            f"cannot go on from {whole.folder} ({reason}): choose another --run_name, or remove its checkpoints"
        ) from None
