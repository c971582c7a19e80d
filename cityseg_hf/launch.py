"""The processes of a run: is the world the one that was asked for, and has someone asked it to stop?"""

import ctypes
import importlib.util
import os
import platform
import shutil
import signal
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    KwargsHandler,
    broadcast,
    compile_regions_fsdp2,
)
from torch import nn
from transformers import PreTrainedModel

from cityseg_hf.config import Config
from cityseg_hf.errors import UserError, one_line
from cityseg_hf.models import PRESETS

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# From Linux's prctl.h.
_PR_SET_PDEATHSIG = 1


def make_accelerator(config: Config) -> Accelerator:
    """Accelerate's state for a training run.

    Raises:
        UserError: the launch gave another world than it promised, or the precision does not exist here.
    """
    try:
        accelerator = Accelerator(
            mixed_precision=config.train.mixed_precision or _default_precision(),
            log_with=None if config.run.report_to == "none" else config.run.report_to,
            project_dir=config.run.save_model_path,
            kwargs_handlers=_handlers(config),
            # The schedule counts optimiser steps, whatever the number of processes.
            step_scheduler_with_optimizer=False,
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"accelerate cannot start: {one_line(error)}") from None
    check_world(accelerator)
    die_with_launcher()
    if config.train.deterministic:
        # Read by cuBLAS when it is first used (its manual, "Results reproducibility").
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if config.train.compile:
        _check_compiler(accelerator.device)
    if accelerator.device.type == "cpu":
        use_cpu_well()
    return accelerator


def _default_precision() -> str | None:
    """bf16 on GPUs that compute with it, unless accelerate was launched with a precision; ``None`` leaves it to that.

    ``accelerate launch`` says "no" whether the user chose that or nothing, so fp32 on such a GPU is our own flag's. On
    CPUs fp32 stays: a run must give the same numbers on one process and on two.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    if launched != "no" or on_cpu or not torch.cuda.is_available():
        return None
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else None


def _check_compiler(device: torch.device) -> None:
    """Raises UserError where ``torch.compile`` would find no compiler in the middle of the first step."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile on a GPU needs triton: pip install triton, or drop --compile")
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(f"--compile on a CPU needs a C++ compiler, and there is no {compiler}: install one, or drop it")


def _handlers(config: Config) -> list[KwargsHandler]:
    # Networks of others may hold parameters that their logits do not need; looking for them costs the presets nothing.
    handlers: list[KwargsHandler] = []
    if config.model.model_type not in PRESETS:
        handlers.append(DistributedDataParallelKwargs(find_unused_parameters=True))
    if _asked_for("DEEPSPEED", os.environ) and not torch.cuda.is_available():
        handlers.append(InitProcessGroupKwargs(backend="gloo"))  # it would take NCCL, which needs GPUs
    return handlers


def _asked_for(engine: str, environment: Any) -> bool:
    return environment.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("true", "1")


def use_cpu_well() -> None:
    """Gives this process its share of the cores, and lets it keep the memory it frees.

    ``accelerate launch`` sets OMP_NUM_THREADS=1 unless the user has set it, whatever the number of cores. And glibc
    hands every large tensor back to the kernel, which must clear its pages again a moment later: keeping them makes a
    SegFormer B0 step 1.2 times as fast (LOG.md).
    """
    if os.environ.get("OMP_NUM_THREADS") == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def prepare_network(model: PreTrainedModel, accelerator: Accelerator, *, compiled: bool) -> PreTrainedModel:
    """Makes a network ready to be trained fast, on one process or many; its names and checkpoints stay."""
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        # The few images of one process make poor statistics; on GPUs they are shared.
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # Convolutions, norms and upsampling walk over whole vectors of channels.
    model = model.to(memory_format=torch.channels_last)
    if compiled:
        # In place and block by block: equal blocks are compiled once.
        compile_regions_fsdp2(model)
    return model


def check_world(accelerator: Accelerator, environment: Any = os.environ) -> None:
    """Stops a launch that silently became something else.

    ``accelerate launch`` starts one process where ``--cpu --num_processes 2`` asked for two, and on a machine without
    GPUs ``--multi_gpu`` starts processes that do not know of each other: each would train alone and overwrite the
    other's run.

    Raises:
        UserError: the number of processes, or the engine (FSDP, DeepSpeed), is not what was asked
            for.
    """
    got = accelerator.num_processes
    asked = int(environment.get("WORLD_SIZE", 1))
    if asked != got:
        raise UserError(
            f"{asked} processes were launched but they do not know of each other (this one sees {got}): "
            "on a machine without GPUs set ACCELERATE_USE_CPU=1"
        )
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    if by_accelerate and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        # The launcher sets an address when more than one process was asked for, and then starts one all the same.
        raise UserError(
            "more than one process was asked for but one was started: for several processes on CPUs use "
            "'ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes N'; for one process unset MASTER_ADDR"
        )
    _check_engine(accelerator, environment)


def _check_engine(accelerator: Accelerator, environment: Any) -> None:
    if _asked_for("FSDP", environment):
        if accelerator.distributed_type != DistributedType.FSDP:
            raise UserError("FSDP was asked for, but accelerate shards only over several GPUs: launch without it here")
        if not accelerator.is_fsdp2:
            raise UserError("FSDP was asked for in its first version: set fsdp_version: 2 (--fsdp_version 2)")
        if accelerator.mixed_precision == "fp16":
            raise UserError("FSDP and fp16 do not go together here: use bf16 or no")
    if _asked_for("DEEPSPEED", environment):
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            raise UserError("DeepSpeed was asked for, but accelerate started without: it needs GPUs, or a launch by it")
        if accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise UserError("DeepSpeed's stage 3 is not supported: use stage 2, or FSDP2, which shards the weights too")
        if accelerator.mixed_precision == "fp16":
            raise UserError("DeepSpeed and fp16 do not go together here: use bf16 or no")


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


class StopSignals:
    """Turns SIGTERM, SIGINT and Slurm's SIGUSR1 into a wish that the training loop reads between steps.

    A second SIGINT stops at once, as Python does without this.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def agreed(accelerator: Accelerator, *wishes: bool) -> list[bool]:
    """Of each wish whether any process has it; all processes get the same answer. A collective call."""
    if accelerator.num_processes == 1:
        return list(wishes)
    sums = accelerator.reduce(torch.tensor(wishes, dtype=torch.float32, device=accelerator.device), "sum")
    return [count > 0 for count in sums.tolist()]


def share_buffers(accelerator: Accelerator, *networks: nn.Module) -> None:
    """Gives every process the main one's statistics of batch normalisation, so that all judge the same network."""
    if accelerator.num_processes > 1:
        for network in dict.fromkeys(networks):
            for buffer in network.buffers():
                broadcast(buffer)


def die_with_launcher() -> None:
    """Asks Linux for a SIGTERM when the launcher dies: it may pass on no signal, or be killed, and leave us alone.

    ``accelerate launch`` of one process forwards nothing, and torchrun no SIGUSR1. Without a launcher nothing is done:
    a shell may go and leave its jobs behind.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and platform.system() == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def lost_process(error: BaseException) -> bool:
    """Whether an error says that a collective call found another process gone."""
    words = str(error)
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "remote process exited")
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(one in words for one in gone)
    )
