"""Many images and videos to pictures of what a network sees in them: read ahead, batched, written whole, resumable."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from cityseg_hf.data.photographs import read_photograph
from cityseg_hf.data.transforms import normalize, resize_image
from cityseg_hf.data.videos import Video, VideoWriter
from cityseg_hf.errors import UserError
from cityseg_hf.inference import native_logits, processor_size
from cityseg_hf.labels import TRAIN_ID_TO_ID, colorize
from cityseg_hf.pieces import Size
from cityseg_hf.runs import write_json, written_beside
from cityseg_hf.upsampled import argmax, argmax_and_confidence
from cityseg_hf.views import SMALLEST, Views

KINDS = ("color", "labelIds", "overlay", "confidence")
"""Pictures that can be made of an image: Cityscapes colours, labelIds, colours over the image, and how sure it is."""

ENDINGS = (*(f"_{kind}.png" for kind in KINDS), "_overlay.mp4")
RECORD = "predictions.json"

T = TypeVar("T")


class Job(NamedTuple):
    """A file to segment (a path, or what ``data.files`` takes), and what its results are called, without a suffix."""

    path: Path | str
    stem: Path


class Reading(NamedTuple):
    """A decoded image, or the line that says why there is none."""

    place: Any
    """Whatever tells the caller which one it is."""
    image: np.ndarray | None = None
    """``uint8[H, W, 3]``."""
    pixels: Tensor | None = None
    """``uint8[3, h, w]``, at the network's size."""
    error: str | None = None


class Prediction(NamedTuple):
    """What the network says, at the image's own resolution."""

    train_ids: np.ndarray
    """``uint8[H, W]``, 0..18."""
    confidence: np.ndarray | None
    """``uint8[H, W]``: the best class's probability, 255 for 1."""


class Predictor:
    """A network with all it needs to segment images.

    Args:
        model: on its device and in its type.
        processor: its image processor.
        views: how it looks at an image; ``views.batch_size`` images go through it at a time.
        confidence: whether probabilities are wanted.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, views: Views, *, confidence: bool = False) -> None:
        self.model, self.size, self.views, self.confidence = model.eval(), processor_size(processor), views, confidence

    def prepare(self, place: Any, image: np.ndarray) -> Reading:
        """Resizes an image to the network's size, where it has one.

        Raises:
            UserError: it has none, and the image is too small for any network.
        """
        size = self.size or image.shape[:2]
        if min(size) < SMALLEST:
            raise UserError(f"{place} is {size[0]}x{size[1]}, a network needs {SMALLEST}x{SMALLEST} at least")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # uint8[H, W, 3] -> [3, H, W]
        return Reading(place, image, resize_image(pixels, size))

    def run(self, readings: Iterable[Reading]) -> Iterator[tuple[Reading, Prediction]]:
        """Segments images; those of one size keep their order.

        Raises:
            UserError: they do not fit the memory.
        """
        for batch in same_size_batches(readings, self.views.batch_size):
            try:
                yield from self._predict(batch)
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
                size = "x".join(map(str, batch[0].pixels.shape[1:]))
                mend = "lower --batch_size" if self.views.batch_size > 1 else "slide a smaller --window"
                raise UserError(f"out of memory with {len(batch)} images of {size}: {mend}") from None

    @torch.no_grad()
    def _predict(self, batch: list[Reading]) -> Iterator[tuple[Reading, Prediction]]:
        images = torch.stack([reading.pixels for reading in batch]).to(self.model.device)
        sizes: list[Size] = [reading.image.shape[:2] for reading in batch]
        rows = native_logits(self.model, normalize(images), sizes, self.views)
        for reading, logits, size in zip(batch, rows, sizes, strict=True):
            if self.confidence:
                best, sure = argmax_and_confidence(logits, size)
                sure = (sure[0] * 255).round().to(torch.uint8).cpu().numpy()
            else:
                best, sure = argmax(logits, size), None
            yield reading, Prediction(best[0].cpu().numpy(), sure)


def same_size_batches(readings: Iterable[Reading], batch_size: int) -> Iterator[list[Reading]]:
    """Readings whose pixels can be stacked; of mixed sizes no more than four batches are kept back."""
    waiting: dict[Size, list[Reading]] = {}
    for reading in readings:
        group = waiting.setdefault(tuple(reading.pixels.shape[1:]), [])
        group.append(reading)
        if len(group) == batch_size:
            yield waiting.pop(tuple(reading.pixels.shape[1:]))
        elif sum(map(len, waiting.values())) >= 4 * batch_size:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()


def ahead(calls: Iterable[Callable[[], T]], threads: int) -> Iterator[T]:
    """What calls return, in their order, while threads are at work on the next ones; 0 threads: this one alone.

    Threads are enough: decoding, resizing and writing pictures leave Python's lock alone.
    """
    if threads == 0:
        yield from (call() for call in calls)
        return
    coming: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for call in calls:
            coming.append(pool.submit(call))
            if len(coming) > 4 * threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        # After an error or Ctrl-C only what is at work is waited for.
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Pictures:
    """What is written of an image.

    Attributes:
        kinds: some of ``KINDS``.
        opacity: of the colours in the overlay, 0..1.
    """

    kinds: tuple[str, ...]
    opacity: float = 0.5

    def paths(self, stem: Path) -> list[Path]:
        """The files, in the order of ``kinds``."""
        return [stem.with_name(f"{stem.name}_{kind}.png") for kind in self.kinds]

    def written(self, stem: Path) -> bool:
        """Whether all are there already."""
        return all(path.is_file() for path in self.paths(stem))

    def write(self, stem: Path, image: np.ndarray, prediction: Prediction) -> None:
        """Writes each whole or not at all.

        Args:
            stem: their path without ending and suffix.
            image: ``uint8[H, W, 3]``.
            prediction: of the same size.
        """
        _make_folder(stem.parent)
        for kind, path in zip(self.kinds, self.paths(stem), strict=True):
            with written_beside(path) as beside:
                # Of a photograph the next level of effort takes four times as long for a fifth of the size.
                effort = 1 if kind == "overlay" else 6
                self._picture(kind, image, prediction).save(beside, format="PNG", compress_level=effort)

    def _picture(self, kind: str, image: np.ndarray, prediction: Prediction) -> Image.Image:
        if kind == "labelIds":
            return Image.fromarray(TRAIN_ID_TO_ID[prediction.train_ids])
        if kind == "confidence":
            return Image.fromarray(prediction.confidence)
        return colorize(prediction.train_ids) if kind == "color" else self.overlay(image, prediction)

    def overlay(self, image: np.ndarray, prediction: Prediction) -> Image.Image:
        """The image with the colours over it, mode ``RGB``."""
        return Image.blend(Image.fromarray(image), colorize(prediction.train_ids).convert("RGB"), self.opacity)


def predict_images(
    predictor: Predictor,
    jobs: Sequence[Job],
    pictures: Pictures,
    *,
    threads: int,
    title: str = "predict",
    read: Callable[[Any], np.ndarray] = read_photograph,
) -> list[str]:
    """Segments images and writes pictures of them.

    Args:
        predictor: the network.
        jobs: the files.
        pictures: what is written.
        threads: how many read ahead, and how many write.
        title: what the progress bar says.
        read: decodes a file to ``uint8[H, W, 3]``.

    Returns:
        A line for each file that could not be read; all others are written.
    """
    broken: list[str] = []
    with tqdm(total=len(jobs), desc=title, unit="image") as bar:

        def whole() -> Iterator[Reading]:
            for reading in ahead((partial(_read, predictor, job, read) for job in jobs), threads):
                if reading.error is None:
                    yield reading
                    continue
                broken.append(reading.error)
                tqdm.write(f"skipped: {reading.error}")
                bar.update()

        done = predictor.run(whole())
        for _ in ahead((partial(pictures.write, one.place.stem, one.image, found) for one, found in done), threads):
            bar.update()
    return broken


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None


def _read(predictor: Predictor, job: Job, read: Callable[[Any], np.ndarray]) -> Reading:
    try:
        return predictor.prepare(job.path, read(job.path))._replace(place=job)
    except UserError as error:
        return Reading(job, error=str(error))


def video_file(stem: Path) -> Path:
    """Where a video's overlay is written."""
    return stem.with_name(f"{stem.name}_overlay.mp4")


def video_written(stem: Path, pictures: Pictures | None) -> bool:
    """Whether a video is done; ``pictures`` as in ``predict_video``."""
    return video_file(stem).is_file() and (pictures is None or pictures.written(frame_stem(stem, 0)))


def frame_stem(stem: Path, index: int) -> Path:
    """What the pictures of a video's frame are called."""
    return stem / f"{index:06d}"


def predict_video(
    predictor: Predictor, job: Job, *, opacity: float, threads: int, pictures: Pictures | None = None
) -> None:
    """Segments a video: an MP4 of overlays with the times of its frames, and, if wanted, pictures of each.

    Args:
        predictor: the network.
        job: the file; the video is written to ``video_file(job.stem)``, pictures to ``frame_stem(job.stem, index)``.
        opacity: of the colours.
        threads: 0 to decode and write in this one; else decoding has one, and writing pictures has these.
        pictures: what is written of each frame.

    Raises:
        UserError: it cannot be read to its end, or PyAV is missing.
    """
    target, colors = video_file(job.stem), Pictures(("overlay",), opacity)
    _make_folder(target.parent)
    # It comes last, and says that the frames are whole too.
    target.unlink(missing_ok=True)
    with Video(job.path) as video, written_beside(target) as beside, VideoWriter(beside, video) as writer:
        frames = iter(video)

        def next_frame() -> Reading | None:
            frame = next(frames, None)
            return None if frame is None else predictor.prepare(job.path, frame.image)._replace(place=frame.time)

        def write_frames(readings: Iterator[Reading]) -> Iterator[Callable[[], None]]:
            for index, (reading, prediction) in enumerate(predictor.run(readings)):
                writer.write(np.asarray(colors.overlay(reading.image, prediction)), reading.place)
                bar.update()
                if pictures is not None:
                    yield partial(pictures.write, frame_stem(job.stem, index), reading.image, prediction)

        bar = tqdm(total=video.length, desc=f"predict {job.path.name}", unit="frame")
        # One thread decodes: frames come in their order. It ends before the video is closed.
        with bar, closing(ahead(repeat(next_frame), min(threads, 1))) as coming:
            deque(ahead(write_frames(iter(coming.__next__, None)), threads), maxlen=0)


def fingerprint(model: PreTrainedModel, processor: Any, views: Views) -> dict[str, Any]:
    """What predictions depend on, for JSON: the network's weights, its image size and type, and the views."""
    digest = hashlib.sha256()
    for name, weights in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weights.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    look = {"window": views.window, "stride": views.stride, "scales": views.scales, "flip": views.flip}
    settings = {"weights": digest.hexdigest(), "size": processor_size(processor), **look}
    return json.loads(json.dumps(settings))


def check_record(folder: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
    """Notes in a folder what the predictions in it depend on; results of other settings are not gone on with.

    Raises:
        UserError: the folder cannot be written, or holds predictions of other settings.
    """
    file = folder / RECORD
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = settings if overwrite or not file.is_file() else json.loads(file.read_text(encoding="utf-8"))
        if before != settings:
            if not isinstance(before, dict):
                raise ValueError(f"no settings: {before}")
            names = sorted({*before, *settings})
            other = ", ".join(name for name in names if before.get(name) != settings.get(name))
            raise UserError(
                f"{folder} holds predictions with other {other}: choose another folder, or --overwrite them"
            )
        write_json(file, settings)
    except ValueError:
        raise UserError(f"{file} is damaged: choose another folder, or --overwrite the predictions") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror}") from None
