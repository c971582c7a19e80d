"""What users get wrong: for each mistake the exit status and the one line. A traceback is our bug.

Words of a case may hold ``{streets}``, ``{model}``, ``{prepared}``, ``{run}`` and ``{tmp}``; ``{broken}`` is what its
``breaks`` makes of one of them.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import REPO, load_script, said
from PIL import Image
from safetensors.torch import load_file, save_file

from cityseg_hf import build_model
from cityseg_hf.checkpoint import image_processor, save_model_folder
from cityseg_hf.cli import exit_with

UNET = "--model unet_small --model_args norm=group hidden_sizes=[8,16] --num_workers 0 --max_steps 1 -b 12"
TRAIN = f"train {UNET} -d {{streets}}"
EVALUATE = "evaluate --model {model} -d {streets} --num_workers 0"
PREDICT = "predict --model {model} --input {tmp}/image.png --output {tmp}/predicted"
SUBMIT = "submit --model {model} -d {streets} --output {tmp}/results.zip"
REPORT = "report {run}"
PREPARE = "prepare_data -d {streets} --num_workers 0 --output"

Breaks = Callable[["World"], object]


class World(NamedTuple):
    """What is there before the mistake. Session-wide, but for ``tmp``."""

    streets: Path
    model: Path
    prepared: Path
    run: Path
    tmp: Path

    def copy(self, of: str) -> Path:
        return Path(shutil.copytree(getattr(self, of), self.tmp / f"broken_{of}"))


class Case(NamedTuple):
    name: str
    command: str
    line: str
    breaks: Breaks | None = None


def flag(words: str, line: str) -> Case:
    """A value that ``scripts/train.py`` refuses at once."""
    return Case(f"train {words}", f"{TRAIN} {words}", line)


def settings(text: str | bytes, line: str) -> Case:
    """A ``--config`` file."""

    def breaks(world: World) -> Path:
        content = text if isinstance(text, bytes) else text.encode()
        (world.tmp / "settings.yaml").write_bytes(content)
        return world.tmp / "settings.yaml"

    return Case(f"config {text!r}", f"{TRAIN} --config {{broken}}", line, breaks)


def first(root: Path, kind: str, split: str = "train") -> Path:
    folder = "leftImg8bit" if kind == "leftImg8bit" else "gtFine"
    return min((root / folder / split).rglob(f"*_{kind}.png"))


def data(name: str, change: Callable[[Path], object], line: str, words: str = "") -> Case:
    """A fault of a tree, met by a training."""

    def breaks(world: World) -> Path:
        root = world.copy("streets")
        change(root)
        return root

    return Case(f"data: {name}", f"train {UNET} -d {{broken}} {words}", line, breaks)


def label(pixels: np.ndarray) -> Callable[[Path], None]:
    return lambda root: Image.fromarray(pixels).save(first(root, "gtFine_labelIds"))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def model(name: str, change: Callable[[Path], object], line: str, command: str = EVALUATE) -> Case:
    """A fault of a model folder."""

    def breaks(world: World) -> Path:
        folder = world.copy("model")
        change(folder)
        return folder

    return Case(f"model: {name}", command.replace("{model}", "{broken}"), line, breaks)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")


def no_segmenter(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


def no_zip(root: Path) -> None:
    shutil.rmtree(root / "leftImg8bit")
    (root / "leftImg8bit_trainvaltest.zip").write_bytes(b"PK")


def edit(file: str, **settings: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **settings}))

    return change


def lack(part: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in weights.items() if part not in name}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def shard(name: str, change: Callable[[Path], object], line: str, command: str = f"train {UNET} --prepared") -> Case:
    """A fault of prepared data."""

    def breaks(world: World) -> Path:
        folder = world.copy("prepared")
        change(folder)
        return folder

    return Case(f"prepared: {name}", f"{command} {{broken}}", line, breaks)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def run(name: str, change: Callable[[Path], object], line: str, words: str = "") -> Case:
    """A fault of a run folder that a command goes on in."""

    def breaks(world: World) -> Path:
        folder = world.copy("run")
        change(folder)
        return folder

    return Case(f"run: {name}", f"{TRAIN} -s {{tmp}} --run_name broken_run {words}", line, breaks)


def cut_run(world: World) -> Path:
    folder = world.copy("run")
    (folder / "results.json").unlink()
    return folder


def as_file(world: World) -> Path:
    (world.tmp / "file").write_text("no image, no model, no folder")
    return world.tmp / "file"


def as_folder(world: World) -> Path:
    (world.tmp / "folder").mkdir()
    return world.tmp / "folder"


NUMBERS = [
    flag("--modle unet_small", r"unknown flag --modle; did you mean --model\?"),
    flag("--batch 2", r"unknown flag --batch; did you mean --batch_size\?"),
    flag("stray", "unrecognized arguments: stray"),
    flag("--learning_rate 0", "--learning_rate must be a number above 0, got 0.0"),
    flag("--learning_rate nan", "--learning_rate must be a number above 0, got nan"),
    flag("--learning_rate fast", "--learning_rate.*invalid float value: 'fast'"),
    flag("--weight_decay -1", "--weight_decay must be a number that is not negative, got -1.0"),
    flag("--head_lr_multiplier nan", "--head_lr_multiplier must be a number that is not negative, got nan"),
    flag("--momentum 1", r"--momentum must lie in \[0, 1\), got 1.0"),
    flag("--optimizer adam", r"--optimizer: invalid choice: 'adam' \(choose from 'adamw', 'sgd'\)"),
    flag("--schedule linear", "--schedule: invalid choice: 'linear'"),
    flag("--gamma 2", r"--gamma must lie in \(0, 1\], got 2.0"),
    flag("--gamma 0.9 --schedule poly", "--gamma belongs to --schedule exponential, not to poly: drop one"),
    flag("--poly_power 0", "--poly_power must be above 0, got 0.0"),
    flag("--min_lr_ratio 2", r"--min_lr_ratio must lie in \[0, 1\], got 2.0"),
    flag("--warmup_steps -1", "--warmup_steps must not be negative, got -1"),
    flag("--max_grad_norm 0", "--max_grad_norm must be above 0, got 0.0"),
    flag("--num_epochs 1.5", "--num_epochs.*invalid int value: '1.5'"),
    flag("--max_steps 0", "--max_steps must be at least 1, got 0"),
    flag("--batch_size 0", "--batch_size must be at least 1, got 0"),
    flag("--global_batch_size 7 --gradient_accumulation_steps 2", "a global batch of 7 cannot be shared by 1"),
    flag("--gradient_accumulation_steps 50", "12 training images cannot be shared by 1 processes x 50 accumulated"),
    flag("--mixed_precision fp8", "--mixed_precision.*invalid choice: 'fp8'"),
    flag("--auxiliary_loss_weight -1", "--auxiliary_loss_weight must be a number that is not negative, got -1.0"),
    flag("--ema_decay 1", "--ema_decay must lie between 0 and 1, for example 0.999; got 1.0"),
    flag("--class_weights rare", "--class_weights.*invalid choice: 'rare'"),
    flag("--rare_class_crops 2", "--rare_class_crops is a share of 0 to 1, got 2.0"),
    flag("--loss ce+focus", "--loss is a sum of ce, focal, ohem, .*; got 'ce.focus'"),
    flag("--loss ce+ce", "--loss is a sum of ce, .* each once"),
    flag("--loss 0*ce", "--loss is a sum of ce"),
    flag("--early_stopping_patience -1", r"--early_stopping_patience must not be negative \(0: never stop\)"),
    flag("--seed -1", r"--seed must lie in 0..4294967295, got -1"),
    flag("--logging_steps 0", "--logging_steps must be at least 1, got 0"),
    flag("--keep 0", "--keep_checkpoints must be at least 1, got 0"),
    flag("--save_every 5x", "--save_every takes steps, epochs or minutes, such as 500, 2e or 10m; got '5x'"),
    flag("--stop_after 10m", "--stop_after takes steps or epochs, such as 500 or 2e; got '10m'"),
    flag("--report_to mlflow", "--report_to.*invalid choice: 'mlflow'"),
    flag("--push_to_hub no/such/name", "--push_to_hub 'no/such/name' is no name of a repository: Repo id must be"),
    flag("--run_name ../up", "--run_name must be a plain folder name of 200 letters at most, got '../up'"),
    flag(f"--run_name {'x' * 250}", "--run_name must be a plain folder name of 200 letters at most"),
    flag("--save_model_path /proc/nowhere", "cannot write /proc/nowhere/.*: No such file or directory; choose another"),
    flag("--image_size 10 10", r"--image_size takes a height and a width of at least 32, .*; got \[10, 10\]"),
    flag("--image_size 512", r"--image_size takes a height and a width .*; got \[512\]"),
    flag("--crop_size 16 16", "--crop_size takes a height and a width of at least 32"),
    flag("--augmentation wild", "unknown --augmentation 'wild'; choose from none, flip, original, standard"),
    flag("--scale_range 2 1", r"--scale_range takes a lowest and a highest scale, .*; got \[2.0, 1.0\]"),
    flag("--holdout_cities atlantis", "--holdout_cities: no train city 'atlantis' in .*; there are neu-synthen, "),
    flag("--recipe nonsense", "unknown --recipe 'nonsense'; choose from original, "),
]

FILES = [
    settings("learning_rate: [1", "--config .*settings.yaml is no YAML: while parsing a flow sequence"),
    settings("- 1\n- 2", "--config .*settings.yaml must hold lines of 'flag: value'"),
    settings(b"\xff\xfe\x00", "--config .*settings.yaml is no YAML: 'utf-8' codec can't decode"),
    settings("lerning_rate: 1", r"\S+settings.yaml: unknown setting 'lerning_rate'; did you mean learning_rate\?"),
    settings("learning_rate: fast", r"\S+settings.yaml: .*--learning_rate.*invalid float value: 'fast'"),
    settings("compile: maybe", r"\S+settings.yaml: .*--compile: Truthy value expected: got maybe"),
    settings("recipe: wrong", "unknown --recipe 'wrong'"),
    settings('!!python/object/apply:os.system ["true"]', "is no YAML: could not determine a constructor for the tag"),
    Case("config that is not there", f"{TRAIN} --config nowhere.yaml", "--config nowhere.yaml: No such file"),
    Case("config that is a folder", f"{TRAIN} --config {{tmp}}", "--config .*: Is a directory"),
]

NETWORKS = [
    flag("--model resnet_19", "unknown --model 'resnet_19': neither a folder nor one of unet_small, "),
    flag("--model ./nowhere", "cannot load ./nowhere: "),
    flag("--init_from ./nowhere", "cannot load ./nowhere: there is no such folder"),
    flag("--init_from imagenet", "--init_from imagenet is for the resnet presets; unet_small takes a checkpoint"),
    flag("--model_args norm", "--model_args takes KEY=VALUE, got 'norm'"),
    flag("--model_args norm=[1", r"--model_args norm=\[1: while parsing"),
    flag("--model_args colour=red", "unet_small has no setting 'colour'; it has hidden_sizes, norm"),
    flag("--model_args num_labels=3", "unet_small has no setting 'num_labels'"),
    flag("--model_args num_channels=4", "unet_small: num_channels must be 3, the images are RGB; got 4"),
    flag("--model_args hidden_sizes=3", "unet_small: its settings do not fit: 'int' object is not iterable"),
    flag("--model_args hidden_sizes=[0,16]", r"unet_small: hidden_sizes must be above 0, got \[0, 16\]"),
    flag("--model segformer_b0 --model_args depths=[1] hidden_sizes=[-8]", "hidden_sizes must be above 0"),
    flag("--model segformer_b0 --model_args drop_path_rate=2", r"drop_path_rate must lie in \[0, 1\), got 2"),
    model("pickled", pickled, r"no model.safetensors in it \(pytorch_model.bin is pickled, which can run code"),
    model("pickled, to start from", pickled, "pytorch_model.bin is pickled", f"{TRAIN} --init_from {{model}}"),
    model("torn", lambda f: cut(f / "model.safetensors", 900), "cannot load .*: Error while deserializing header"),
    model("no weights", lambda f: (f / "model.safetensors").unlink(), r"no model.safetensors in it \(it has no"),
    model("no config", lambda f: (f / "config.json").unlink(), "cannot load .*: there is no config.json in it"),
    model("config is no JSON", lambda f: cut(f / "config.json", 9), "cannot load .*config.json' is not a valid JSON"),
    model("no processor", lambda f: (f / "preprocessor_config.json").unlink(), "is no preprocessor_config.json in it"),
    model("other classes", edit("config.json", id2label={"0": "a", "1": "b"}), "has 2 classes, Cityscapes has 19"),
    model("other sizes", edit("config.json", hidden_sizes=[16, 32]), r"\d+ weights of other sizes than its"),
    model("lacks its head", lack("classifier"), "lacks 2 of its weights, first classifier.bias: train it first"),
    model("no segmenter", no_segmenter, "it is no network for semantic segmentation"),
    model("other mean", edit("preprocessor_config.json", image_mean=[0.5] * 3), "does not normalise images as"),
    model(
        "another architecture",
        edit("config.json", hidden_sizes=[16, 32]),
        r"does not fit segformer_b0: \d+ parameters outside the head differ, first ",
        "train --model segformer_b0 --num_workers 0 --max_steps 1 -d {streets} --init_from {model}",
    ),
    Case("model: a file", "evaluate --model {broken} -d {streets}", "it is a file; name the folder that", as_file),
    Case("model: no such", "evaluate --model /no/where -d {streets}", "cannot load /no/where: there is no such folder"),
]

TREES = [
    Case("data: no such folder", f"train {UNET} -d /no/where", "no folder /no/where: -d takes the folder that holds"),
    Case("data: empty folder", f"train {UNET} -d {{tmp}}", "no images in .*: expected leftImg8bit/"),
    Case("data: a file", f"train {UNET} -d {{broken}}", "no folder .*/file: -d takes", as_file),
    data("no val", lambda r: shutil.rmtree(r / "leftImg8bit/val"), "has no images in leftImg8bit/val"),
    data("no labels", lambda r: shutil.rmtree(r / "gtFine"), r"has no label: expected gtFine.*\(17 faults"),
    data("no label", lambda r: first(r, "gtFine_labelIds").unlink(), "leftImg8bit.png has no label: expected gtFine"),
    data(
        "cut image", lambda r: cut(first(r, "leftImg8bit"), 2000), r"is no readable image \(image file is truncated\)"
    ),
    data(
        "cut image, in a worker",
        lambda r: cut(first(r, "leftImg8bit"), 2000),
        r"is no readable image \(image file is truncated\): download it again",
        "--num_workers 2",
    ),
    data("empty image", lambda r: cut(first(r, "leftImg8bit"), 0), "is no readable image .not a PNG, or its header"),
    data("cut val image", lambda r: cut(first(r, "leftImg8bit", "val"), 2000), "is no readable image"),
    data("another size", label(np.zeros((32, 32), np.uint8)), "labelIds.png is 32x32, but its image .* is 64x128"),
    data("illegal id", label(np.full((64, 128), 99, np.uint8)), "holds 99, which is no Cityscapes labelId"),
    data("colour label", label(np.zeros((64, 128, 3), np.uint8)), "has mode RGB, but a labelIds map must have mode L"),
    data("no zip", no_zip, "leftImg8bit_trainvaltest.zip is no readable zip"),
    Case("evaluate: no such data", "evaluate --model {model} -d /no/where", "no folder /no/where"),
    Case("check_data: no such data", "check_data -d /no/where", "no folder /no/where"),
]

PREPARED = [
    shard("no such", lambda f: shutil.rmtree(f), "no folder .*: make it with scripts/prepare_data.py --output"),
    shard("not prepared", lambda f: (f / "prepared.json").unlink(), "holds no prepared.json: it is no prepared data"),
    shard("cut list", lambda f: cut(f / "prepared.json", 50), "prepared.json is damaged"),
    shard("cut shard", lambda f: cut(f / "train-00000.arrow", 5000), "has 5000 bytes, prepared.json says .*: run "),
    shard("lost shard", lambda f: (f / "val-00000.arrow").unlink(), "val-00000.arrow: No such file or directory: run "),
    shard(
        "flipped bit",
        lambda f: flip_a_bit(f / "train-00000.arrow"),
        r"train-00000.arrow is not as it was written \(another checksum\)",
        "prepare_data --verify --output",
    ),
    Case("prepared: other cities", f"train {UNET} --prepared {{prepared}} --holdout_cities x", "not x: prepare"),
    Case("prepare_data: into data", f"{PREPARE} {{streets}}", "holds other files .*: choose a new or empty folder"),
    Case("prepare_data: into a file", f"{PREPARE} {{broken}}", "cannot write .*file: File exists", as_file),
    Case("prepare_data: --size 8 8", f"{PREPARE} {{tmp}}/p --size 8 8", "--size takes a height and a width of at"),
    Case("prepare_data: no data", "prepare_data -d /no/where --output {tmp}/p", "no folder /no/where"),
]

RUNS = [
    run("other settings", lambda f: None, r"holds a run with --learning_rate 0.001, this command has 0.5", "-l 0.5"),
    run("damaged run.json", lambda f: cut(f / "run.json", 5), "run.json is damaged .*: choose another --run_name"),
    run("run.json of others", lambda f: (f / "run.json").write_text("3"), "run.json is damaged .*: choose another"),
    Case("run: a file", f"{TRAIN} -s {{tmp}} --run_name file", "cannot write .*file: File exists", as_file),
]

SCRIPTS = [
    Case("evaluate: no model", "evaluate", "the following arguments are required: --model"),
    Case("evaluate: --split", f"{EVALUATE} --split all", "--split: invalid choice: 'all'"),
    Case("evaluate: --batch_size", f"{EVALUATE} --batch_size 0", "--batch_size 0"),
    Case("evaluate: --window", f"{EVALUATE} --window 16", "--window takes a height and a width of at least 32, got 16"),
    Case(
        "evaluate: --window of three", f"{EVALUATE} --window 64 64 64", "--window takes one number, or a height and a"
    ),
    Case("evaluate: --stride alone", f"{EVALUATE} --stride 48", "--stride says how far .*: give --window too"),
    Case("evaluate: --stride", f"{EVALUATE} --window 64 --stride 65", "at most --window 64 64, got 65 65"),
    Case("evaluate: --scales", f"{EVALUATE} --scales 1 nan", "--scales must be numbers above 0, got 1.0 nan"),
    Case("evaluate: --tta", f"{EVALUATE} --tta all", "--tta: invalid choice: 'all'"),
    Case("evaluate: --dtype", f"{EVALUATE} --dtype int8", "--dtype: invalid choice: 'int8'"),
    Case("evaluate: --output nowhere", f"{EVALUATE} --output /no/where.json", "--output .*: there is no folder /no"),
    Case("evaluate: --output folder", f"{EVALUATE} --output {{tmp}}", "--output .* is a folder: name a file in it"),
    Case("predict: no image", PREDICT.replace("image.png", "no.png"), "--input .*no.png: there is no such file or"),
    Case("predict: empty", "predict --model {model} --input {broken} --output o", "no images in it", as_folder),
    Case("predict: no image file", "predict --model {model} --input {broken} --output o", "1 of 1 files", as_file),
    Case("predict: into a file", "predict --model {model} --input {tmp} --output {broken}", "File exists", as_file),
    Case("predict: --opacity", f"{PREDICT} --opacity 2", "--opacity must lie between 0 and 1, got 2.0"),
    Case("predict: --write", f"{PREDICT} --write masks", "--write: invalid choice: 'masks'"),
    Case("predict: --window", f"{PREDICT} --window 8", "--window takes a height and a width of at least 32, got 8 8"),
    Case("predict: --batch_size", f"{PREDICT} --batch_size 0", "--batch_size must be at least 1, got 0"),
    Case("predict: --num_workers", f"{PREDICT} --num_workers -1", "--num_workers must not be negative, got -1"),
    Case("predict: glob", PREDICT.replace("image.png", "*.gif"), "--input .*gif: no images in it"),
    Case("submit: nothing", "submit -d {streets}", "give --model FOLDER and --output ZIP, or --check ZIP"),
    Case("submit: both", f"{SUBMIT} --check a.zip", "--check only looks at an archive: leave --model and --output out"),
    Case("submit: --split", f"{SUBMIT} --split train", "--split: invalid choice: 'train'"),
    Case("submit: --output nowhere", f"{SUBMIT} --output /no/a.zip", "--output /no/a.zip: there is no folder /no"),
    Case("submit: --output there", f"{SUBMIT} --output {{broken}}", "is there already: --check it, or", as_file),
    Case("submit: --scales", f"{SUBMIT} --scales 0", "--scales must be numbers above 0, got 0.0"),
    Case("submit: --num_workers", f"{SUBMIT} --num_workers -1", "--num_workers must not be negative, got -1"),
    Case("submit: no such data", f"{SUBMIT} -d /no/where", "no folder /no/where"),
    Case("submit: no such archive", "submit --check no.zip", "--check no.zip: there is no such file"),
    Case(
        "submit: no archive", "submit --check {broken}", "has 1 fault, listed above, first: .*no readable zip", as_file
    ),
    Case("make_synthetic: size", "make_synthetic --output s --size 8 8", "size must be a height and a width of at"),
    Case("make_synthetic: count", "make_synthetic --output s --train -1", "train must not be negative, got -1"),
    Case("make_synthetic: file", "make_synthetic --output {broken}", "--output .*file: Not a directory", as_file),
    Case("check_data: --output", "check_data -d {streets} --output {tmp}", "is a folder: name a file in it"),
    Case("benchmark: mode", "benchmark speed", "invalid choice: 'speed'"),
    Case("benchmark: model", "benchmark train --models nosuch", "unknown --model 'nosuch'"),
    Case("benchmark: device", "benchmark train --device tpu", "--device: invalid choice: 'tpu'"),
    Case("report: no runs", "report", "the following arguments are required: RUNS"),
    Case("report: no such", "report /no/where", "no folder /no/where: name run folders, or a folder that holds them"),
    Case("report: no run in it", "report {model}", "no run in .*/model: name run folders, or a folder that holds"),
    Case(
        "report: not finished", "report {broken}", "no finished run to report on: .*: not finished, at step 1", cut_run
    ),
    Case("report: --output nowhere", f"{REPORT} --output /no/where.html", "--output .*: there is no folder /no"),
    Case(
        "report: --output page", f"{REPORT} --output {{tmp}}/results.csv", "--output .* must end in .html: results.csv"
    ),
    Case("report: --images", f"{REPORT} --images -1", "--images must not be negative, got -1"),
    Case("report: --weights", f"{REPORT} --weights best", "--weights: invalid choice: 'best'"),
    Case(
        "report: --pictures_of",
        f"{REPORT} --pictures_of rum",
        "--pictures_of rum: no finished run .*; did you mean run",
    ),
    Case("chaos: --kills", "chaos --kills 0", "--kills must be at least 1, got 0"),
]

TABLE = [*NUMBERS, *FILES, *NETWORKS, *TREES, *PREPARED, *RUNS, *SCRIPTS]


def call(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a script in this process as its own would; returns its exit status."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    script, *words = command.split()
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as ended:
        exit_with(load_script(script).main)
    return ended.value.code


@pytest.fixture(scope="session")
def good(streets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, prepared data and a finished run."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    save_model_folder(folder / "model", build_model("unet_small", hidden_sizes=[8, 16]), image_processor((48, 64)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call(f"prepare_data -d {streets} --num_workers 0 --output {folder}/prepared", monkeypatch) == 0
        assert call(f"train {UNET} -d {streets} -s {folder} --run_name run", monkeypatch) == 0
    return {name: folder / name for name in ("model", "prepared", "run")}


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name[:60])
def test_mistakes_cost_one_line(
    case: Case,
    streets: Path,
    good: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "image.png")
    world = World(streets=streets, tmp=tmp_path, **good)
    places = {**world._asdict(), "broken": case.breaks and case.breaks(world)}
    command = re.sub(r"\{(\w+)\}", lambda found: str(places[found[1]]), case.command)
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    status = call(command, monkeypatch)
    said = capfd.readouterr().err
    # Progress bars are rubbed out; what stays is one line.
    lines = [line for part in said.split("\n") if (line := part.split("\r")[-1].removeprefix("\x1b[A").strip())]
    lines = [line for line in lines if not re.match(r"(train|val|test|predict|verify|check)\b.*\|", line)]
    assert status == 2, said
    assert len(lines) == 1, said
    assert re.search(r"^error: .*" + case.line, lines[0]), lines[0]
    assert len(lines[0]) < 700


def test_the_table_is_long_enough() -> None:
    assert len({case.name for case in TABLE}) == len(TABLE) >= 60


def test_a_scripts_own_process_says_the_same(tmp_path: Path) -> None:
    """The table calls ``main`` in this process; here is one mistake as the shell sees it."""
    command = [sys.executable, str(REPO / "scripts/evaluate.py"), "--model", "/no/where", "-d", "/no/data"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert said(done) == ["error: no folder /no/data: -d takes the folder that holds leftImg8bit/ and gtFine/"]
