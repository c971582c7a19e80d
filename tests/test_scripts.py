"""The scripts as a user runs them: exit statuses, single lines, files written."""

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
import torch
from conftest import REPO, TINY_UNET, load_script, said
from PIL import Image
from transformers import pipeline

from cityseg_hf import PRESETS, UserError, build_model, labels
from cityseg_hf.checkpoint import image_processor, save_model_folder
from cityseg_hf.cli import exit_with
from cityseg_hf.inference import load_model_folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "unet"
    model = build_model("unet_small", hidden_sizes=[8, 16])
    torch.nn.init.normal_(model.classifier.weight)  # all classes occur
    save_model_folder(folder, model, image_processor((48, 64)))
    return folder


def script(name: str, *argv: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / "scripts" / f"{name}.py"), *map(str, argv)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


def test_the_main_job_without_cityscapes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No ./cityscapes_data and no -d: synthetic streets, in one loud line. With a wrong -d: never."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = script("train", *TINY_UNET, "--max_steps", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if "SYNTHETIC" in line and "NO CITYSCAPES" in line]
    assert len(list(tmp_path.glob("saved_models/*/results.json"))) == 1
    assert len(list(tmp_path.glob("cache/cityseg_hf/streets_*"))) == 1


def test_mistakes_exit_2_with_one_line(tmp_path: Path) -> None:
    done = script("train", "-d", "nowhere", "--model", "segformer_small", cwd=tmp_path)
    assert done.returncode == 2
    assert said(done) == ["error: no folder nowhere: -d takes the folder that holds leftImg8bit/ and gtFine/"]


def test_a_signal_to_the_whole_group_saves_and_exits_75(streets: Path, tmp_path: Path) -> None:
    """Ctrl-C and Slurm signal the workers too: they must not die before the step is done."""
    argv = ["-d", streets, *TINY_UNET, "-e", 500, "-b", 4, "--num_workers", 2, "--run_name", "run"]
    command = [sys.executable, str(REPO / "scripts/train.py"), *map(str, argv)]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        metrics = tmp_path / "saved_models/run/metrics.jsonl"
        deadline = time.monotonic() + 200
        while not metrics.is_file() and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 75, errors[-2000:]
    assert "run the same command again to go on" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert len(list(tmp_path.glob("saved_models/run/checkpoints/step_*"))) >= 1


LEAVES_A_DEAF_WORKER = """
import multiprocessing, signal, time
from cityseg_hf.cli import exit_with

def work():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("deaf", flush=True)
    time.sleep(600)

def main(argv):
    worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    worker.start()
    time.sleep(0.5)
    return 75

exit_with(main)
"""


def test_workers_that_are_deaf_to_signals_do_not_keep_a_script_alive() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVES_A_DEAF_WORKER], capture_output=True, timeout=60, cwd=REPO)
    assert done.returncode == 75 and b"deaf" in done.stdout


def test_listed_models_exist() -> None:
    """Defect 10: the help listed models that did not exist."""
    done = subprocess.run(
        [sys.executable, str(REPO / "scripts/train.py"), "--list_models"], capture_output=True, text=True, timeout=240
    )
    assert done.stdout.split() == list(PRESETS)


def test_evaluate_asks_for_what_is_missing(model_folder: Path, streets: Path, tmp_path: Path) -> None:
    main = load_script("evaluate").main
    with pytest.raises(UserError, match="no folder"):
        main(["--model", str(model_folder), "-d", str(tmp_path / "nothing")])
    with pytest.raises(UserError, match=r"there is no config\.json in it"):
        main(["--model", str(tmp_path), "-d", str(streets)])
    with pytest.raises(UserError, match="--output"):
        main(["--model", str(model_folder), "-d", str(streets), "--output", str(tmp_path / "no" / "where.json")])


def test_predict_writes_three_pictures_of_the_images_size(model_folder: Path, tmp_path: Path) -> None:
    """Defect 18: no way to look at a result. Sub-folders and names are kept; a broken file costs only itself."""
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (70, 90, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(source / "a.png")
    Image.fromarray(pixels[:50, :, 0]).save(source / "sub" / "grey.jpg")
    (source / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(UserError, match=r"1 of 3 files could not be segmented, first: .*broken.png"):
        load_script("predict").main(
            ["--model", str(model_folder), "--input", str(source), "--output", str(tmp_path / "out")]
        )
    for stem, height in (("a", 70), ("sub/grey", 50)):
        ids = np.asarray(Image.open(tmp_path / "out" / f"{stem}_labelIds.png"))
        color = Image.open(tmp_path / "out" / f"{stem}_color.png")
        overlay = Image.open(tmp_path / "out" / f"{stem}_overlay.png")
        assert ids.shape == (height, 90)
        assert color.size == overlay.size == (90, height)
        evaluated = {label.id for label in labels.TRAIN_LABELS}
        assert set(np.unique(ids)) <= evaluated
        colors = {label.id: label.color for label in labels.TRAIN_LABELS}
        assert tuple(np.asarray(color.convert("RGB"))[3, 5]) == colors[ids[3, 5]]


def test_predict_agrees_with_the_pipeline(model_folder: Path, tmp_path: Path) -> None:
    """The pipeline of transformers, with the saved processor, is the oracle."""
    pixels = np.random.default_rng(1).integers(0, 255, (70, 90, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    load_script("predict").main(
        ["--model", str(model_folder), "--input", str(tmp_path / "a.png"), "--output", str(tmp_path)]
    )
    ids = np.asarray(Image.open(tmp_path / "a_labelIds.png"))
    segments = pipeline("image-segmentation", model=str(model_folder))(Image.fromarray(pixels))
    assert segments
    for segment in segments:
        train_id = labels.LABEL2ID[segment["label"]]
        np.testing.assert_array_equal(np.asarray(segment["mask"]) > 0, ids == labels.TRAIN_ID_TO_ID[train_id])


def test_make_synthetic_writes_a_tree_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    load_script("make_synthetic").main(
        [
            "--output",
            str(tmp_path / "s"),
            "--train",
            "3",
            "--val",
            "1",
            "--test",
            "1",
            "--size",
            "64",
            "96",
            "--seed",
            "5",
        ]
    )
    from cityseg_hf import load_cityscapes

    rows = load_cityscapes(tmp_path / "s")
    assert {split: len(found) for split, found in rows.items()} == {"train": 3, "val": 1, "test": 1}
    assert rows["train"][0]["image"].size == (96, 64)
    with pytest.raises(UserError, match="size"):
        load_script("make_synthetic").main(["--output", str(tmp_path / "t"), "--size", "8", "8"])


def test_push_to_hub_is_never_fatal(run_train, streets: Path) -> None:
    """Offline, the Hub refuses at once; what was trained stays on disk."""
    run = run_train("-d", streets, *TINY_UNET, "--max_steps", 1, "-b", 4, "--push_to_hub", "someone/some-model")
    assert json.loads((run / "results.json").read_text())


def test_models_that_would_be_judged_wrongly_are_refused(model_folder: Path, tmp_path: Path) -> None:
    """Another normalisation than the one the loader does would give plausible, wrong scores."""
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(UserError, match="does not normalise images"):
        load_model_folder(other)


def test_half_precision_folders_load_in_float32(model_folder: Path, tmp_path: Path) -> None:
    model, processor = load_model_folder(model_folder)
    save_model_folder(tmp_path / "half", model.half(), processor)
    assert load_model_folder(tmp_path / "half")[0].dtype == torch.float32
    assert build_model(str(tmp_path / "half")).dtype == torch.float32


def test_predict_does_not_segment_its_own_output(model_folder: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    argv = ["--model", str(model_folder), "--input", str(tmp_path), "--output", str(tmp_path / "out")]
    for _ in range(2):
        load_script("predict").main(argv)
        assert len(list((tmp_path / "out").rglob("*.png"))) == 3


def test_an_interrupt_is_one_line(capsys: pytest.CaptureFixture) -> None:
    """Ctrl-C in evaluate or predict, or a second one in training, is no traceback."""

    def main(argv: list[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        exit_with(main)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
