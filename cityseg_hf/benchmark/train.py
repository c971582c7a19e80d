"""The whole optimiser step: forward, loss, backward, AdamW. Ours as in the loop, the peers' as in their examples."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cityseg_hf.benchmark.options import Options
from cityseg_hf.benchmark.peers import Peer, peers_of
from cityseg_hf.benchmark.timing import Contender, Group
from cityseg_hf.config import OptimConfig
from cityseg_hf.labels import IGNORE, NUM_CLASSES
from cityseg_hf.losses import Criterion, label_mass
from cityseg_hf.optim import make_optimizer

LEARNING_RATE = 1e-4


class Batch(NamedTuple):
    """``float[B, 3, H, W]`` and ``long[B, H, W]``."""

    pixel_values: Tensor
    labels: Tensor


def groups(options: Options) -> Iterator[Group]:
    """A group for each network."""
    height, width = options.size
    batch = random_batch(options)
    for name in options.models:
        ours = options.build(name)
        peers = list(peers_of(ours, extra=options.peers))  # before our own way changes the network
        steps = [Contender("cityseg_hf", our_step(ours, batch), ours=True)]
        steps += [Contender(one.name, peer_step(one, batch), note=one.note, same_work=one.same_work) for one in peers]
        contenders = [
            one._replace(run=_under(options, precision, one.run), precision=precision)
            for precision in options.precisions
            for one in steps
        ]
        title = f"{name}: optimiser step, {options.batch_size} x {height}x{width}"
        yield Group(title, contenders, memory=True)


def random_batch(options: Options) -> Batch:
    """Noise for images, random blocks of classes (with some void) for labels."""
    height, width = options.size
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(options.batch_size, 3, height, width, generator=generator)
    # [B, 1, h, w] blocks of 32 pixels -> [B, H, W]
    cells = (options.batch_size, 1, -(-height // 32), -(-width // 32))
    blocks = torch.randint(NUM_CLASSES + 1, cells, generator=generator)
    blocks[blocks == NUM_CLASSES] = IGNORE
    labels = F.interpolate(blocks.float(), scale_factor=32, mode="nearest")[:, 0, :height, :width].long()
    return Batch(pixel_values.to(options.device), labels.contiguous().to(options.device))


def our_step(network: nn.Module, batch: Batch) -> Callable[[torch.autocast], None]:
    """``Trainer._step`` of one process and one batch, without what it logs."""
    criterion = Criterion(network.to(memory_format=torch.channels_last), 0.4).train()
    optimizer = make_optimizer(network, OptimConfig(learning_rate=LEARNING_RATE))
    labels, epoch = batch.labels.to(torch.uint8), 0  # the type that our loader makes

    def step(autocast: torch.autocast) -> None:
        nonlocal epoch
        epoch += 1  # other keys, other masks of dropout
        valid = label_mass(labels).clamp(min=1)
        with autocast:
            loss, _ = criterion(batch.pixel_values, labels, [(0, epoch, index) for index in range(len(labels))])
        (loss / valid).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer_step(peer: Peer, batch: Batch) -> Callable[[torch.autocast], None]:
    """As in transformers' and torchvision's training scripts, with AdamW for all."""
    peer.network.train()
    optimizer = torch.optim.AdamW(peer.network.parameters(), lr=LEARNING_RATE)

    def step(autocast: torch.autocast) -> None:
        with autocast:
            loss = peer.loss(batch.pixel_values, batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _under(options: Options, precision: str, step: Callable[[torch.autocast], None]) -> Callable[[], None]:
    return lambda: step(options.autocast(precision))
