"""Reading Cityscapes as it is downloaded, its faults, and the order and randomness of samples."""

import io
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.labels import labels as official_labels
from PIL import Image
from torch import Tensor

from cityseg_hf import load_cityscapes
from cityseg_hf.config import DataConfig
from cityseg_hf.data.augment import TrainTransform
from cityseg_hf.data.cityscapes import (
    instance_path,
    read_bytes,
    read_image,
    read_instances,
    read_label,
    read_pair,
)
from cityseg_hf.data.loading import (
    EvalBatches,
    SegmentationDataset,
    TrainBatches,
    make_loader,
    raise_errors,
    seeded,
)
from cityseg_hf.data.sources import FileSource, image_size_of
from cityseg_hf.data.transforms import EvalTransform
from cityseg_hf.errors import UserError
from cityseg_hf.labels import IGNORE, LABELS

SIZE = (64, 128)
TRAIN_ID_OF = {label.id: label.trainId for label in official_labels if label.id >= 0}


def write_pair(root: Path, split: str, name: str, image: np.ndarray, label_ids: np.ndarray | None) -> tuple[Path, Path]:
    """Writes an image and its labelIds by their Cityscapes names; returns both paths."""
    city = name.rsplit("_", 2)[0]
    paths = (
        root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png",
        root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png",
    )
    for path, content in zip(paths, (image, label_ids), strict=True):
        if content is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(path)
    return paths


def noise(size: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A random image and a random map of all labelIds."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*size, 3), np.uint8), rng.integers(0, 34, size, np.uint8)


def pack(root: Path, target: Path) -> Path:
    """The tree as the two official zips."""
    target.mkdir()
    for kind in ("leftImg8bit", "gtFine"):
        with zipfile.ZipFile(target / f"{kind}_trainvaltest.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            # The download has these beside the folder.
            archive.writestr("README", "read me")
            archive.writestr("license.txt", "terms")
            for path in sorted((root / kind).rglob("*.png")):
                archive.write(path, path.relative_to(root))
    return target


@pytest.fixture(scope="module")
def zips(streets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The streets as zips."""
    return pack(streets, tmp_path_factory.mktemp("zips") / "packed")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """The files of a tree with one image of 24x32."""
    return write_pair(tmp_path, "train", "ulm_000000_000019", *noise((24, 32)))


def raw_paths(rows: datasets.Dataset) -> list[tuple[str, str]]:
    """Where the images and labels of a split lie."""
    plain = rows.cast_column("image", datasets.Image(decode=False)).cast_column("label", datasets.Image(decode=False))
    return [(row["image"]["path"], row["label"]["path"]) for row in plain]


def read_split(root: Path, split: str) -> FileSource:
    """A split as the loader reads it."""
    return FileSource(load_cityscapes(root)[split])


def assert_one_line(error: pytest.ExceptionInfo[UserError], *words: object) -> None:
    """The message is a single line that holds the words."""
    message = str(error.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


# --- labels


def test_the_label_table_is_the_official_one() -> None:
    official = [label for label in official_labels if label.id >= 0]
    assert [tuple(label) for label in LABELS] == [
        (label.name, label.id, label.trainId, label.category, label.hasInstances, label.color) for label in official
    ]


@pytest.mark.parametrize("size", [(24, 32), (17, 41), (1, 34)])
def test_read_label_maps_every_id_as_the_official_table_says(size: tuple[int, int], tmp_path: Path) -> None:
    label_ids = np.arange(size[0] * size[1], dtype=np.int64).reshape(size) % 34
    _, path = write_pair(tmp_path, "train", "ulm_0_0", noise(size)[0], label_ids.astype(np.uint8))
    expected = [[TRAIN_ID_OF[label_id] for label_id in row] for row in label_ids.tolist()]
    train_ids = read_label(str(path))
    assert train_ids.dtype == np.uint8 and train_ids.tolist() == expected


# --- trees


def test_a_tree_becomes_rows(streets: Path) -> None:
    splits = load_cityscapes(streets)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 12, "val": 5, "test": 3}
    for split, rows in splits.items():
        assert rows.column_names == ["image", "label", "city", "name"]
        assert isinstance(rows.features["image"], datasets.Image) and isinstance(rows.features["label"], datasets.Image)
        files = sorted(
            (streets / "leftImg8bit" / split).glob("*/*.png"), key=lambda path: (path.parent.name, path.name)
        )
        assert rows["city"][:] == [path.parent.name for path in files]
        assert rows["name"][:] == [path.name.removesuffix("_leftImg8bit.png") for path in files]
        for row, path in zip(rows, files, strict=True):
            label_path = streets / "gtFine" / split / row["city"] / f"{row['name']}_gtFine_labelIds.png"
            with Image.open(path) as image, Image.open(label_path) as label:
                assert np.array_equal(np.array(row["image"]), np.array(image))
                # Raw labelIds, as they lie on the disk.
                assert row["label"].mode == "L" and np.array_equal(np.array(row["label"]), np.array(label))
    assert image_size_of(FileSource(splits["train"])) == SIZE and image_size_of(
        FileSource(splits["train"]), (32, 64)
    ) == (32, 64)


def test_labelids_are_all_that_is_needed(streets: Path, tmp_path: Path) -> None:
    """The original read labelTrainIds, which the download does not have."""
    assert not list(streets.rglob("*labelTrainIds*"))
    write_pair(tmp_path, "train", "ulm_0_0", *noise((24, 32)))
    sample = SegmentationDataset(read_split(tmp_path, "train"), EvalTransform((24, 32)), instances=True)[(0, 0)]
    assert sample["instances"] is None and sample["labels"].unique().tolist() == [*range(19), IGNORE]


@pytest.mark.parametrize("size", [(31, 47), (1, 1), (64, 33)])
def test_any_image_size(size: tuple[int, int], tmp_path: Path) -> None:
    image, label_ids = noise(size)
    write_pair(tmp_path, "train", "ulm_0_0", image, label_ids)
    ((image_path, label_path),) = raw_paths(load_cityscapes(tmp_path)["train"])
    found, train_ids = read_pair(image_path, label_path)
    assert np.array_equal(found, image) and train_ids.shape == size


@pytest.mark.parametrize("city", ["neu-ulm", "bad-24-hall", "s21", "st_goar", "x_12_y"])
def test_names_of_cities(city: str, tmp_path: Path) -> None:
    write_pair(tmp_path, "train", f"{city}_000001_000019", *noise((8, 8)))
    row = load_cityscapes(tmp_path)["train"][0]
    assert (row["city"], row["name"]) == (city, f"{city}_000001_000019")


def test_images_of_every_colour_mode_are_rgb(tmp_path: Path) -> None:
    image = noise((8, 8))[0]
    for mode in ("RGB", "RGBA", "L", "P"):
        path = tmp_path / f"{mode}.png"
        converted = Image.fromarray(image).convert(mode)
        converted.save(path)
        assert np.array_equal(read_image(str(path)), np.array(converted.convert("RGB")))


# --- zips


def test_zips_are_read_like_the_tree(streets: Path, zips: Path) -> None:
    unpacked, packed = load_cityscapes(streets), load_cityscapes(zips)
    assert list(unpacked) == list(packed)
    for split in unpacked:
        for ours, theirs in zip(unpacked[split], packed[split], strict=True):
            for column in ("image", "label"):
                assert np.array_equal(np.array(ours[column]), np.array(theirs[column]))
            assert (ours["city"], ours["name"]) == (theirs["city"], theirs["name"])
        for ours, theirs in zip(raw_paths(unpacked[split]), raw_paths(packed[split]), strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(read_pair(*ours), read_pair(*theirs), strict=True))
    assert instance_path(ours[1]) is not None and instance_path(theirs[1]) is not None
    assert np.array_equal(read_instances(instance_path(ours[1])), read_instances(instance_path(theirs[1])))


def test_two_workers_read_the_zips(streets: Path, zips: Path) -> None:
    """The archives are open here before the workers are forked: they must not share a file position."""
    batches = []
    for root, workers in ((streets, 0), (zips, 2)):
        dataset = SegmentationDataset(read_split(root, "train"), EvalTransform(SIZE), instances=True)
        _ = dataset[(0, 0)]
        loader = make_loader(dataset, EvalBatches(len(dataset), batch_size=2), num_workers=workers)
        batches.append(list(raise_errors(loader)))
    assert_same_batches(*batches)


def test_the_folder_wins_over_the_zip_beside_it(streets: Path, tmp_path: Path) -> None:
    root = pack(streets, tmp_path / "both")
    write_pair(root, "train", "ulm_0_0", *noise((8, 8)))
    assert load_cityscapes(root)["train"]["name"][:] == ["ulm_0_0"]


# --- held-out cities


def test_whole_cities_are_held_out(streets: Path) -> None:
    """The original split frames at random: neighbours of training images judged the network."""
    whole = load_cityscapes(streets)
    splits = load_cityscapes(streets, holdout_cities=["synthburg"])
    assert set(splits["holdout"]["city"]) == {"synthburg"} and "synthburg" not in splits["train"]["city"]
    assert sorted([*splits["holdout"]["name"], *splits["train"]["name"]]) == sorted(whole["train"]["name"])
    assert splits["val"]["name"][:] == whole["val"]["name"][:]
    two = load_cityscapes(streets, holdout_cities=["synthburg", "neu-synthen"])
    assert set(two["train"]["city"]) == {"synthstadt"} and set(two["holdout"]["city"]) == {"synthburg", "neu-synthen"}


@pytest.mark.parametrize(
    ("cities", "word"),
    [
        (["atlantis"], "'atlantis'"),
        # A city of val is none of train's.
        (["synthhausen"], "'synthhausen'"),
        (["synthburg", "synthstadt", "neu-synthen"], "no city to train on"),
    ],
)
def test_cities_that_cannot_be_held_out(cities: list[str], word: str, streets: Path) -> None:
    with pytest.raises(UserError) as error:
        load_cityscapes(streets, holdout_cities=cities)
    assert_one_line(error, "--holdout_cities", word, streets)


# --- test splits


def test_a_test_split_of_void_has_no_labels(streets: Path, tmp_path: Path) -> None:
    """As in the download, where test labels are there in name only."""
    for index in range(3):
        void = np.array([[1, 3], [0, 4]], np.uint8).repeat(4, 0).repeat(4, 1)
        write_pair(tmp_path, "test", f"berlin_{index}_0", noise((8, 8))[0], void)
    assert read_split(tmp_path, "test").has_labels() is False
    assert read_split(streets, "test").has_labels() is True


def test_test_images_need_no_labels(tmp_path: Path) -> None:
    write_pair(tmp_path, "train", "ulm_0_0", *noise((8, 8)))
    for index in range(2):
        write_pair(tmp_path, "test", f"berlin_{index}_0", noise((8, 8))[0], None)
    rows = load_cityscapes(tmp_path)["test"]
    assert rows["label"][:] == [None, None] and FileSource(rows).has_labels() is False
    assert np.array(rows[0]["image"]).shape == (8, 8, 3)


# --- faults


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_cityscapes(tmp_path / "none")
    assert_one_line(error, tmp_path / "none", "leftImg8bit")


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_cityscapes(tmp_path)
    assert_one_line(error, tmp_path, "leftImg8bit", "_leftImg8bit.png")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_image_without_its_label(split: str, tmp_path: Path) -> None:
    write_pair(tmp_path, split, "ulm_0_0", *noise((8, 8)))
    image, label = write_pair(tmp_path, split, "ulm_1_0", noise((8, 8))[0], None)
    with pytest.raises(UserError) as error:
        load_cityscapes(tmp_path)
    assert_one_line(error, image, label.relative_to(tmp_path))


def test_a_badly_named_image(tmp_path: Path) -> None:
    image, _ = write_pair(tmp_path, "train", "ulm_one_two", *noise((8, 8)))
    with pytest.raises(UserError) as error:
        load_cityscapes(tmp_path)
    assert_one_line(error, image, "CITY_SEQ_FRAME")


def test_a_zip_that_is_none(tmp_path: Path) -> None:
    archive = tmp_path / "leftImg8bit_trainvaltest.zip"
    archive.write_bytes(b"half a download")
    with pytest.raises(UserError) as error:
        load_cityscapes(tmp_path)
    assert_one_line(error, archive)


def test_a_label_of_another_size(pair: tuple[Path, Path]) -> None:
    image, label = pair
    Image.fromarray(noise((24, 31))[1]).save(label)
    with pytest.raises(UserError) as error:
        read_pair(str(image), str(label))
    assert_one_line(error, image, label, "24x32", "24x31")


@pytest.mark.parametrize("which", [0, 1], ids=["image", "label"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.95])
def test_a_truncated_png(which: int, share: float, pair: tuple[Path, Path]) -> None:
    content = pair[which].read_bytes()
    pair[which].write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError) as error:
        read_pair(*map(str, pair))
    assert_one_line(error, pair[which])


@pytest.mark.parametrize("which", [0, 1], ids=["image", "label"])
def test_a_damaged_png_is_an_error_or_the_same_image(which: int, pair: tuple[Path, Path]) -> None:
    content, whole = pair[which].read_bytes(), read_pair(*map(str, pair))
    for place in range(0, len(content), 17):
        damaged = bytearray(content)
        damaged[place] ^= 0x5A
        pair[which].write_bytes(damaged)
        try:
            found = read_pair(*map(str, pair))
        except UserError as error:
            assert str(pair[which]) in str(error) and "\n" not in str(error)
        else:
            assert np.array_equal(found[which], whole[which])


@pytest.mark.parametrize("which", [0, 1], ids=["image", "label"])
def test_a_file_that_has_gone(which: int, pair: tuple[Path, Path]) -> None:
    pair[which].unlink()
    with pytest.raises(UserError) as error:
        read_pair(*map(str, pair))
    assert_one_line(error, pair[which])


@pytest.mark.parametrize("value", [34, 77, 254, 255])
def test_values_that_are_no_labelid(value: int, pair: tuple[Path, Path]) -> None:
    """77 came out as some class or other where tables were filled for known ids alone."""
    label_ids = noise((24, 32))[1]
    label_ids[3, 5] = value
    Image.fromarray(label_ids).save(pair[1])
    with pytest.raises(UserError) as error:
        read_label(str(pair[1]))
    assert_one_line(error, pair[1], value)


def test_every_illegal_value_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "label.png"
    for value in range(256):
        Image.fromarray(np.full((2, 2), value, np.uint8)).save(path)
        if value in TRAIN_ID_OF:
            assert (read_label(str(path)) == TRAIN_ID_OF[value]).all()
        else:
            with pytest.raises(UserError, match=str(value)):
                read_label(str(path))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "1", "I;16"])
def test_labels_of_another_mode(mode: str, pair: tuple[Path, Path]) -> None:
    label = Image.fromarray(noise((24, 32))[1])
    label = Image.fromarray(np.asarray(label).astype(np.uint16)) if mode == "I;16" else label.convert(mode)
    label.save(pair[1])
    with pytest.raises(UserError) as error:
        read_label(str(pair[1]))
    assert_one_line(error, pair[1], f"mode {mode}")


def test_an_image_of_16_bits(pair: tuple[Path, Path]) -> None:
    Image.fromarray(np.zeros((24, 32), np.uint16)).save(pair[0])
    with pytest.raises(UserError) as error:
        read_image(str(pair[0]))
    assert_one_line(error, pair[0], "I;16")


def test_a_damaged_member_of_a_zip(tmp_path: Path) -> None:
    """One broken byte anywhere: the content as it was, or one error that names the archive."""
    label_ids, archive = np.zeros((64, 64), np.uint8), tmp_path / "gtFine_x.zip"
    label_ids[:, ::3] = 7
    buffer = io.BytesIO()
    Image.fromarray(label_ids).save(buffer, "png")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("gtFine/a.png", buffer.getvalue() * 3)
    content = archive.read_bytes()
    escaped = defaultdict(list)
    for place in range(0, len(content)):
        # Another name each time, since archives stay open.
        damaged_path = tmp_path / f"{place}.zip"
        damaged = bytearray(content)
        damaged[place] ^= 0x5A
        damaged_path.write_bytes(damaged)
        try:
            assert read_bytes(f"zip://gtFine/a.png::{damaged_path}") == buffer.getvalue() * 3
        except UserError as error:
            assert str(damaged_path) in str(error) and "\n" not in str(error)
        except Exception as error:  # whatever a user would see as a traceback
            escaped[type(error).__name__].append(place)
        damaged_path.unlink()
    assert not escaped


def break_file(path: Path) -> None:
    """Cuts a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("suffix", ["leftImg8bit", "gtFine_labelIds", "gtFine_instanceIds"])
def test_a_fault_in_a_worker_arrives_as_one_line(suffix: str, workers: int, streets: Path, tmp_path: Path) -> None:
    root = tmp_path / "broken"
    for kind in ("leftImg8bit", "gtFine"):
        shutil.copytree(streets / kind / "val", root / kind / "val")
    broken = sorted(root.rglob(f"*_{suffix}.png"))[3]
    break_file(broken)
    dataset = SegmentationDataset(read_split(root, "val"), EvalTransform(SIZE), instances=True)
    loader = make_loader(dataset, EvalBatches(len(dataset), batch_size=2), num_workers=workers)
    with pytest.raises(UserError) as error:
        list(raise_errors(loader))
    assert_one_line(error, broken)


def test_workers_end_with_the_program(streets: Path) -> None:
    """They are deaf to Python's own way of ending them: whoever left a loader half read hung at exit."""
    program = f"""
from cityseg_hf import load_cityscapes
from cityseg_hf.data.loading import EvalBatches, SegmentationDataset, make_loader, raise_errors
from cityseg_hf.data.sources import FileSource
from cityseg_hf.data.transforms import EvalTransform

rows = load_cityscapes({str(streets)!r})["val"]
dataset = SegmentationDataset(FileSource(rows), EvalTransform({SIZE}))
held = raise_errors(make_loader(dataset, EvalBatches(len(rows), batch_size=1), num_workers=2))
held = held, next(held), [held]
held[2].append(held)  # a cycle, such as an error and its traceback make: nothing is freed before the end
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_fault_ends_the_workers(streets: Path, tmp_path: Path) -> None:
    """Also while the error is looked at, and its traceback holds on to what it can."""
    root = tmp_path / "broken"
    for kind in ("leftImg8bit", "gtFine"):
        shutil.copytree(streets / kind / "val", root / kind / "val")
    break_file(sorted(root.rglob("*_leftImg8bit.png"))[1])
    dataset = SegmentationDataset(read_split(root, "val"), EvalTransform(SIZE))
    before = set(multiprocessing.active_children())
    with pytest.raises(UserError):
        list(raise_errors(make_loader(dataset, EvalBatches(len(dataset), batch_size=1), num_workers=2)))
    assert set(multiprocessing.active_children()) <= before


def test_an_instance_map_of_another_size(streets: Path, tmp_path: Path) -> None:
    """Found here, by name, and not by the scores that count it."""
    root = tmp_path / "broken"
    for kind in ("leftImg8bit", "gtFine"):
        shutil.copytree(streets / kind / "val", root / kind / "val")
    broken = sorted(root.rglob("*_gtFine_instanceIds.png"))[0]
    Image.fromarray(np.zeros((32, 64), np.uint16)).save(broken)
    dataset = SegmentationDataset(read_split(root, "val"), EvalTransform(SIZE), instances=True)
    with pytest.raises(UserError) as error:
        list(raise_errors(make_loader(dataset, EvalBatches(len(dataset), batch_size=2), num_workers=0)))
    assert_one_line(error, broken)


# --- order


def steps_of(length: int, steps: int, *, batch_size: int, accumulation: int, world: int) -> list[set[tuple[int, int]]]:
    """What all processes together read for each optimiser step."""
    union: list[list[tuple[int, int]]] = [[] for _ in range(steps)]
    for rank in range(world):
        options = {"batch_size": batch_size, "accumulation": accumulation, "rank": rank, "world": world}
        batches = TrainBatches(length, **options, seed=3, last_step=steps)
        assert len(batches) == len(list(batches)) == steps * accumulation
        for number, batch in enumerate(batches):
            assert batch, "no process is left without an image"
            union[number // accumulation] += batch
    assert all(len(set(step)) == len(step) for step in union), "no image twice"
    return [set(step) for step in union]


@pytest.mark.parametrize("length", [24, 29, 5])
def test_steps_do_not_depend_on_processes_and_accumulation(length: int) -> None:
    steps = 3 * max(1, length // 8) + 1
    expected = steps_of(length, steps, batch_size=8, accumulation=1, world=1)
    assert {len(step) for step in expected} == {min(8, length)}
    for world in (1, 2, 4):
        for accumulation in (1, 2):
            if world * accumulation <= length:
                batch_size = 8 // (world * accumulation)
                assert (
                    steps_of(length, steps, batch_size=batch_size, accumulation=accumulation, world=world) == expected
                )


@pytest.mark.parametrize("length", [24, 29])
def test_an_epoch_is_a_permutation_and_no_two_are_alike(length: int) -> None:
    """The original shuffled once, and every epoch had the same order."""
    per_epoch = length // 8
    batches = list(TrainBatches(length, batch_size=8, seed=0, last_step=4 * per_epoch))
    orders = []
    for epoch in range(4):
        keys = [key for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for key in batch]
        assert {key[0] for key in keys} == {epoch}
        orders.append([key[1] for key in keys])
        assert len(set(orders[-1])) == len(orders[-1]) == per_epoch * 8 and set(orders[-1]) <= set(range(length))
    assert len(set(map(tuple, orders))) == 4 and sorted(orders[0]) != orders[0]
    if length == 24:
        assert all(sorted(order) == list(range(24)) for order in orders)
    else:
        # Over the epochs, the left-out tail takes turns.
        assert set().union(*orders) == set(range(length))
    other = list(TrainBatches(length, batch_size=8, seed=1, last_step=per_epoch))
    assert [key[1] for batch in other for key in batch] != orders[0]


def test_a_run_goes_on_with_the_step_it_stopped_at() -> None:
    options = {"batch_size": 2, "accumulation": 2, "rank": 1, "world": 2, "seed": 5}
    whole = list(TrainBatches(21, **options, last_step=9))
    for first in range(10):
        assert list(TrainBatches(21, **options, first_step=first, last_step=9)) == whole[2 * first :]


def test_fewer_images_than_processes() -> None:
    with pytest.raises(UserError) as error:
        TrainBatches(3, batch_size=1, accumulation=2, world=2)
    assert_one_line(error, "3 training images", "2 processes x 2")


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [0, 1, 5, 12])
def test_evaluation_sees_every_image_once(length: int, world: int) -> None:
    seen = []
    for rank in range(world):
        batches = EvalBatches(length, batch_size=2, rank=rank, world=world)
        assert len(batches) == len(list(batches)) and all(1 <= len(batch) <= 2 for batch in batches)
        seen += [key for batch in batches for key in batch]
    assert sorted(seen) == [(0, index) for index in range(length)]


# --- randomness


def make_dataset(streets: Path, augmentation: str, seed: int = 3) -> SegmentationDataset:
    """The training split with an augmentation."""
    config = DataConfig(augmentation=augmentation, crop_size=[48, 64] if augmentation == "standard" else None)
    return SegmentationDataset(read_split(streets, "train"), TrainTransform(config, SIZE), seed=seed)


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal to the last bit, through lists and dictionaries."""
    assert type(ours) is type(theirs)
    if isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    elif isinstance(ours, dict | list):
        assert len(ours) == len(theirs)
        for key in ours if isinstance(ours, dict) else range(len(ours)):
            assert_same(ours[key], theirs[key])
    else:
        assert ours == theirs


def assert_same_batches(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """As ``assert_same``, and there are some."""
    assert ours
    assert_same(ours, theirs)


@pytest.mark.parametrize("augmentation", ["original", "standard"])
def test_a_sample_is_a_function_of_seed_epoch_and_index(augmentation: str, streets: Path) -> None:
    dataset = make_dataset(streets, augmentation)
    sample = dataset[(2, 4)]
    # Another state of every generator there is, and another sample in between.
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    _ = dataset[(0, 1)]
    assert_same(dataset[(2, 4)], sample)
    assert_same(make_dataset(streets, augmentation)[(2, 4)], sample)
    for other in (dataset[(3, 4)], make_dataset(streets, augmentation, seed=4)[(2, 4)]):
        assert not torch.equal(other["augmentation"], sample["augmentation"])


@pytest.mark.parametrize("augmentation", ["original", "standard"])
def test_a_sample_leaves_the_generators_as_they_were(augmentation: str, streets: Path) -> None:
    dataset = make_dataset(streets, augmentation)
    states: list[Callable[[], Any]] = [
        torch.get_rng_state,
        lambda: [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        random.getstate,
    ]
    before = [state() for state in states]
    _ = dataset[(0, 0)]
    assert_same([state() for state in states], before)


def test_seeded_gives_the_generator_back_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(1, 2, 3):
        first = torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(1, 2, 3):
        assert torch.equal(torch.rand(3), first)
    with seeded(1, 3, 2):
        assert not torch.equal(torch.rand(3), first)


@pytest.mark.parametrize("augmentation", ["original", "standard"])
def test_workers_do_not_change_a_sample(augmentation: str, streets: Path) -> None:
    dataset = make_dataset(streets, augmentation)
    batches = [
        list(
            raise_errors(
                make_loader(dataset, TrainBatches(len(dataset), batch_size=4, last_step=5), num_workers=workers)
            )
        )
        for workers in (0, 2)
    ]
    assert_same_batches(*batches)
    assert [key[1:] for batch in batches[0] for key in batch["key"]] == [
        key for batch in TrainBatches(len(dataset), batch_size=4, last_step=5) for key in batch
    ]
    assert batches[0][0]["pixel_values"].shape[0] == 4


class MappedSource(FileSource):
    """Its images and labels are read-only maps of files, as of a prepared split."""

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        maps = []
        for array in super().read(index):
            path = Path(self.image_paths[index]).parent / f"{index}_{array.ndim}.raw"
            array.tofile(path)
            maps.append(np.memmap(path, np.uint8, mode="r", shape=array.shape))
        return maps[0], maps[1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("augmentation", ["none", "standard", None])
def test_samples_of_read_only_maps_are_copies(augmentation: str | None, streets: Path, tmp_path: Path) -> None:
    shutil.copytree(streets, tmp_path / "streets")
    rows = load_cityscapes(tmp_path / "streets")["val"]
    transform = (
        EvalTransform(SIZE) if augmentation is None else TrainTransform(DataConfig(augmentation=augmentation), SIZE)
    )
    mapped, plain = (SegmentationDataset(kind(rows), transform)[(1, 2)] for kind in (MappedSource, FileSource))
    assert_same(mapped, plain)
    assert ("augmentation" in mapped) is (augmentation is not None)
    for name in ("pixel_values", "labels"):
        packed = mapped[name].permute(1, 2, 0) if name == "pixel_values" else mapped[name]
        assert mapped[name].dtype == torch.uint8 and packed.is_contiguous()
        mapped[name].zero_()  # a write to the map would end the process


def test_labels_of_several_sizes_stay_apart(tmp_path: Path) -> None:
    for index, size in enumerate([(24, 32), (17, 41)]):
        write_pair(tmp_path, "val", f"ulm_{index}_0", *noise(size))
    dataset = SegmentationDataset(read_split(tmp_path, "val"), EvalTransform((16, 32)))
    (batch,) = raise_errors(make_loader(dataset, EvalBatches(2, batch_size=2), num_workers=0))
    assert batch["pixel_values"].shape == (2, 3, 16, 32)
    assert [tuple(label.shape) for label in batch["labels"]] == [(24, 32), (17, 41)]


def test_a_signal_while_workers_start_kills_none(streets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes before a worker is deaf waits; the main process gets it once they have started."""
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("main"))
    set_threads = torch.set_num_threads

    def slow_start(count: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # in the worker, before it is deaf
        os.kill(os.getppid(), signal.SIGTERM)
        set_threads(count)

    monkeypatch.setattr(torch, "set_num_threads", slow_start)
    try:
        dataset = make_dataset(streets, "none")
        loader = make_loader(dataset, EvalBatches(len(dataset), batch_size=4), num_workers=2)
        assert sum(len(batch["labels"]) for batch in raise_errors(loader)) == len(dataset)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "main" in seen
