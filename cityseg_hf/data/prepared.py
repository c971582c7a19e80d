"""Prepared data: decoded once into memory-mapped Arrow shards of raw pixels, which ``data.prepared_writer`` makes.

A folder holds ``prepared.json``, written last, and shards ``SPLIT-00000.arrow``, each of which
``datasets.Dataset.from_file`` opens. A row of a shard is a record batch of its own, so the pixels of an image are one
run of bytes in the file: a reader gets them as a read-only view, and a crop of it touches its own rows and no others.

Training images and labels have the prepared size. Of every other split only the images do: labels and instances keep
their own size, at which they are judged.
"""

import bisect
import dataclasses
import hashlib
import json
import math
import shlex
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cityseg_hf.config import DataConfig
from cityseg_hf.data.cityscapes import instance_path, load_cityscapes
from cityseg_hf.data.files import stamp
from cityseg_hf.data.sources import FileSource
from cityseg_hf.errors import UserError, one_line
from cityseg_hf.labels import NUM_CLASSES

MANIFEST = "prepared.json"
VERSION = 2

FEATURES = datasets.Features(
    {
        "name": datasets.Value("string"),
        "city": datasets.Value("string"),
        **{side: datasets.Value("int32") for side in ("height", "width", "label_height", "label_width")},
        "image": datasets.Value("binary"),  # uint8[height, width, 3]
        "label": datasets.Value("binary"),  # uint8[label_height, label_width], train ids
        "instances": datasets.Value("binary"),  # uint16[label_height, label_width], or null
    }
)


@dataclass(frozen=True)
class Shard:
    """One file of rows, as it was written."""

    file: str
    rows: int
    bytes: int
    crc32: int
    fingerprint: str
    """Of the files it was made from, the size, and the format: equal ones hold equal rows."""
    classes: list[list[int]]
    """What its labels held at their own resolution, ``[3, 19]``: see ``sources.class_counts``."""


@dataclass(frozen=True)
class Split:
    """The images of a split and what they were made from."""

    names: list[str]
    stamps: list[list[str]]
    """Of each image, its label and its instance map: see ``stamps_of``."""
    has_labels: bool
    shards: list[Shard]
    """None for a test split without labels: nothing would read its images."""


@dataclass(frozen=True)
class Manifest:
    """The content of ``prepared.json``."""

    root: str
    size: list[int] | None
    """Height and width of the images; ``None``: their own."""
    holdout_cities: list[str]
    splits: dict[str, Split]
    version: int = VERSION

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    def command(self, folder: Path) -> str:
        """The command that makes the folder, or mends it."""
        words = ["scripts/prepare_data.py", "-d", self.root, "--output", str(folder)]
        words += ["--size", *map(str, self.size)] if self.size else []
        words += ["--holdout_cities", *self.holdout_cities] if self.holdout_cities else []
        return shlex.join(words)


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        UserError: there is none, it is damaged, or another version wrote it.
    """
    path = folder / name
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: make it with scripts/prepare_data.py --output {folder}")
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {MANIFEST}: it is no prepared data, or not finished; run scripts/prepare_data.py "
            f"--output {folder} (again) to the end"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise UserError(
                f"{path} has version {content['version']}, this program reads {VERSION}: "
                "run scripts/prepare_data.py again"
            )
        splits = {
            name: Split(**{**split, "shards": [Shard(**shard) for shard in split["shards"]]})
            for name, split in content["splits"].items()
        }
        return Manifest(**{**content, "splits": splits})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): run scripts/prepare_data.py again") from None


class PreparedSource:
    """One split of a prepared folder. Every process maps the files for itself, when it first reads them.

    Args:
        folder: the prepared folder.
        manifest: its manifest.
        split: the name of the split.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        self.folder, self.split = folder, split
        self.record, self.mend = manifest.splits[split], f"run {manifest.command(folder)}"
        self.names = self.record.names
        self.starts = [0, *np.cumsum([shard.rows for shard in self.record.shards]).tolist()]
        self._tables: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of the file, read-only: an image ``uint8[H, W, 3]``, its train ids ``uint8[H', W']``."""
        image = self._view(index, "image", np.uint8, ("height", "width"), 3)
        return image, self._view(index, "label", np.uint8, ("label_height", "label_width"))

    def read_instances(self, index: int, size: tuple[int, ...]) -> np.ndarray | None:
        """``int32[H', W']``, a copy; of the size of the label, which was made sure of when it was prepared."""
        table, row = self._find(index)
        if table.column("instances").chunk(row).null_count:
            return None
        return self._view(index, "instances", np.uint16, ("label_height", "label_width")).astype(np.int32)

    def count_classes(self) -> Tensor:
        """From the manifest: the labels were counted when they were decoded."""
        return torch.tensor([shard.classes for shard in self.record.shards]).reshape(-1, 3, NUM_CLASSES).sum(0)

    def has_labels(self) -> bool:
        return self.record.has_labels

    def image_size(self) -> tuple[int, int]:
        return self.read(0)[0].shape[:2]

    def check(self) -> None:
        """Whether each shard is there, whole and this manifest's. Opens all, reads no pixels.

        Raises:
            UserError: one is not.
        """
        for number, shard in enumerate(self.record.shards):
            check_bytes(self.folder, shard, self.mend)
            self._open(number)

    def _find(self, index: int) -> tuple[pa.Table, int]:
        if not self.record.shards:
            raise UserError(f"{self.folder} knows the split {self.split} by name only: it has no labels")
        number = bisect.bisect_right(self.starts, index) - 1
        return self._open(number), index - self.starts[number]

    def _open(self, number: int) -> pa.Table:
        if number not in self._tables:
            shard = self.record.shards[number]
            path = self.folder / shard.file
            try:
                table = datasets.Dataset.from_file(str(path)).data.table
                fingerprint = json.loads(table.schema.metadata[b"huggingface"])["fingerprint"]
                whole = table.num_rows == table.column("image").num_chunks == shard.rows
            # Arrow meets a damaged file with whatever its bytes happen to say.
            except Exception as error:
                raise UserError(f"{path} cannot be read ({one_line(error)}): {self.mend}") from None
            if not whole or fingerprint != shard.fingerprint:
                raise UserError(f"{path} is not the file that {MANIFEST} names: {self.mend}")
            self._tables[number] = table
        return self._tables[number]

    def _view(self, index: int, column: str, dtype: type, sides: tuple[str, str], *channels: int) -> np.ndarray:
        table, row = self._find(index)
        try:
            shape = (*(table.column(side).chunk(row)[0].as_py() for side in sides), *channels)
            # The bytes of the row's only value, in the file.
            pixels = table.column(column).chunk(row).buffers()[2]
            return np.frombuffer(pixels, dtype, count=math.prod(shape)).reshape(shape)
        except (ValueError, TypeError, IndexError, AttributeError, pa.ArrowException) as error:
            path = self.folder / self.record.shards[bisect.bisect_right(self.starts, index) - 1].file
            raise UserError(f"{path} is damaged ({one_line(error)}): {self.mend}") from None


@dataclass(frozen=True)
class Prepared:
    """An opened folder of prepared data; see ``open_prepared``."""

    folder: Path
    manifest: Manifest
    sources: dict[str, PreparedSource]

    def fit(self, data: DataConfig, default_root: str) -> DataConfig:
        """The settings of a run's data with the prepared size and the root filled in.

        Args:
            data: the run's settings.
            default_root: where the download lies when nobody says where.

        Raises:
            UserError: the folder does not give the samples that these settings ask for.
        """
        root = self.check_source(data.base_dataset_path, default_root)
        self.check_holdout(data.holdout_cities or [])
        if data.image_size is not None:
            self.check_size(data.image_size)
        return dataclasses.replace(data, base_dataset_path=root, image_size=data.image_size or self.manifest.size)

    def check_size(self, size: tuple[int, ...] | list[int] | None) -> None:
        """Refuses to give images of a size, ``None`` for their own, that is not the prepared one.

        Raises:
            UserError: it names both.
        """
        ours = self.manifest.size
        if ours is not None and (size is None or list(size) != ours):
            asked, flag = ("their own size", "without --size") if size is None else (f"{size[0]}x{size[1]}", None)
            raise UserError(
                f"{self.folder} holds images at {ours[0]}x{ours[1]}, not at {asked}: "
                f"prepare another folder {flag or f'with --size {size[0]} {size[1]}, or one without'}"
            )

    def check_holdout(self, cities: list[str]) -> None:
        """Refuses other held-out cities than the prepared ones.

        Raises:
            UserError: it names both.
        """
        if set(cities) != set(self.manifest.holdout_cities):
            ours = " ".join(self.manifest.holdout_cities) or "none"
            raise UserError(
                f"{self.folder} is prepared with --holdout_cities {ours}, not {' '.join(cities) or 'none'}: "
                "prepare another folder with those, or ask for the prepared ones"
            )

    def check_source(self, root: str | None, default_root: str) -> str:
        """Compares with the files that the folder was made from, where they are on this disk.

        Args:
            root: where they should lie, or ``None``: where they lay, else ``default_root``, else nowhere.
            default_root: where the download lies when nobody says where.

        Returns:
            The root that the run is named after.

        Raises:
            UserError: an image was added, removed or changed since.
        """
        places = [root] if root is not None else [self.manifest.root, default_root]
        for place in places:
            if root is not None or any(Path(place).glob("leftImg8bit*")):
                self._compare(place)
                return place
        return self.manifest.root

    def _compare(self, root: str) -> None:
        rows = load_cityscapes(root, holdout_cities=self.manifest.holdout_cities)
        mend = f"run {dataclasses.replace(self.manifest, root=root).command(self.folder)}"
        for split in {**rows, **self.manifest.splits}:
            record = self.manifest.splits.get(split, Split([], [], False, []))
            names = list(rows[split]["name"]) if split in rows else []
            if names != record.names:
                other = sorted(set(names) ^ set(record.names)) or names
                raise UserError(f"{root} has other {split} images than {self.folder} (first {other[0]}): {mend}")
            source = FileSource(rows[split])
            for index, (now, before) in enumerate(zip(stamps_of(source, split), record.stamps, strict=True)):
                if now != before:
                    paths = (source.image_paths[index], source.label_paths[index], f"an instance map of {names[index]}")
                    path = next(path for path, *pair in zip(paths, now, before, strict=True) if pair[0] != pair[1])
                    raise UserError(f"{path} has changed since {self.folder} was prepared: {mend}")


def open_prepared(folder: str | Path) -> Prepared:
    """Opens a folder of prepared data and checks that its files are there, whole and of one make.

    Raises:
        UserError: they are not; the line says how to mend it.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    sources = {split: PreparedSource(folder, manifest, split) for split in manifest.splits}
    for source in sources.values():
        source.check()
    return Prepared(folder, manifest, sources)


def stamps_of(source: FileSource, split: str) -> list[list[str]]:
    """Size and time of the files that each image is made of: the image, its label, its instances (not in ``train``).

    Raises:
        UserError: a file has gone.
    """

    def of_row(row: tuple[str, str | None]) -> list[str]:
        image, label = row
        instances = instance_path(label) if label is not None and split != "train" else None
        return ["" if path is None else stamp(path) for path in (image, label, instances)]

    with ThreadPoolExecutor() as pool:  # a file system on the network answers many at once
        return list(pool.map(of_row, zip(source.image_paths, source.label_paths, strict=True)))


def fingerprint_of(*content: Any) -> str:
    """A short hash of anything that is JSON."""
    return hashlib.sha256(json.dumps([VERSION, *content]).encode()).hexdigest()[:16]


def check_bytes(folder: Path, shard: Shard, mend: str) -> None:
    """Refuses a shard that has gone or has another length; reads nothing.

    Raises:
        UserError: it names the file.
    """
    path = folder / shard.file
    try:
        found = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: {mend}") from None
    if found != shard.bytes:
        raise UserError(f"{path} has {found} bytes, {MANIFEST} says {shard.bytes}: {mend}")


def crc32_of(path: Path) -> int:
    """The checksum of a file."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return checksum
