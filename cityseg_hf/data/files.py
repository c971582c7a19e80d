"""A file of the download, in its folder or in a zip that stays packed: how it is opened, read and told from others."""

import functools
import os
import zipfile
import zlib
from pathlib import Path

from cityseg_hf.errors import UserError, one_line

ZIP_URL = "zip://{inner}::{archive}"

UNREADABLE = (OSError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)
"""A missing file, a damaged file and a damaged archive show themselves in all of these ways."""


def open_zip(archive: str) -> zipfile.ZipFile:
    """The archive, opened once in each process; raises what ``UNREADABLE`` lists."""
    # A worker forked with an open archive would share its file position with its siblings: one for each process.
    return _open_zip_in(archive, os.getpid())


@functools.lru_cache(maxsize=8)
def _open_zip_in(archive: str, process: int) -> zipfile.ZipFile:
    # Opening reads the directory of 10,000 entries: once, not for every image.
    return zipfile.ZipFile(archive)


def in_zip(path: str) -> tuple[zipfile.ZipFile, str] | None:
    """The opened archive and the member that a ``zip://INNER::ARCHIVE`` names; ``None`` for a plain file."""
    if not path.startswith("zip://"):
        return None
    inner, archive = path.removeprefix("zip://").split("::", 1)
    return open_zip(archive), inner


def read_bytes(path: str) -> bytes:
    """The content of a file, or of a ``zip://INNER::ARCHIVE`` member.

    Raises:
        UserError: it cannot be read.
    """
    try:
        packed = in_zip(path)
        return Path(path).read_bytes() if packed is None else packed[0].read(packed[1])
    except UNREADABLE as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from None


def stamp(path: str) -> str:
    """What tells a file from a changed one without reading it: size and time of change, or size and CRC in a zip.

    Raises:
        UserError: it is not there.
    """
    try:
        packed = in_zip(path)
        if packed is None:
            status = Path(path).stat()
            return f"{status.st_size}:{status.st_mtime_ns}"
        member = packed[0].getinfo(packed[1])
        return f"{member.file_size}:{member.CRC:08x}"
    except UNREADABLE as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    # The path is said already.
    return getattr(error, "strerror", None) or one_line(error)
