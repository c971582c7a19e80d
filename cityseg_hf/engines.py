"""How gradients become new weights, and where weights lie: the one thing that engines of training differ in."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
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
        return {"network": self.network, "optimizer": _Whole(self.optimizer)}


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
        return {"network": _Whole(self.network), "optimizer": _Whole(self.optimizer)}


class DeepSpeed(DataParallel):
    """DeepSpeed's ZeRO, stages 1 and 2: each process keeps all weights, and a share of the optimiser's state.

    Weights stay in float32 and autocast does the rest, as without DeepSpeed. Checkpoints hold the optimiser's state
    as torch has it, so that a run goes on with another number of processes, or without DeepSpeed.
    """

    gathers = True

    def __init__(
        self, accelerator: Accelerator, network: PreTrainedModel, criterion: nn.Module, config: OptimConfig
    ) -> None:
        # Weights of a group are laid in one row.
        network.to(memory_format=torch.contiguous_format)
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings.update(
            # DeepSpeed wants to know; batches come from our own loader, and we say which one is a step's last.
            train_micro_batch_size_per_gpu=1,
            gradient_accumulation_steps=1,
            gradient_clipping=config.max_grad_norm or 0.0,
            bf16={"enabled": False},
            zero_force_ds_cpu_optimizer=False,
        )
        super().__init__(accelerator, network, criterion, config)
        # The tensors that the optimiser has now are DeepSpeed's: all weights of a group in one row, cut by processes.
        self.names = [[name for name, _ in group] for group in _by_group(network, make_optimizer(network, config))]
        self.zero = self.prepared.optimizer

    def accumulating(self, *, last: bool) -> Any:
        self.criterion.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        bf16 = self.accelerator.mixed_precision == "bf16"
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bf16):
            loss, logits = self.criterion(*inputs)
        return loss, logits.float()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.criterion.backward(loss * self.accelerator.num_processes)

    def update(self) -> Tensor:
        """DeepSpeed clips, steps, and skips by itself where a gradient is not finite."""
        self.criterion.step()
        return torch.tensor(bool(self.zero.overflow), device=self.accelerator.device)

    def parts(self) -> dict[str, Stateful]:
        """Network and optimiser; the latter is gathered."""
        return {"network": self.network, "optimizer": _Partitioned(self)}


class _Partitioned:
    """The optimiser's state under ZeRO, read and written as torch has it without. Both are collective calls."""

    def __init__(self, engine: DeepSpeed) -> None:
        self.engine = engine
        self.parameters = dict(engine.network.named_parameters())

    def state_dict(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        state, groups, start = {}, [], 0
        for names, group in zip(self.engine.names, self.engine.optimizer.param_groups, strict=True):
            flat = self.engine.optimizer.state[group["params"][0]]
            for number, name in enumerate(names, start):
                state[number] = {
                    key: safe_get_full_optimizer_state(self.parameters[name], key) if value.ndim else value
                    for key, value in flat.items()
                }
            settings = {key: value for key, value in group.items() if key != "params"}
            groups.append({**settings, "params": list(range(start, start + len(names)))})
            start += len(names)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        optimizer, number = self.engine.optimizer, 0
        for names, group, saved in zip(self.engine.names, optimizer.param_groups, state["param_groups"], strict=True):
            (flat,) = group["params"]
            group.update({key: value for key, value in saved.items() if key != "params"})
            for key, value in state["state"][number].items():
                optimizer.state[flat][key] = torch.zeros_like(flat) if value.ndim else value.clone()
            number += len(names)
        self._link()
        for number, name in enumerate(name for names in self.engine.names for name in names):
            for key, value in state["state"][number].items():
                if value.ndim:
                    safe_set_full_optimizer_state(self.parameters[name], value, key)
        # Its own copy of the weights follows those that were loaded.
        self.engine.zero.refresh_fp32_params()

    def _link(self) -> None:
        """From each weight to its share of the state: DeepSpeed does so when only the first group has its state."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        optimizer = self.engine.optimizer
        for weights, group in zip(self.engine.zero.bit16_groups, optimizer.param_groups, strict=True):
            lazy_init_hp_params_optimizer_state(weights, group["params"][0], optimizer.state)


def _by_group(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[tuple[str, nn.Parameter]]]:
    names = {parameter: name for name, parameter in network.named_parameters()}
    return [[(names[parameter], parameter) for parameter in group["params"]] for group in optimizer.param_groups]


class _Whole:
    """A state in whole tensors, whatever shards it is used in: both calls are collective where there are shards."""

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
                    # A fused kernel reads memory from end to end: state that lies otherwise would go to other weights.
                    values[name] = _as(parameter, value)


def _as(sharded: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, cut and laid out in memory as another one is."""
    if not isinstance(sharded, DTensor):
        return torch.empty_like(sharded).copy_(value)
    return distribute_tensor(value.to(sharded.device).contiguous(), sharded.device_mesh, sharded.placements)


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
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeed(accelerator, network, criterion, config)
    engine = Sharded if accelerator.is_fsdp2 else DataParallel
    return engine(accelerator, network, criterion, config)
