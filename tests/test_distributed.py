"""Two processes over gloo: the same curve as one, each image once, stopping together, one tracker run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, TINY_UNET

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


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


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
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED"),
    ]:
        with pytest.raises(UserError, match=message):
            check_world(accelerator, environment)
