"""One training sample, on one core: from the files to normalised pixels and train ids."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import datasets
import torch

from cityseg_hf.benchmark.options import Options
from cityseg_hf.benchmark.pipelines import read_all, torchvision_reference, transformers_example
from cityseg_hf.benchmark.timing import Contender, Group
from cityseg_hf.config import DataConfig
from cityseg_hf.data.augment import Augment, TrainTransform
from cityseg_hf.data.cityscapes import IMAGE_SUFFIX, LABEL_SUFFIX, find_rows, load_cityscapes, read_bytes
from cityseg_hf.data.loading import SegmentationDataset, collate
from cityseg_hf.data.prepared import open_prepared
from cityseg_hf.data.prepared_writer import prepare
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
        root = _few_images(options)
        rows = load_cityscapes(root)["train"]
        prepare(str(root), options.folder / "prepared", size=options.size, say=lambda line: None)
        sources = {
            "cityseg_hf": FileSource(rows),
            "cityseg_hf, prepared": open_prepared(options.folder / "prepared").sources["train"],
        }
        for augmentation in WORK:
            yield _group(options, rows, sources, augmentation)
    finally:
        torch.set_num_threads(threads)


def _group(options: Options, rows: datasets.Dataset, sources: dict[str, Source], augmentation: str) -> Group:
    crop = augmentation == "standard"
    transform = TrainTransform(DataConfig(augmentation=augmentation), options.size)
    samples = {name: SegmentationDataset(source, transform) for name, source in sources.items()}
    contenders = list(_ours(samples, transform.augment))
    contenders.append(_theirs("torchvision reference", rows, torchvision_reference(options.size, crop=crop)))
    if options.peers:
        note = "crops without scaling" if crop else ""
        pipeline = transformers_example(options.size, crop=crop)
        contenders.append(_theirs("transformers example", rows, pipeline, note))
    title = f"one sample of {options.size[0]}x{options.size[1]} on one core: {WORK[augmentation]}"
    return Group(title, contenders, {"differing_samples": differing_samples(list(samples.values()))})


def _few_images(options: Options) -> Path:
    """A tree of a few training images: the first of the given one, copied, or synthetic streets."""
    target = options.folder / "tree"
    if options.root is None:
        # As large against the samples as the images of Cityscapes are.
        size = (2 * options.size[0], 2 * options.size[1])
        return make_synthetic(target, train=IMAGES // 2, val=0, test=0, size=size)
    rows = find_rows(options.root)["train"][:IMAGES]
    if not rows:
        raise UserError(f"{options.root} has no images in leftImg8bit/train")
    for row in rows:
        for kind, suffix, path in (("leftImg8bit", IMAGE_SUFFIX, row.image), ("gtFine", LABEL_SUFFIX, row.label)):
            folder = target / kind / "train" / row.city
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{row.name}{suffix}").write_bytes(read_bytes(path))
    return target


def _theirs(name: str, rows: datasets.Dataset, pipeline: Callable, note: str = "") -> Contender:
    return Contender(name, read_all(rows, pipeline), note=note, pieces=len(rows))


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
