"""Archives for the benchmark server: the official tools find and score what is in them, and every fault is named."""

import io
import os
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
from conftest import load_script
from PIL import Image

from cityseg_hf import UserError, build_model, make_synthetic, submission
from cityseg_hf.checkpoint import image_processor, save_model_folder
from cityseg_hf.data.cityscapes import find_rows, read_image
from cityseg_hf.inference import load_model_folder, segment
from cityseg_hf.labels import TRAIN_ID_TO_ID
from cityseg_hf.prediction import fingerprint
from cityseg_hf.submission import archive_faults, image_sizes
from cityseg_hf.views import Views


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that resizes to 32x64 and answers every class somewhere."""
    torch.manual_seed(0)
    model = build_model("unet_small", hidden_sizes=[8, 16])
    torch.nn.init.normal_(model.classifier.weight)
    folder = tmp_path_factory.mktemp("model") / "unet"
    save_model_folder(folder, model, image_processor((32, 64)))
    return folder


@pytest.fixture(scope="module")
def results(folder: Path, streets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of the three test images."""
    archive = tmp_path_factory.mktemp("results") / "results.zip"
    call("--model", folder, "-d", streets, "--split", "test", "--output", archive)
    return archive


def call(*words: object) -> None:
    load_script("submit").main([str(word) for word in words])


def test_the_official_tools_find_every_prediction(results: Path, folder: Path, streets: Path, tmp_path: Path) -> None:
    """Names, sizes and ids of an archive of the test split, by cityscapesscripts' own search and evaluation."""
    zipfile.ZipFile(results).extractall(tmp_path)
    args = official.CArgs()
    args.predictionPath, args.predictionWalk = str(tmp_path), None
    rows = find_rows(streets)["test"]
    model, processor = load_model_folder(folder)
    for row in rows:
        found = official.getPrediction(args, f"{row.name}_gtFine_labelIds.png")
        assert Path(found).name == f"{row.name}_pred_labelIds.png"
        ids, image = Image.open(found), read_image(row.image)
        assert ids.mode == "L" and ids.size == (image.shape[1], image.shape[0])
        expected = TRAIN_ID_TO_ID[segment(model, processor, image)]
        assert (np.asarray(ids) == expected).mean() > 0.999
    assert len(zipfile.ZipFile(results).namelist()) == len(rows) == 3
    assert {path.name for path in results.parent.iterdir()} == {"results.zip"}


def test_the_official_scores_of_val_are_ours(
    folder: Path, streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    archive, words = tmp_path / "val.zip", ("-d", streets, "--split", "val")
    call("--model", folder, *words, "--output", archive, "--tta", "flip", "--window", 32, "--stride", 16)
    said = capsys.readouterr().out
    assert "holds 5 predictions and is fine" in said and said.endswith("cityscapesscripts has the same scores\n")
    scores = submission.compare_scores(archive, find_rows(streets)["val"])
    assert {"miou", "iou/road", "iiou", "iiou/car", "category_iou/flat", "category_iiou/human"} <= set(scores)
    assert f"miou {100 * scores['miou']:.2f}, iiou " in said
    call("--check", archive, *words)
    assert capsys.readouterr().out == f"{archive} is fine\n" + "".join(said.splitlines(keepends=True)[-2:])


def test_scores_that_differ_are_not_passed_over(
    folder: Path, streets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("--model", folder, "-d", streets, "--split", "val", "--output", tmp_path / "val.zip")
    original = submission._official_scores

    def shifted(*args: object, **kwargs: object) -> dict[str, float]:
        scores = original(*args, **kwargs)
        return {**scores, "iou/road": scores["iou/road"] + 1e-9}

    monkeypatch.setattr(submission, "_official_scores", shifted)
    with pytest.raises(RuntimeError, match="iou/road is "):
        submission.compare_scores(tmp_path / "val.zip", find_rows(streets)["val"])


def test_the_same_predictions_make_the_same_archive(results: Path, folder: Path, streets: Path, tmp_path: Path) -> None:
    call("--model", folder, "-d", streets, "--output", tmp_path / "again.zip", "--num_workers", 0)
    assert (tmp_path / "again.zip").read_bytes() == results.read_bytes()


def test_a_stopped_call_goes_on(
    results: Path, folder: Path, streets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--model", folder, "-d", streets, "--output", tmp_path / "results.zip", "--num_workers", 0)

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submission, "image_sizes", stop)
    with pytest.raises(KeyboardInterrupt):
        call(*words)
    parts = tmp_path / ".results.zip.parts"
    assert [path.name for path in tmp_path.iterdir()] == [parts.name]
    files = sorted(parts.glob("*.png"))
    assert len(files) == 3
    monkeypatch.undo()
    with pytest.raises(UserError, match="holds predictions with other flip"):
        call(*words, "--tta", "flip")
    files[0].unlink()
    os.utime(files[1], ns=(0, 0))
    again: list[Path] = []
    monkeypatch.setattr(submission, "read_image", lambda path: again.append(path) or read_image(path))
    call(*words)
    assert len(again) == 1
    assert (tmp_path / "results.zip").read_bytes() == results.read_bytes()
    with pytest.raises(UserError, match="is there already: --check it, or --overwrite it"):
        call(*words)
    call(*words, "--overwrite")
    assert len(again) == 4


def content(ids: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(ids).save(file, format="PNG")
    return file.getvalue()


ROAD = np.full((64, 128), 7, np.uint8)
Files = dict[str, bytes]

FAULTS: list[tuple[str, Callable[[Files, str], object], str]] = [
    ("missing", lambda files, name: files.pop(name), r"^(\S+) has no prediction: \1_pred_labelIds\.png is missing$"),
    ("twice", lambda files, name: files.update({f"sub/{name}": content(ROAD)}), "is the second prediction of "),
    ("of others", lambda files, name: files.update({"ulm_000000_000019_x.png": b""}), "^ulm.* of no image of this"),
    ("no picture", lambda files, name: files.update({"readme.txt": b"hello"}), "^readme.txt is the prediction of no"),
    (
        "damaged",
        lambda files, name: files.update({name: content(ROAD)[:60]}),
        "_pred_labelIds.png is no readable image",
    ),
    ("empty", lambda files, name: files.update({name: b""}), "is no readable image .not a PNG, or damaged."),
    ("colour", lambda files, name: files.update({name: content(np.dstack([ROAD] * 3))}), "is PNG of mode RGB, it must"),
    ("deep", lambda files, name: files.update({name: content(ROAD.astype(np.uint16))}), "is PNG of mode I;16, it must"),
    ("shallow", lambda files, name: files.update({name: content(ROAD > 0)}), "is PNG of mode 1, it must be a PNG of"),
    ("size", lambda files, name: files.update({name: content(ROAD[:32])}), "is 32x128, its image is 64x128"),
    ("ids", lambda files, name: files.update({name: content(ROAD - 7)}), "holds 0, which is no evaluated labelId"),
]


@pytest.mark.parametrize(("change", "line"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_every_fault_is_named(
    change: Callable[[Files, str], object],
    line: str,
    streets: Path,
    results: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    packed = zipfile.ZipFile(results)
    files = {name: packed.read(name) for name in packed.namelist()}
    change(files, min(files))
    with zipfile.ZipFile(tmp_path / "results.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    sizes = image_sizes(find_rows(streets)["test"])
    (fault,) = archive_faults(tmp_path / "results.zip", sizes)
    assert re.search(line, fault), fault
    with pytest.raises(UserError, match=r"results.zip has 1 fault, listed above, first: "):
        call("--check", tmp_path / "results.zip", "-d", streets)
    assert fault in capsys.readouterr().out


def test_a_damaged_archive_is_one_line(results: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.zip").write_bytes(results.read_bytes()[:-40])
    (fault,) = archive_faults(tmp_path / "cut.zip")
    assert "cut.zip is no readable zip" in fault


def test_without_the_images_the_official_figures_count(results: Path, tmp_path: Path) -> None:
    faults = list(archive_faults(results))
    assert len(faults) == 4
    assert faults[0].endswith("is 64x128, its image is 1024x2048")
    assert faults[3].endswith("has predictions of 3 images, Cityscapes has val 500, test 1525")
    data = content(np.full((1024, 2048), 7, np.uint8))
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        for index in range(500):
            archive.writestr(f"results/ulm_{index:06d}_000019_pred_labelIds.png", data)
    assert not list(archive_faults(tmp_path / "val.zip"))


def test_cities_may_have_digits_and_underscores(tmp_path: Path) -> None:
    names = {"new_york_2_000000_000019": (64, 128), "new_york_2_000000_000020": (64, 128)}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in names:
            archive.writestr(f"{name}_pred_labelIds.png", content(ROAD))
    assert not list(archive_faults(tmp_path / "a.zip", names))


def test_the_official_scores_need_the_official_tools(
    folder: Path, streets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cityscapesscripts.evaluation", None)
    with pytest.raises(UserError, match="the official scores need cityscapesscripts: pip install"):
        call("--model", folder, "-d", streets, "--split", "val", "--output", tmp_path / "val.zip")


def test_broken_images_leave_no_archive(folder: Path, tmp_path: Path) -> None:
    root = make_synthetic(tmp_path / "streets", train=0, val=0, test=2, size=(64, 128))
    broken = min((root / "leftImg8bit").rglob("*.png"))
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(UserError, match=r"1 of 2 images cannot be read, first: .* is no readable image"):
        call("--model", folder, "-d", root, "--output", tmp_path / "results.zip")
    assert not (tmp_path / "results.zip").exists()
    assert len(list((tmp_path / ".results.zip.parts").glob("*.png"))) == 1


def test_settings_are_recorded(folder: Path) -> None:
    """What predictions depend on is recorded beside them."""
    settings = fingerprint(*load_model_folder(folder), Views(window=(32, 32), flip=True))
    assert {**settings, "weights": None} == {
        "weights": None,
        "size": [32, 64],
        "window": [32, 32],
        "stride": None,
        "scales": [1.0],
        "flip": True,
    }
