"""Writing the shards of prepared data (``data.prepared``): each whole or not at all, several at a time."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets.arrow_writer import ArrowWriter

from cityseg_hf.data.cityscapes import instance_path, read_instances, read_pair
from cityseg_hf.data.prepared import FEATURES, Shard, crc32_of
from cityseg_hf.data.sources import class_counts
from cityseg_hf.data.transforms import resize_image, resize_label
from cityseg_hf.errors import UserError, one_line
from cityseg_hf.labels import NUM_CLASSES

GO_ON = "finished shards are kept: run the same command again"


class Row(NamedTuple):
    """An image to prepare."""

    name: str
    city: str
    image: str
    label: str


@dataclass(frozen=True)
class Job:
    """A shard to write."""

    path: Path
    rows: list[Row]
    size: tuple[int, int] | None
    train: bool
    fingerprint: str
    bytes: int
    """About as many as the file will have."""


class Stop(Exception):
    """Somebody asked to stop."""


def write_shards(jobs: list[Job], num_workers: int, stop: Callable[[], bool]) -> Iterator[Shard]:
    """Writes shards in so many processes, 0 for this one, and yields them as they are finished.

    Raises:
        UserError: see ``write_shard``; or a process was killed.
        Stop: ``stop`` said so; no half a shard is left.
    """
    if num_workers == 0:
        for job in jobs:
            yield write_shard(job, stop)
    if num_workers == 0 or not jobs:
        return
    # Spawned, not forked: the caller may well have started the threads of torch.
    context = get_context("spawn")
    halt = context.Event()
    with ProcessPoolExecutor(min(num_workers, len(jobs)), context, _start_worker, (halt,)) as pool:
        pending = {pool.submit(_write_in_worker, job) for job in jobs}
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
                if stop():
                    raise Stop
        except BrokenProcessPool:
            if stop():  # the signal went to the whole group
                raise Stop from None
            raise UserError(
                f"a process that decodes was killed (out of memory?); {GO_ON}, with a lower --num_workers"
            ) from None
        finally:
            halt.set()
            pool.shutdown(cancel_futures=True)


_halt: Any = None


def _start_worker(halt: Any) -> None:
    global _halt
    _halt = halt
    torch.set_num_threads(1)
    # Ctrl-C signals the whole group: the main process decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for its next shard for ever."""
    parent_process().join()
    os._exit(1)


def _write_in_worker(job: Job) -> Shard:
    return write_shard(job, _halt.is_set)


def write_shard(job: Job, stop: Callable[[], bool] = lambda: False) -> Shard:
    """Writes one shard beside its place and renames it.

    Raises:
        UserError: a file cannot be read, or the shard not be written.
        Stop: ``stop`` said so.
    """
    beside = job.path.with_name(f".{job.path.name}.part")
    classes = np.zeros((3, NUM_CLASSES), np.int64)
    try:
        with beside.open("wb") as stream:
            # Every row is a batch, and so in one piece.
            options: dict[str, Any] = {"fingerprint": job.fingerprint, "writer_batch_size": 1}
            with ArrowWriter(features=FEATURES, stream=stream, **options) as writer:
                for row in job.rows:
                    if stop():
                        raise Stop
                    record, counts = read_record(row, job.size, job.train)
                    columns = {name: [value] for name, value in record.items()}
                    writer.write_table(pa.table(columns, schema=FEATURES.arrow_schema))
                    classes += counts
                writer.finalize(close_stream=False)
            stream.flush()
            os.fsync(stream.fileno())
        length, checksum = beside.stat().st_size, crc32_of(beside)
        beside.replace(job.path)
    except OSError as error:
        raise UserError(f"cannot write {job.path}: {error.strerror or one_line(error)}; {GO_ON}") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    return Shard(job.path.name, len(job.rows), length, checksum, job.fingerprint, classes.tolist())


def read_record(row: Row, size: tuple[int, int] | None, train: bool) -> tuple[dict[str, Any], np.ndarray]:
    """Decodes an image into a row of ``FEATURES``.

    Returns:
        The row, and what the label holds at its own resolution: ``int64[3, 19]``, see ``class_counts``.

    Raises:
        UserError: a file cannot be read.
    """
    image, label = read_pair(row.image, row.label)
    counts = class_counts(label)
    instances = None
    if not train and (path := instance_path(row.label)) is not None:
        instances = read_instances(path, label.shape).astype(np.uint16)
    # uint8[H, W, 3] -> uint8[3, H, W], and back.
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)
    image = resize_image(pixels, size or label.shape).permute(1, 2, 0).contiguous().numpy()
    if train:
        label = resize_label(torch.from_numpy(label), size or label.shape).contiguous().numpy()
    record = {
        "name": row.name,
        "city": row.city,
        "height": image.shape[0],
        "width": image.shape[1],
        "label_height": label.shape[0],
        "label_width": label.shape[1],
        "image": image.tobytes(),
        "label": label.tobytes(),
        "instances": None if instances is None else instances.tobytes(),
    }
    return record, counts
