"""One training sample, on one core: from the files to normalised pixels and train ids."""

from collections.abc import Callable, Iterator
from itertools import count

import datasets
import torch

from cityseg_hf.benchmark.options import Options
from cityseg_hf.benchmark.pipelines import read_all, torchvision_reference, transformers_example
from cityseg_hf.benchmark.timing import Contender, Group
from cityseg_hf.config import DataConfig
from cityseg_hf.data.augment import Augment, TrainTransform
from cityseg_hf.data.cityscapes import load_cityscapes
from cityseg_hf.data.loading import SegmentationDataset, collate
from cityseg_hf.data.sources import FileSource, Source
from cityseg_hf.data.synthetic import make_synthetic
from cityseg_hf.errors import UserError

IMAGES = 8
"""How many images are read in turn; a round reads each of them once."""

WORK = {
    "flip": "whole image resized, flipped",
    "standard": "random crop, flipped (ours and torchvision also scale; ours also distorts colours)",
}
"""What the two augmentations that peers have too do."""


def groups(options: Options) -> Iterator[Group]:
    """Whole images and random crops."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = _rows(options)
        height, width = options.size
        for augmentation, work in WORK.items():
            crop = augmentation == "standard"
            transform = TrainTransform(DataConfig(augmentation=augmentation), options.size)
            samples = {name: SegmentationDataset(source, transform) for name, source in _sources(rows).items()}
            contenders = list(_ours(samples, transform.augment))
            contenders.append(_theirs("torchvision reference", rows, torchvision_reference(options.size, crop=crop)))
            if options.peers:
                note = "crops without scaling" if crop else ""
                pipeline = transformers_example(options.size, crop=crop)
                contenders.append(_theirs("transformers example", rows, pipeline, note))
            title = f"one sample of {height}x{width} on one core: {work}"
            yield Group(title, contenders, {"differing_samples": differing_samples(list(samples.values()))})
    finally:
        torch.set_num_threads(threads)


def _rows(options: Options) -> datasets.Dataset:
    root = options.root
    if root is None:
        root = options.folder / "streets"
        # As large against the samples as the images of Cityscapes are.
        size = (2 * options.size[0], 2 * options.size[1])
        make_synthetic(root, train=IMAGES // 2, val=0, test=0, size=size)
    rows = load_cityscapes(root)
    if "train" not in rows:
        raise UserError(f"{root} has no images in leftImg8bit/train")
    return rows["train"].select(range(min(IMAGES, len(rows["train"]))))


def _theirs(name: str, rows: datasets.Dataset, pipeline: Callable, note: str = "") -> Contender:
    return Contender(name, read_all(rows, pipeline), note=note, pieces=len(rows))


def _sources(rows: datasets.Dataset) -> dict[str, Source]:
    """Our ways of reading, by the names of their rows in the table; the files themselves first."""
    return {"cityseg_hf": FileSource(rows)}


def _ours(samples: dict[str, SegmentationDataset], augment: Augment) -> Iterator[Contender]:
    for name, dataset in samples.items():
        yield Contender(name, _epoch_by_epoch(dataset, augment), ours=True, pieces=len(dataset))
        note = "flip, colours and normalisation are the device's"
        yield Contender(f"{name}: loader", _epoch_by_epoch(dataset), ours=True, note=note, pieces=len(dataset))


def differing_samples(ways: list[SegmentationDataset]) -> int:
    """How many samples of the first epoch another way of reading makes otherwise than the first, in any bit."""
    first, *others = ways
    pairs = ((first[0, index], other[0, index]) for other in others for index in range(len(first)))
    parts = ("pixel_values", "labels", "augmentation")
    return sum(not all(torch.equal(one[part], two[part]) for part in parts) for one, two in pairs)


def _epoch_by_epoch(samples: SegmentationDataset, augment: Augment | None = None) -> Callable[[], None]:
    """Makes a sample of each image; with ``augment`` also what the device does, here on the same core."""
    epochs = count()  # another augmentation each time, as in training

    def run() -> None:
        epoch = next(epochs)
        for index in range(len(samples)):
            batch = collate([samples[epoch, index]])
            if augment is not None:
                augment(batch["pixel_values"], batch["labels"], batch["augmentation"])

    return run
