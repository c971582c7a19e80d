"""The checker against faults made by hand: each is found, named, and told in the loader's own words."""

import json
import os
import shutil
import signal
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import load_script
from PIL import Image

from cityseg_hf import load_cityscapes, make_synthetic
from cityseg_hf.cli import exit_with
from cityseg_hf.data import checking
from cityseg_hf.data.cityscapes import instance_path, read_instances
from cityseg_hf.data.sources import FileSource
from cityseg_hf.errors import UserError

IMAGE, LABEL, INSTANCES = "_leftImg8bit.png", "_gtFine_labelIds.png", "_gtFine_instanceIds.png"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree without a fault: 3 images in train, 2 in val and 2 in test."""
    return make_synthetic(tmp_path_factory.mktemp("whole") / "tree", train=3, val=2, test=2, size=(64, 64), seed=4)


@pytest.fixture
def tree(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(whole, tmp_path / "tree"))


def file_of(tree: Path, suffix: str, split: str = "train", index: int = 1) -> Path:
    """One of the files of a split, by its suffix and its place in the order of names."""
    return sorted(tree.rglob(f"{split}/*/*{suffix}"))[index]


def copy_to(source: Path, target: Path) -> Path:
    """Copies a file into a folder that may not be there yet."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(source, target))


def png(content: np.ndarray, depth: int, colour: int) -> bytes:
    """A PNG of a depth that Pillow does not write; ``content`` is ``uint8[H, bytes]``, packed rows."""
    width = content.shape[1] * 8 // (depth * {0: 1, 2: 3}[colour])

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(content), depth, colour, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in content))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# --- one fault each: what makes it returns the file that must be named


def cut(tree: Path, suffix: str, share: float = 0.5) -> Path:
    path = file_of(tree, suffix)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def corrupt(tree: Path, suffix: str) -> Path:
    path = file_of(tree, suffix)
    content = bytearray(path.read_bytes())
    for place in range(60, len(content) - 20):
        content[place] ^= 0x5A
    path.write_bytes(content)
    return path


def odd_chunk(tree: Path) -> Path:
    """A chunk that is shorter than it must be: Pillow answers with an error of ``struct``."""
    path = file_of(tree, IMAGE)
    content = path.read_bytes()
    chunk = struct.pack(">I", 1) + b"gAMA" + b"\0" + struct.pack(">I", zlib.crc32(b"gAMA\0"))
    path.write_bytes(content[:33] + chunk + content[33:])
    return path


def save(path: Path, content: np.ndarray | Image.Image) -> Path:
    (content if isinstance(content, Image.Image) else Image.fromarray(content)).save(path)
    return path


def replace(tree: Path, suffix: str, content: np.ndarray, split: str = "train") -> Path:
    return save(file_of(tree, suffix, split), content)


def palette_label(tree: Path) -> Path:
    path = file_of(tree, LABEL)
    return save(path, Image.open(path).convert("P"))


def shallow_label(tree: Path) -> Path:
    """Of four bits a pixel: Pillow makes 17 of 1, which is another class."""
    path = file_of(tree, LABEL)
    path.write_bytes(png(np.full((64, 32), 0x11, np.uint8), depth=4, colour=0))
    return path


def illegal_label(tree: Path) -> Path:
    path = file_of(tree, LABEL)
    label_ids = np.array(Image.open(path))
    label_ids[3, 5] = 77
    return save(path, label_ids)


def remove(tree: Path, suffix: str, split: str) -> Path:
    """Removes an image or a label; its partner is the file that is named."""
    path = file_of(tree, suffix, split)
    partner = file_of(tree, LABEL if suffix == IMAGE else IMAGE, split)
    path.unlink()
    return partner


def bad_name(tree: Path) -> Path:
    for suffix in (LABEL, IMAGE):
        path = file_of(tree, suffix)
        path = path.rename(path.with_name(f"{path.parent.name}_first{suffix}"))
    return path


def same_name(tree: Path, split: str) -> Path:
    """A pair once more, in another city of a split; its pixels differ, so that its name alone is at fault."""
    for suffix, kind in ((LABEL, "gtFine"), (IMAGE, "leftImg8bit")):
        first = file_of(tree, suffix, index=0)
        path = copy_to(first, tree / kind / split / "zwilling" / first.name)
    return save(path, np.array(Image.open(path))[::-1])


def same_image(tree: Path) -> Path:
    """A training image in val, under a name of val."""
    return copy_to(file_of(tree, IMAGE, "train"), file_of(tree, IMAGE, "val"))


NAMES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a train image without label": (lambda tree: remove(tree, LABEL, "train"), "has no label: expected gtFine/train/"),
    "a test image without label": (lambda tree: remove(tree, LABEL, "test"), "has no label: expected gtFine/test/"),
    "a label without image": (lambda tree: remove(tree, IMAGE, "val"), "has no image: expected leftImg8bit/val/"),
    "a bad name": (bad_name, "the name must be CITY_SEQ_FRAME"),
    "a name twice in a split": (lambda tree: same_name(tree, "train"), "has the same name as"),
    "a name in two splits": (lambda tree: same_name(tree, "val"), "of train: an image belongs to one split"),
}
"""Faults that ``load_cityscapes`` meets."""

FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a truncated image": (lambda tree: cut(tree, IMAGE), "is no readable image"),
    "a truncated label": (lambda tree: cut(tree, LABEL), "is no readable image"),
    "truncated instances": (lambda tree: cut(tree, INSTANCES), "is no readable image"),
    "an empty image": (lambda tree: cut(tree, IMAGE, 0.0), "is no readable image"),
    "a corrupt image": (lambda tree: corrupt(tree, IMAGE), "is no readable image"),
    "a corrupt label": (lambda tree: corrupt(tree, LABEL), "is no readable image"),
    "an image with an odd chunk": (odd_chunk, "is no readable image"),
    "an image of 16 bits": (lambda tree: replace(tree, IMAGE, np.zeros((64, 64), np.uint16)), "has mode I;16"),
    "a colour label": (lambda tree: replace(tree, LABEL, np.zeros((64, 64, 3), np.uint8)), "has mode RGB"),
    "a palette label": (palette_label, "has mode P"),
    "a label of 16 bits": (lambda tree: replace(tree, LABEL, np.zeros((64, 64), np.uint16)), "has mode I;16"),
    "a label of 4 bits": (shallow_label, "is 4 bits deep"),
    "instances of 8 bits": (lambda tree: replace(tree, INSTANCES, np.zeros((64, 64), np.uint8)), "has mode L"),
    "an illegal label id": (illegal_label, "holds 77, which is no Cityscapes labelId"),
    "instances of another size": (
        lambda tree: replace(tree, INSTANCES, np.zeros((64, 32), np.uint16)),
        "is 64x32, but its label is 64x64",
    ),
    "an image of another size": (
        # Its label is the file that is named, with the image.
        lambda tree: (replace(tree, IMAGE, np.zeros((32, 64, 3), np.uint8)), file_of(tree, LABEL))[1],
        "is 64x64, but its image",
    ),
}
"""Faults that a read of the file meets."""

CHECKED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a void train label": (
        lambda tree: replace(tree, LABEL, np.full((64, 64), 4, np.uint8)),
        "is void in every pixel",
    ),
    "a void val label": (lambda tree: replace(tree, LABEL, np.zeros((64, 64), np.uint8), "val"), "is void"),
    "an image in two splits": (same_image, "is the same image as"),
}
"""Faults that the loader lets through."""


def pack(tree: Path) -> Path:
    """The tree as zips."""
    for kind in ("leftImg8bit", "gtFine"):
        with zipfile.ZipFile(tree / f"{kind}_trainvaltest.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted((tree / kind).rglob("*.png")):
                archive.write(path, path.relative_to(tree))
        shutil.rmtree(tree / kind)
    return tree


def packed_name(path: Path, tree: Path) -> str:
    """What a file is called in the zip it went into."""
    inner = path.relative_to(tree)
    return f"zip://{inner}::{tree / f'{inner.parts[0]}_trainvaltest.zip'}"


def check(tree: Path, *flags: object) -> tuple[list[dict[str, str]], str]:
    """Runs the script on a faulty tree; returns the faults it writes, and its last line."""
    output = tree.parent / "faults.json"
    with pytest.raises(UserError) as error:
        load_script("check_data").main(["-d", str(tree), "--output", str(output), *map(str, flags)])
    return json.loads(output.read_text()), str(error.value)


def loader_says(tree: Path) -> str:
    """The first fault that the loader meets in the train split, then in val and test; nothing if it meets none."""
    try:
        sources = [FileSource(rows) for rows in load_cityscapes(tree).values()]
        for source in sources:
            for index in range(len(source)):
                _, label = source.read(index)
                source.read_instances(index, label.shape)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zips"])
@pytest.mark.parametrize("kind", [*NAMES, *FILES, *CHECKED])
def test_each_fault(kind: str, zipped: bool, tree: Path, capsys: pytest.CaptureFixture) -> None:
    spoil, words = {**NAMES, **FILES, **CHECKED}[kind]
    named = spoil(tree)
    split = named.relative_to(tree).parts[1]
    file = str(named)
    if zipped:
        pack(tree)
        file = packed_name(named, tree)
    faults, summary = check(tree, "--num_workers", 2)
    line = capsys.readouterr().out.strip()
    assert faults == [{"file": file, "split": split, "fault": line}]
    assert "\n" not in line and line.startswith(file) and words in line
    assert summary == f"1 fault in {tree}: mend it before training"
    # The very words that a training would have stopped with.
    assert loader_says(tree) == ("" if kind in CHECKED else line)


def test_both_files_are_named(tree: Path) -> None:
    first, twin, copied = file_of(tree, IMAGE, index=0), same_name(tree, "val"), same_image(tree)
    faults, _ = check(tree)
    assert [fault["file"] for fault in faults] == [str(twin), str(copied)] and str(first) in faults[0]["fault"]
    assert str(file_of(tree, IMAGE)) in faults[1]["fault"]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_all_faults_in_one_pass(workers: int, tree: Path, capsys: pytest.CaptureFixture) -> None:
    """Several in one pair as well; and the loader says the first, and how to see all."""
    named = [
        (remove(tree, LABEL, "test"), "has no label"),
        (cut(tree, IMAGE), "no readable image"),
        (illegal_label(tree), "holds 77"),
        (replace(tree, INSTANCES, np.zeros((8, 8), np.uint16)), "is 8x8"),
        (replace(tree, LABEL, np.zeros((64, 32), np.uint8), "val"), "is 64x32"),
    ]
    named += [(named[4][0], "is void"), (file_of(tree, INSTANCES, "val"), "but its label is 64x32")]
    faults, summary = check(tree, "--num_workers", workers)
    assert [fault["file"] for fault in faults] == [str(path) for path, _ in named]
    assert all(words in fault["fault"] for fault, (_, words) in zip(faults, named, strict=True))
    assert capsys.readouterr().out.splitlines() == [fault["fault"] for fault in faults]
    assert summary == f"7 faults in {tree}: mend them before training"
    assert loader_says(tree) == faults[0]["fault"]
    extra = remove(tree, IMAGE, "val")
    with pytest.raises(UserError) as error:
        load_cityscapes(tree)
    assert str(error.value).startswith(faults[0]["fault"]), extra
    assert str(error.value).endswith(f" (2 faults: scripts/check_data.py -d {tree} lists them)")


# --- archives


def test_a_name_in_two_archives(tree: Path) -> None:
    pack(tree)
    shutil.copy(tree / "leftImg8bit_trainvaltest.zip", tree / "leftImg8bit_trainvaltest_again.zip")
    faults, _ = check(tree)
    assert len(faults) == 7 and all(fault["file"].endswith("_again.zip") for fault in faults)
    assert loader_says(tree).startswith(faults[0]["fault"]) and "has the same name as zip://" in faults[0]["fault"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice(tree: Path) -> None:
    pack(tree)
    with zipfile.ZipFile(tree / "gtFine_trainvaltest.zip", "a") as archive:
        member = next(name for name in archive.namelist() if name.endswith(LABEL))
        archive.writestr(member, archive.read(member))
    (fault,), _ = check(tree)
    assert fault["file"] == f"zip://{member}::{tree / 'gtFine_trainvaltest.zip'}" and "twice" in fault["fault"]
    assert loader_says(tree) == fault["fault"]


@pytest.mark.parametrize("kind", ["leftImg8bit", "gtFine"])
def test_a_truncated_archive(kind: str, tree: Path) -> None:
    """One fault, and not one for every partner of what may be in it."""
    archive = pack(tree) / f"{kind}_trainvaltest.zip"
    archive.write_bytes(archive.read_bytes()[:-100])
    (fault,), _ = check(tree)
    assert (fault["file"], fault["split"]) == (str(archive), None) and "is no readable zip" in fault["fault"]
    assert loader_says(tree) == fault["fault"]


def test_a_damaged_member(tree: Path) -> None:
    archive = pack(tree) / "gtFine_trainvaltest.zip"
    with zipfile.ZipFile(archive) as opened:
        info = next(info for info in opened.infolist() if info.filename.endswith(LABEL))
    content = bytearray(archive.read_bytes())
    middle = info.header_offset + 30 + len(info.filename) + info.compress_size // 2
    content[middle : middle + 40] = bytes(40)
    archive.write_bytes(content)
    (fault,), _ = check(tree)
    assert fault["file"] == f"zip://{info.filename}::{archive}" and fault["fault"].startswith("cannot read zip://")
    # The split of the first member is test, which the loader reads last.
    assert loader_says(tree) == fault["fault"]


# --- trees without a fault


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zips"])
def test_a_tree_that_is_fine(zipped: bool, tree: Path, capsys: pytest.CaptureFixture) -> None:
    if zipped:
        pack(tree)
    output = tree / "faults.json"
    assert not load_script("check_data").main(["-d", str(tree), "--output", str(output)])
    assert capsys.readouterr().out.startswith(f"{tree} is fine: 7 images (train 3, val 2, test 2), all read in ")
    assert json.loads(output.read_text()) == [] and loader_says(tree) == ""


@pytest.mark.parametrize("labels_of_test", ["none", "void", "without images"])
def test_test_labels_of_the_download(labels_of_test: str, tree: Path) -> None:
    if labels_of_test == "none":
        shutil.rmtree(tree / "gtFine" / "test")
    elif labels_of_test == "void":
        for path in (tree / "gtFine" / "test").rglob(f"*{LABEL}"):
            save(path, np.zeros((64, 64), np.uint8))
    else:
        shutil.rmtree(tree / "leftImg8bit" / "test")
    report = checking.check_tree(tree)
    assert report.faults == [] and report.images.get("test", 0) == (0 if labels_of_test == "without images" else 2)
    load_cityscapes(tree)


def test_a_split_whose_images_were_forgotten(tree: Path) -> None:
    """The loader lets it be, since evaluation needs one split alone."""
    shutil.rmtree(tree / "leftImg8bit" / "train")
    (fault,), _ = check(tree)
    assert (fault["file"], fault["split"]) == (str(tree), "train") and "leftImg8bit/train" in fault["fault"]
    assert list(load_cityscapes(tree)) == ["val", "test"]


def test_instance_maps_are_read_in_place(tree: Path) -> None:
    """What the checker holds against a map is what reading it for the scores says."""
    path = replace(tree, INSTANCES, np.zeros((64, 32), np.uint16))
    (fault,), _ = check(tree)
    assert instance_path(str(file_of(tree, LABEL))) == str(path)
    with pytest.raises(UserError) as error:
        read_instances(str(path), (64, 64))
    assert str(error.value) == fault["fault"]


# --- the script


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-d", "none"], "no folder none"),
        (["-d", "."], "no images in ."),
        (["--num_workers", "-1"], "--num_workers"),
        (["-d", "tree", "--output", "none/faults.json"], "there is no folder"),
        (["-d", "tree", "--output", "tree"], "--output tree is a folder"),
        (["--worker", "1"], "unknown flag --worker"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], words: str, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tree.parent)
    assert words in error_of(argv, 2, monkeypatch, capsys)


def error_of(argv: list[str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """Runs the script to its exit status; returns its last line on stderr, before which is only the bar."""
    monkeypatch.setattr(sys, "argv", ["check_data.py", *argv])
    with pytest.raises(SystemExit) as left:
        exit_with(load_script("check_data").main)
    assert left.value.code == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    *bar, last = error.replace("\r", "\n").strip().splitlines()
    assert all(line.strip() == "" or line.startswith("check:") for line in bar)
    return last


def test_faults_are_status_2(tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    cut(tree, IMAGE)
    said = error_of(["-d", str(tree)], 2, monkeypatch, capsys)
    assert said == f"error: 1 fault in {tree}: mend it before training"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_that_nobody_thought_of(workers: int, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise MemoryError

    monkeypatch.setattr(checking, "read_label", fail)
    report = checking.check_tree(tree, num_workers=workers)
    assert [fault.file for fault in report.faults] == [
        str(path) for split in ("train", "val", "test") for path in sorted((tree / "gtFine" / split).rglob(f"*{LABEL}"))
    ]
    assert all("cannot be read (MemoryError" in fault.line and "\n" not in fault.line for fault in report.faults)


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_is_one_line(
    workers: int, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And what has not been begun is not read."""
    read, asked = checking.read_image, []

    def interrupt(path: str) -> np.ndarray:
        asked.append(path)
        if len(asked) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return read(path)

    monkeypatch.setattr(checking, "read_image", interrupt)
    last = error_of(["-d", str(tree), "--num_workers", str(workers)], 130, monkeypatch, capsys)
    assert last == "interrupted" and len(asked) < 7
