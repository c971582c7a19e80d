"""The loop, end to end on tiny streets: what it writes, what it reloads, what it resumes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_SEGFORMER, TINY_UNET, load_script, read_lines
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from cityseg_hf import UserError, launch, load_cityscapes
from cityseg_hf.checkpoint import Progress
from cityseg_hf.data.sources import FileSource
from cityseg_hf.labels import CLASS_NAMES, ID_TO_TRAIN_ID
from cityseg_hf.runs import RunFolder
from cityseg_hf.step import TrainStep

RunTrain = Callable[..., Path]
SHORT = (*TINY_UNET, "-e", 3, "-b", 4, "--logging_steps", 1)


def test_run_folder_holds_what_the_contract_says(run_train: RunTrain, streets: Path) -> None:
    run = run_train("-d", streets, *SHORT)
    lines = read_lines(run)
    assert {line["split"] for line in lines} == {"train", "train_epoch", "val", "test"}
    assert [line["model"] for line in lines if line["split"] == "test"] == ["best_miou", "best_loss", "last"]
    assert [line["step"] for line in lines if line["split"] == "val"] == [3, 6, 9]
    results = json.loads((run / "results.json").read_text())
    assert set(results) == {"best_miou", "best_loss", "last"}
    for scores in results.values():
        for name in ("miou", "iiou", "category_iou", "dice", "pixel_accuracy", "mean_accuracy", "loss"):
            assert scores[f"test/{name}"] >= 0, name
        assert {f"test/iou/{name}" for name in CLASS_NAMES} <= set(scores)
    description = json.loads((run / "run.json").read_text())
    assert description["arguments"]["batch_size"] == 4
    assert {"settings", "versions", "git_commit", "data_fingerprint", "device", "num_processes"} <= set(description)
    for name in ("best_miou", "best_loss", "last"):
        files = {path.name for path in (run / name).iterdir()}
        assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= files
    assert (run / "checkpoints" / "step_00000009").is_dir()
    AutoImageProcessor.from_pretrained(run / "last")
    AutoModelForSemanticSegmentation.from_pretrained(run / "last")


def test_no_secret_is_written(run_train: RunTrain, streets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect 13: credentials in files."""
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-wandb")
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-hub")
    run = run_train("-d", streets, *TINY_UNET, "--max_steps", 1, "-b", 4)
    for path in run.rglob("*"):
        if path.is_file():
            assert b"s3cr3t" not in path.read_bytes(), path


def test_a_finished_run_says_so(run_train: RunTrain, streets: Path, capsys: pytest.CaptureFixture) -> None:
    run = run_train("-d", streets, *TINY_UNET, "--max_steps", 1, "-b", 4)
    before = (run / "results.json").stat().st_mtime_ns
    capsys.readouterr()
    run_train("-d", streets, *TINY_UNET, "--max_steps", 1, "-b", 4)
    assert "finished" in capsys.readouterr().out
    assert (run / "results.json").stat().st_mtime_ns == before


def test_a_run_folder_is_not_overwritten_by_other_settings(run_train: RunTrain, streets: Path) -> None:
    """Defect 14, where the user names the folder."""
    run_train("-d", streets, *TINY_UNET, "--max_steps", 1, "-b", 4)
    with pytest.raises(UserError, match=r"--weight_decay 0.0001, this command has 0.5.*--run_name"):
        run_train("-d", streets, *TINY_UNET, "--max_steps", 1, "-b", 4, "-w", 0.5)


def test_evaluate_reproduces_the_runs_own_validation(
    run_train: RunTrain, streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Also with another batch size; and the image is resized, the label is not (defect 5)."""
    run = run_train("-d", streets, "--model", "segformer_small", "-e", 1, "-b", 4, "--image_size", 48, 80, "-a")
    expected = next(line for line in read_lines(run) if line["split"] == "val")
    output = tmp_path / "scores.json"
    argv = ["--model", str(run / "last"), "-d", str(streets), "--output", str(output), "--batch_size", "3"]
    load_script("evaluate").main(argv)
    scores = json.loads(output.read_text())["val"]
    for name, value in scores.items():
        assert value == pytest.approx(expected[name], abs=1e-6), name
    assert "miou" in capsys.readouterr().out


def test_early_stopping_tests_what_it_has(run_train: RunTrain, streets: Path) -> None:
    """Defect 16: the last epoch was lost at an early stop. A rate of nothing cannot lower the loss."""
    run = run_train("-d", streets, *TINY_UNET, "-e", 9, "-b", 4, "-p", 2, "-l", 1e-30)
    validated = [line["epoch"] for line in read_lines(run) if line["split"] == "val"]
    assert validated == [1, 2, 3], "one best, then two without gain"
    assert set(json.loads((run / "results.json").read_text())) == {"best_miou", "best_loss", "last"}


def test_a_tracker_that_is_down_costs_nothing(
    run_train: RunTrain, streets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect 16: results went to the tracker only, and with it."""
    import accelerate

    def down(*args, **kwargs):
        raise ConnectionError("no route to the tracker")

    monkeypatch.setattr(accelerate.Accelerator, "init_trackers", down)
    run = run_train("-d", streets, *TINY_UNET, "--max_steps", 2, "-b", 4, "--report_to", "tensorboard")
    assert (run / "results.json").is_file()


def test_tensorboard_gets_what_metrics_jsonl_has(run_train: RunTrain, streets: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_train("-d", streets, *TINY_UNET, "-e", 1, "-b", 4, "--report_to", "tensorboard")
    folder = next(run.rglob("events.out.tfevents.*")).parent
    events = EventAccumulator(str(folder)).Reload()
    expected = next(line for line in read_lines(run) if line["split"] == "val")
    assert events.Scalars("val/miou")[0].value == pytest.approx(expected["miou"], abs=1e-6)
    assert events.Scalars("val/iou/road")[0].value == pytest.approx(expected["iou/road"], abs=1e-6)
    assert events.Tags()["images"], "a panel of image, label and prediction"


def test_wandb_offline_has_one_run_with_config_and_scores(run_train: RunTrain, streets: Path) -> None:
    run = run_train("-d", streets, *TINY_UNET, "--max_steps", 2, "-b", 4, "--report_to", "wandb")
    assert len(list(run.rglob("offline-run-*"))) == 1


def test_accumulation_equals_one_large_batch(run_train: RunTrain, streets: Path) -> None:
    """The mean is over the valid pixels of the global batch, however it is cut up."""
    whole = run_train("-d", streets, *TINY_UNET, "-e", 2, "-b", 6, "--logging_steps", 1, name="whole")
    cut = run_train("-d", streets, *TINY_UNET, "-e", 2, "-b", 2, "--gradient_accumulation_steps", 3,
                    "--logging_steps", 1, name="cut")  # fmt: skip
    losses = [[line["loss"] for line in read_lines(run)] for run in (whole, cut)]
    np.testing.assert_allclose(*losses, atol=1e-5)


def test_bf16_trains(run_train: RunTrain, streets: Path) -> None:
    """Defect 21: no mixed precision."""
    run = run_train("-d", streets, *TINY_UNET, "--max_steps", 3, "-b", 4, "--mixed_precision", "bf16", "-l", 1e-2)
    losses = [line["loss"] for line in read_lines(run) if line["split"] in ("train", "val")]
    assert np.isfinite(losses).all()
    assert load_file(run / "last" / "model.safetensors")["classifier.weight"].dtype == torch.float32


def test_the_step_does_not_wait_for_the_host(
    run_train: RunTrain, streets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect 19: logits were copied to the host every step, with a sync for each class."""

    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default, "the step reads a value on the host"
            return function(*args, **(kwargs or {}))

    step = TrainStep.__call__

    def watched(self: TrainStep, *args):
        with NoSync():
            return step(self, *args)

    monkeypatch.setattr(TrainStep, "__call__", watched)
    # The optimiser's own step counter lives on the host: SGD has none.
    run_train("-d", streets, *TINY_UNET, "--max_steps", 2, "-b", 4, "--optimizer", "sgd")


def test_holdout_cities_choose_and_val_judges(run_train: RunTrain, streets: Path) -> None:
    """Defect 5: frames of one city stood in train and validation."""
    city = load_cityscapes(streets)["train"][0]["city"]
    run = run_train("-d", streets, *TINY_UNET, "--max_steps", 2, "-b", 4, "--holdout_cities", city)
    assert "holdout" in {line["split"] for line in read_lines(run)}
    images = json.loads((run / "run.json").read_text())["images"]
    assert images["holdout"] + images["train"] == 12


def test_auxiliary_head_and_frozen_batchnorm(run_train: RunTrain, streets: Path) -> None:
    run = run_train("-d", streets, "--model", "resnet_18", "--model_args", "auxiliary_head=true", "--max_steps", 1,
                    "-b", 2, "--freeze_batchnorm", "--num_workers", 0)  # fmt: skip
    weights = load_file(run / "last" / "model.safetensors")
    assert torch.equal(weights["backbone.bn1.running_mean"], torch.zeros(64)), "frozen statistics do not move"
    assert "aux_classifier.0.weight" in weights


def test_any_image_size_and_mixed_sizes(run_train: RunTrain, tmp_path: Path) -> None:
    from cityseg_hf import make_synthetic

    root = tmp_path / "odd"
    make_synthetic(root, train=4, val=1, size=(65, 131))
    make_synthetic(root, train=2, val=2, size=(90, 100), seed=3)  # the first images are now of another size
    run = run_train("-d", root, *TINY_UNET, "--max_steps", 2, "-b", 2, "--image_size", 64, 96)
    assert (run / "results.json").is_file()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("-d", "no_such_folder"), "no folder no_such_folder"),
        (("--model", "segformer_smal"), "unknown --model 'segformer_smal'"),
        (("--model_args", "nonsense=1"), "has no setting 'nonsense'"),
        (("--model_args", "norm"), "KEY=VALUE"),
        (("--holdout_cities", "atlantis"), "no train city 'atlantis'"),
    ],
)
def test_mistakes_are_one_line(argv: tuple[str, ...], message: str, run_train: RunTrain, streets: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run_train("-d", streets, "--model", "unet_small", *argv)
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_no_number_is_no_gain() -> None:
    """Else a run that diverged at once would never stop early; and JSON has no NaN."""
    progress = Progress()
    assert progress.note_validation(None, float("nan")) == ["best_miou", "best_loss"], "the first is kept all the same"
    assert progress.note_validation(0.0, float("nan")) == []
    assert progress.validations_without_gain == 1
    assert progress.note_validation(0.1, 5.0) == ["best_miou", "best_loss"]
    assert progress.note_validation(0.0, float("nan")) == []


def test_json_has_no_nan(tmp_path: Path) -> None:
    RunFolder(tmp_path, is_main=True).log(1, 0.5, "val", {"loss": float("nan"), "miou": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)["loss"] is None


def test_class_weights_are_counted_from_the_training_labels(streets: Path) -> None:
    rows = load_cityscapes(streets)["train"]
    expected = sum(np.bincount(ID_TO_TRAIN_ID[np.asarray(label)].ravel(), minlength=256) for label in rows["label"])
    counts = FileSource(rows).count_classes()
    np.testing.assert_array_equal(counts[0], expected[:19])
    has = [[(ID_TO_TRAIN_ID[np.asarray(label)] == c).any() for c in range(19)] for label in rows["label"]]
    np.testing.assert_array_equal(counts[1], np.sum(has, axis=0))


def test_a_broken_first_image_is_one_line(run_train: RunTrain, streets: Path, tmp_path: Path) -> None:
    """It is read before the loader, for its size."""
    root = tmp_path / "streets"
    shutil.copytree(streets, root)
    first = sorted(root.glob("leftImg8bit/train/*/*.png"))[0]
    first.write_bytes(first.read_bytes()[:300])
    with pytest.raises(UserError, match=f"{first.name} is no readable image"):
        run_train("-d", root, *TINY_UNET, "--max_steps", 1, "-b", 4)


def test_a_push_can_be_asked_for_later(run_train: RunTrain, streets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run trains no more, but still goes up when the same command says so."""
    pushed = []
    monkeypatch.setattr("cityseg_hf.hub.push_model_folder", lambda folder, repo: pushed.append((folder.name, repo)))
    run_train("-d", streets, *TINY_UNET, "--max_steps", 1, "-b", 4)
    run_train("-d", streets, *TINY_UNET, "--max_steps", 1, "-b", 4, "--push_to_hub", "someone/model")
    assert pushed == [("best_miou", "someone/model")]


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run) if line["split"] == "train"]


@pytest.mark.slow
def test_compilation_changes_no_curve_and_no_name(
    run_train: RunTrain, streets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is what an uncompiled run saves, and the losses agree. Traced as ever, but kernels are torch's."""
    by_region = launch.compile_regions_fsdp2
    monkeypatch.setattr(launch, "compile_regions_fsdp2", lambda network: by_region(network, backend="aot_eager"))
    model = TINY_SEGFORMER
    plain, compiled = (
        run_train(
            "-d", streets, *model, "--max_steps", 3, "-b", 2, "--logging_steps", 1, *extra, name=f"run{len(extra)}"
        )
        for extra in ((), ("--compile",))
    )
    np.testing.assert_allclose(losses_of(compiled), losses_of(plain), rtol=1e-4)
    assert load_file(compiled / "last/model.safetensors").keys() == load_file(plain / "last/model.safetensors").keys()


def test_compilation_without_a_compiler_is_one_line(
    run_train: RunTrain, streets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler"):
        run_train("-d", streets, *TINY_UNET, "--max_steps", 1, "-b", 2, "--compile")


def test_saved_weights_lie_as_they_are_read(run_train: RunTrain, streets: Path) -> None:
    """Training keeps weights channels last; files hold them in the order of their indices."""
    run = run_train("-d", streets, *TINY_UNET, "--max_steps", 2, "-b", 4)
    model = AutoModelForSemanticSegmentation.from_pretrained(run / "last")
    weights = load_file(run / "last/model.safetensors")
    assert all(weight.is_contiguous() for weight in weights.values())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
