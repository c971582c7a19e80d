"""Reads a whole Cityscapes tree and finds every fault there is, in the words in which the loader would meet it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from cityseg_hf import labels
from cityseg_hf.data.cityscapes import (
    Fault,
    Tree,
    find_tree,
    instance_path,
    read_image,
    read_instances,
    read_label,
    read_size,
    require_same_size,
)
from cityseg_hf.data.files import read_bytes
from cityseg_hf.errors import UserError, one_line

JUDGED = ("train", "val")
"""Splits whose labels must say something; those of the official test split are void."""


@dataclass(frozen=True)
class Report:
    """What was read, and what is wrong with it."""

    images: dict[str, int]
    """How many there are, by split; only splits that have some."""
    faults: list[Fault]


class Pair(NamedTuple):
    """Files to read: an image and its label, or one of them alone."""

    split: str
    image: str | None
    label: str | None
    name: str = ""


class Found(NamedTuple):
    """What reading a pair gave."""

    faults: list[Fault]
    digest: bytes | None
    """Of the image's file; ``None`` where it is no readable image."""


def check_tree(root: str | Path, *, num_workers: int = 0, say: Callable[[str], Any] = print) -> Report:
    """Reads every image, label and instance map of a tree.

    Args:
        root: what ``load_cityscapes`` takes.
        num_workers: threads that decode; 0: this one.
        say: gets the line of each fault as soon as it is found.

    Returns:
        How many images there are and all the faults: first those of names and pairs, then those of the files by split.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    tree = find_tree(root)
    faults = [*tree.faults, *_splits_without_images(tree, root)]
    for fault in faults:
        say(fault.line)
    pairs = [Pair(split, row.image, row.label, row.name) for split, rows in tree.rows.items() for row in rows]
    pairs += [Pair(split, None, label) for split, label in tree.lone_labels]
    first: dict[bytes, Pair] = {}
    with tqdm(total=len(pairs), desc="check", unit="image") as bar:
        for pair, found in zip(pairs, _check_pairs(pairs, num_workers), strict=True):
            for fault in (*found.faults, *_copies(pair, found.digest, first)):
                faults.append(fault)
                say(fault.line)
            bar.update()
    return Report({split: len(rows) for split, rows in tree.rows.items() if rows}, faults)


def _splits_without_images(tree: Tree, root: str | Path) -> Iterator[Fault]:
    """Training needs train and val: where one has labels alone, its images were forgotten."""
    if any(fault.split is None for fault in tree.faults):
        return  # they may be in an archive that cannot be read
    for split in JUDGED:
        if not tree.rows[split] and any(found == split for found, _ in tree.lone_labels):
            line = f"{root} has labels of {split}, but no images: expected leftImg8bit/{split} or its zip beside them"
            yield Fault(str(root), split, line)


def _copies(pair: Pair, digest: bytes | None, first: dict[bytes, Pair]) -> Iterator[Fault]:
    """The image of a pair, if an earlier split has the same under another name; ``first`` learns those of this one."""
    if digest is None:
        return
    twin = first.setdefault(digest, pair)
    # The same name in two splits has been told already.
    if twin.split != pair.split and twin.name != pair.name:
        line = f"{pair.image} is the same image as {twin.image} of {twin.split}: an image belongs to one split"
        yield Fault(pair.image, pair.split, f"{line}, remove one of them")


def _check_pairs(pairs: Iterable[Pair], num_workers: int) -> Iterator[Found]:
    """``check_pair`` of each, in their order."""
    if num_workers == 0:
        yield from map(check_pair, pairs)
        return
    # Threads: decoding leaves Python's lock alone, and there is nothing to start, to kill or to send.
    pool = ThreadPoolExecutor(num_workers)
    try:
        yield from pool.map(check_pair, pairs)
    finally:
        # After Ctrl-C only what is being read is waited for.
        pool.shutdown(cancel_futures=True)


def check_pair(pair: Pair) -> Found:
    """Reads the files of a pair and the instance map, each by the function that the loader reads it with.

    Returns:
        Every fault of theirs; nothing is raised, whatever the files hold.
    """
    split, image_path, label_path, _ = pair
    faults: list[Fault] = []

    def attempt(read: Callable[..., Any], path: str | None, *more: Any) -> Any:
        """What ``read`` gives for the file; ``None`` where there is none, or where it has a fault, which is noted."""
        if path is None:
            return None
        try:
            return read(path, *more)
        except UserError as error:
            line = str(error)
        except Exception as error:  # whatever a library makes of bytes that nobody thought of: it names no file
            line = f"{path} cannot be read ({type(error).__name__}: {one_line(error)}): download it again"
        faults.append(Fault(path, split, line))

    image, label = attempt(read_image, image_path), attempt(read_label, label_path)
    label_size = _size(label_path, label)
    if image_path and label_path and (image_size := _size(image_path, image)) and label_size:
        attempt(require_same_size, label_path, label_size, image_path, image_size)
    if label is not None and split in JUDGED and (label == labels.IGNORE).all():
        line = f"{label_path} is void in every pixel, so nothing is learnt or judged by it: remove the pair"
        faults.append(Fault(label_path, split, line))
    attempt(read_instances, attempt(instance_path, label_path), label_size)
    return Found(faults, None if image is None else attempt(_digest, image_path))


def _size(path: str | None, decoded: np.ndarray | None) -> tuple[int, int] | None:
    """Height and width of a file, of a faulty one by its header; ``None`` where nothing says it."""
    if decoded is not None:
        return decoded.shape[:2]
    try:
        return None if path is None else read_size(path)
    except Exception:  # its fault is known
        return None


def _digest(path: str) -> bytes:
    return hashlib.blake2b(read_bytes(path), digest_size=16).digest()
