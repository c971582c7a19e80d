"""Procedural street scenes in the layout of Cityscapes: data for whoever has none, and for the tests.

``render_street`` builds one scene and ``make_synthetic`` a tree of them. A scene is a pure function of its seed (in a
tree: of seed, split and index), so neither the number of workers nor that of images changes any of them.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from cityseg_hf.data._street_canvas import Street
from cityseg_hf.data._street_layout import compose

MIN_SIZE = 64
"""Height and width below which a street is no longer one."""

CITIES: dict[str, tuple[str, ...]] = {
    "train": ("synthburg", "synthstadt", "neu-synthen"),
    "val": ("synthhausen", "synth-am-see"),
    "test": ("synthdorf", "altsynthingen"),
}
"""Image ``i`` of a split belongs to city ``i % len(cities)``."""

_FRAME = 19
"""The frame of its sequence that Cityscapes annotates."""


def render_street(size: tuple[int, int], seed: int | Sequence[int]) -> Street:
    """Builds one street scene.

    Args:
        size: height and width in pixels, each at least 64.
        seed: any number or numbers; the last one also chooses the rare guests (a bus, a tram, ...) of the scene, so
            that eight seeds in a row show every class.

    Returns:
        The picture with its label map, instance map and polygons; the same for the same arguments.
    """
    _check_size(size)
    entropy = [seed] if isinstance(seed, int | np.integer) else list(seed)
    return compose(size, np.random.SeedSequence([int(number) for number in entropy]), rotation=int(entropy[-1]) % 8)


def make_synthetic(
    root: str | Path,
    *,
    train: int = 64,
    val: int = 16,
    test: int = 0,
    size: tuple[int, int] = (256, 512),
    seed: int = 0,
    workers: int = 1,
) -> Path:
    """Writes a Cityscapes tree of synthetic streets.

    Args:
        root: gets ``leftImg8bit/SPLIT/CITY/*_leftImg8bit.png`` and, below ``gtFine``, ``*_gtFine_labelIds.png``
            (8 bit), ``*_gtFine_instanceIds.png`` (16 bit) and ``*_gtFine_polygons.json``.
        train: images in that split; likewise ``val`` and ``test``. Files from an earlier call stay or are overwritten.
        size: height and width of every image.
        seed: another one gives other streets.
        workers: processes that render; the files are the same for any number.

    Returns:
        ``root`` as a path.

    Raises:
        ValueError: a size below 64, a negative count or seed, or no worker.
    """
    _check_size(size)
    counts = {"train": train, "val": val, "test": test}
    for name, count in {**counts, "seed": seed}.items():
        if count < 0:
            raise ValueError(f"{name} must not be negative, got {count}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    root = Path(root)
    jobs = [(root, split, index, size, seed) for split, count in counts.items() for index in range(count)]
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            _write_scene(job)
    else:
        # Spawned, not forked: the caller may well have started the threads of torch.
        with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
            for _ in pool.map(_write_scene, jobs, chunksize=4):
                pass
    return root


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < MIN_SIZE:
        raise ValueError(f"size must be a height and a width of at least {MIN_SIZE} pixels, got {tuple(size)}")


def _write_scene(job: tuple[Path, str, int, tuple[int, int], int]) -> None:
    """Renders image ``index`` of a split and writes its four files."""
    root, split, index, size, seed = job
    cities = CITIES[split]
    street = render_street(size, (seed, list(CITIES).index(split), index))
    city = cities[index % len(cities)]
    stem = f"{city}_{index // len(cities):06d}_{_FRAME:06d}"
    image_dir, label_dir = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
    for folder in (image_dir, label_dir):
        folder.mkdir(parents=True, exist_ok=True)
    # Camera noise hardly compresses: a higher level would cost time and save nothing.
    Image.fromarray(street.image).save(image_dir / f"{stem}_leftImg8bit.png", compress_level=1)
    Image.fromarray(street.label_ids).save(label_dir / f"{stem}_gtFine_labelIds.png")
    Image.fromarray(street.instance_ids.astype(np.uint16)).save(label_dir / f"{stem}_gtFine_instanceIds.png")
    height, width = street.label_ids.shape
    objects = [{"label": name, "polygon": [list(point) for point in polygon]} for name, polygon in street.polygons]
    annotation = {"imgHeight": height, "imgWidth": width, "objects": objects}
    (label_dir / f"{stem}_gtFine_polygons.json").write_text(json.dumps(annotation) + "\n", encoding="utf-8")
