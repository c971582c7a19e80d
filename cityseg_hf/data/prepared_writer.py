"""Makes prepared data (``data.prepared``): plans its shards and writes those that are not there yet."""

import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import filelock
import numpy as np
from tqdm import tqdm

from cityseg_hf.data.cityscapes import load_cityscapes, read_size
from cityseg_hf.data.prepared import (
    MANIFEST,
    Manifest,
    Shard,
    Split,
    crc32_of,
    fingerprint_of,
    open_prepared,
    read_manifest,
    stamps_of,
)
from cityseg_hf.data.prepared_shards import GO_ON, Job, Row, Stop, write_shards
from cityseg_hf.data.sources import FileSource
from cityseg_hf.errors import UserError, one_line

SHARD_BYTES = 128 * 2**20
"""Rows are put together until a shard has this size."""

ROW_BYTES = 2048
"""About what Arrow adds to a row."""

UNFINISHED = "prepared.partial.json"
"""The manifest while shards are missing: what another start of the same command goes on from."""

OURS = re.compile(r"\.?(train|val|test|holdout)-\d+\.arrow(\.part)?|\.?prepared(\.partial)?\.json(\.part)?|\.lock")


def prepare(
    root: str,
    folder: Path,
    *,
    size: tuple[int, int] | None = None,
    holdout_cities: list[str] | None = None,
    num_workers: int = 0,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> Manifest | None:
    """Decodes a Cityscapes tree into a folder; shards that are there and whole are kept.

    Args:
        root: what ``load_cityscapes`` takes, as well as ``holdout_cities``.
        folder: where the shards go; made where there is none.
        size: height and width of the images (see ``data.prepared``); ``None``: their own.
        num_workers: processes that decode; 0: this one.
        stop: asked between images; once it says so, what is finished stays and ``None`` is returned.
        say: gets the line about disk space before anything is written.

    Raises:
        UserError: a fault of the data, no space, or a folder that holds something else.
    """
    rows = load_cityscapes(root, holdout_cities=holdout_cities)
    splits = {split: FileSource(found) for split, found in rows.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock", timeout=0):
            draft = Manifest(str(Path(root).absolute()), list(size) if size else None, holdout_cities or [], {})
            known = known_shards(folder, draft)
            jobs, manifest = plan(splits, folder, draft)
            return _finish(folder, manifest, jobs, known, num_workers, stop, say)
    except filelock.Timeout:
        raise UserError(f"another prepare_data.py is writing to {folder}: wait for it") from None
    except Stop:
        return None
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or one_line(error)}; {GO_ON}") from None


def known_shards(folder: Path, draft: Manifest) -> dict[str, Shard]:
    """The shards of an earlier start or of another state of the data, by file name.

    Raises:
        UserError: the folder holds other things, or data prepared in another way.
    """
    strangers = [path.name for path in folder.iterdir() if not OURS.fullmatch(path.name)]
    if strangers:
        raise UserError(f"{folder} holds other files ({min(strangers)}): choose a new or empty folder for --output")
    for name in (UNFINISHED, MANIFEST):
        try:
            before = read_manifest(folder, name)
        except UserError:
            continue  # none, or damaged: everything is made anew
        if (before.size, set(before.holdout_cities)) != (draft.size, set(draft.holdout_cities)):
            raise UserError(
                f"{folder} holds data of another --size or --holdout_cities (made by {before.command(folder)}): "
                "choose another --output, or remove the folder"
            )
        return {shard.file: shard for split in before.splits.values() for shard in split.shards}
    return {}


def plan(sources: dict[str, FileSource], folder: Path, draft: Manifest) -> tuple[dict[str, list[Job]], Manifest]:
    """The shards there will be, by split, and the manifest without them."""
    jobs: dict[str, list[Job]] = {}
    splits, target = {}, tuple(draft.size) if draft.size else None
    for split, source in sources.items():
        stamps = stamps_of(source, split)
        splits[split] = Split(source.names, stamps, source.has_labels(), [])
        # Nothing reads the images of a test split without labels: its names are enough.
        read = len(source) if split != "test" or splits[split].has_labels else 0
        with ThreadPoolExecutor() as pool:
            sizes = list(pool.map(read_size, source.image_paths[:read]))
        jobs[split] = _shards_of(split, source, stamps, sizes, target, folder)
    return jobs, replace(draft, splits=splits)


def _shards_of(
    split: str,
    source: FileSource,
    stamps: list[list[str]],
    sizes: list[tuple[int, int]],
    target: tuple[int, int] | None,
    folder: Path,
) -> list[Job]:
    rows = [Row(*row) for row in zip(source.names, source.cities, source.image_paths, source.label_paths, strict=True)]
    costs = [
        row_bytes(size, target, split == "train", bool(row_stamps[2]))
        for size, row_stamps in zip(sizes, stamps, strict=False)
    ]
    jobs = []
    for number, chosen in enumerate(_cut(costs)):
        of_rows = [(rows[index].name, rows[index].city, stamps[index]) for index in chosen]
        jobs.append(
            Job(
                path=folder / f"{split}-{number:05d}.arrow",
                rows=[rows[index] for index in chosen],
                size=target,
                train=split == "train",
                fingerprint=fingerprint_of(target, split, of_rows),
                bytes=sum(costs[index] for index in chosen),
            )
        )
    return jobs


def row_bytes(own: tuple[int, int], target: tuple[int, int] | None, train: bool, instances: bool) -> int:
    """What a row takes on the disk: three bytes for a pixel, one for its label, two for its instance."""
    image = np.prod(target or own)
    label = image if train else np.prod(own)
    return int(3 * image + label * (3 if instances else 1)) + ROW_BYTES


def _cut(costs: list[int]) -> Iterator[range]:
    """Runs of rows of at most ``SHARD_BYTES``, or of one row."""
    start, total = 0, 0
    for index, cost in enumerate(costs):
        if index > start and total + cost > SHARD_BYTES:
            yield range(start, index)
            start, total = index, 0
        total += cost
    if costs:
        yield range(start, len(costs))


def _finish(
    folder: Path,
    manifest: Manifest,
    jobs: dict[str, list[Job]],
    known: dict[str, Shard],
    num_workers: int,
    stop: Callable[[], bool],
    say: Callable[[str], None],
) -> Manifest:
    """Writes the missing shards, then the manifest."""
    every = [job for found in jobs.values() for job in found]
    done = _kept(every, known, stop)
    missing = [job for job in every if job.path.name not in done]
    _check_space(folder, every, missing, say)

    def with_shards() -> Manifest:
        splits = {
            split: replace(record, shards=[done[job.path.name] for job in jobs[split] if job.path.name in done])
            for split, record in manifest.splits.items()
        }
        return replace(manifest, splits=splits)

    if missing:
        # From here to the end the folder is none to read from.
        _replace(folder / UNFINISHED, with_shards().to_json())
        (folder / MANIFEST).unlink(missing_ok=True)
        _remove_all_but(folder, {*done, UNFINISHED})
    count, images = sum(shard.rows for shard in done.values()), sum(len(job.rows) for job in every)
    try:
        with tqdm(total=images, initial=count, desc="prepare", unit="image", disable=not missing) as bar:
            for shard in write_shards(missing, num_workers, stop):
                done[shard.file] = shard
                _replace(folder / UNFINISHED, with_shards().to_json())
                bar.update(shard.rows)
    finally:
        for part in folder.glob(".*.part"):
            part.unlink(missing_ok=True)
    _replace(folder / MANIFEST, with_shards().to_json())
    _remove_all_but(folder, {*done, MANIFEST})
    return with_shards()


def _kept(jobs: list[Job], known: dict[str, Shard], stop: Callable[[], bool]) -> dict[str, Shard]:
    """The shards of these jobs that are on the disk as they were written."""

    def is_whole(job: Job) -> bool:
        shard = known.get(job.path.name)
        if shard is None or shard.fingerprint != job.fingerprint or not job.path.is_file():
            return False
        if stop():
            raise Stop
        return job.path.stat().st_size == shard.bytes and crc32_of(job.path) == shard.crc32

    with ThreadPoolExecutor(4) as pool:  # checksums leave Python's lock alone
        return {
            job.path.name: known[job.path.name]
            for job, whole in zip(jobs, pool.map(is_whole, jobs), strict=True)
            if whole
        }


def _check_space(folder: Path, every: list[Job], missing: list[Job], say: Callable[[str], None]) -> None:
    need = sum(job.bytes for job in missing)
    # What lies there under the name of a missing shard makes room for it.
    free = shutil.disk_usage(folder).free + sum(job.path.stat().st_size for job in missing if job.path.is_file())
    images, total = sum(len(job.rows) for job in every), sum(job.bytes for job in every)
    there = len(every) - len(missing)
    say(
        f"{images} images take {readable(total)} in {folder} ({len(every)} shards, {there} of them there already); "
        f"{readable(need)} to write, {readable(free)} free"
    )
    if need > free:
        raise UserError(
            f"{readable(need)} do not fit into {folder}, which has {readable(free)} free: "
            "choose another --output or a smaller --size"
        )


def readable(count: int) -> str:
    """Bytes in words: ``7.3 GB``."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _remove_all_but(folder: Path, names: set[str]) -> None:
    for path in folder.iterdir():
        if OURS.fullmatch(path.name) and path.name not in {*names, ".lock"}:
            path.unlink(missing_ok=True)


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def verify(folder: Path) -> Manifest:
    """Compares every shard with its checksum.

    Raises:
        UserError: it names the first that is not as it was written, and the mend.
    """
    opened = open_prepared(folder)
    shards = [shard for split in opened.manifest.splits.values() for shard in split.shards]
    with ThreadPoolExecutor(4) as pool:  # checksums leave Python's lock alone
        found = pool.map(lambda shard: crc32_of(folder / shard.file), shards)
        for shard, checksum in zip(shards, tqdm(found, total=len(shards), desc="verify", unit="shard"), strict=True):
            if checksum != shard.crc32:
                raise UserError(
                    f"{folder / shard.file} is not as it was written (another checksum): "
                    f"run {opened.manifest.command(folder)}"
                )
    return opened.manifest
