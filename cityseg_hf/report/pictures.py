"""The worst and the best images of a run: what was seen, what is there, what was predicted, and where that is wrong."""

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from cityseg_hf.cli import did_you_mean
from cityseg_hf.data.cityscapes import Row, find_rows, read_pair
from cityseg_hf.errors import UserError
from cityseg_hf.inference import load_model_folder, segment
from cityseg_hf.labels import IGNORE, PALETTE
from cityseg_hf.report.reading import Evaluation, Run

WIDTH = 960
"""Pixels of a picture's width at most."""


class Picture(NamedTuple):
    """An image of the final test. The four views are data URIs of one size."""

    name: str
    miou: float
    image: str
    label: str
    prediction: str
    errors: str
    """The image in grey; wrong pixels in red, void ones black."""


class Pictures(NamedTuple):
    """Worst images, the worst first, and best ones, the best first; none is in both. Or why there are none."""

    run: Run | None = None
    worst: Sequence[Picture] = ()
    best: Sequence[Picture] = ()
    reason: str = ""


def pictures_of(runs: Sequence[Run], name: str | None, folder: str, root: str | None, count: int) -> Pictures:
    """Predicts the worst and best images of a run's final test again, where data and model are there.

    Args:
        runs: to choose from.
        name: of the run's folder; ``None``: the one with the highest mIoU of those that tell the images' scores.
        folder: ``best_miou``, ``best_loss`` or ``last``.
        root: where the data lies; ``None``: where the run read it.
        count: how many of each.

    Raises:
        UserError: no run has that name.
    """
    named = [run for run in runs if name in (None, run.name)]
    if not named:
        near = did_you_mean(str(name), [run.name for run in runs])
        raise UserError(f"--pictures_of {name}: no finished run has that name{near}")
    if count == 0:
        return Pictures(reason="Left out by --images 0.")
    told = [run for run in named if folder in run.evaluations and run.results[folder]["miou"] is not None]
    if not told:
        lacks = "No run has an" if name is None else f"{name} has no"
        return Pictures(reason=f"{lacks} evaluation.json, which tells the scores of single images.")
    run = max(told, key=lambda run: run.results[folder]["miou"])
    try:
        return _predicted(run, folder, root, count)
    except UserError as error:
        return Pictures(reason=str(error))


def _predicted(run: Run, folder: str, root: str | None, count: int) -> Pictures:
    evaluation = run.evaluations[folder]
    worst, best = _chosen(evaluation, count)
    rows = _find(run, evaluation.split, root or run.arguments.get("base_dataset_path"), [*worst, *best])
    model, processor = load_model_folder(run.path / folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def picture(name: str) -> Picture:
        image, label = read_pair(rows[name].image, rows[name].label)
        return Picture(name, evaluation.images[name], *views(image, label, segment(model, processor, image)))

    return Pictures(run, [picture(name) for name in worst], [picture(name) for name in best])


def _chosen(evaluation: Evaluation, count: int) -> tuple[list[str], list[str]]:
    """Names of the worst and the best images. Of a few, half are worst and half best."""
    judged = {name: miou for name, miou in evaluation.images.items() if miou is not None}
    names = sorted(judged, key=lambda name: (judged[name], name))
    count = min(count, (len(names) + 1) // 2)
    return names[:count], names[max(count, len(names) - count) :][::-1]


def _find(run: Run, split: str, root: str | None, names: Sequence[str]) -> dict[str, Row]:
    if root is None:
        raise UserError("-d says where the images lie")
    rows = find_rows(root)
    # Held-out cities lie among the train images.
    places = rows.get("train", []) if split == "holdout" else rows.get(split, [])
    found = {row.name: row for row in places if row.label is not None}
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"{root} has no {missing[0]} with a label in {split}: -d names the data {run.name} was tested on"
        )
    return found


def views(image: np.ndarray, label: np.ndarray, prediction: np.ndarray) -> tuple[str, str, str, str]:
    """Image, label, prediction and errors as data URIs.

    Args:
        image: ``uint8[H, W, 3]``, RGB.
        label, prediction: ``uint8[H, W]``, train ids; void of the label is ``IGNORE``.
    """
    grey = np.asarray(Image.fromarray(image).convert("L").convert("RGB")) // 2 + 60
    errors = np.where((label != prediction)[..., None], np.array([235, 60, 60]), grey)
    errors[label == IGNORE] = 0
    return (
        _data_uri(image, Image.Resampling.LANCZOS, quality=78),
        # Maps have flat colours, which a lossless file holds in less room and without halos.
        _data_uri(PALETTE[label], Image.Resampling.NEAREST, lossless=True),
        _data_uri(PALETTE[prediction], Image.Resampling.NEAREST, lossless=True),
        _data_uri(errors.astype(np.uint8), Image.Resampling.BOX, quality=78),
    )


def _data_uri(pixels: np.ndarray, how: Image.Resampling, **options: bool | int) -> str:
    image = Image.fromarray(pixels)
    if image.width > WIDTH:
        image = image.resize((WIDTH, max(1, round(image.height * WIDTH / image.width))), how)
    content = BytesIO()
    image.save(content, "WEBP", method=6, **options)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
