"""From train ids to scores: one update, and what many images cost."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cityseg_hf.benchmark.ends import street
from cityseg_hf.benchmark.options import Options
from cityseg_hf.benchmark.peers import require
from cityseg_hf.benchmark.timing import Contender, Group
from cityseg_hf.labels import IGNORE, NUM_CLASSES, TRAIN_ID_TO_ID
from cityseg_hf.metrics import SegmentationCounts


class Metric(NamedTuple):
    """A way of scoring: ``start()`` gives what takes in one image, and what gives the scores of all."""

    name: str
    note: str
    start: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]
    ours: bool = False
    whole: bool = False
    """Nothing is counted before the end: its time for an image has to include that."""


def metric_groups(options: Options) -> Iterator[Group]:
    """One update, then the memory of many images."""
    labels = torch.from_numpy(street(options.size)[1])
    wrong = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)) < 0.1
    predictions = torch.where(wrong | (labels == IGNORE), 0, labels)  # uint8[H, W]
    metrics = list(_metrics(options, predictions, labels))
    height, width = options.size
    once = [Contender(m.name, _image_by_image(m), m.ours, note=m.note) for m in metrics]
    yield Group(f"one image of {height}x{width} counted", once)
    for number in options.images:
        at_once = [Contender(m.name, _many(m, number), m.ours, note=m.note, pieces=number) for m in metrics]
        title = f"{number} images of {height}x{width} to scores, time of each"
        yield Group(title, at_once, memory=True, rounds=1, warm_up=False)  # warm from the one image


def _image_by_image(metric: Metric) -> Callable[[], Any]:
    return _many(metric, 1) if metric.whole else metric.start()[0]


def _many(metric: Metric, images: int) -> Callable[[], None]:
    def run() -> None:
        update, finish = metric.start()
        for _ in range(images):
            update()
        finish()

    return run


def _metrics(options: Options, predictions: Tensor, labels: Tensor) -> Iterator[Metric]:
    # Each gets the types that its own pipeline makes: int64 everywhere but here.
    our_ids, our_truth = predictions.to(options.device), labels.to(options.device)
    ids, truth = our_ids.long(), our_truth.long()

    def ours() -> tuple[Callable, Callable]:
        counts = SegmentationCounts(options.device)
        return lambda: counts.update(our_ids, our_truth), lambda: dict(counts.scores())

    from cityseg_hf.benchmark.mean_iou import MeanIoU  # evaluate takes a while to import

    def of_evaluate() -> tuple[Callable, Callable]:
        metric = MeanIoU(cache_dir=str(options.folder))
        add = {"predictions": ids[None].cpu(), "references": truth[None].cpu()}
        return lambda: metric.add_batch(**add), lambda: metric.compute(num_labels=NUM_CLASSES, ignore_index=IGNORE)

    yield Metric("cityseg_hf", "", ours, ours=True)
    note = "add_batch and compute; its arithmetic restated"
    yield Metric("evaluate mean_iou", note, of_evaluate, whole=True)
    if options.peers:
        yield from _extra_metrics(options, predictions, ids, truth)


def _extra_metrics(options: Options, predictions: Tensor, ids: Tensor, truth: Tensor) -> Iterator[Metric]:
    torchmetrics = require("torchmetrics")

    def of_torchmetrics(validate: bool) -> tuple[Callable, Callable]:
        metric = torchmetrics.JaccardIndex(
            task="multiclass", num_classes=NUM_CLASSES, ignore_index=IGNORE, validate_args=validate
        ).to(options.device)
        return lambda: metric.update(ids, truth), metric.compute

    yield Metric("torchmetrics", "JaccardIndex as it comes", lambda: of_torchmetrics(True))
    yield Metric("torchmetrics, not validated", "validate_args=False", lambda: of_torchmetrics(False))
    if not hasattr(np, "in1d"):  # gone since numpy 2.4; cityscapesscripts still calls it
        np.in1d = np.isin
    benchmark = require("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    paths = [str(options.folder / f"street_{kind}_labelIds.png") for kind in ("pred", "gtFine")]
    Image.fromarray(TRAIN_ID_TO_ID[predictions.numpy()]).save(paths[0])
    label_ids = np.where(truth.cpu().numpy() == IGNORE, 0, TRAIN_ID_TO_ID[np.minimum(truth.cpu().numpy(), 18)])
    Image.fromarray(label_ids.astype(np.uint8)).save(paths[1])
    args = copy.copy(benchmark.args)
    args.evalInstLevelScore = args.evalPixelAccuracy = False  # the others do not either

    def of_cityscapesscripts() -> tuple[Callable, Callable]:
        matrix = benchmark.generateMatrix(args)
        return lambda: benchmark.evaluatePair(*paths, matrix, {}, {}, args), lambda: matrix

    yield Metric("cityscapesscripts", "reads its two PNGs; pixels only", of_cityscapesscripts)
