"""Every setting of a training run, documented once. The command line is made from these classes (``cityseg_hf.cli``).

All fields of all classes but ``RunConfig`` can change the result; together they name the run folder.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cityseg_hf.config.data import DataConfig
from cityseg_hf.config.fields import parse_duration, parse_loss
from cityseg_hf.config.network import ModelConfig, OptimConfig
from cityseg_hf.config.run import RunConfig
from cityseg_hf.config.training import TrainConfig

__all__ = [
    "Config",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "parse_duration",
    "parse_loss",
]


@dataclass(frozen=True)
class Config:
    """A whole training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.optim.learning_rate is None:
            starts_random = self.model.init_from is None and not _is_checkpoint(self.model.model_type)
            rate = 1e-3 if starts_random else 1e-4
            object.__setattr__(self, "optim", dataclasses.replace(self.optim, learning_rate=rate))

    def settings(self) -> dict[str, Any]:
        """Every setting that can change the result, flat, by the name of its flag."""
        parts = (self.data, self.model, self.optim, self.train)
        return {name: value for part in parts for name, value in dataclasses.asdict(part).items()}

    def identity(self, num_processes: int) -> dict[str, Any]:
        """What makes two runs the same: the settings, but of the batch only how large it is over all processes."""
        settings = self.settings()
        shares = [settings.pop(name) for name in ("batch_size", "gradient_accumulation_steps", "global_batch_size")]
        settings["global_batch_size"] = shares[2] or shares[0] * shares[1] * num_processes
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Every setting, flat, by the name of its flag."""
        return {**self.settings(), **dataclasses.asdict(self.run)}

    def run_name(self, num_processes: int = 1) -> str:
        """The name of the run folder: ``--run_name``, or one that no run with another setting shares.

        The settings people vary are spelled out; a hash of all of them keeps the others apart. Of the batch the global
        one counts, so that a run can go on with another number of processes.
        """
        if self.run.run_name:
            return self.run.run_name
        settings = self.identity(num_processes)
        # The same data may be mounted elsewhere next time: where it lies does not change the result.
        settings["base_dataset_path"] = Path(settings["base_dataset_path"] or "synthetic").name
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
        train, optim = self.train, self.optim
        length = f"s{train.max_steps}" if train.max_steps else f"e{train.num_epochs}"
        parts = [
            Path(self.model.model_type).name[:100],
            self.data.augmentation,
            length,
            f"b{settings['global_batch_size']}",
        ]
        parts += [f"lr{optim.learning_rate:g}", f"wd{optim.weight_decay:g}"]
        parts += [f"g{optim.gamma:g}" if optim.gamma else optim.schedule, f"seed{train.seed}", digest]
        return "_".join(parts)


def _is_checkpoint(model_type: str) -> bool:
    """Presets are plain names; everything else is a folder or a Hub name."""
    return "/" in model_type or Path(model_type).is_dir()
