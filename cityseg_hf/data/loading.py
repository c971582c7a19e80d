"""Source -> samples -> batches; order and augmentation depend on nothing but (seed, epoch, index)."""

import atexit
import multiprocessing
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cityseg_hf.data.sources import Source
from cityseg_hf.data.transforms import Transform
from cityseg_hf.errors import LocalFault, UserError


def random_seed(*key: int) -> int:
    """A 64-bit seed that is a pure function of its key, e.g. (seed, epoch, sample index)."""
    low, high = np.random.SeedSequence(key).generate_state(2)
    return int(low) | int(high) << 32


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Makes torch's CPU generator a pure function of the key within the block, and leaves it as it was."""
    state = torch.get_rng_state()
    # Not torch.manual_seed: that would reseed the accelerators too.
    torch.default_generator.manual_seed(random_seed(*key))
    try:
        yield
    finally:
        torch.set_rng_state(state)


class SegmentationDataset(Dataset):
    """Samples of a split, by ``(epoch, index)``.

    Args:
        source: where images and labels are read from.
        transform: what makes a sample of a decoded pair.
        seed: the run's seed.
        instances: also read the ``instanceIds`` maps (``None`` for images that have none).
    """

    def __init__(self, source: Source, transform: Transform, *, seed: int = 0, instances: bool = False) -> None:
        self.source, self.transform, self.seed, self.instances = source, transform, seed, instances

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        try:
            image, label = self.source.read(index)
            instances = self.source.read_instances(index, label.shape) if self.instances else None
        except UserError as error:
            # Raised in a worker it would come back wrapped in a traceback: it travels as a sample instead.
            return {"error": str(error)}
        with seeded(self.seed, epoch, index):
            # uint8[H, W, 3] -> uint8[3, H, W]
            given = _viewed(image), _viewed(label)
            pixels, train_ids, *augmentation = self.transform(given[0].permute(2, 0, 1), given[1])
        sample = {
            "pixel_values": _owned(_packed(pixels), given[0]).permute(2, 0, 1),
            "labels": _owned(train_ids, given[1]),
            "key": (self.seed, epoch, index),
        }
        if augmentation:
            sample["augmentation"] = augmentation[0]
        if self.instances:
            sample["instances"] = None if instances is None else torch.from_numpy(instances)
        return sample


def _owned(part: Tensor, given: Tensor) -> Tensor:
    """Without gaps, and a copy if it is a view of what a source gave: that may be read-only, and on a disk."""
    if part.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
        return part.clone(memory_format=torch.contiguous_format)
    return part.contiguous()


def _packed(pixels: Tensor) -> Tensor:
    """``[3, H, W]`` -> ``[H, W, 3]``, a view: as images are decoded and stored, the device gets them.

    To sort their bytes by channel would cost a core more than to resize them.
    """
    return pixels.permute(1, 2, 0)


def _viewed(array: np.ndarray) -> Tensor:
    """The array as a tensor that is only read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks samples.

    Returns:
        ``pixel_values uint8[B, 3, H, W]``, channels last; ``labels uint8[B, H', W']`` or a list where sizes differ;
        ``key``; in training ``augmentation float32[B, K]``; ``instances`` where they are asked for; or ``error`` alone.
    """
    error = next((sample["error"] for sample in samples if "error" in sample), None)
    if error is not None:
        return {"error": error}
    batch: dict[str, Any] = {
        "pixel_values": torch.stack([_packed(sample["pixel_values"]) for sample in samples]).permute(0, 3, 1, 2)
    }
    train_ids = [sample["labels"] for sample in samples]
    same_size = len({tuple(label.shape) for label in train_ids}) == 1
    batch["labels"] = torch.stack(train_ids) if same_size else train_ids
    batch["key"] = [sample["key"] for sample in samples]
    if "augmentation" in samples[0]:
        batch["augmentation"] = torch.stack([sample["augmentation"] for sample in samples])
    if "instances" in samples[0]:
        batch["instances"] = [sample["instances"] for sample in samples]
    return batch


def raise_errors(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The batches of a loader; a fault of the data that a worker met is raised here, as the one line it is."""
    with _signals_held():
        batches = iter(loader)
    try:
        for batch in batches:
            if "error" in batch:
                raise LocalFault(batch["error"])
            yield batch
    finally:
        # The error's traceback holds this frame, and a name in it would hold the workers.
        del batches


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """The batches of one process, epoch after epoch.

    The shuffled epoch is cut into global batches first, and each global batch is dealt to the processes: which images
    make optimiser step t depends on the seed and the global batch alone, not on how many processes share the work.
    The tail of an epoch that fills no global batch is left out (another one each epoch); a set smaller than one global
    batch is one short batch.

    Args:
        length: images in the split.
        batch_size: images per process and batch.
        accumulation: batches that make one optimiser step.
        rank, world: this process and how many there are.
        seed: the run's seed.
        first_step, last_step: the optimiser steps to yield, from the start of training.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        first_step: int = 0,
        last_step: int = 0,
    ) -> None:
        if length < world * accumulation:
            raise UserError(
                f"{length} training images cannot be shared by {world} processes x {accumulation} accumulated batches: "
                "use fewer"
            )
        self.length, self.seed, self.rank, self.world, self.accumulation = length, seed, rank, world, accumulation
        self.batch_size = batch_size
        self.global_batch = min(batch_size * accumulation * world, length)
        self.steps_per_epoch = length // self.global_batch
        self.first_step, self.last_step = first_step, last_step

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, []
        for step in range(self.first_step, self.last_step):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(self.length, self.seed, epoch)
            start = step % self.steps_per_epoch * self.global_batch
            chosen = order[start : start + self.global_batch]
            # Even shares, whatever the remainder: no process is left without an image.
            for shard in np.array_split(chosen, self.accumulation * self.world)[self.rank :: self.world]:
                yield [(epoch, int(index)) for index in shard]


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: ``int64[length]``, a permutation."""
    return np.random.default_rng([seed, epoch]).permutation(length)


class EvalBatches(Sampler[list[tuple[int, int]]]):
    """Every image of a split once: process ``rank`` takes every ``world``-th, nothing is padded or repeated."""

    def __init__(self, length: int, *, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.indices = range(rank, length, world)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


def make_loader(dataset: Dataset, batches: Sampler, *, num_workers: int, pin_memory: bool = False) -> DataLoader:
    """A loader whose workers leave the processors to the network: one thread each."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker if num_workers else None,
        prefetch_factor=4 if num_workers else None,
    )


# Ctrl-C and Slurm signal the whole group: the main process decides, and needs its batches to finish the step. A worker
# leaves when told to through its queue, or when it sees that its parent is gone.
DEAF_TO = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)}


@contextmanager
def _signals_held() -> Iterator[None]:
    """Holds signals back while workers are started: until it is deaf to it, one would kill a worker."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@atexit.register
def _end_workers() -> None:
    """Ends the workers of loaders that nobody has closed: Python would ask them to, and wait for the deaf for ever."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    for number in DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, DEAF_TO)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Moves the tensors of a batch, without waiting; the parameters of the augmentation stay with the host."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        return [move(item) for item in value] if isinstance(value, list) else value

    return {name: value if name == "augmentation" else move(value) for name, value in batch.items()}


def on_device(batches: Iterator[dict[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    """The batches on a device; on a GPU the next one is on its way, on a stream of its own, while one is used."""
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    copies, batches = torch.cuda.Stream(device), iter(batches)

    def send() -> dict[str, Any] | None:
        batch = next(batches, None)
        with torch.cuda.stream(copies):
            return None if batch is None else to_device(batch, device)

    coming = send()
    while coming is not None:
        used = torch.cuda.current_stream(device)
        used.wait_stream(copies)
        for value in coming.values():
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(used)  # its memory is not given to the next copy before the step is through
        batch, coming = coming, send()
        yield batch
