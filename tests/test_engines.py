"""Shards: trained with FSDP2 or DeepSpeed, cut, and gone on with or without them, a run is the one without shards.

Neither takes part in a launch on CPUs by itself: the launches here say that there are GPUs (FSDP2), or that DeepSpeed
computes on CPUs.
"""

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import REPO, TINY_UNET, assert_same_run, read_lines
from safetensors.torch import load_file
from torch import nn

from cityseg_hf import UserError
from cityseg_hf.engines import _Whole
from cityseg_hf.launch import check_world

LAUNCH = """
import os, runpy, sys
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from cityseg_hf.step import TrainStep

begin, take = PartialState.__init__, TrainStep.__call__

def as_if_on_gpus(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

def step(self, batches, number):
    if number == 0:
        print("ENGINE", type(self.engine).__name__)
    if number == int(os.environ.get("DIE_AT", -1)):
        os._exit(9)
    if number == int(os.environ.get("SPOIL_AT", -1)):
        hook = self.network.classifier.register_forward_hook(lambda module, inputs, output: output * float("nan"))
        loss = take(self, batches, number)
        hook.remove()
        return loss
    return take(self, batches, number)

if "ACCELERATE_USE_FSDP" in os.environ:
    PartialState.__init__ = as_if_on_gpus
TrainStep.__call__ = step
try:
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
except SystemExit as end:
    # Threads of gloo that shards have begun can abort an interpreter that is cleaning up.
    sys.stdout.flush()
    os._exit(end.code)
"""
PLAIN = {"ACCELERATE_USE_CPU": "1"}
FSDP2 = {
    **PLAIN,
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (it builds beside torch only)"
)
ENGINES = [
    pytest.param(FSDP2, "Sharded", id="fsdp2"),
    pytest.param(DEEPSPEED, "DeepSpeed", id="deepspeed", marks=needs_deepspeed),
]
ARGV = (*TINY_UNET, "-e", 2, "-b", 1, "--gradient_accumulation_steps", 2, "-a", "standard", "--ema_decay", 0.5)
ARGV += ("--max_grad_norm", 0.05, "--save_every", 1, "--logging_steps", 1)


def train(streets: Path, folder: Path, engine: dict[str, str], name: str = "run", processes: int = 2, **extra) -> str:
    """Trains; returns what was said. ``extra`` goes to the environment; ``DIE_AT`` makes the processes end there."""
    launch = folder / "launch.py"
    launch.write_text(LAUNCH)
    argv = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, launch]
    argv += [REPO / "scripts/train.py", "-d", streets, *ARGV, "-s", folder, "--run_name", name]
    if processes == 1:
        argv += ["-b", 2]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))}
    environment = {**clean, **engine, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **extra}
    command = [sys.executable, *map(str, argv)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) is ("DIE_AT" not in extra), done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def plain(streets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    train(streets, folder, PLAIN)
    return folder / "run"


def assert_close_runs(one: Path, other: Path) -> None:
    """The clipping's norm is summed in another order; nothing else differs."""
    ours, theirs = ([line["loss"] for line in read_lines(run)] for run in (one, other))
    assert ours == pytest.approx(theirs, abs=1e-5)
    for name in ("best_miou", "last"):
        weights = [load_file(run / name / "model.safetensors") for run in (one, other)]
        assert weights[0].keys() == weights[1].keys()
        for key in weights[0]:
            ours, theirs = (part[key].double() for part in weights)
            # Adam takes the sign of a gradient that is next to nothing: single weights may differ by a step.
            assert (ours - theirs).norm() <= 1e-2 * theirs.norm() + 1e-4, f"{name} {key}"


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kind"), ENGINES)
def test_shards_change_nothing(engine: dict, kind: str, plain: Path, streets: Path, tmp_path: Path) -> None:
    """Accumulation, clipping, an average, and the cut: uncut, cut and gone on, and gone on without shards."""
    assert f"ENGINE {kind}" in train(streets, tmp_path, engine)
    assert_close_runs(plain, tmp_path / "run")

    train(streets, tmp_path, engine, name="cut", DIE_AT="4")
    shutil.copytree(tmp_path / "cut", tmp_path / "unsharded")
    shutil.copytree(tmp_path / "cut", tmp_path / "alone")
    train(streets, tmp_path, engine, name="cut")
    assert_same_run(tmp_path / "run", tmp_path / "cut")
    train(streets, tmp_path, PLAIN, name="unsharded")
    assert_close_runs(plain, tmp_path / "unsharded")
    train(streets, tmp_path, PLAIN, name="alone", processes=1)
    assert_close_runs(plain, tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kind"), ENGINES)
def test_a_run_goes_on_in_shards(engine: dict, kind: str, plain: Path, streets: Path, tmp_path: Path) -> None:
    train(streets, tmp_path, PLAIN, DIE_AT="4")
    train(streets, tmp_path, engine)
    assert_close_runs(plain, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kind"), ENGINES)
def test_shards_skip_what_is_not_finite(engine: dict, kind: str, streets: Path, tmp_path: Path) -> None:
    train(streets, tmp_path, engine, SPOIL_AT="2")
    assert [line.get("skipped_steps", 0) for line in read_lines(tmp_path / "run") if line["split"] == "train"][-1] == 1
    for value in load_file(tmp_path / "run/last/model.safetensors").values():
        assert value.isfinite().all()
    assert json.loads((tmp_path / "run/results.json").read_text())


def test_a_state_is_laid_out_as_its_weights() -> None:
    """A fused optimiser walks over memory: state in another layout would go to other weights, silently."""

    def network(layout: torch.memory_format) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        convolution = nn.Conv2d(3, 5, 3).to(memory_format=layout)
        return convolution, torch.optim.AdamW(convolution.parameters(), lr=0.1, fused=True)

    def step(convolution: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        images = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)
        (convolution(images) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    one, other = network(torch.contiguous_format), network(torch.channels_last)
    step(*one)
    other[0].load_state_dict(one[0].state_dict())
    _Whole(other[1]).load_state_dict(copy.deepcopy(_Whole(one[1]).state_dict()))
    step(*one)
    step(*other)
    torch.testing.assert_close(other[0].weight, one[0].weight, rtol=0, atol=1e-6)


def accelerator(kind: DistributedType, *, version: int = 2, precision: str = "no", stage: int = 2) -> SimpleNamespace:
    return SimpleNamespace(
        num_processes=1,
        distributed_type=kind,
        is_fsdp2=version == 2,
        mixed_precision=precision,
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)),
    )


@pytest.mark.parametrize(
    ("engine", "found", "line"),
    [
        ("FSDP", accelerator(DistributedType.MULTI_CPU), "accelerate shards only over several GPUs"),
        ("FSDP", accelerator(DistributedType.FSDP, version=1), "set fsdp_version: 2"),
        ("FSDP", accelerator(DistributedType.FSDP, precision="fp16"), "FSDP and fp16 do not go together"),
        ("DEEPSPEED", accelerator(DistributedType.NO), "accelerate started without"),
        (
            "DEEPSPEED",
            accelerator(DistributedType.DEEPSPEED, stage=3),
            "stage 3 is not supported: use stage 2, or FSDP2",
        ),
        ("DEEPSPEED", accelerator(DistributedType.DEEPSPEED, precision="fp16"), "DeepSpeed and fp16 do not go"),
    ],
)
def test_an_engine_that_cannot_be_is_one_line(engine: str, found: SimpleNamespace, line: str) -> None:
    with pytest.raises(UserError, match=line):
        check_world(found, {"WORLD_SIZE": "1", f"ACCELERATE_USE_{engine}": "true"})
