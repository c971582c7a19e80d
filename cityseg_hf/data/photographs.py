"""Anybody's pictures and videos: which files an input names, and their pixels whatever their mode."""

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cityseg_hf.errors import UserError, one_line

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


class Input(NamedTuple):
    """A file to segment."""

    path: Path
    stem: Path
    """What its results are called within a folder: its sub-folder and name, without a suffix where that is enough."""

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(words: Sequence[str], output: Path, own_endings: tuple[str, ...]) -> list[Input]:
    """The images and videos that files, folders and globs name, each once, in that order.

    Names are kept from the folder on, or from what stands before a glob's first wildcard. A file of its own is taken
    for an image whatever its suffix, but for those of videos.

    Args:
        words: paths; what exists is no glob, whatever characters its name has.
        output: where the results go; those of an earlier call are no input.
        own_endings: how their names end.

    Raises:
        UserError: a path that does not exist, a folder or glob without images and videos, two files of one name.
    """
    output, names = output.resolve(), {}
    for word in words:
        files = [(path, base) for path, base in _files(word) if not _is_own(path, output, own_endings)]
        if not files:
            raise UserError(f"--input {word}: no images in it ({', '.join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))})")
        for path, base in files:
            names.setdefault(path.resolve(), (path, path.relative_to(base)))
    first: dict[Path, Path] = {}
    for path, name in names.values():
        if (twin := first.setdefault(name, path)) is not path:
            raise UserError(f"--input: {twin} and {path} have the same name: give the folder that holds both")
    inputs = [Input(path, name) for path, name in names.values()]
    # Photographs of one name in two formats must not overwrite each other.
    shorter = [item._replace(stem=item.stem.with_suffix("")) for item in inputs]
    taken = Counter((item.is_video, item.stem) for item in shorter)
    pairs = zip(inputs, shorter, strict=True)
    return [item if taken[short.is_video, short.stem] > 1 else short for item, short in pairs]


def _is_own(path: Path, output: Path, endings: tuple[str, ...]) -> bool:
    return path.name.endswith(endings) and path.resolve().is_relative_to(output)


def _files(word: str) -> Iterator[tuple[Path, Path]]:
    """Files and the folder from which on their names are kept."""
    source = Path(word)
    if source.is_file():
        yield source, source.parent
        return
    if source.is_dir():
        base, matches = source, [source]
    elif glob.has_magic(word):
        fixed = list(takewhile(lambda part: not glob.has_magic(part), source.parts))
        base = Path(*fixed)
        matches = sorted(base.glob(str(Path(*source.parts[len(fixed) :]))))
    else:
        raise UserError(f"--input {word}: there is no such file or folder")
    for match in matches:
        for path in sorted(match.rglob("*")) if match.is_dir() else [match]:
            if path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES and path.is_file():
                yield path, base


def read_photograph(path: Path) -> np.ndarray:
    """Decodes an image of any mode, turned as its camera says.

    Grey is repeated, 16 bits are scaled to 8, transparency is ignored.

    Returns:
        ``uint8[H, W, 3]``, RGB.

    Raises:
        UserError: it is no image, or its levels have no known range.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # I;16, I;16B; I is how Pillow opens some files of 16 bits
            levels = np.asarray(image).astype(np.float32).clip(0, 65535)
            image = Image.fromarray((levels / 257).round().astype(np.uint8))
        if image.mode == "F":
            raise ValueError("its levels are floating-point numbers, whose range nobody knows")
        image.info.pop("transparency", None)  # not asked for, and where it is damaged Pillow stumbles over it
        return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        raise UserError(f"{path} is no readable image (of a format that Pillow knows)") from None
    except Exception as error:  # whatever Pillow makes of broken bytes: one file of many must not stop the others
        raise UserError(f"{path} is no readable image ({one_line(error)})") from None
