"""Cityscapes as it is downloaded -> rows -> arrays.

The unpacked download and its unopened zips are read alike. Every fault of the data is one error that names the file.
"""

import functools
import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from PIL import Image

from cityseg_hf import labels
from cityseg_hf.errors import UserError

SPLITS = ("train", "val", "test")
DEFAULT_ROOT = "./cityscapes_data"
"""Where the scripts look for the download when nobody says where it lies."""
IMAGE_SUFFIX = "_leftImg8bit.png"
LABEL_SUFFIX = "_gtFine_labelIds.png"
INSTANCE_SUFFIX = "_gtFine_instanceIds.png"
# CITY may hold hyphens and digits, and in other people's data underscores; SEQ and FRAME are digits.
NAME = re.compile(r"(?P<city>.+?)_(?P<seq>\d+)_(?P<frame>\d+)")
ZIP_URL = "zip://{inner}::{archive}"

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "label": datasets.Image(),
        "city": datasets.Value("string"),
        "name": datasets.Value("string"),
    }
)


class Row(NamedTuple):
    """One image: where it lies, where its label lies (``None`` where there is none), and what it is called."""

    image: str
    label: str | None
    city: str
    name: str


def load_cityscapes(root: str | Path, *, holdout_cities: list[str] | None = None) -> datasets.DatasetDict:
    """The rows of a Cityscapes tree; nothing is decoded before a row is read.

    Args:
        root: the folder that holds ``leftImg8bit/`` and ``gtFine/`` with ``{train,val,test}/CITY/``, or the official
            zips (``leftImg8bit_*.zip``, ``gtFine_*.zip``), which stay packed.
        holdout_cities: train cities that become a split ``holdout`` of their own.

    Returns:
        ``train``, ``val`` and ``test`` (and ``holdout``), those that have images, with the columns ``image`` and
        ``label`` (``datasets.Image``; the label's pixels are raw labelIds), ``city`` and ``name``. ``label`` is
        ``None`` throughout where a test split has no labels.

    Raises:
        UserError: no such tree, a badly named file, an image without its label, a city that is not there.
    """
    rows = find_rows(root)
    if holdout_cities:
        cities = {row.city for row in rows["train"]}
        for city in holdout_cities:
            if city not in cities:
                raise UserError(
                    f"--holdout_cities: no train city {city!r} in {root}; there are {', '.join(sorted(cities))}"
                )
        if cities <= set(holdout_cities):
            raise UserError(f"--holdout_cities leaves no city to train on: {root} has only {', '.join(sorted(cities))}")
        rows["holdout"] = [row for row in rows["train"] if row.city in holdout_cities]
        rows["train"] = [row for row in rows["train"] if row.city not in holdout_cities]
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {column: [getattr(row, column) for row in found] for column in Row._fields}, features=FEATURES
            )
            for split, found in rows.items()
            if found
        }
    )


def find_rows(root: str | Path) -> dict[str, list[Row]]:
    """Pairs images with labels, by split, sorted by city and name. See ``load_cityscapes``."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no folder {root}: -d takes the folder that holds leftImg8bit/ and gtFine/")
    images = dict(_list_files(root, "leftImg8bit", IMAGE_SUFFIX))
    if not images:
        raise UserError(
            f"no images in {root}: expected leftImg8bit/{{train,val,test}}/CITY/*{IMAGE_SUFFIX}, "
            "or leftImg8bit_*.zip of the download"
        )
    label_files = dict(_list_files(root, "gtFine", LABEL_SUFFIX))
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for (split, city, name), image in sorted(images.items()):
        if NAME.fullmatch(name) is None:
            raise UserError(f"{image}: the name must be CITY_SEQ_FRAME{IMAGE_SUFFIX}, with digits for SEQ and FRAME")
        rows[split].append(Row(image, label_files.get((split, city, name)), city, name))
    _check_labels(rows, root)
    return rows


def _check_labels(rows: dict[str, list[Row]], root: Path) -> None:
    """A label for every image, but for a test split that has none at all."""
    for split, found in rows.items():
        missing = [row for row in found if row.label is None]
        if missing and not (split == "test" and len(missing) == len(found)):
            row = missing[0]
            raise UserError(
                f"{row.image} has no label: expected gtFine/{split}/{row.city}/{row.name}{LABEL_SUFFIX} in {root}"
                + (f" ({len(missing)} images lack theirs)" if len(missing) > 1 else "")
            )


def _list_files(root: Path, kind: str, suffix: str) -> Iterator[tuple[tuple[str, str, str], str]]:
    """Yields ``((split, city, name), path)``; the unpacked folder wins over a zip that lies beside it."""
    if (root / kind).is_dir():
        for split in SPLITS:
            for path in (root / kind / split).glob(f"*/*{suffix}"):
                yield (split, path.parent.name, path.name.removesuffix(suffix)), str(path)
        return
    for archive in sorted(root.glob(f"{kind}*.zip")):
        try:
            inner_paths = _open_zip(str(archive)).namelist()
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise UserError(f"{archive} is no readable zip ({error}): download it again") from None
        for inner in inner_paths:
            parts = inner.split("/")[-4:]
            if inner.endswith(suffix) and len(parts) == 4 and parts[0] == kind and parts[1] in SPLITS:
                url = ZIP_URL.format(inner=inner, archive=archive)
                yield (parts[1], parts[2], parts[3].removesuffix(suffix)), url


def _open_zip(archive: str) -> zipfile.ZipFile:
    # A worker forked with an open archive would share its file position with its siblings: one for each process.
    return _open_zip_in(archive, os.getpid())


@functools.lru_cache(maxsize=8)
def _open_zip_in(archive: str, process: int) -> zipfile.ZipFile:
    # Opening reads the directory of 10,000 entries: once, not for every image.
    return zipfile.ZipFile(archive)


UNREADABLE = (OSError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)
"""A missing file, a damaged file and a damaged archive show themselves in all of these ways."""

NO_IMAGE = (*UNREADABLE, SyntaxError, ValueError, Image.DecompressionBombError)
"""And a broken image in these as well."""


def _in_zip(path: str) -> tuple[zipfile.ZipFile, str] | None:
    """The opened archive and the member that a ``zip://INNER::ARCHIVE`` names; ``None`` for a plain file."""
    if not path.startswith("zip://"):
        return None
    inner, archive = path.removeprefix("zip://").split("::", 1)
    return _open_zip(archive), inner


def read_bytes(path: str) -> bytes:
    """The content of a file, or of a ``zip://INNER::ARCHIVE`` member.

    Raises:
        UserError: it cannot be read.
    """
    try:
        packed = _in_zip(path)
        return Path(path).read_bytes() if packed is None else packed[0].read(packed[1])
    except UNREADABLE as error:
        raise UserError(f"cannot read {path}: {error}") from None


def stamp(path: str) -> str:
    """What tells a file from a changed one without reading it: size and time of change, or size and CRC in a zip.

    Raises:
        UserError: it is not there.
    """
    try:
        packed = _in_zip(path)
        if packed is None:
            status = Path(path).stat()
            return f"{status.st_size}:{status.st_mtime_ns}"
        member = packed[0].getinfo(packed[1])
        return f"{member.file_size}:{member.CRC:08x}"
    except UNREADABLE as error:
        raise UserError(f"cannot read {path}: {error}") from None


def read_size(path: str) -> tuple[int, int]:
    """Height and width of an image, from its header alone.

    Raises:
        UserError: it cannot be read.
    """
    try:
        packed = _in_zip(path)
        with Path(path).open("rb") if packed is None else packed[0].open(packed[1]) as file, Image.open(file) as image:
            return image.height, image.width
    except NO_IMAGE as error:
        raise _broken(path, error) from None


def _broken(path: str, error: Exception) -> UserError:
    return UserError(f"{path} is no readable image ({error}): download it again")


def _decode(path: str, modes: tuple[str, ...], what: str) -> Image.Image:
    content = read_bytes(path)
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except NO_IMAGE as error:
        raise _broken(path, error) from None
    if image.mode not in modes:
        raise UserError(f"{path} has mode {image.mode}, but {what} must have mode {' or '.join(modes)}")
    return image


def read_image(path: str) -> np.ndarray:
    """Decodes an image.

    Returns:
        ``uint8[H, W, 3]``, RGB.

    Raises:
        UserError: the file is missing, broken, or no colour image.
    """
    return np.asarray(_decode(path, ("RGB", "RGBA", "L", "P"), "an image").convert("RGB"))


def read_label(path: str) -> np.ndarray:
    """Decodes a ``labelIds`` PNG and maps it to train ids by one look-up table.

    Returns:
        ``uint8[H, W]``: train ids 0..18, and ``labels.IGNORE`` for the void classes.

    Raises:
        UserError: the file is missing or broken, is not 8 bits deep, or holds values that are no labelId.
    """
    label_ids = np.asarray(_decode(path, ("L",), "a labelIds map"))
    train_ids = labels.ID_TO_TRAIN_ID[label_ids]
    if (train_ids == labels.ILLEGAL).any():
        illegal = ", ".join(map(str, np.unique(label_ids[train_ids == labels.ILLEGAL])[:5]))
        raise UserError(f"{path} holds {illegal}, which is no Cityscapes labelId (0..33): is it a labelTrainIds map?")
    return train_ids


def read_pair(image_path: str, label_path: str) -> tuple[np.ndarray, np.ndarray]:
    """An image ``uint8[H, W, 3]`` and its label ``uint8[H, W]`` (train ids).

    Raises:
        UserError: either cannot be read, or their sizes differ.
    """
    image, label = read_image(image_path), read_label(label_path)
    if image.shape[:2] != label.shape:
        raise UserError(
            f"{label_path} is {label.shape[0]}x{label.shape[1]}, but its image {image_path} is "
            f"{image.shape[0]}x{image.shape[1]}"
        )
    return image, label


def instance_path(label_path: str) -> str | None:
    """Where the ``instanceIds`` PNG of a label lies, or ``None`` where there is none."""
    path = label_path.replace(LABEL_SUFFIX, INSTANCE_SUFFIX)
    packed = _in_zip(path)
    there = Path(path).is_file() if packed is None else packed[1] in packed[0].NameToInfo
    return path if there else None


def read_instances(path: str, size: tuple[int, ...] | None = None) -> np.ndarray:
    """Decodes an ``instanceIds`` PNG.

    Args:
        path: the file.
        size: height and width of the label it belongs to, which it must have too.

    Returns:
        ``int32[H, W]``: ``labelId * 1000 + k`` for the pixels of instance k, the labelId where there are no instances.

    Raises:
        UserError: it cannot be read, is not 16 bits deep, or has another size than the label.
    """
    instances = np.asarray(_decode(path, ("I;16", "I"), "an instanceIds map")).astype(np.int32)
    if size is not None and instances.shape != size:
        shapes = ["x".join(map(str, shape)) for shape in (instances.shape, size)]
        raise UserError(f"{path} is {shapes[0]}, but its label is {shapes[1]}")
    return instances
