"""Cut anywhere and run again, a run ends as one that was never cut; and what goes wrong costs one line."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPO, TINY_SEGFORMER, TINY_UNET, assert_same_run, load_script, read_lines
from torch import nn

from cityseg_hf import UserError, checkpoint, config, memory
from cityseg_hf.checkpoint import Checkpoints
from cityseg_hf.errors import Stopped
from cityseg_hf.losses import Criterion
from cityseg_hf.optim import Plan, average_weights
from cityseg_hf.reporting import Skipped
from cityseg_hf.step import TrainStep

RunTrain = Callable[..., Path]
SHORT = ("-e", 3, "-b", 4, "--logging_steps", 2)


class Killed(Exception):
    """Stands for SIGKILL: nothing is saved after it."""


def cut_at(monkeypatch: pytest.MonkeyPatch, step: int, how: Callable[[], None]) -> None:
    """Does something at the beginning of an optimiser step."""
    take = TrainStep.__call__

    def cut(self: TrainStep, batches: list, number: int):
        if number == step:
            how()
        return take(self, batches, number)

    monkeypatch.setattr(TrainStep, "__call__", cut)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill() -> None:
    raise Killed


CASES = {
    "unet": (*TINY_UNET, *SHORT),
    "workers": (*TINY_UNET, *SHORT, "-a", "--num_workers", 2),
    "bf16": (*TINY_UNET, *SHORT, "-a", "standard", "--mixed_precision", "bf16"),
    "accumulation": (*TINY_UNET, *SHORT, "-b", 2, "--gradient_accumulation_steps", 2, "-a", "standard"),
    "average": (*TINY_UNET, *SHORT, "--ema_decay", 0.5, "--optimizer", "sgd", "--class_weights", "enet"),
    "segformer": (*TINY_SEGFORMER, *SHORT, "-a", "standard", "--max_grad_norm", 1),
    "resnet": ("--model", "resnet_18", "--num_workers", 0, "-e", 2, "-b", 6, "--logging_steps", 3, "-a"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_cut_run_ends_as_an_uncut_one(
    name: str, run_train: RunTrain, streets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once told to stop in the middle of an epoch, once killed after it: bit for bit the same."""
    argv = ("-d", streets, *CASES[name])
    uncut = run_train(*argv, name="uncut")
    steps = max(line["step"] for line in read_lines(uncut))
    for step, how, raised in ((steps // 2, terminate, Stopped), (steps - 1, kill, Killed)):
        with monkeypatch.context() as patched, pytest.raises(raised):
            cut_at(patched, step, how)
            run_train(*argv, name="cut")
    assert_same_run(run_train(*argv, name="cut"), uncut)


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def cut_off(folder: Path) -> None:
    file = folder / "state.pt"
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "state.pt").write_bytes(content)


@pytest.mark.parametrize(
    "tear",
    [cut_off, flip_a_bit, lambda folder: (folder / "manifest.json").unlink(), lambda folder: shutil.rmtree(folder)],
    ids=["cut off", "a bit", "no manifest", "gone"],
)
def test_a_torn_checkpoint_costs_the_way_from_the_one_before(
    tear: Callable[[Path], None], run_train: RunTrain, streets: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    argv = ("-d", streets, *TINY_UNET, *SHORT)
    uncut = run_train(*argv, name="uncut")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        cut_at(patched, 7, kill)
        run_train(*argv, name="cut")
    run = uncut.with_name("cut")
    torn = newest(run)
    assert torn.name == "step_00000006"
    tear(torn)
    was_there = torn.exists()
    capsys.readouterr()
    assert_same_run(run_train(*argv, name="cut"), uncut)
    said = capsys.readouterr().out
    assert "going on from step 3" in said
    assert (f"{torn} is damaged" in said) == was_there


def test_checkpoints_are_bounded_and_come_when_asked(run_train: RunTrain, streets: Path, monkeypatch) -> None:
    saved = []
    save = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, step, *rest, **more: (saved.append(step), save(self, step, *rest, **more))
    )
    run = run_train("-d", streets, *TINY_UNET, *SHORT, "--save_every", 2, "--keep", 3)
    assert saved == [2, 4, 6, 8, 9]
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_00000006", "step_00000008", "step_00000009"]


def test_save_every_is_converted_at_one_door() -> None:
    train = config.TrainConfig(num_epochs=10, val_freq=4)
    for text, steps, seconds in ((None, None, None), ("7", 7, None), ("2e", 20, None), ("0.5e", 5, None)):
        plan = Plan.of(train, 10, text)
        assert (plan.save_every, plan.save_seconds) == (steps, seconds)
    assert [step for step in range(1, 101) if Plan.of(train, 10).saves_at(step)] == [40, 80, 100]
    assert [step for step in range(1, 101) if Plan.of(train, 10, "30").saves_at(step)] == [30, 60, 90, 100]
    minutes = Plan.of(train, 10, "1.5m")
    assert minutes.save_seconds == 90
    assert [step for step in range(1, 101) if minutes.saves_at(step)] == [100]


def test_minutes_go_by_the_clock(run_train: RunTrain, streets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    save = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, step, *rest, **more: (saved.append(step), save(self, step, *rest, **more))
    )
    run_train("-d", streets, *TINY_UNET, *SHORT, "--save_every", "0.000001m")
    assert saved == list(range(1, 10))


def test_a_save_does_not_stop_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is the state at that step, however long the disk takes and whatever the next step does."""
    import threading

    go = threading.Event()
    write = checkpoint._write_to_disk
    monkeypatch.setattr(checkpoint, "_write_to_disk", lambda *args: (go.wait(30), write(*args)))
    layer = nn.Linear(3, 3)
    before = layer.weight.detach().clone()
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"network": layer})
    with torch.no_grad():
        layer.weight.zero_()
    assert not list(tmp_path.glob("checkpoints/step_*")), "its name appears when it is whole"
    go.set()
    checkpoints.wait()
    whole, torn = checkpoints.newest()
    assert torn == []
    assert torch.equal(whole.state["network"]["weight"], before)


def test_a_disk_that_is_full_costs_one_line(run_train: RunTrain, streets: Path, monkeypatch) -> None:
    """The write fails half way; the checkpoint before is whole, and with room again the run goes on from it."""
    argv = ("-d", streets, *TINY_UNET, *SHORT)
    uncut = run_train(*argv, name="uncut")
    written = 0

    def full(path: Path, data: bytes) -> None:
        nonlocal written
        written += 1
        if written <= 2:
            return write(path, data)
        path.write_bytes(bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    write = checkpoint._write_to_disk
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_write_to_disk", full)
        with pytest.raises(UserError, match=r"No space left on device.*go on") as caught:
            run_train(*argv, name="full")
    assert "\n" not in str(caught.value)
    run = uncut.with_name("full")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000003"]
    assert_same_run(run_train(*argv, name="full"), uncut)


def test_a_really_full_disk(streets: Path, tmp_path: Path) -> None:
    """On a file system of 2 MiB, which the first checkpoints fill."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    model = ("--model", "unet_small", "--model_args", "norm=group", "hidden_sizes=[8,16,32]", "--num_workers", 0)
    argv = ["-d", streets, *model, *SHORT, "--save_every", 1, "--keep", 9, "-s", small, "--run_name", "run"]
    try:
        done = subprocess.run([sys.executable, REPO / "scripts/train.py", *map(str, argv)], capture_output=True,
                              text=True, timeout=120)  # fmt: skip
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        assert done.returncode == 2, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        assert len(errors) == 1
        assert "No space left" in errors[0]
        whole, torn = Checkpoints(small / "run", keep=9).newest()
        assert whole is not None
        assert torn == []
    finally:
        subprocess.run(["umount", small], check=True)


class Wild(nn.Module):
    """A network whose output is not finite at chosen steps."""

    def __init__(self, when: set[int]) -> None:
        super().__init__()
        self.when, self.calls = when, 0

    def poison(self, module: nn.Module, args: tuple, output: tuple) -> tuple:
        self.calls += 1
        loss, logits = output
        return (loss * float("nan") if self.calls in self.when else loss), logits


def make_wild(monkeypatch: pytest.MonkeyPatch, when: set[int]) -> None:
    wild, initialise = Wild(when), Criterion.__init__

    def initialised(self: Criterion, *args, **kwargs) -> None:
        initialise(self, *args, **kwargs)
        self.register_forward_hook(wild.poison)

    monkeypatch.setattr(Criterion, "__init__", initialised)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_that_is_not_finite_is_skipped(
    optimizer: str, run_train: RunTrain, streets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, the optimiser's state and the statistics of batch normalisation stay as they were."""
    states = []
    update = TrainStep._update

    def watched(self: TrainStep, before: list) -> None:
        update(self, before)
        names = {name: value.clone() for name, value in self.network.state_dict().items() if value.is_floating_point()}
        states.append((names, [dict(state) for state in self.engine.optimizer.state.values()]))

    monkeypatch.setattr(TrainStep, "_update", watched)
    make_wild(monkeypatch, {2})
    model = ("--model", "unet_small", "--model_args", "hidden_sizes=[8,16]", "--num_workers", 0)
    run = run_train("-d", streets, *model, "-e", 1, "-b", 4, "--logging_steps", 1, "--optimizer", optimizer)
    for name, value in states[1][0].items():
        assert torch.equal(value, states[0][0][name]), name
        assert value.isfinite().all()
    assert any(not torch.equal(value, states[1][0][name]) for name, value in states[2][0].items()), "it goes on"
    lines = [line for line in read_lines(run) if line["split"] == "train"]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]
    assert [line["loss"] is None for line in lines] == [False, True, False]
    assert next(line["loss"] for line in read_lines(run) if line["split"] == "train_epoch") > 0


def test_steps_that_are_never_finite_stop_with_the_files(
    run_train: RunTrain, streets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wild(monkeypatch, set(range(2, 100)))
    with pytest.raises(UserError, match=r"4 steps in a row .*_leftImg8bit.png.*--learning_rate"):
        run_train("-d", streets, *TINY_UNET, *SHORT, "--max_skipped_steps", 4)


def test_skips_are_counted_in_a_row() -> None:
    skipped = Skipped(torch.device("cpu"))
    for bad in (True, True, False, True):
        skipped.note(torch.tensor(bad))
    assert skipped.read() == (1, 3)
    other = Skipped(torch.device("cpu"))
    other.load_state_dict(skipped.state_dict())
    assert other.read() == (1, 3)


def out_of_memory_above(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Criterion.forward

    def limited(self: Criterion, pixel_values, labels, keys):
        if len(pixel_values) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(self, pixel_values, labels, keys)

    monkeypatch.setattr(Criterion, "forward", limited)


def test_out_of_memory_says_what_to_lower(run_train: RunTrain, streets: Path, monkeypatch) -> None:
    out_of_memory_above(3, monkeypatch)
    with pytest.raises(UserError, match="--batch_size 3 --gradient_accumulation_steps 2 keeps the global batch"):
        run_train("-d", streets, *TINY_UNET, *SHORT, "-b", 6)
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(UserError, match="one image of 64x128: lower --image_size"):
        run_train("-d", streets, *TINY_UNET, *SHORT, "-b", 1, name="one")


def test_find_batch_size_keeps_the_global_batch(run_train: RunTrain, streets: Path, monkeypatch) -> None:
    """The same run, with batches that fit."""
    by_hand = ("-b", 3, "--gradient_accumulation_steps", 2)
    expected = run_train("-d", streets, *TINY_UNET, *SHORT, *by_hand, name="by_hand")
    out_of_memory_above(3, monkeypatch)
    found = run_train("-d", streets, *TINY_UNET, *SHORT, "-b", 6, "--find_batch_size", name="found")
    assert_same_run(found, expected)
    description = json.loads((found / "run.json").read_text())
    assert description["arguments"]["batch_size"] == 3
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(UserError, match="out of memory with one image"):
        run_train("-d", streets, *TINY_UNET, *SHORT, "--find_batch_size", name="none")


def test_splits_keep_the_images_of_a_step() -> None:
    splits = memory.splits_of(config.TrainConfig(batch_size=6, gradient_accumulation_steps=2))
    assert [(one.batch_size, one.gradient_accumulation_steps) for one in splits] == [
        (6, 2), (4, 3), (3, 4), (2, 6), (1, 12),
    ]  # fmt: skip


def test_the_average_follows_the_weights() -> None:
    """By hand: the first is a copy, then average = d average + (1 - d) weights, d = min(decay, (1 + n) / (10 + n))."""
    layer = nn.Linear(1, 1, bias=False)
    averaged = average_weights(layer, 0.25)
    expected = None
    for steps, value in enumerate((1.0, 2.0, 4.0, 8.0)):
        nn.init.constant_(layer.weight, value)
        averaged.update_parameters(layer)
        decay = min(0.25, (1 + steps) / (10 + steps))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert averaged.module.weight.item() == pytest.approx(expected, rel=1e-6)


def test_the_average_is_what_is_judged_and_saved(run_train: RunTrain, streets: Path) -> None:
    plain = run_train("-d", streets, *TINY_UNET, *SHORT, "-l", 1e-2, name="plain")
    averaged = run_train("-d", streets, *TINY_UNET, *SHORT, "-l", 1e-2, "--ema_decay", 0.9, name="averaged")
    train = [[line["loss"] for line in read_lines(run) if line["split"] == "train"] for run in (plain, averaged)]
    assert train[0] == train[1], "training does not feel it"
    judged = [[line["loss"] for line in read_lines(run) if line["split"] == "val"] for run in (plain, averaged)]
    assert judged[0] != judged[1]
    state = Checkpoints(averaged, keep=2).newest()[0].state
    saved = load_script("evaluate").load_model_folder(averaged / "last")[0].state_dict()
    for name, value in saved.items():
        assert torch.equal(value, state["average"][f"module.{name}"]), name


def test_another_number_of_processes_needs_the_same_global_batch(run_train: RunTrain, streets: Path) -> None:
    run_train("-d", streets, *TINY_UNET, *SHORT)
    with pytest.raises(UserError, match="--global_batch_size 4, this command has 6: use --global_batch_size 4"):
        run_train("-d", streets, *TINY_UNET, *SHORT, "-b", 6)
    # Cut otherwise it is the same run: finished.
    run_train("-d", streets, *TINY_UNET, *SHORT, "-b", 2, "--gradient_accumulation_steps", 2)


def test_a_checkpoint_of_another_network_is_one_line(run_train: RunTrain, streets: Path, monkeypatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(Killed):
        cut_at(patched, 4, kill)
        run_train("-d", streets, *TINY_UNET, *SHORT, name="one")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        cut_at(patched, 4, kill)
        other = ("--model", "unet_small", "--model_args", "norm=group", "hidden_sizes=[8,8]", "--num_workers", 0)
        run_train("-d", streets, *other, *SHORT, name="two")
    runs = Path.cwd() / "runs"
    shutil.rmtree(runs / "one/checkpoints")
    shutil.copytree(runs / "two/checkpoints", runs / "one/checkpoints")
    with pytest.raises(UserError, match=r"cannot go on from .*step_00000003") as caught:
        run_train("-d", streets, *TINY_UNET, *SHORT, name="one")
    assert "\n" not in str(caught.value)


KILLS_A_WORKER = """
import multiprocessing, os, runpy, signal, sys
from cityseg_hf.step import TrainStep

take = TrainStep.__call__

def cut(self, batches, number):
    if number == 2:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    return take(self, batches, number)

TrainStep.__call__ = cut
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_a_killed_worker_is_one_line(streets: Path, tmp_path: Path) -> None:
    """The kernel kills what takes too much memory, and a worker may be the one."""
    argv = ["-d", streets, *TINY_UNET, "--num_workers", 2, "-e", 200, "-b", 4, "-f", 200, "--save_every", 1]
    command = [sys.executable, "-c", KILLS_A_WORKER, REPO / "scripts/train.py", *argv]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"error: a process that loads data was lost .*Killed.*lower --num_workers", last)
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("saved_models/*/checkpoints/step_*"))


@pytest.mark.parametrize("pause", ["1e", "4"])
def test_a_paused_run_ends_as_an_uncut_one(pause: str, streets: Path, run_train: RunTrain) -> None:
    argv = ("-d", streets, *TINY_UNET, *SHORT)
    whole = run_train(*argv, name="whole")
    for _ in range(2):  # asked again, a run that has come so far does not take a step more
        with pytest.raises(Stopped, match=f"--stop_after {pause}"):
            run_train(*argv, "--stop_after", pause, name="paused")
        folder = whole.with_name("paused")
        assert {line["step"] for line in read_lines(folder)} <= set(range(5))
        assert (folder / "checkpoints" / f"step_{3 if pause == '1e' else 4:08}").is_dir()
    assert_same_run(run_train(*argv, "--stop_after", "99", name="paused"), whole)
