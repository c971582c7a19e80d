"""What fits the memory: a batch size that does, and what to say when one does not."""

import copy

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedModel

from cityseg_hf.config import Config, TrainConfig
from cityseg_hf.data.transforms import normalize
from cityseg_hf.errors import LocalFault
from cityseg_hf.launch import agreed, prepare_network
from cityseg_hf.losses import Criterion
from cityseg_hf.optim import average_weights, make_optimizer


def out_of_memory(config: Config, image_size: tuple[int, int]) -> LocalFault:
    """One line that names what to lower."""
    train, (height, width) = config.train, config.data.crop_size or image_size
    smaller = next((split for split in splits_of(train) if split.batch_size < train.batch_size), None)
    if smaller is None:
        return LocalFault(f"out of memory with one image of {height}x{width}: lower --image_size or --crop_size")
    return LocalFault(
        f"out of memory with --batch_size {train.batch_size} at {height}x{width}: --batch_size {smaller.batch_size} "
        f"--gradient_accumulation_steps {smaller.gradient_accumulation_steps} keeps the global batch, and "
        "--find_batch_size looks for what fits"
    )


def splits_of(train: TrainConfig) -> list[TrainConfig]:
    """All ways to accumulate the same images of a process, from the given batch size downwards."""
    images = train.batch_size * train.gradient_accumulation_steps
    sizes = [size for size in range(train.batch_size, 0, -1) if images % size == 0]
    return [train.split(size, images // size) for size in sizes]


def find_batch_size(
    config: Config, accelerator: Accelerator, model: PreTrainedModel, image_size: tuple[int, int]
) -> TrainConfig:
    """The largest of ``splits_of`` whose step fits the memory of every process: each is tried on a copy, with noise.

    Raises:
        LocalFault: not even one image fits.
    """
    size = tuple(config.data.crop_size or image_size)
    for split in splits_of(config.train):
        fits = _fits(config, accelerator, model, split.batch_size, size)
        clear_device_cache(garbage_collection=True)
        if not agreed(accelerator, not fits)[0]:
            return split
    raise LocalFault(f"out of memory with one image of {size[0]}x{size[1]}: lower --image_size or --crop_size")


def _fits(
    config: Config, accelerator: Accelerator, model: PreTrainedModel, batch_size: int, size: tuple[int, int]
) -> bool:
    try:
        network = prepare_network(copy.deepcopy(model), accelerator, compiled=False).to(accelerator.device)
        criterion = Criterion(network, config.train.auxiliary_loss_weight).to(accelerator.device).train()
        optimizer = make_optimizer(network, config.optim)
        average = average_weights(network, config.train.ema_decay) if config.train.ema_decay else None
        images = torch.randint(256, (batch_size, 3, *size), dtype=torch.uint8, device=accelerator.device)
        with accelerator.autocast():
            loss, _ = criterion(normalize(images), images[:, 0] % 19, [(0, 0, index) for index in range(batch_size)])
        loss.backward()
        optimizer.step()  # its state takes twice the weights' memory
        del average
    except Exception as error:
        if not should_reduce_batch_size(error):
            raise
        return False
    return True
