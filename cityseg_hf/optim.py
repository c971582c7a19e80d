"""Optimiser, parameter groups and learning-rate schedule, all functions of the optimiser step."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cityseg_hf.config import OptimConfig, TrainConfig, parse_duration
from cityseg_hf.models.presets import HEADS


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Four groups at most: decayed or not, head or body.

    Weight decay is for the weights of convolutions and linear layers. Biases, normalisations and every other vector
    (temperatures, layer scales) are left alone. The head's rate is multiplied by ``head_lr_multiplier``.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and "position_embeddings" not in name
            in_head = name.split(".")[0] in HEADS
            groups.setdefault((decayed, in_head), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "lr": config.learning_rate * (config.head_lr_multiplier if in_head else 1.0),
        }
        for (decayed, in_head), parameters in groups.items()
    ]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019), optionally AMSGrad (Reddi et al., 2018), or SGD with momentum.

    Fused: one pass over each parameter and its state.
    """
    groups = parameter_groups(model, config)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate, amsgrad=config.amsgrad, fused=True)


def average_weights(network: nn.Module, decay: float) -> AveragedModel:
    """A copy of a network that follows it: after each step ``average = d average + (1 - d) weights``, buffers too.

    The average of step n keeps ``d = min(decay, (1 + n) / (10 + n))`` of itself, so that a short training is not one of
    its first, random weights.

    Args:
        network: as it starts.
        decay: between 0 and 1.

    Returns:
        Call ``update_parameters(network)`` after each step; ``module`` is the averaged network.
    """

    def follow(averages: list[Tensor], weights: list[Tensor], _: Tensor | int) -> None:
        steps = int(averaged.n_averaged)  # on the host: the argument is a copy on the device, and would be waited for
        share = 1 - min(decay, (1 + steps) / (10 + steps))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, weights, share)
        else:  # counters
            torch._foreach_copy_(averages, weights)

    averaged = AveragedModel(network, multi_avg_fn=follow, use_buffers=True)
    return averaged.eval().requires_grad_(False)


def rate_factor(config: OptimConfig, plan: "Plan") -> Callable[[int], float]:
    """The schedule: optimiser step (0 is the first) -> factor on the peak learning rate.

    - exponential: ``gamma ** epoch``, once per epoch, as the original meant it.
    - poly: ``(1 - t) ** power`` (Chen et al., DeepLab, 2017), t from 0 to 1 over the steps after the warm-up.
    - cosine: ``(1 + cos(pi t)) / 2`` (Loshchilov and Hutter, SGDR, 2017, equation 5).

    poly and cosine end at ``min_lr_ratio``; the warm-up is linear from ``warmup_ratio``.
    """
    warmup = config.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return config.warmup_ratio + (1 - config.warmup_ratio) * step / warmup
        if config.schedule == "exponential":
            return config.gamma ** (step // plan.steps_per_epoch)
        if config.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, plan.total_steps - warmup))
        falling = (
            (1 - progress) ** config.poly_power if config.schedule == "poly" else (1 + math.cos(math.pi * progress)) / 2
        )
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * falling

    return factor


class Plan(NamedTuple):
    """A run's length in optimiser steps: the one door at which epochs become steps."""

    steps_per_epoch: int
    total_steps: int
    validate_every: int
    save_every: int | None = None
    """``None``: whenever it validates."""
    save_seconds: float | None = None
    stop_after: int | None = None
    """Where the run pauses, before its end."""

    @classmethod
    def of(
        cls, config: TrainConfig, steps_per_epoch: int, save_every: str | None = None, stop_after: str | None = None
    ) -> "Plan":
        """Converts ``--num_epochs`` (or ``--max_steps``), ``--val_freq``, ``--save_every`` and ``--stop_after``."""
        total = config.max_steps or config.num_epochs * steps_per_epoch
        validate_every = config.val_freq * steps_per_epoch
        plan = cls(steps_per_epoch, total, validate_every, stop_after=_steps(stop_after, steps_per_epoch))
        if save_every and save_every.endswith("m"):
            # Steps in reach of none, so that the clock alone decides.
            return plan._replace(save_every=total, save_seconds=parse_duration(save_every)[0] * 60)
        return plan._replace(save_every=_steps(save_every, steps_per_epoch))

    def validates_at(self, step: int) -> bool:
        """Every ``val_freq`` epochs, and at the end."""
        return step % self.validate_every == 0 or step == self.total_steps

    def saves_at(self, step: int) -> bool:
        """Every ``save_every`` steps, or with each validation; and where it pauses or ends."""
        return step % (self.save_every or self.validate_every) == 0 or step in (self.stop_after, self.total_steps)

    def pauses_at(self, step: int) -> bool:
        """At ``stop_after``, or beyond it where the run has come further already; not at the end."""
        return self.stop_after is not None and self.stop_after <= step < self.total_steps


def _steps(duration: str | None, steps_per_epoch: int) -> int | None:
    """``500`` or ``2e`` -> optimiser steps."""
    if duration is None:
        return None
    count, unit = parse_duration(duration)
    return max(1, round(count * steps_per_epoch) if unit == "e" else int(count))
