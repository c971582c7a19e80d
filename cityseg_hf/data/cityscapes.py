"""Cityscapes as it is downloaded -> rows -> arrays.

The unpacked download and its unopened zips are read alike. Every fault of the data is one error that names the file.
"""

import io
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from PIL import Image, UnidentifiedImageError

from cityseg_hf import labels
from cityseg_hf.data.files import UNREADABLE, ZIP_URL, in_zip, open_zip, read_bytes
from cityseg_hf.errors import UserError, one_line

SPLITS = ("train", "val", "test")
DEFAULT_ROOT = "./cityscapes_data"
"""Where the scripts look for the download when nobody says where it lies."""
IMAGE_SUFFIX = "_leftImg8bit.png"
LABEL_SUFFIX = "_gtFine_labelIds.png"
INSTANCE_SUFFIX = "_gtFine_instanceIds.png"
# CITY may hold hyphens and digits, and in other people's data underscores; SEQ and FRAME are digits.
NAME = re.compile(r"(?P<city>.+?)_(?P<seq>\d+)_(?P<frame>\d+)")

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "label": datasets.Image(),
        "city": datasets.Value("string"),
        "name": datasets.Value("string"),
    }
)


class Key(NamedTuple):
    """What an image and its label have in common."""

    split: str
    city: str
    name: str


class Row(NamedTuple):
    """One image: where it lies, where its label lies (``None`` where there is none), and what it is called."""

    image: str
    label: str | None
    city: str
    name: str


class Fault(NamedTuple):
    """A fault of the data: the file that has it, its split (``None`` for an archive), and the line that says it."""

    file: str
    split: str | None
    line: str


class Tree(NamedTuple):
    """What lies under a root, whole or not."""

    rows: dict[str, list[Row]]
    """Every image, by split, with its label where there is one."""
    lone_labels: list[tuple[str, str]]
    """``(split, path)`` of the labels that belong to none of these rows."""
    faults: list[Fault]
    """What is wrong with names and pairs; no image has been read for it."""


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
        UserError: no such tree, the first of the faults that ``find_tree`` lists, a city that is not there.
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
    """Images with their labels, by split, sorted by city and name. See ``load_cityscapes``."""
    rows, _, faults = find_tree(root)
    if faults:
        rest = f" ({len(faults)} faults: scripts/check_data.py -d {root} lists them)" if len(faults) > 1 else ""
        raise UserError(faults[0].line + rest)
    return rows


def find_tree(root: str | Path) -> Tree:
    """Pairs images with labels by their names, and finds every fault that names alone show.

    These are: an unreadable archive, a badly named image, a name that is there twice or in two splits, an image
    without its label (unless the test split has none at all) and a label without its image (unless its split has no
    images at all: not everybody unpacks all of them).

    Raises:
        UserError: there is no such folder, or nothing in it.
    """
    root, faults = Path(root), []
    if not root.is_dir():
        raise UserError(f"no folder {root}: -d takes the folder that holds leftImg8bit/ and gtFine/")
    images = _list_files(root, "leftImg8bit", IMAGE_SUFFIX, faults)
    if not images and not faults:
        raise UserError(
            f"no images in {root}: expected leftImg8bit/{{train,val,test}}/CITY/*{IMAGE_SUFFIX}, "
            "or leftImg8bit_*.zip of the download"
        )
    found_labels = _list_files(root, "gtFine", LABEL_SUFFIX, faults)
    # Where an archive cannot be read, nobody knows what it holds: nothing is missing then.
    complete = all(fault.split is not None for fault in faults)
    label_files: dict[Key, str] = {}
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    spare = []
    for key, label in found_labels:
        if label_files.setdefault(key, label) != label:
            faults.append(_twin(label, key.split, label_files[key], key.split))
            spare.append((key, label))
    for (split, city, name), image in images:
        if NAME.fullmatch(name) is None:
            line = f"{image}: the name must be CITY_SEQ_FRAME{IMAGE_SUFFIX}, with digits for SEQ and FRAME"
            faults.append(Fault(image, split, line))
        rows[split].append(Row(image, label_files.get((split, city, name)), city, name))
    keys = {key for key, _ in images}
    lone = [(key, label) for key, label in label_files.items() if key not in keys]
    faults += _twin_images(rows)
    if complete:
        faults += _missing_labels(rows, root)
        faults += [_missing_image(key, label, root) for key, label in lone if rows[key.split]]
    return Tree(rows, [(key.split, label) for key, label in [*lone, *spare]], faults)


def _twin_images(rows: dict[str, list[Row]]) -> Iterator[Fault]:
    """Images that have the name of an earlier one, in whatever city folder, archive or split."""
    first: dict[str, tuple[str, str]] = {}
    for split, found in rows.items():
        for row in found:
            if (twin := first.setdefault(row.name, (row.image, split))) != (row.image, split):
                yield _twin(row.image, split, *twin)


def _twin(path: str, split: str, first: str, first_split: str) -> Fault:
    if split == first_split:
        return Fault(path, split, f"{path} has the same name as {first}: remove one of them")
    line = f"{path} has the same name as {first} of {first_split}: an image belongs to one split, remove one of them"
    return Fault(path, split, line)


def _missing_labels(rows: dict[str, list[Row]], root: Path) -> Iterator[Fault]:
    """A label for every image, but for a test split that has none at all."""
    for split, found in rows.items():
        missing = [row for row in found if row.label is None]
        if split == "test" and len(missing) == len(found):
            continue
        for row in missing:
            expected = f"gtFine/{split}/{row.city}/{row.name}{LABEL_SUFFIX}"
            yield Fault(row.image, split, f"{row.image} has no label: expected {expected} in {root}")


def _missing_image(key: Key, label: str, root: Path) -> Fault:
    expected = f"leftImg8bit/{key.split}/{key.city}/{key.name}{IMAGE_SUFFIX}"
    return Fault(label, key.split, f"{label} has no image: expected {expected} in {root}")


def _list_files(root: Path, kind: str, suffix: str, faults: list[Fault]) -> list[tuple[Key, str]]:
    """Every file of a kind and its path, sorted; the unpacked folder wins over a zip that lies beside it.

    Archives that cannot be read, and what is in its archive twice, are added to ``faults``.
    """
    if (root / kind).is_dir():
        return sorted(
            (Key(split, path.parent.name, path.name.removesuffix(suffix)), str(path))
            for split in SPLITS
            for path in (root / kind / split).glob(f"*/*{suffix}")
        )
    found = {}
    for archive in sorted(root.glob(f"{kind}*.zip")):
        try:
            inner_paths = open_zip(str(archive)).namelist()
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            line = f"{archive} is no readable zip ({error}): download it again"
            faults.append(Fault(str(archive), None, line))
            continue
        for inner in inner_paths:
            parts = inner.split("/")[-4:]
            if inner.endswith(suffix) and len(parts) == 4 and parts[0] == kind and parts[1] in SPLITS:
                url = ZIP_URL.format(inner=inner, archive=archive)
                if url in found:
                    faults.append(Fault(url, parts[1], f"{url} is in its archive twice: download it again"))
                found[url] = Key(parts[1], parts[2], parts[3].removesuffix(suffix))
    return sorted((key, url) for url, key in found.items())


NO_IMAGE = (*UNREADABLE, SyntaxError, ValueError, IndexError, struct.error, Image.DecompressionBombError)
"""A broken image shows itself in these ways as well."""


def read_size(path: str) -> tuple[int, int]:
    """Height and width of an image, from its header alone.

    Raises:
        UserError: it cannot be read.
    """
    try:
        packed = in_zip(path)
        with Path(path).open("rb") if packed is None else packed[0].open(packed[1]) as file, Image.open(file) as image:
            return image.height, image.width
    except NO_IMAGE as error:
        raise _broken(path, error) from None


def _broken(path: str, error: Exception) -> UserError:
    # Pillow's own words for this name an address in memory.
    reason = "not a PNG, or its header is damaged" if isinstance(error, UnidentifiedImageError) else one_line(error)
    return UserError(f"{path} is no readable image ({reason}): download it again")


def _decode(path: str, modes: tuple[str, ...], what: str, depth: int | None = None) -> Image.Image:
    content = read_bytes(path)
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except NO_IMAGE as error:
        raise _broken(path, error) from None
    if image.mode not in modes:
        raise UserError(f"{path} has mode {image.mode}, but {what} must have mode {' or '.join(modes)}")
    # Byte 24 of a PNG is its depth: Pillow stretches the values of 2 and 4 bits to 8.
    if depth is not None and image.format == "PNG" and content[24] != depth:
        raise UserError(f"{path} is {content[24]} bits deep, but {what} must be {depth} bits deep")
    return image


def read_image(path: str) -> np.ndarray:
    """Decodes an image.

    Returns:
        ``uint8[H, W, 3]``, RGB.

    Raises:
        UserError: the file is missing, broken, or no colour image.
    """
    image = _decode(path, ("RGB", "RGBA", "L", "P"), "an image")
    image.info.pop("transparency", None)  # not asked for, and where it is damaged Pillow stumbles over it
    return np.asarray(image.convert("RGB"))


def read_label(path: str) -> np.ndarray:
    """Decodes a ``labelIds`` PNG and maps it to train ids by one look-up table.

    Returns:
        ``uint8[H, W]``: train ids 0..18, and ``labels.IGNORE`` for the void classes.

    Raises:
        UserError: the file is missing or broken, is no grey map of 8 bits, or holds values that are no labelId.
    """
    label_ids = np.asarray(_decode(path, ("L",), "a labelIds map", depth=8))
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
    require_same_size(label_path, label.shape, image_path, image.shape[:2])
    return image, label


def require_same_size(
    label_path: str, label_size: tuple[int, int], image_path: str, image_size: tuple[int, int]
) -> None:
    """Refuses a label whose height and width are not those of its image.

    Raises:
        UserError: their sizes differ.
    """
    if image_size != label_size:
        raise UserError(
            f"{label_path} is {label_size[0]}x{label_size[1]}, but its image {image_path} is "
            f"{image_size[0]}x{image_size[1]}"
        )


def instance_path(label_path: str) -> str | None:
    """Where the ``instanceIds`` PNG of a label lies, or ``None`` where there is none."""
    path = label_path.replace(LABEL_SUFFIX, INSTANCE_SUFFIX)
    packed = in_zip(path)
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
