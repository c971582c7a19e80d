"""How gradients become new weights, and where weights lie: the one thing that engines of training differ in."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from cityseg_hf.checkpoint import Stateful
from cityseg_hf.config import OptimConfig
from cityseg_hf.optim import make_optimizer


class DataParallel:
    """One process, or several of which each has all weights and the optimiser's whole state.

    Args:
        accelerator: from ``launch.make_accelerator``.
        network: as it starts.
        criterion: the network and its loss in one module; ``self.criterion`` is what Accelerate makes of it.
        config: of the optimiser.

    Attributes:
        whole: a network that has all weights on this process, once ``refresh`` was called: it is judged and saved.
        gathers: whether every process must take part when the state of ``parts`` is read.
    """

    gathers = False

    def __init__(
        self, accelerator: Accelerator, network: PreTrainedModel, criterion: nn.Module, config: OptimConfig
    ) -> None:
        self.accelerator, self.network, self.max_grad_norm = accelerator, network, config.max_grad_norm
        self.whole = network
        self.optimizer = make_optimizer(network, config)
        self.criterion, self.prepared = accelerator.prepare(criterion, self.optimizer)

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Runs the criterion in the precision that was asked for."""
        return self.criterion(*inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds gradients; they cross processes once a step, with the ``last`` batch."""
        # Data parallelism averages gradients over processes; the division by the valid pixels has done so already.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def accumulating(self, *, last: bool) -> Any:
        """The context of forward and backward of a batch."""
        return nullcontext() if last else self.accelerator.no_sync(self.criterion)

    def update(self) -> Tensor:
        """Changes the weights, but for a gradient that is not finite. The host is not asked.

        Returns:
            ``bool`` scalar: the step was skipped. All processes have the same.
        """
        parameters = [parameter for parameter in self.criterion.parameters() if parameter.grad is not None]
        self.accelerator.unscale_gradients()
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        bad = ~norm.isfinite()
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        if self.accelerator.scaler is None:  # else the scaler skips, and lowers its factor
            self.optimizer.found_inf = bad.float()  # the fused kernel's own way to skip
        self.prepared.step()
        self.prepared.zero_grad()
        return bad

    def refresh(self) -> None:
        """Brings the weights to ``whole``. A collective call."""

    def parts(self) -> dict[str, Stateful]:
        """What a run goes on from, by its name in a checkpoint."""
        return {"network": self.network, "optimizer": self.optimizer}


class Sharded(DataParallel):
    """FSDP2: each process keeps a share of every weight, gradient and state of the optimiser.

    Checkpoints hold whole tensors, so that a run goes on with another number of processes, or without shards.
    """

    gathers = True

    def __init__(
        self, accelerator: Accelerator, network: PreTrainedModel, criterion: nn.Module, config: OptimConfig
    ) -> None:
        # A plain network beside the sharded one: evaluation, saving and averaging know nothing of shards.
        whole = copy.deepcopy(network).to(accelerator.device).requires_grad_(False)
        # Shards are cut from rows that follow each other.
        network.to(memory_format=torch.contiguous_format)
        # Weights and their gradients stay in float32, as without shards; autocast does the rest, norms included.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
        super().__init__(accelerator, network, criterion, config)
        self.whole = whole

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        with self.accelerator.autocast():
            loss, logits = self.criterion(*inputs)
        return loss, logits.float()

    def update(self) -> Tensor:
        """Skips where the host finds that the norm is not finite: the kernels take no wish beside shards."""
        parameters = [parameter for parameter in self.criterion.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters]).full_tensor()
        bad = ~norm.isfinite()
        if not bad:
            if self.max_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
            self.prepared.step()
        self.prepared.zero_grad()
        return bad

    @torch.no_grad()
    def refresh(self) -> None:
        """Gathers every weight."""
        self.whole.train(self.network.training)
        for whole, sharded in zip(self.whole.parameters(), self.network.parameters(), strict=True):
            whole.copy_(sharded.full_tensor())
        for whole, buffer in zip(self.whole.buffers(), self.network.buffers(), strict=True):
            whole.copy_(buffer)

    def parts(self) -> dict[str, Stateful]:
        """Network and optimiser, each of which gives and takes whole tensors."""
        return {"network": _Gathered(self.network), "optimizer": _Gathered(self.optimizer)}


class _Gathered:
    """The state of something sharded, in whole tensors. Reading and loading are collective calls."""

    def __init__(self, part: nn.Module | torch.optim.Optimizer) -> None:
        self.part = part

    def state_dict(self) -> dict[str, Any]:
        return _map(self.part.state_dict(), lambda value: value.full_tensor() if isinstance(value, DTensor) else value)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if isinstance(self.part, nn.Module):
            own = self.part.state_dict()
            self.part.load_state_dict({name: _as(own[name], value) for name, value in state.items()})
            return
        self.part.load_state_dict(state)
        for parameter, values in self.part.state.items():
            for name, value in values.items():
                if value.shape == parameter.shape:  # all but the counter of steps
                    values[name] = _as(parameter, value)


def _as(sharded: Tensor, value: Tensor) -> Tensor:
    """A whole tensor cut as another one is."""
    if not isinstance(sharded, DTensor):
        return value
    return distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {name: _map(item, change) for name, item in value.items()}
    if isinstance(value, list):
        return [_map(item, change) for item in value]
    return change(value)


def make_engine(
    accelerator: Accelerator, network: PreTrainedModel, criterion: nn.Module, config: OptimConfig
) -> DataParallel:
    """The engine that the launch asked for."""
    engine = Sharded if accelerator.is_fsdp2 else DataParallel
    return engine(accelerator, network, criterion, config)
