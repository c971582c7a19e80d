"""Two processes over gloo: the same curve as one, each image once, stopping together, one tracker run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, TINY_UNET, load_script

TRAIN = REPO / "scripts" / "train.py"


def launch(*words: object, cwd: Path, cpu: bool = True, timeout: int = 240) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    environment.pop("ACCELERATE_USE_CPU", None)
    if cpu:
        environment["ACCELERATE_USE_CPU"] = "1"
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def two_processes(*argv: object, cwd: Path, cpu: bool = True) -> subprocess.CompletedProcess:
    # Port 0: a free one, so that test runs side by side do not meet.
    launcher = ["-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes", 2]
    return launch(*launcher, "--main_process_port", 0, TRAIN, *argv, cwd=cwd, cpu=cpu)


def losses(run: Path, splits: tuple[str, ...] = ("train", "val", "test")) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["split"] in splits]


@pytest.mark.parametrize(
    "model",
    [
        TINY_UNET,
        # Stochastic depth and dropout are on: their masks belong to the samples.
        ("--model", "segformer_small", "--model_args", "hidden_sizes=[8,16,24,32]", "--freeze_batchnorm"),
    ],
    ids=["unet", "segformer"],
)
def test_same_curve_as_one_process(model: tuple, streets: Path, tmp_path: Path, run_train) -> None:
    """Defects 7 and 17, and the contract. 12 images, 5 to validate: the shards of validation are unequal."""
    common = ("-d", streets, *model, "-a", "-e", 2, "--logging_steps", 1, "--report_to", "tensorboard",
              "--class_weights", "enet")  # fmt: skip
    one = run_train(*common, "-b", 4, name="one")
    done = two_processes(*common, "-b", 2, "-s", tmp_path / "runs", "--run_name", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    two = tmp_path / "runs" / "two"
    np.testing.assert_allclose(losses(two), losses(one), atol=1e-5)
    results = [json.loads((run / "results.json").read_text()) for run in (one, two)]
    for name, scores in results[0].items():
        for key, value in scores.items():
            assert results[1][name][key] == pytest.approx(value, abs=1e-3), f"{name} {key}"
    written = [len(list(run.rglob("events.out.tfevents.*"))) for run in (one, two)]
    assert written[0] == written[1], "one tracker run, whatever the number of processes"


def test_processes_stop_early_together(streets: Path, tmp_path: Path) -> None:
    """Defect 8: some ranks went on training while others tested, and hung."""
    argv = ("-d", streets, *TINY_UNET, "-e", 9, "-b", 2, "-p", 1, "-l", 1e-30)
    done = two_processes(*argv, "-s", tmp_path / "runs", "--run_name", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "runs/two/metrics.jsonl").read_text().splitlines()]
    assert max(line["epoch"] for line in lines) == 2


def test_a_fault_that_one_process_meets_is_said(streets: Path, tmp_path: Path) -> None:
    """It lies in the other process's share of the data: whoever meets it must name the file."""
    root = tmp_path / "streets"
    shutil.copytree(streets, root)
    for broken in root.glob("leftImg8bit/train/*/*.png"):
        broken.write_bytes(broken.read_bytes()[:200])
    argv = ("-d", root, *TINY_UNET, "-e", 1, "-b", 2, "--image_size", 64, 128)
    done = two_processes(*argv, "-s", tmp_path / "runs", "--run_name", "two", cwd=tmp_path)
    assert done.returncode != 0
    assert "_leftImg8bit.png is no readable image" in done.stderr


def test_processes_that_do_not_know_of_each_other_are_refused(streets: Path, tmp_path: Path) -> None:
    """Without ACCELERATE_USE_CPU two runs of rank 0 would overwrite each other and exit 0."""
    done = two_processes("-d", streets, *TINY_UNET, "--max_steps", 1, cwd=tmp_path, cpu=False)
    assert done.returncode != 0
    assert "do not know of each other" in done.stderr
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_one_process_where_two_were_asked_for_is_refused(streets: Path, tmp_path: Path) -> None:
    """``accelerate launch --cpu --num_processes 2`` starts one process and says nothing."""
    launcher = ("-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", 2)
    done = launch(*launcher, TRAIN, "-d", streets, *TINY_UNET, "--max_steps", 1, cwd=tmp_path, cpu=False)
    assert done.returncode != 0
    assert "more than one process was asked for" in done.stderr


def test_check_world_says_exit_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher turns every status into 1; the script's own is 2, for each way a launch can go wrong."""
    from accelerate import Accelerator

    from cityseg_hf import UserError
    from cityseg_hf.launch import check_world

    accelerator = Accelerator(cpu=True)
    check_world(accelerator, {})
    check_world(accelerator, {"WORLD_SIZE": "1", "ACCELERATE_USE_FSDP": "false"})
    check_world(accelerator, {"MASTER_ADDR": "node1"})  # left over in a shell: no launcher, no promise
    for environment, message in [
        ({"WORLD_SIZE": "2"}, "2 processes"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "more than one process"),
    ]:
        with pytest.raises(UserError, match=message):
            check_world(accelerator, environment)


# --- pre-emption


def begin(command: list[object], cwd: Path) -> subprocess.Popen:
    """Starts a training, and returns when it has written its first line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "ACCELERATE_USE_CPU": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=environment, **pipes)
    wait_for(lambda: (cwd / "runs/run/metrics.jsonl").is_file(), process)
    return process


def wait_for(condition, process: subprocess.Popen | None = None, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < end
        time.sleep(0.02)


def trainings(run: Path) -> list[int]:
    """The processes that train into a run folder, the launchers apart: rank by rank."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        launcher = b"-m" in words
        if str(run).encode() in words and not launcher:
            rank = next((int(one[5:]) for one in environment if one.startswith(b"RANK=")), 0)
            found.append((rank, parent, int(folder.name)))
    workers = {pid for _, _, pid in found}  # a loader's worker has the words of its parent
    return [pid for _, parent, pid in sorted(found) if parent not in workers]


LONG = ("-e", 60, "-b", 2, "--logging_steps", 1, "-f", 20, "-a")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
SINGLE = ("-m", "accelerate.commands.launch", "--quiet", "--cpu")


def flags(streets: Path, cwd: Path, *more: object) -> list[object]:
    return [TRAIN, "-d", streets, *TINY_UNET, *LONG, "-s", cwd / "runs", "--run_name", "run", *more]


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    ("launcher", "target", "number"),
    [
        (TORCHRUN, "rank", signal.SIGTERM),
        (TORCHRUN, "rank", signal.SIGUSR1),
        (TORCHRUN, "launcher", signal.SIGTERM),
        (TORCHRUN, "launcher", signal.SIGUSR1),
        (SINGLE, "launcher", signal.SIGTERM),
        (SINGLE, "launcher", signal.SIGUSR1),
        ((), "rank", signal.SIGINT),
    ],
    ids=["torchrun rank TERM", "torchrun rank USR1", "torchrun TERM", "torchrun USR1", "accelerate TERM",
         "accelerate USR1", "python INT"],
)  # fmt: skip
def test_a_signal_to_anyone_saves(
    launcher: tuple, target: str, number: signal.Signals, streets: Path, tmp_path: Path
) -> None:
    """All processes finish the same step and save it, whoever got the signal; nobody trains on alone."""
    run = tmp_path / "runs/run"
    process = begin([*launcher, *flags(streets, tmp_path)], tmp_path)
    os.kill(trainings(tmp_path / "runs")[-1] if target == "rank" else process.pid, number)
    stderr = process.communicate(timeout=60)[1]
    wait_for(lambda: not trainings(tmp_path / "runs"))
    steps = [int(name[5:]) for name in saved(run)]
    last = max(json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines())
    assert steps, stderr[-2000:]
    assert steps[-1] == last < 180
    if not launcher:
        assert process.returncode == 75
        assert stderr.splitlines()[-1].startswith("stopped: SIGINT at step")
        assert "Traceback" not in stderr


def test_a_process_that_dies_ends_the_others(streets: Path, tmp_path: Path) -> None:
    """Within a minute, with a line that says so; and the run goes on from what was saved, on one process."""
    process = begin([*TORCHRUN, *flags(streets, tmp_path, "--save_every", 2)], tmp_path)
    run = tmp_path / "runs/run"
    wait_for(lambda: saved(run), process)
    start = time.monotonic()
    os.kill(trainings(tmp_path / "runs")[-1], signal.SIGKILL)
    stderr = process.communicate(timeout=60)[1]
    wait_for(lambda: not trainings(tmp_path / "runs"))
    assert time.monotonic() - start < 60
    assert "another process is gone" in stderr
    assert "Traceback" not in stderr.split("torch/distributed", 1)[0]
    # The same images a step: one process takes the batches of both.
    done = launch(*flags(streets, tmp_path, "-b", 4), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "going on from step" in done.stdout
    alone = launch(*flags(streets, tmp_path, "-b", 4, "--run_name", "alone"), cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr[-2000:]
    np.testing.assert_allclose(losses(run), losses(tmp_path / "runs/alone"), atol=1e-3)


ONE, TWO = ((), ("-b", 4)), (TORCHRUN, ("-b", 2))
"""A launcher, and what it needs for global batches of four."""


@pytest.mark.parametrize(("before", "after"), [(ONE, TWO), (TWO, ONE)], ids=["1 to 2", "2 to 1"])
def test_a_run_goes_on_with_other_processes(
    before: tuple, after: tuple, streets: Path, tmp_path: Path, run_train
) -> None:
    """Cut after its first steps, it ends as one process does that was never cut."""
    common = ("-e", 24, "-f", 12)
    alone = run_train("-d", streets, *TINY_UNET, *LONG, *common, "-b", 4, name="alone")
    process = begin([*before[0], *flags(streets, tmp_path, *common, *before[1])], tmp_path)
    os.kill(trainings(tmp_path / "runs")[-1], signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    wait_for(lambda: not trainings(tmp_path / "runs"))
    run = tmp_path / "runs/run"
    assert saved(run), stderr[-2000:]
    assert not (run / "results.json").exists()
    done = launch(*after[0], *flags(streets, tmp_path, *common, *after[1]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "going on from step" in done.stdout
    # Which of two equal mIoUs is the best may differ, and with it what is tested: the curves are what counts.
    for split in ("train", "val"):
        np.testing.assert_allclose(losses(run, (split,)), losses(alone, (split,)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_runs_end_as_quiet_ones(processes: int, capsys: pytest.CaptureFixture) -> None:
    """``scripts/chaos.py`` in short: most places with one process, some with two."""
    kills = {1: 6, 2: 2}[processes]
    assert load_script("chaos").main(["--kills", str(kills), "--processes", str(processes), "--seed", "3"]) == 0
    said = capsys.readouterr().out
    assert f"{kills} of {kills} killed runs ended as the quiet one, bit for bit" in said
