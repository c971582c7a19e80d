"""Saving and restoring: model folders for users, checkpoints to go on from."""

import math
import os
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel, SegformerImageProcessor

from cityseg_hf.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from cityseg_hf.errors import UserError, one_line


@dataclass
class Progress:
    """Where a run is, beyond weights and optimiser. Registered with Accelerate, so it is part of every checkpoint."""

    step: int = 0
    best_miou: float | None = None
    best_loss: float | None = None
    validations_without_gain: int = 0
    stopped_early: bool = False
    tracker_run_id: str | None = None
    train_scores: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """All fields, for Accelerate."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes all fields, for Accelerate."""
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
    """Writes config.json, model.safetensors and preprocessor_config.json; the folder changes as a whole."""
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    processor.save_pretrained(beside)
    _swap_in(beside, folder)


def _swap_in(beside: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def checkpoint_folder(root: Path, step: int) -> Path:
    """``checkpoints/step_00001234``."""
    return root / "checkpoints" / f"step_{step:08d}"


def latest_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint of a run; unfinished ones have other names."""
    found = sorted((root / "checkpoints").glob("step_" + "[0-9]" * 8))
    return found[-1] if found else None


def save_checkpoint(accelerator: Accelerator, root: Path, step: int, keep: int) -> None:
    """Everything needed to go on, from all processes; written beside and renamed. A collective call."""
    target = checkpoint_folder(root, step)
    if target.is_dir():
        return
    beside = target.with_name(f".{target.name}.new")
    if accelerator.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(beside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _sync_folder(beside)
        beside.rename(target)
        for old in sorted(target.parent.glob("step_*"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _sync_folder(folder: Path) -> None:
    """Brings the files to the disk before the name says that they are there."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def restore_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Loads a checkpoint into everything that was prepared or registered.

    Raises:
        UserError: it is broken, or of another network.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            accelerator.load_state(str(folder))
    except Exception as error:  # torch, safetensors, zip and key errors alike: the checkpoint does not fit
        reason = one_line(error)
        raise UserError(
            f"cannot go on from {folder} ({reason}): remove it to use the one before, or start anew"
        ) from None
