"""Where the loader reads images and labels from: the files of the download, or data prepared from them."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import datasets
import numpy as np
import torch
from torch import Tensor

from cityseg_hf import labels
from cityseg_hf.data.cityscapes import instance_path, read_image, read_instances, read_label, read_pair


class Source(Protocol):
    """One split: images and labels by index. A fault of the data is a ``UserError`` that names the file."""

    names: list[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """An image ``uint8[H, W, 3]`` and its train ids ``uint8[H', W']``; either may be read-only."""
        ...

    def read_instances(self, index: int, size: tuple[int, ...]) -> np.ndarray | None:
        """``int32[H', W']``, the instance ids of a label of that size; ``None`` where there are none."""
        ...

    def count_classes(self) -> Tensor:
        """``int64[3, 19]``: the sum of ``class_counts`` over the labels, at their own resolution."""
        ...

    def has_labels(self) -> bool:
        """Whether the split can be judged: the official test split has labels in name only, all of them void."""
        ...

    def image_size(self) -> tuple[int, int]:
        """Height and width of the first image."""
        ...


def class_counts(label: np.ndarray) -> np.ndarray:
    """What a label holds: ``uint8[H, W]`` of train ids -> ``int64[3, 19]``.

    The rows: how many pixels each class has; 1 where that is not 0; and there, how many pixels of any class.
    """
    pixels = np.bincount(label.ravel(), minlength=256)[: labels.NUM_CLASSES]
    has = (pixels > 0).astype(np.int64)
    return np.stack([pixels, has, has * pixels.sum()])


class FileSource:
    """The files as they were downloaded, decoded at every read.

    Args:
        rows: one split of ``load_cityscapes``.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        # Paths only: the rows stay encoded, and workers decode.
        raw = rows.cast_column("image", datasets.Image(decode=False)).cast_column("label", datasets.Image(decode=False))
        self.image_paths: list[str] = [image["path"] for image in raw["image"]]
        self.label_paths: list[str | None] = [label and label["path"] for label in raw["label"]]
        self.names, self.cities = list(rows["name"]), list(rows["city"])

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return read_pair(self.image_paths[index], self.label_paths[index])

    def read_instances(self, index: int, size: tuple[int, ...]) -> np.ndarray | None:
        path = instance_path(self.label_paths[index])
        return None if path is None else read_instances(path, size)

    def count_classes(self) -> Tensor:
        """Reads every label once."""
        with ThreadPoolExecutor() as pool:  # decoding leaves Python's lock alone
            return torch.from_numpy(sum(pool.map(lambda path: class_counts(read_label(path)), self.label_paths)))

    def has_labels(self) -> bool:
        """Reads up to eight labels."""
        return any((read_label(path) != labels.IGNORE).any() for path in self.label_paths[:8] if path)

    def image_size(self) -> tuple[int, int]:
        return read_image(self.image_paths[0]).shape[:2]


def file_sources(rows: datasets.DatasetDict) -> dict[str, Source]:
    """The splits of ``load_cityscapes`` as sources."""
    return {split: FileSource(found) for split, found in rows.items()}


def selection_split(sources: Mapping[str, Source]) -> str:
    """The split that chooses the best model: the held-out cities where there are any, else ``val``."""
    return "holdout" if "holdout" in sources else "val"


def test_split(sources: Mapping[str, Source]) -> str:
    """The split that judges the final models: ``test`` where its labels say something, else ``val``."""
    return "test" if "test" in sources and sources["test"].has_labels() else "val"


def image_size_of(source: Source, default: tuple[int, int] = (512, 1024)) -> tuple[int, int]:
    """``default``, or the size of the split's first image where that has fewer pixels."""
    height, width = source.image_size()
    return (height, width) if height * width < default[0] * default[1] else default
