"""Dropout and stochastic depth whose masks belong to the sample, not to its place in a batch.

The usual modules draw from one generator per process, so a sample's mask depends on what shares its batch, on the
process and on all that ran before. Here it is a pure function of the sample's key and the layer: one process or eight,
cut and resumed or not, the same images get the same masks.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

CALLS_PER_LAYER = 4
"""How often a module may be used in one forward pass with masks of its own (SegFormer's DropPath: twice)."""


class SampleRandomness:
    """The random numbers of one batch: a row for each sample, a column for each use of each layer."""

    def __init__(self) -> None:
        self.layers: list[_Keyed] = []
        self.draws: np.ndarray | None = None  # uint64[B, CALLS_PER_LAYER * layers]

    def begin(self, keys: Sequence[Sequence[int]]) -> None:
        """Sets the keys of the samples of the next forward pass, e.g. ``(seed, epoch, index)`` each."""
        columns = CALLS_PER_LAYER * len(self.layers)
        # uint64[B, columns]. The 1 keeps the stream apart from the one of the augmentation, which has the same key.
        self.draws = np.stack([np.random.SeedSequence([*key, 1]).generate_state(columns, np.uint64) for key in keys])
        for layer in self.layers:
            layer.calls, layer.calls_per_pass = 0, CALLS_PER_LAYER

    def end(self) -> None:
        """The forward pass is over; gradient checkpointing may repeat parts of it, with the masks of the first time."""
        for layer in self.layers:
            layer.calls_per_pass = max(1, min(layer.calls, CALLS_PER_LAYER))

    def take(self, layer: "_Keyed", batch: int) -> np.ndarray | None:
        """``uint64[B]`` for this use of a layer, or ``None`` where no keys were set for such a batch."""
        if self.draws is None or len(self.draws) != batch:
            return None
        column = CALLS_PER_LAYER * layer.position + layer.calls % layer.calls_per_pass
        layer.calls += 1
        return self.draws[:, column]


class _Keyed(nn.Module):
    def __init__(self, probability: float, randomness: SampleRandomness) -> None:
        super().__init__()
        self.probability, self.randomness = probability, randomness
        self.position, self.calls, self.calls_per_pass = len(randomness.layers), 0, CALLS_PER_LAYER
        randomness.layers.append(self)

    def extra_repr(self) -> str:
        return f"p={self.probability}"


class KeyedDropout(_Keyed):
    """``nn.Dropout`` (Srivastava et al., 2014) with a generator for each sample."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``float[B, ...]`` -> the same shape."""
        if not self.training:
            return hidden_states
        mask = self._mask(hidden_states)
        return nn.functional.dropout(hidden_states, self.probability) if mask is None else hidden_states * mask

    @torch.compiler.disable
    def _mask(self, hidden_states: Tensor) -> Tensor | None:
        seeds = self.randomness.take(self, len(hidden_states))
        if seeds is None:
            return None
        # Maps are drawn channels last, the layout of the networks: the product then walks over both in one order.
        is_map = hidden_states.ndim == 4
        shape = hidden_states.permute(0, 2, 3, 1).shape if is_map else hidden_states.shape
        keep = torch.empty(shape, dtype=torch.bool, device=hidden_states.device)
        generator = torch.Generator(device=keep.device)
        # Sixteen bits decide on a value, so four values share a draw: probabilities are multiples of 2^-16.
        steps = round(self.probability * 2**16)
        for row, seed in zip(keep, seeds, strict=True):
            draws = torch.empty(-(-row.numel() // 4), dtype=torch.int64, device=row.device)
            draws.random_(-(2**63), None, generator=generator.manual_seed(int(seed >> np.uint64(1))))
            values = draws.view(torch.int16)[: row.numel()].view(row.shape)  # even in -2^15 .. 2^15 - 1
            torch.ge(values, steps - 2**15, out=row)
        mask = keep.to(hidden_states.dtype).mul_(2**16 / (2**16 - steps))
        return mask.permute(0, 3, 1, 2) if is_map else mask


class KeyedDropPath(_Keyed):
    """Stochastic depth (Huang et al., 2016): drops a residual branch of a sample."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``float[B, ...]`` -> the same shape."""
        if not self.training:
            return hidden_states
        # [B] -> [B, 1, ..., 1]
        keep = self._keep(hidden_states).reshape(-1, *[1] * (hidden_states.ndim - 1))
        return hidden_states * keep

    @torch.compiler.disable
    def _keep(self, hidden_states: Tensor) -> Tensor:
        draws = self.randomness.take(self, len(hidden_states))
        uniform = torch.rand(len(hidden_states)) if draws is None else torch.from_numpy(draws / 2.0**64)
        return ((uniform >= self.probability) / (1 - self.probability)).to(hidden_states)


def key_dropout(model: nn.Module) -> SampleRandomness:
    """Replaces a network's dropout and stochastic depth by keyed ones; parameters and their names stay.

    Returns:
        What must be told the keys of a batch before each forward pass in training mode.
    """
    randomness = SampleRandomness()
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Dropout) and module.p > 0:
                keyed: _Keyed = KeyedDropout(module.p, randomness)
            elif getattr(module, "drop_prob", None) and not list(module.children()):
                # Every family of transformers has a DropPath class of its own; they share this attribute.
                keyed = KeyedDropPath(float(module.drop_prob), randomness)
            else:
                continue
            parent.add_module(name, keyed.train(module.training))
    model.register_forward_hook(lambda *_: randomness.end())
    return randomness
