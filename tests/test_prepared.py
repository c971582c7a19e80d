"""Prepared data: the same samples and scores as the files it was made from, and no trust in what is not whole."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import REPO, TINY_UNET, load_script
from test_data import assert_one_line, assert_same_batches, noise, pack, write_pair

from cityseg_hf import load_cityscapes
from cityseg_hf.config import DataConfig
from cityseg_hf.data import prepared_writer
from cityseg_hf.data.augment import TrainTransform
from cityseg_hf.data.loading import EvalBatches, SegmentationDataset, TrainBatches, make_loader, raise_errors
from cityseg_hf.data.prepared import PreparedSource, open_prepared
from cityseg_hf.data.prepared_writer import prepare, verify
from cityseg_hf.data.sources import FileSource, Source
from cityseg_hf.data.transforms import EvalTransform
from cityseg_hf.errors import UserError
from cityseg_hf.labels import IGNORE
from cityseg_hf.runs import fingerprint

SIZE, SMALL = (64, 128), (48, 80)
RunTrain = Callable[..., Path]


@pytest.fixture(scope="module")
def whole(streets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The streets at their own size."""
    folder = tmp_path_factory.mktemp("prepared") / "whole"
    prepare(str(streets), folder)
    return folder


@pytest.fixture(scope="module")
def small(streets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The streets at 48x80."""
    folder = tmp_path_factory.mktemp("prepared") / "small"
    prepare(str(streets), folder, size=SMALL)
    return folder


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of about four streets of 48x80."""
    monkeypatch.setattr(prepared_writer, "SHARD_BYTES", 75_000)


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """A folder of its own to damage."""
    return Path(shutil.copytree(small, tmp_path / "copy"))


def files_of(root: Path, split: str) -> FileSource:
    return FileSource(load_cityscapes(root)[split])


def batches_of(source: Source, config: DataConfig, size: tuple[int, int], workers: int) -> list[dict]:
    """Two epochs of training batches."""
    dataset = SegmentationDataset(source, TrainTransform(config, size), seed=3)
    batches = TrainBatches(len(dataset), batch_size=4, last_step=6)
    return list(raise_errors(make_loader(dataset, batches, num_workers=workers)))


def judged(source: Source, size: tuple[int, int], workers: int = 0) -> list[dict]:
    """What an evaluation reads."""
    dataset = SegmentationDataset(source, EvalTransform(size), instances=True)
    return list(raise_errors(make_loader(dataset, EvalBatches(len(dataset), batch_size=2), num_workers=workers)))


def assert_same_splits(folder: Path, root: Path, size: tuple[int, int]) -> None:
    """Training and evaluation read the same from both."""
    sources = open_prepared(folder).sources
    files = {split: FileSource(rows) for split, rows in load_cityscapes(root).items()}
    assert list(sources) == list(files) and fingerprint(sources) == fingerprint(files)
    for split, source in sources.items():
        assert source.names == files[split].names and source.has_labels() == files[split].has_labels()
        if split == "train":
            config = DataConfig(augmentation="flip")
            assert_same_batches(batches_of(source, config, size, 0), batches_of(files[split], config, size, 0))
        elif source.has_labels():
            assert_same_batches(judged(source, size), judged(files[split], size))
        if source.has_labels():
            assert torch.equal(source.count_classes(), files[split].count_classes())


# --- the same samples


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("augmentation", ["none", "flip", "original", "standard"])
def test_training_batches_are_the_same_bits(
    augmentation: str, workers: int, streets: Path, whole: Path, small: Path
) -> None:
    config = DataConfig(augmentation=augmentation)
    for folder in (whole, small):
        ours = batches_of(open_prepared(folder).sources["train"], config, SMALL, workers)
        assert_same_batches(ours, batches_of(files_of(streets, "train"), config, SMALL, 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_reads_the_same_bits(workers: int, streets: Path, whole: Path, small: Path) -> None:
    for folder in (whole, small):
        for split in ("val", "test"):
            ours = judged(open_prepared(folder).sources[split], SMALL, workers)
            assert ours[0]["labels"].shape[-2:] == SIZE and ours[0]["instances"][0].dtype == torch.int32
            assert_same_batches(ours, judged(files_of(streets, split), SMALL))


def test_zips_are_prepared_like_the_tree(streets: Path, small: Path, tmp_path: Path) -> None:
    zips = pack(streets, tmp_path / "zips")
    prepare(str(zips), tmp_path / "out", size=SMALL)
    for shard in small.glob("*.arrow"):
        # The head of a file says what it was made from.
        theirs = datasets.Dataset.from_file(str(tmp_path / "out" / shard.name))
        assert datasets.Dataset.from_file(str(shard)).to_list() == theirs.to_list()
    open_prepared(tmp_path / "out").check_source(str(zips), "nowhere")


@pytest.mark.parametrize("size", [None, (40, 56)])
def test_images_of_any_size(size: tuple[int, int] | None, tmp_path: Path) -> None:
    """Odd sizes, several in a split, and images without instance maps."""
    for split, city in (("train", "ulm"), ("val", "bonn")):
        for index, own in enumerate([(31, 47), (64, 33), (40, 56), (1, 1), (57, 90)]):
            write_pair(tmp_path / "data", split, f"{city}_{index}_0", *noise(own, index))
    prepare(str(tmp_path / "data"), tmp_path / "out", size=size)
    assert_same_splits(tmp_path / "out", tmp_path / "data", (40, 56))


@pytest.mark.parametrize("void", [True, False])
def test_a_test_split_without_labels_is_kept_by_name(void: bool, tmp_path: Path) -> None:
    for split, city in (("train", "ulm"), ("val", "bonn")):
        write_pair(tmp_path / "data", split, f"{city}_0_0", *noise(SIZE))
    for index in range(3):
        label = np.zeros(SIZE, np.uint8) if void else None
        write_pair(tmp_path / "data", "test", f"berlin_{index}_0", noise(SIZE)[0], label)
    prepare(str(tmp_path / "data"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("test-*"))
    assert_same_splits(tmp_path / "out", tmp_path / "data", SIZE)
    with pytest.raises(UserError, match="by name only"):
        open_prepared(tmp_path / "out").sources["test"].read(0)


def test_training_labels_of_void_are_kept(tmp_path: Path) -> None:
    """Unlike a test split's: nobody says that all of them are."""
    for split, city in (("train", "ulm"), ("val", "bonn")):
        write_pair(tmp_path / "data", split, f"{city}_0_0", noise(SIZE)[0], np.zeros(SIZE, np.uint8))
    prepare(str(tmp_path / "data"), tmp_path / "out")
    assert (open_prepared(tmp_path / "out").sources["train"].read(0)[1] == IGNORE).all()


def test_pixels_are_views_of_the_file_and_cannot_be_written(whole: Path) -> None:
    """So that a crop reads its own rows and nobody changes the data for the others."""
    source = open_prepared(whole).sources["train"]
    for first, second in zip(source.read(3), source.read(3), strict=True):
        assert np.shares_memory(first, second) and not first.flags.writeable and not first.flags.owndata
        with pytest.raises(ValueError, match="WRITEABLE"):
            first.setflags(write=True)
    assert not np.shares_memory(source.read(3)[0], source.read(4)[0])
    start, maps = source.read(3)[0].ctypes.data, Path("/proc/self/maps")
    if maps.is_file():
        spans = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(whole) in line]
        assert any(int(low, 16) <= start < int(high, 16) for low, high in spans)


def test_reading_gives_no_warning(whole: Path) -> None:
    """torch warns of tensors over memory that must not be written."""
    sources = open_prepared(whole).sources
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for augmentation in ("none", "standard"):
            batches_of(sources["train"], DataConfig(augmentation=augmentation), SIZE, 0)
        judged(sources["val"], SIZE)


def test_a_source_travels_to_another_process_without_its_maps(whole: Path) -> None:
    source = open_prepared(whole).sources["val"]
    source.read(0)
    sent = pickle.dumps(source)
    assert len(sent) < 10_000
    assert np.array_equal(pickle.loads(sent).read(4)[0], source.read(4)[0])


def test_shards_are_files_of_datasets(small: Path) -> None:
    row = datasets.Dataset.from_file(str(small / "val-00000.arrow"))[0]
    assert len(row["image"]) == 3 * 48 * 80 and len(row["instances"]) == 2 * 64 * 128
    assert (row["height"], row["width"], row["label_height"], row["label_width"]) == (*SMALL, *SIZE)


# --- making


def test_processes_do_not_change_a_shard_and_tell_of_a_broken_image(
    streets: Path, tmp_path: Path, few_rows: None
) -> None:
    root = Path(shutil.copytree(streets, tmp_path / "streets"))
    broken = sorted(root.glob("leftImg8bit/val/*/*.png"))[2]
    content, times = broken.read_bytes(), broken.stat()
    broken.write_bytes(content[:1000])
    with pytest.raises(UserError) as error:
        prepare(str(root), tmp_path / "out", size=SMALL, num_workers=2)
    assert_one_line(error, broken)
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.arrow")}
    assert written and not (tmp_path / "out" / "prepared.json").exists()
    broken.write_bytes(content)
    os.utime(broken, ns=(times.st_atime_ns, times.st_mtime_ns))
    prepare(str(root), tmp_path / "alone", size=SMALL)
    for name, shard in written.items():
        assert (tmp_path / "alone" / name).read_bytes() == shard


def test_space_is_said_first_and_asked_for(streets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    prepare(str(streets), tmp_path / "out", size=SMALL, say=lines.append)
    real = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.arrow"))
    said = float(lines[0].split(" images take ")[1].split(" MB")[0]) * 1e6
    assert lines[0].startswith("20 images") and "free" in lines[0] and real == pytest.approx(said, rel=0.1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError) as error:
        prepare(str(streets), tmp_path / "full", size=SMALL)
    assert_one_line(error, tmp_path / "full", "do not fit", "--output")
    assert not list((tmp_path / "full").glob("*.arrow*"))


def test_a_full_disk_is_one_line(streets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as error:
        prepare(str(streets), tmp_path / "out", size=SMALL)
    assert_one_line(error, "train-00000.arrow", "No space left on device", "run the same command again")
    assert not list((tmp_path / "out").glob("*.arrow*")) and not list((tmp_path / "out").glob(".*.part"))


def test_a_cut_start_goes_on(streets: Path, small: Path, tmp_path: Path, few_rows: None) -> None:
    folder, asked = tmp_path / "out", []

    def stop() -> bool:
        asked.append(True)
        return len(asked) > 6

    assert prepare(str(streets), folder, size=SMALL, stop=stop) is None
    first = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    assert len(first) == 1 and not list(folder.glob(".*.part"))
    with pytest.raises(UserError) as error:
        open_prepared(folder)
    assert_one_line(error, folder, "not finished", "scripts/prepare_data.py")
    lines: list[str] = []
    prepare(str(streets), folder, size=SMALL, say=lines.append)
    assert "1 of them there already" in lines[0]
    assert {name: (folder / name).stat().st_mtime_ns for name in first} == first, "finished shards are kept"
    assert len(list(folder.glob("train-*.arrow"))) == 3 and not (folder / "prepared.partial.json").exists()
    assert_same_splits(folder, streets, SMALL)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    prepare(str(streets), folder, size=SMALL)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.arrow")} == times


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_whole_shards(number: int, streets: Path, tmp_path: Path) -> None:
    """Nothing half is left under a final name, and no process."""
    folder = tmp_path / "out"
    # A row takes a while, so that the signal comes in the middle of a shard.
    slow = (
        "import sys, time; from cityseg_hf.data import prepared_shards as shards, prepared_writer as writer\n"
        "writer.SHARD_BYTES, read = 75_000, shards.read_record\n"
        "shards.read_record = lambda *row: (time.sleep(0.2), read(*row))[1]\n"
        f"sys.path.insert(0, {str(REPO / 'scripts')!r}); import prepare_data; from cityseg_hf.cli import exit_with\n"
        "exit_with(prepare_data.main)"
    )
    argv = ["-d", str(streets), "--output", str(folder), "--num_workers", "0", "--size", "48", "80"]
    process = subprocess.Popen([sys.executable, "-c", slow, *argv], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(folder.glob("*.arrow")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == (-9 if number == signal.SIGKILL else 75), errors[-2000:]
    if number != signal.SIGKILL:
        assert "run the same command again" in errors.splitlines()[-1] and not list(folder.glob(".*.part"))
    assert 1 <= len(list(folder.glob("*.arrow"))) < 5 and not (folder / "prepared.json").exists()
    prepare(str(streets), folder, size=SMALL)
    verify(folder)
    assert_same_splits(folder, streets, SMALL)
    assert not list(folder.glob(".*.part"))


def test_other_folders_are_left_alone(streets: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        prepare(str(streets), tmp_path)
    for options in ({"size": SIZE}, {"size": SMALL, "holdout_cities": ["synthburg"]}, {}):
        with pytest.raises(UserError) as error:
            prepare(str(streets), small, **options)
        assert_one_line(error, small, "--size 48 80", "choose another --output")
    verify(small)


def test_flags_of_the_script(streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main = load_script("prepare_data").main
    out = ["--output", str(tmp_path / "out")]
    main(["-d", str(streets), *out, "--size", "48", "80", "--num_workers", "0"])
    main(["--verify", *out])
    assert "is whole: train 12, val 5, test 3; 3 shards" in capsys.readouterr().out
    for argv, message in (
        (["--size", "8", "8"], "--size"),
        (["--num_workers", "-1"], "--num_workers"),
        (["-d", "no"], "no"),
    ):
        with pytest.raises(UserError, match=message):
            main([*out, *argv])


# --- what is not whole


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        open_prepared(tmp_path / "none")
    assert_one_line(error, tmp_path / "none", "scripts/prepare_data.py")
    with pytest.raises(UserError) as error:
        open_prepared(tmp_path)
    assert_one_line(error, tmp_path, "no prepared data", "scripts/prepare_data.py")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 1}', '{"version": 1, "splits": {"train": 3}}'])
def test_a_damaged_manifest(content: str, copy: Path) -> None:
    (copy / "prepared.json").write_text(content)
    with pytest.raises(UserError) as error:
        open_prepared(copy)
    assert_one_line(error, copy / "prepared.json", "damaged", "scripts/prepare_data.py")


def test_another_version(copy: Path) -> None:
    manifest = json.loads((copy / "prepared.json").read_text())
    (copy / "prepared.json").write_text(json.dumps({**manifest, "version": 99, "more": 1}))
    with pytest.raises(UserError, match="99"):
        open_prepared(copy)


@pytest.mark.parametrize("share", [None, 0.0, 0.3, 0.999])
def test_a_truncated_shard_is_mended_by_its_command(share: float | None, streets: Path, copy: Path) -> None:
    shard = copy / "val-00000.arrow"
    content = shard.read_bytes()
    shard.unlink() if share is None else shard.write_bytes(content[: int(share * len(content))])
    for check in (open_prepared, verify):
        with pytest.raises(UserError) as error:
            check(copy)
        assert_one_line(error, shard, f"scripts/prepare_data.py -d {streets} --output {copy} --size 48 80")
    prepare(str(streets), copy, size=SMALL)
    assert shard.read_bytes() == content


def test_a_flipped_byte_is_found_by_verify_and_mended(streets: Path, copy: Path) -> None:
    shard = copy / "train-00000.arrow"
    content = shard.read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 0x10
    shard.write_bytes(damaged)
    with pytest.raises(UserError) as error:
        verify(copy)
    assert_one_line(error, shard, "checksum", "scripts/prepare_data.py")
    others = {path: path.stat().st_mtime_ns for path in copy.glob("*.arrow") if path != shard}
    prepare(str(streets), copy, size=SMALL)
    assert shard.read_bytes() == content
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_no_damage_is_a_traceback(copy: Path) -> None:
    """Any flipped byte gives pixels or one line, whatever Arrow makes of it."""
    shard = copy / "val-00000.arrow"
    content = shard.read_bytes()
    record = open_prepared(copy).manifest
    refused = 0
    # The head, the frame of a row with its pixels' start, and the end.
    places = [*range(0, 4200, 11), *range(len(content) // 5 - 600, len(content) // 5 + 600, 7), len(content) - 3]
    for number, place in enumerate(places):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        # Another file each time: a map of a file that changes is nobody's business.
        shard.unlink()
        shard.write_bytes(damaged)
        source = PreparedSource(copy, record, "val")
        try:
            source.check()
            for index in range(len(source)):
                source.read_instances(index, source.read(index)[1].shape)
        except UserError as error:
            refused += 1
            assert str(shard) in str(error) and "\n" not in str(error), number
    assert refused > 10


def test_shards_of_another_make_are_refused(streets: Path, copy: Path, tmp_path: Path) -> None:
    """All of one size: only what they were made from tells them apart."""
    root = Path(shutil.copytree(streets, tmp_path / "streets"))
    prepare(str(root), tmp_path / "other", size=SMALL)
    shutil.copy(tmp_path / "other" / "train-00000.arrow", copy / "train-00000.arrow")
    open_prepared(copy)  # copied with its times: the same files
    label = sorted(root.glob("gtFine/train/*/*labelIds.png"))[0]
    os.utime(label, (1, 1))
    prepare(str(root), tmp_path / "other", size=SMALL)
    shutil.copy(tmp_path / "other" / "train-00000.arrow", copy / "train-00000.arrow")
    with pytest.raises(UserError) as error:
        open_prepared(copy)
    assert_one_line(error, copy / "train-00000.arrow", "is not the file")


# --- what it was made from


@pytest.mark.parametrize("kind", ["leftImg8bit", "gtFine_labelIds", "gtFine_instanceIds"])
@pytest.mark.parametrize("change", ["touched", "longer", "gone"])
def test_a_changed_source_is_refused_and_only_that_is_made_anew(
    change: str, kind: str, streets: Path, tmp_path: Path
) -> None:
    root, folder = Path(shutil.copytree(streets, tmp_path / "streets")), tmp_path / "out"
    prepare(str(root), folder, size=SMALL)
    open_prepared(folder).check_source(str(root), "nowhere")
    path = sorted(root.glob(f"*/val/*/*_{kind}.png"))[1]
    if change == "touched":
        os.utime(path, (1, 1))
    elif change == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    elif kind == "gtFine_instanceIds":
        path.unlink()
    else:
        for file in root.glob(f"*/val/*/{path.name.removesuffix(f'_{kind}.png')}_*"):
            file.unlink()
    with pytest.raises(UserError) as error:
        open_prepared(folder).check_source(str(root), "nowhere")
    name = path.name.removesuffix(f"_{kind}.png") if kind == "gtFine_instanceIds" or change == "gone" else path
    assert_one_line(error, name, f"run scripts/prepare_data.py -d {root} --output {folder} --size 48 80")
    times = {split: (folder / f"{split}-00000.arrow").stat().st_mtime_ns for split in ("train", "val", "test")}
    prepare(str(root), folder, size=SMALL)
    assert {split: (folder / f"{split}-00000.arrow").stat().st_mtime_ns == times[split] for split in times} == {
        "train": True,
        "val": False,
        "test": True,
    }
    open_prepared(folder).check_source(str(root), "nowhere")
    assert_same_splits(folder, root, SMALL)


def test_a_changed_member_of_a_zip_is_refused(streets: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(streets, tmp_path / "streets"))
    prepare(str(pack(root, tmp_path / "zips")), tmp_path / "out", size=SMALL)
    label = sorted(root.glob("gtFine/val/*/*labelIds.png"))[0]
    shutil.copy(sorted(root.glob("gtFine/val/*/*labelIds.png"))[1], label)
    again = pack(root, tmp_path / "again")
    with pytest.raises(UserError) as error:
        open_prepared(tmp_path / "out").check_source(str(again), "nowhere")
    assert_one_line(error, label.name, "has changed")


# --- training and judging


SHORT = (*TINY_UNET, "-e", 2, "-b", 4, "--image_size", *SMALL, "--class_weights", "enet", "-a", "flip")


def finished(run: Path) -> tuple[dict, dict, list[dict]]:
    description = json.loads((run / "run.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {key: value for key, value in line.items() if "seconds" not in key and "per_s" not in key} for line in lines
    ]
    results = json.loads((run / "results.json").read_text())
    return {name: description[name] for name in ("settings", "data_fingerprint", "images")}, results, kept


def test_a_run_from_prepared_data_is_the_same_run(run_train: RunTrain, streets: Path, small: Path) -> None:
    """Class weights, losses, validations and final tests, to the last digit; and one may go on as the other."""
    files = finished(run_train("-d", streets, *SHORT, name="files"))
    shards = finished(run_train("--prepared", small, *SHORT, name="shards"))
    assert shards[0] == files[0] and shards[1] == files[1]
    losses = [[line.get("loss") for line in lines] for lines in (files[2], shards[2])]
    assert losses[0] == losses[1] and any(losses[0])
    # The run of the files is found finished, and is no other run.
    run_train("--prepared", small, "-d", streets, *SHORT, name="files")


def test_the_name_of_a_run_does_not_say_where_it_read(
    streets: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [str(word) for word in (*TINY_UNET, "--max_steps", 1, "-b", 4, "--image_size", *SMALL)]
    assert load_script("train").main([*argv, "-d", str(streets)]) == 0
    assert load_script("train").main([*argv, "--prepared", str(small)]) == 0
    assert len(list((tmp_path / "saved_models").iterdir())) == 1


def test_without_the_download_it_trains_alone(
    run_train: RunTrain, streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """At the prepared size, and not on synthetic streets."""
    root = Path(shutil.copytree(streets, tmp_path / "data"))
    prepare(str(root), tmp_path / "out", size=SMALL)
    shutil.rmtree(root)
    run = run_train("--prepared", tmp_path / "out", *TINY_UNET, "--max_steps", 1, "-b", 4)
    description = json.loads((run / "run.json").read_text())
    assert description["settings"]["image_size"] == list(SMALL)
    assert "SYNTHETIC" not in capsys.readouterr().out


def test_what_it_was_not_prepared_for_is_refused(
    run_train: RunTrain, streets: Path, small: Path, tmp_path: Path
) -> None:
    held = tmp_path / "held"
    prepare(str(streets), held, holdout_cities=["synthburg"])
    for argv, words in (
        (("--prepared", small, "--image_size", 32, 64), ("48x80", "32x64", "--size 32 64")),
        (("--prepared", small, "--holdout_cities", "synthburg"), ("--holdout_cities none", "synthburg")),
        (("--prepared", held), ("--holdout_cities synthburg", "none")),
        (("--prepared", held, "-d", "nowhere", "--holdout_cities", "synthburg"), ("no folder nowhere",)),
        (("--prepared", tmp_path / "none"), ("no folder",)),
        (("--prepared", streets), ("no prepared data",)),
    ):
        with pytest.raises(UserError) as error:
            run_train(*argv, *TINY_UNET, "--max_steps", 1, "-b", 4)
        assert_one_line(error, *words)
    run_train(
        "--prepared", held, "--holdout_cities", "synthburg", *TINY_UNET, "--max_steps", 1, "-b", 4, "-a", "standard"
    )


def test_evaluate_gives_the_same_scores(
    run_train: RunTrain, streets: Path, whole: Path, small: Path, tmp_path: Path
) -> None:
    model = run_train("-d", streets, *TINY_UNET, "--max_steps", 1, "-b", 4, "--image_size", *SMALL) / "last"
    main, scores = load_script("evaluate").main, []
    for where in (["-d", streets], ["--prepared", small], ["--prepared", whole, "-d", streets]):
        main(
            [str(word) for word in ("--model", model, *where, "--output", tmp_path / "scores.json", "--num_workers", 0)]
        )
        scores.append(json.loads((tmp_path / "scores.json").read_text()))
    assert scores[0] == scores[1] == scores[2] and scores[0]["val"]["iiou"] is not None
    for argv, word in ((("--split", "train"), "own size"), (("--split", "holdout"), "--holdout_cities")):
        with pytest.raises(UserError, match=word):
            main([str(word) for word in ("--model", model, "--prepared", small, *argv)])
