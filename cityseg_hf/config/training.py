"""Settings of the training."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from cityseg_hf.config.fields import flag, parse_loss, require
from cityseg_hf.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, and what is judged on the way."""

    _argument_group_name = "training"

    num_epochs: int = flag(80, "epochs", "-e")
    max_steps: int | None = flag(None, "optimiser steps; overrides --num_epochs")
    batch_size: int = flag(16, "images per process and step", "-b")
    gradient_accumulation_steps: int = flag(1, "batches that make one optimiser step")
    global_batch_size: int | None = flag(
        None, "images per optimiser step over all processes; --batch_size follows from it"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = flag(
        None,
        "precision of the forward pass (default: what accelerate was launched with; where that is fp32, bf16 on GPUs "
        "that have it)",
    )
    compile: bool = flag(
        False, "compile the network block by block, and the loss (torch.compile): slow to start, then faster"
    )
    auxiliary_loss_weight: float = flag(0.4, "weight of the auxiliary head's loss, for networks that have one")
    ema_decay: float | None = flag(
        None,
        "judge and save a moving average of the weights that keeps this share of itself at each step, such as 0.999",
    )
    loss: str = flag(
        "ce",
        "what is trained: a sum of ce (cross-entropy), focal, ohem, dice, lovasz and boundary, such as ce+0.5*lovasz",
    )
    class_weights: Literal["none", "enet", "enet_sqrt", "inverse", "median", "effective"] = flag(
        "none",
        "weights of the classes in the loss, from the training labels: 1 / ln(1.02 + share), its square root, "
        "1 / share, median frequency by its own, or 1 / effective number of images",
    )
    val_freq: int = flag(1, "validate every f epochs", "-f")
    early_stopping_patience: int = flag(
        20, "stop after so many validations without a lower loss; 0 never stops early", "-p"
    )
    seed: int = flag(0, "seed of everything random")
    deterministic: bool = flag(
        False, "use only algorithms that give the same bits every time (slower on GPUs; CPUs do so anyway)"
    )

    def __post_init__(self) -> None:
        for name in ("num_epochs", "batch_size", "gradient_accumulation_steps", "val_freq"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1, got {getattr(self, name)}")
        require(
            self.global_batch_size is None or self.global_batch_size >= 1,
            f"--global_batch_size must be at least 1, got {self.global_batch_size}",
        )
        require(self.max_steps is None or self.max_steps >= 1, f"--max_steps must be at least 1, got {self.max_steps}")
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"--ema_decay must lie between 0 and 1, for example 0.999; got {self.ema_decay}",
        )
        require(
            0 <= self.auxiliary_loss_weight < float("inf"),
            f"--auxiliary_loss_weight must be a number that is not negative, got {self.auxiliary_loss_weight}",
        )
        parse_loss(self.loss)
        require(self.early_stopping_patience >= 0, "--early_stopping_patience must not be negative (0: never stop)")
        require(0 <= self.seed < 2**32, f"--seed must lie in 0..{2**32 - 1}, got {self.seed}")

    def split(self, batch_size: int, accumulation: int) -> "TrainConfig":
        """These settings with another cut of the same global batch."""
        return dataclasses.replace(self, batch_size=batch_size, gradient_accumulation_steps=accumulation)

    def for_processes(self, num_processes: int) -> "TrainConfig":
        """These settings with the batch size per process that makes the global one.

        Raises:
            UserError: the global batch cannot be shared evenly.
        """
        if self.global_batch_size is None:
            return self
        shares = num_processes * self.gradient_accumulation_steps
        if self.global_batch_size % shares:
            raise UserError(
                f"a global batch of {self.global_batch_size} cannot be shared by {num_processes} processes x "
                f"{self.gradient_accumulation_steps} accumulated batches: give --batch_size instead"
            )
        return dataclasses.replace(self, batch_size=self.global_batch_size // shares)
