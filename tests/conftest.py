"""What the tests share: a small tree of synthetic streets, and scripts called as functions."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# Before torch and the libraries of Hugging Face are imported: no test reaches the network, and tensors are too small
# for more than one thread.
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from cityseg_hf import make_synthetic
from cityseg_hf.data.cityscapes import find_rows
from cityseg_hf.launch import STOP_SIGNALS

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Cityscapes tree: 12 train, 5 val and 3 test images of 64x128."""
    root = tmp_path_factory.mktemp("data") / "streets"
    return make_synthetic(root, train=12, val=5, test=3, size=(64, 128), seed=1)


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    """Accelerate keeps one state per process; every test starts without it, and from the same random numbers.

    A training turns signals into wishes for the rest of its process: that ends with its test.
    """
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    torch.manual_seed(0)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def load_script(name: str) -> ModuleType:
    """Imports ``scripts/NAME.py`` as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", REPO / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said(done: subprocess.CompletedProcess) -> list[str]:
    """What a script wrote to stderr, without the warning that a torchao older than this torch logs when imported."""
    return [line for line in done.stderr.splitlines() if "_pytree.py" not in line]


@pytest.fixture
def run_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs ``scripts/train.py`` in this process; returns the run folder."""

    def run(*argv: object, name: str = "run") -> Path:
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        monkeypatch.chdir(tmp_path)
        words = [str(word) for word in argv]
        assert load_script("train").main([*words, "-s", str(tmp_path / "runs"), "--run_name", name]) == 0
        return tmp_path / "runs" / name

    return run


TINY_UNET = ("--model", "unet_small", "--model_args", "norm=group", "hidden_sizes=[8,16]", "--num_workers", "0")
"""Flags of a network that trains in a blink, the same on any number of processes."""

TINY_SEGFORMER = ("--model", "segformer_b0", "--num_workers", 0, "--model_args")
TINY_SEGFORMER += ("hidden_sizes=[16,16,16,16]", "depths=[1,1,1,1]", "num_attention_heads=[1,1,1,1]")
TINY_SEGFORMER += ("decoder_hidden_size=16",)


def read_lines(run: Path) -> list[dict]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs left the same lines, results and weights, to the last bit."""
    assert read_lines(one) == read_lines(other)
    assert (one / "results.json").read_text() == (other / "results.json").read_text()
    for name in ("best_miou", "best_loss", "last"):
        ours, theirs = (load_file(run / name / "model.safetensors") for run in (one, other))
        assert ours.keys() == theirs.keys()
        for weight in ours:
            assert torch.equal(ours[weight], theirs[weight]), f"{name} {weight}"


def confusion() -> list[list[int]]:
    """Counts of 19 classes; the last one has no label."""
    counts = np.random.default_rng(0).integers(0, 50, (19, 19)) + 300 * np.eye(19, dtype=int)
    counts[18] = 0
    return counts.tolist()


def rewrite(file: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """What changes a JSON file of a run folder."""

    def apply(run: Path) -> None:
        content = json.loads((run / file).read_text())
        change(content)
        (run / file).write_text(json.dumps(content))

    return apply


def as_if(run: Path, score: float, **settings: object) -> None:
    """Turns a copy of a run into one of other settings and another mIoU."""

    def setting(content: dict) -> None:
        for part in ("settings", "arguments"):
            content[part].update(settings)

    rewrite("run.json", setting)(run)
    rewrite("results.json", lambda content: [model.update({"test/miou": score}) for model in content.values()])(run)


@pytest.fixture(scope="session")
def trained(streets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run, with the scores of single images that a final test tells."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    folder = tmp_path_factory.mktemp("trained")
    argv = ["-d", streets, *TINY_UNET, "-e", 2, "-b", 4, "--logging_steps", 1, "-s", folder, "--run_name", "unet_seed0"]
    assert load_script("train").main([str(word) for word in argv]) == 0
    run = folder / "unet_seed0"
    images = {row.name: {"miou": 0.1 * number} for number, row in enumerate(find_rows(streets)["test"], start=1)}
    written = json.loads((run / "evaluation.json").read_text())
    for part in written.values():
        assert set(part["images"]) == set(images)
        part.update(confusion=confusion(), images=images)  # numbers that a test can tell apart
    (run / "evaluation.json").write_text(json.dumps(written))
    return run


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """Two configurations of three and of one run: the better one is that of the higher learning rate."""
    folder = tmp_path / "saved_models"
    for seed, score in enumerate((0.5, 0.6, 0.7)):
        as_if(Path(shutil.copytree(trained, folder / f"unet_seed{seed}")), score, seed=seed, learning_rate=0.01)
    as_if(Path(shutil.copytree(trained, folder / "lower")), 0.4, learning_rate=0.0001)
    return folder
