"""Settings of the network and its optimiser."""

from dataclasses import dataclass
from typing import Literal

from cityseg_hf.config.fields import flag, require
from cityseg_hf.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """Which network, and which weights it starts from."""

    _argument_group_name = "model"

    model_type: str = flag(
        "resnet_50",
        "a preset (see --list_models), or any semantic-segmentation checkpoint of the Hub or on disk",
        "-m",
        "--model",
    )
    init_from: str | None = flag(
        None, "weights to start a preset from: a checkpoint folder or Hub name, or 'imagenet' for the resnet presets"
    )
    model_args: list[str] | None = flag(
        None, "settings of the network's configuration, e.g. norm=group dilation=true", metavar="KEY=VALUE"
    )
    freeze_batchnorm: bool = flag(False, "keep the statistics of batch normalisation as loaded (small batches)")


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule."""

    _argument_group_name = "optimisation"

    learning_rate: float | None = flag(
        None, "peak learning rate (default: 1e-3 from random weights, 1e-4 from given ones)", "-l"
    )
    weight_decay: float = flag(1e-4, "weight decay; never on norms and biases", "-w")
    optimizer: Literal["adamw", "sgd"] = flag("adamw", "optimiser")
    momentum: float = flag(0.9, "momentum of sgd")
    amsgrad: bool = flag(False, "the AMSGrad variant of adamw, as the original used")
    schedule: Literal["exponential", "poly", "cosine", "constant"] | None = flag(
        None, "learning-rate schedule (default: exponential where -g is given, else poly)"
    )
    gamma: float | None = flag(None, "factor of the exponential schedule, once an epoch (default there: 0.99)", "-g")
    poly_power: float = flag(1.0, "power of the poly schedule")
    min_lr_ratio: float = flag(0.0, "share of the peak rate that poly and cosine end at")
    warmup_steps: int = flag(0, "optimiser steps of linear warm-up")
    warmup_ratio: float = flag(1e-6, "share of the rate that the warm-up starts from")
    head_lr_multiplier: float = flag(1.0, "factor on the learning rate of the decode head")
    max_grad_norm: float | None = flag(None, "clip gradients to this norm")

    def __post_init__(self) -> None:
        require(
            self.learning_rate is None or 0 < self.learning_rate < float("inf"),
            f"--learning_rate must be a number above 0, got {self.learning_rate}",
        )
        for name in ("weight_decay", "head_lr_multiplier"):
            require(
                0 <= getattr(self, name) < float("inf"),
                f"--{name} must be a number that is not negative, got {getattr(self, name)}",
            )
        require(self.gamma is None or 0 < self.gamma <= 1, f"--gamma must lie in (0, 1], got {self.gamma}")
        require(self.warmup_steps >= 0, f"--warmup_steps must not be negative, got {self.warmup_steps}")
        require(0 <= self.momentum < 1, f"--momentum must lie in [0, 1), got {self.momentum}")
        require(self.poly_power > 0, f"--poly_power must be above 0, got {self.poly_power}")
        for name in ("min_lr_ratio", "warmup_ratio"):
            require(0 <= getattr(self, name) <= 1, f"--{name} must lie in [0, 1], got {getattr(self, name)}")
        require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            f"--max_grad_norm must be above 0, got {self.max_grad_norm}",
        )
        if self.gamma is not None and self.schedule not in (None, "exponential"):
            raise UserError(f"--gamma belongs to --schedule exponential, not to {self.schedule}: drop one of the two")
        if self.schedule is None:
            object.__setattr__(self, "schedule", "poly" if self.gamma is None else "exponential")
        if self.schedule == "exponential" and self.gamma is None:
            object.__setattr__(self, "gamma", 0.99)
