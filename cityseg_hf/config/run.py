"""Settings of where a run goes and who is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cityseg_hf.config.fields import check_repository, flag, parse_duration, require
from cityseg_hf.errors import UserError


@dataclass(frozen=True)
class RunConfig:
    """Where things go and who is told: nothing here changes a number."""

    _argument_group_name = "run"

    save_model_path: str = flag("./saved_models", "where run folders are made", "-s", "--output_dir")
    run_name: str | None = flag(None, "name of the run folder (default: made from every setting that counts)")
    prepared: str | None = flag(
        None, "folder of scripts/prepare_data.py to read from, instead of decoding the download", metavar="DIR"
    )
    num_workers: int = flag(2, "processes that load data, per training process")
    logging_steps: int = flag(10, "write the training loss every so many steps")
    save_every: str | None = flag(
        None, "save a checkpoint every so many steps (500), epochs (2e) or minutes (10m); default: with each validation"
    )
    stop_after: str | None = flag(
        None, "save and stop, with status 75, after so many steps (500) or epochs (2e); the run can go on from there"
    )
    keep_checkpoints: int = flag(2, "how many checkpoints stay on disk", "--keep")
    max_skipped_steps: int = flag(
        10, "stop after so many steps in a row whose loss or gradient is not finite (they are skipped)"
    )
    find_batch_size: bool = flag(
        False, "lower --batch_size until it fits the memory, and accumulate to keep the global batch"
    )
    report_to: Literal["none", "wandb", "tensorboard", "trackio"] = flag("none", "experiment tracker")
    project_name: str = flag("Image-Segmentation", "project of the tracker")
    push_to_hub: str | None = flag(None, "Hub repository that gets the best model at the end", metavar="REPO")

    def __post_init__(self) -> None:
        require(self.num_workers >= 0, f"--num_workers must not be negative, got {self.num_workers}")
        require(self.logging_steps >= 1, f"--logging_steps must be at least 1, got {self.logging_steps}")
        require(self.keep_checkpoints >= 1, f"--keep_checkpoints must be at least 1, got {self.keep_checkpoints}")
        require(self.max_skipped_steps >= 1, f"--max_skipped_steps must be at least 1, got {self.max_skipped_steps}")
        if self.save_every is not None:
            parse_duration(self.save_every)
        if self.stop_after is not None and parse_duration(self.stop_after, "--stop_after")[1] == "m":
            raise UserError(f"--stop_after takes steps or epochs, such as 500 or 2e; got {self.stop_after!r}")
        if self.push_to_hub is not None:
            check_repository(self.push_to_hub)
        name = self.run_name
        if name is not None and (Path(name).name != name or name in ("", "..") or len(name.encode()) > 200):
            raise UserError(f"--run_name must be a plain folder name of 200 letters at most, got {name!r}")
