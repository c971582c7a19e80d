"""One optimiser step: forward, loss and backward of a global batch, and an update that skips what is not finite."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from cityseg_hf.checkpoint import Stateful
from cityseg_hf.config import Config, parse_loss
from cityseg_hf.data.augment import Augment
from cityseg_hf.data.loading import random_seed
from cityseg_hf.engines import make_engine
from cityseg_hf.launch import prepare_network, share_buffers
from cityseg_hf.losses import Criterion, label_mass
from cityseg_hf.models import freeze_batchnorm
from cityseg_hf.optim import Plan, average_weights, rate_factor
from cityseg_hf.reporting import Skipped, TrainScores


class TrainStep:
    """Network, loss, optimiser and schedule, prepared for this process and all others.

    A step whose gradient is not finite changes neither weights nor the optimiser's state nor the statistics of batch
    normalisation; all processes see the summed gradient, so that they agree. Schedule and data go on. The host is not
    asked: on a GPU the optimiser's own kernel skips.

    Args:
        config: all settings.
        accelerator: from ``launch.make_accelerator``.
        model: with its initial weights.
        plan: the run's length.
        augment: what is done to a batch on the device.
        class_weights: ``float32[19]`` of the loss, or ``None``.
        scores: counts the training batches.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: PreTrainedModel,
        plan: Plan,
        augment: Augment,
        class_weights: Tensor | None,
        scores: TrainScores,
    ) -> None:
        self.config, self.accelerator, self.augment, self.scores = config, accelerator, augment, scores
        self.network = prepare_network(model, accelerator, compiled=config.train.compile)
        self.class_weights = None if class_weights is None else class_weights.to(accelerator.device)
        # What is judged and saved: the network itself, or the average that follows it.
        decay, self.averaged = config.train.ema_decay, None
        if decay is not None:
            self.averaged = average_weights(self.network, decay).to(accelerator.device)
        criterion = Criterion(
            self.network,
            config.train.auxiliary_loss_weight,
            self.class_weights,
            shares=parse_loss(config.train.loss),
            compiled=config.train.compile,
        )
        self.engine = make_engine(accelerator, self.network, criterion, config.optim)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.engine.optimizer, rate_factor(config.optim, plan))
        self.statistics = [buffer for buffer in self.network.buffers() if buffer.is_floating_point()]
        self.skipped = Skipped(accelerator.device)

    def parts(self) -> dict[str, Stateful]:
        """All that a run goes on from, by the name it has in a checkpoint."""
        found = {**self.engine.parts(), "scheduler": self.scheduler}
        others = {"average": self.averaged, "scaler": self.accelerator.scaler, "skipped": self.skipped}
        return {**found, **{name: part for name, part in others.items() if part is not None}}

    def judged(self) -> PreTrainedModel:
        """The network that is judged and saved, with all its weights as they are now. A collective call."""
        if self.averaged is not None:
            share_buffers(self.accelerator, self.network, self.averaged.module)
            return self.averaged.module
        share_buffers(self.accelerator, self.network)
        self.engine.refresh()
        return self.engine.whole

    def train(self) -> None:
        """Training mode."""
        self.engine.criterion.train()
        if self.config.model.freeze_batchnorm:
            freeze_batchnorm(self.network.modules())

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.scheduler.get_last_lr()[0]

    def __call__(self, batches: Sequence[dict[str, Any]], step: int) -> Tensor:
        """Takes optimiser step number ``step`` (0 is the first) on this process's batches of the global batch.

        Returns:
            ``float32`` scalar: this process's share of the mean loss.
        """
        accelerator = self.accelerator
        # The masks of dropout belong to the samples. Whatever else a network draws depends on the step and no more.
        torch.manual_seed(random_seed(self.config.train.seed, step, accelerator.process_index))
        # The mean is over the valid pixels of the whole global batch: a mean of means would weight void unequally.
        valid = torch.stack([label_mass(batch["labels"], self.class_weights) for batch in batches]).sum()
        valid = accelerator.reduce(valid, "sum").clamp(min=1)
        total = torch.zeros((), device=accelerator.device)
        before = [buffer.clone() for buffer in self.statistics]
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            with self.engine.accumulating(last=last):
                pixel_values, labels = self.augment(batch["pixel_values"], batch["labels"], batch["augmentation"])
                loss, logits = self.engine.forward(pixel_values, labels, batch["key"])
                loss = loss / valid
                self.engine.backward(loss, last=last)
            total += loss.detach()
            self.scores.update(logits, labels)
        self._update(before)
        return total

    def _update(self, before: list[Tensor]) -> None:
        bad = self.engine.update()
        self.scheduler.step()
        self._keep_statistics(bad, before)
        self.skipped.note(bad)
        if self.averaged is not None:
            self.engine.refresh()
            self.averaged.update_parameters(self.engine.whole)

    def _keep_statistics(self, bad: Tensor, before: list[Tensor]) -> None:
        for buffer, old in zip(self.statistics, before, strict=True):
            buffer.copy_(torch.where(bad, old, buffer))
