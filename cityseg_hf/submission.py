"""An archive of predictions for the Cityscapes benchmark: written, checked, and scored by the official tools."""

import copy
import hashlib
import io
import math
import re
import shutil
import zipfile
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cityseg_hf.data.cityscapes import (
    INSTANCE_SUFFIX,
    LABEL_SUFFIX,
    NAME,
    NO_IMAGE,
    Row,
    instance_path,
    read_image,
    read_instances,
    read_label,
    read_size,
)
from cityseg_hf.data.files import UNREADABLE, read_bytes, stamp
from cityseg_hf.errors import UserError, one_line
from cityseg_hf.labels import CATEGORY_NAMES, CLASS_NAMES, ID_TO_TRAIN_ID, TRAIN_LABELS
from cityseg_hf.metrics import INSTANCE_CATEGORIES, INSTANCE_CLASSES, SegmentationCounts
from cityseg_hf.pieces import Size
from cityseg_hf.prediction import Job, Pictures, Predictor, check_record, predict_images
from cityseg_hf.runs import written_beside

PICTURES = Pictures(("labelIds",))
OFFICIAL_COUNTS = {"val": 500, "test": 1525}
OFFICIAL_SIZE = (1024, 2048)

EVALUATED = np.zeros(256, dtype=bool)
EVALUATED[[label.id for label in TRAIN_LABELS]] = True


def write_submission(
    predictor: Predictor,
    rows: Sequence[Row],
    archive: Path,
    *,
    settings: dict[str, Any],
    threads: int,
    overwrite: bool = False,
) -> None:
    """Segments a split and packs ``CITY_SEQ_FRAME_pred_labelIds.png`` of each image, at its own resolution.

    Predictions are kept in a hidden folder beside the archive until that is whole: the same call goes on from there.
    The archive is checked before it gets its name.

    Args:
        predictor: the network.
        rows: the images of the split.
        archive: the zip to write.
        settings: what the predictions depend on, see ``prediction.check_record``.
        threads: how many read ahead, and how many write.
        overwrite: forgets the predictions that an earlier call left there.

    Raises:
        UserError: an image cannot be read, or the predictions that are there are those of other settings.
    """
    parts = archive.with_name(f".{archive.name}.parts")
    if overwrite and parts.is_dir():
        shutil.rmtree(parts)
    stamps = "".join(f"{row.name} {stamp(row.image)}\n" for row in rows)
    check_record(parts, {**settings, "images": hashlib.sha256(stamps.encode()).hexdigest()})
    jobs = [Job(row.image, parts / f"{row.name}_pred") for row in rows]
    missing = [job for job in jobs if not PICTURES.written(job.stem)]
    broken = predict_images(predictor, missing, PICTURES, threads=threads, read=read_image)
    if broken:
        raise UserError(f"{len(broken)} of {len(rows)} images cannot be read, first: {broken[0]}")
    with written_beside(archive) as beside:
        with zipfile.ZipFile(beside, "w") as packed:  # PNGs are compressed already
            for job in jobs:
                (file,) = PICTURES.paths(job.stem)
                # Without the time of writing: the same predictions make the same archive.
                packed.writestr(zipfile.ZipInfo(file.name), file.read_bytes())
        faults = list(archive_faults(beside, image_sizes(rows)))
        if faults:
            raise UserError(f"{faults[0]} (in {parts}, {len(faults)} faults): remove that folder and run it again")
    shutil.rmtree(parts)


def image_sizes(rows: Sequence[Row]) -> dict[str, Size]:
    """Height and width of each image, by its name."""
    return {row.name: read_size(row.image) for row in rows}


def archive_faults(archive: Path, sizes: dict[str, Size] | None = None) -> Iterator[str]:
    """What the benchmark server would stumble over, a line for each file.

    As ``cityscapesscripts`` finds them (``getPrediction``), the prediction of an image is the one PNG, in whatever
    folder, whose name begins with CITY_SEQ_FRAME.

    Args:
        archive: a zip.
        sizes: height and width of each image of the split, by name. ``None``: as many images of 1024x2048 as the
            official ``test`` or ``val`` has, whatever their names.

    Yields:
        Lines that name the file: no zip, no prediction, or two, of an image, a file that is none's, one that is no
        8-bit grey PNG, of another size than its image, or with ids that are not evaluated.
    """
    first: dict[str, str] = {}
    try:
        with zipfile.ZipFile(archive) as packed:
            members = [member for member in packed.namelist() if not member.endswith("/")]
            for member in tqdm(members, desc="check", unit="file"):
                name = _image_of(member, sizes)
                if name is None:
                    yield f"{member} is the prediction of no image of this split: remove it"
                elif (twin := first.setdefault(name, member)) is not member:
                    yield f"{member} is the second prediction of {name}, after {twin}: remove one of them"
                else:
                    yield from _picture_faults(packed, member, OFFICIAL_SIZE if sizes is None else sizes[name])
    except (*UNREADABLE, RuntimeError) as error:  # RuntimeError: a password
        yield f"{archive} is no readable zip ({one_line(error)})"
        return
    for name in sizes or ():
        if name not in first:
            yield f"{name} has no prediction: {name}_pred_labelIds.png is missing"
    if sizes is None and len(first) not in OFFICIAL_COUNTS.values():
        counts = ", ".join(f"{split} {count}" for split, count in OFFICIAL_COUNTS.items())
        yield f"{archive} has predictions of {len(first)} images, Cityscapes has {counts}"


def _image_of(member: str, names: Container[str] | None) -> str | None:
    """The image whose prediction a file is called after."""
    file = Path(member).name
    if not file.endswith(".png"):
        return None
    if names is None:
        found = NAME.match(file)
        return found and found[0]
    # The digits of FRAME are the end of a name, but cities may have digits and underscores too.
    return next((file[: end.end()] for end in re.finditer(r"\d+", file) if file[: end.end()] in names), None)


def _picture_faults(packed: zipfile.ZipFile, member: str, size: Size) -> Iterator[str]:
    try:
        content = packed.read(member)
        image = Image.open(io.BytesIO(content))
        image.load()
    except NO_IMAGE as error:
        reason = "not a PNG, or damaged" if isinstance(error, Image.UnidentifiedImageError) else one_line(error)
        yield f"{member} is no readable image ({reason})"
        return
    # Byte 24 of a PNG is its depth: Pillow stretches the values of 2 and 4 bits to 8.
    if image.format != "PNG" or image.mode != "L" or content[24] != 8:
        yield f"{member} is {image.format} of mode {image.mode}, it must be a PNG of one channel of 8 bits (mode L)"
        return
    if image.size != (size[1], size[0]):
        yield f"{member} is {image.height}x{image.width}, its image is {size[0]}x{size[1]}"
    label_ids = np.asarray(image)
    if not EVALUATED[label_ids].all():
        wrong = ", ".join(map(str, np.unique(label_ids[~EVALUATED[label_ids]])[:5]))
        yield f"{member} holds {wrong}, which is no evaluated labelId: are these train ids?"


def require_official() -> ModuleType:
    """The benchmark's own evaluation.

    Raises:
        UserError: it is not installed.
    """
    if not hasattr(np, "in1d"):  # gone since numpy 2.4; cityscapesscripts still calls it
        np.in1d = np.isin
    try:
        from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling
    except ImportError:
        raise UserError("the official scores need cityscapesscripts: pip install cityscapesscripts") from None
    return evalPixelLevelSemanticLabeling


def compare_scores(archive: Path, rows: Sequence[Row]) -> dict[str, float | None]:
    """Scores an archive by ``cityscapesscripts``, and by our counts of the same files.

    Args:
        archive: without faults.
        rows: the images of the split, with their labels.

    Returns:
        The scores that both know, under our names.

    Raises:
        UserError: ``cityscapesscripts`` is missing or refuses the files.
        RuntimeError: the scores differ by more than 1e-12.
    """
    official = require_official()
    counts, pairs = SegmentationCounts(), []
    with TemporaryDirectory() as folder, zipfile.ZipFile(archive) as packed:
        names = {row.name for row in rows}
        members = {_image_of(member, names): member for member in packed.namelist()}
        for row in tqdm(rows, desc="score", unit="image"):
            prediction, truth = Path(folder) / f"{row.name}.png", Path(folder) / f"{row.name}{LABEL_SUFFIX}"
            prediction.write_bytes(packed.read(members[row.name]))
            truth.write_bytes(read_bytes(row.label))  # a file for those that lie in zips too
            instances = instance_path(row.label)
            if instances is not None:
                (Path(folder) / f"{row.name}{INSTANCE_SUFFIX}").write_bytes(read_bytes(instances))
                instances = torch.from_numpy(read_instances(instances))
            train_ids = torch.from_numpy(ID_TO_TRAIN_ID[np.asarray(Image.open(prediction))])
            counts.update(train_ids, torch.from_numpy(read_label(row.label)), instances)
            pairs.append((str(prediction), str(truth)))
        scores = dict(counts.scores())
        theirs = _official_scores(official, pairs, instances="iiou" in scores)
    for name, value in theirs.items():
        ours = math.nan if scores[name] is None else scores[name]
        if not (math.isnan(ours) and math.isnan(value)) and not abs(ours - value) <= 1e-12:
            raise RuntimeError(f"{name} is {ours!r}, cityscapesscripts has {value!r}")
    return {name: scores[name] for name in theirs}


def _official_scores(official: ModuleType, pairs: list[tuple[str, str]], *, instances: bool) -> dict[str, float]:
    """What ``cityscapesscripts`` says of predictions and labels, under our names; NaN where there is no score."""
    settings = copy.copy(official.args)
    settings.quiet, settings.JSONOutput, settings.evalInstLevelScore = True, False, instances
    try:
        found = official.evaluateImgLists([pair[0] for pair in pairs], [pair[1] for pair in pairs], settings)
    except SystemExit:
        raise UserError("cityscapesscripts refuses the files: see its line above") from None
    kinds = [("miou", "iou", "averageScoreClasses", "classScores", CLASS_NAMES)]
    kinds += [("category_iou", "category_iou", "averageScoreCategories", "categoryScores", CATEGORY_NAMES)]
    if instances:
        classes = tuple(CLASS_NAMES[train_id] for train_id in INSTANCE_CLASSES)
        categories = INSTANCE_CATEGORIES
        kinds += [("iiou", "iiou", "averageScoreInstClasses", "classInstScores", classes)]
        kinds += [("category_iiou", "category_iiou", "averageScoreInstCategories", "categoryInstScores", categories)]
    scores = {}
    for mean, each, average, values, names in kinds:
        scores |= {mean: found[average], **{f"{each}/{name}": found[values][name] for name in names}}
    return scores
