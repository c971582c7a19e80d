"""What a run says while it goes: progress bar, terminal lines, metrics.jsonl and tracker, through one place."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from cityseg_hf.errors import LocalFault
from cityseg_hf.labels import NUM_CLASSES
from cityseg_hf.metrics import class_scores, confusion_matrix
from cityseg_hf.optim import Plan
from cityseg_hf.runs import RunFolder
from cityseg_hf.tracking import Tracking
from cityseg_hf.upsampled import argmax


class TrainScores:
    """Running scores over the training batches of an epoch, on the device, part of every checkpoint.

    They are taken at the network's stride on augmented crops: a trend to watch for the price of a small argmax, not a
    figure to compare.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.counts = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64, device=accelerator.device)
        # Sums of float32 are exact in float64, in whatever order processes and resumed runs add them.
        self.loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch: ``float[B, 19, h, w]``, ``uint8`` or ``long[B, H, W]``."""
        size = tuple(logits.shape[-2:])
        small = nn.functional.interpolate(labels[:, None].to(torch.uint8), size=size)[:, 0]  # [B, h, w]
        self.counts += confusion_matrix(argmax(logits, size), small)

    def pop(self, steps: int) -> dict[str, float | None]:
        """The scores of all processes over the last ``steps`` steps, and a fresh start. A collective call."""
        counts, loss = self._sums()
        scores = {name: value for name, value in class_scores(counts.cpu()) if name in ("miou", "dice")}
        self.counts.zero_()
        self.loss.zero_()
        return {"loss": loss.item() / steps, **scores}

    def _sums(self) -> tuple[Tensor, Tensor]:
        return self.accelerator.reduce(self.counts, "sum"), self.accelerator.reduce(self.loss, "sum")

    def collect(self) -> None:
        """Brings the sums of all processes to the main one, before it saves them. A collective call."""
        counts, loss = self._sums()
        self.counts.copy_(counts * self.accelerator.is_main_process)
        self.loss.copy_(loss * self.accelerator.is_main_process)

    def state_dict(self) -> dict[str, Any]:
        """This process's sums."""
        return {"counts": self.counts, "loss": self.loss}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes saved sums; the main process holds them, as they will be summed over processes again."""
        if self.accelerator.is_main_process:
            self.counts.copy_(saved["counts"])
            self.loss.copy_(saved["loss"])


class Skipped:
    """How many steps were skipped, in a row and in all, counted on the device."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    def note(self, bad: Tensor) -> None:
        """Takes in a step: ``bool`` scalar."""
        self.counts[0] = (self.counts[0] + 1) * bad
        self.counts[1] += bad

    def read(self) -> tuple[int, int]:
        """In a row and in all; the host waits for the device."""
        in_a_row, in_all = self.counts.tolist()
        return in_a_row, in_all

    def check(self, limit: int, images: list[str]) -> None:
        """Stops a run that has gone astray; ``images`` are the files of the last step.

        Raises:
            LocalFault: ``limit`` steps in a row were skipped.
        """
        in_a_row = self.read()[0]
        if in_a_row >= limit:
            raise LocalFault(
                f"{in_a_row} steps in a row had a loss or gradient that is not finite, the last one with "
                f"{', '.join(images)}: lower --learning_rate or set --max_grad_norm"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts.copy_(torch.tensor(state["counts"]))


class Reporter:
    """Tells the person at the terminal, the run folder and the tracker.

    Args:
        accelerator: only its main process speaks.
        run: the run folder.
        tracking: the tracker, or one that is off.
        plan: the run's length.
        global_batch: images per optimiser step.
        logging_steps: how often the training loss is written.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run: RunFolder,
        tracking: Tracking,
        plan: Plan,
        *,
        global_batch: int,
        logging_steps: int,
    ) -> None:
        self.accelerator, self.run, self.tracking, self.plan = accelerator, run, tracking, plan
        self.global_batch, self.logging_steps = global_batch, logging_steps
        self.train_scores, self.skipped_steps = TrainScores(accelerator), 0

    def bar(self, step: int) -> tqdm:
        """A progress bar over optimiser steps with ETA, images/s, loss and learning rate."""
        hidden = not self.accelerator.is_main_process
        total = self.plan.total_steps
        return tqdm(total=total, initial=step, desc="train", unit="step", disable=hidden, dynamic_ncols=True)

    def log(self, step: int, split: str, scores: dict[str, Any]) -> None:
        """A line in metrics.jsonl, and the same to the tracker."""
        self.run.log(step, step / self.plan.steps_per_epoch, split, scores)
        self.tracking.log(split, scores, step)

    def after_step(self, step: int, loss: Tensor, rate: float, skipped: Skipped, bar: tqdm) -> None:
        """Takes in a step: ``loss`` is this process's share of the global batch's mean. The host waits only to log."""
        self.train_scores.loss += loss.nan_to_num(0.0, 0.0, 0.0)
        if step % self.logging_steps == 0 or step == self.plan.total_steps:
            value = self.accelerator.reduce(loss, "sum").item()
            in_all = skipped.read()[1]
            self.log(step, "train", {"loss": value, "learning_rate": rate, "skipped_steps": in_all})
            if in_all > self.skipped_steps:
                self.say(f"step {step}: {in_all} steps were skipped so far, their loss or gradient was not finite")
            self.skipped_steps = in_all
            speed = (bar.format_dict["rate"] or 0.0) * self.global_batch
            bar.set_postfix(loss=f"{value:.3f}", lr=f"{rate:.2e}", images_per_s=f"{speed:.1f}", refresh=False)
        bar.update()
        if step % self.plan.steps_per_epoch == 0:
            self.log(step, "train_epoch", self.train_scores.pop(self.plan.steps_per_epoch))

    def say(self, line: str) -> None:
        """A line above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(line)

    def after_validation(self, step: int, split: str, scores: dict[str, Any], better: list[str]) -> None:
        """The scores of a validation: on the terminal the two that choose models, in the files all of them."""
        self.log(step, split, scores)
        shown = [f"{title} {_number(scores.get(name))}" for title, name in (("mIoU", "miou"), ("loss", "loss"))]
        mark = f" (new {' and '.join(better)})" if better else ""
        self.say(f"epoch {step / self.plan.steps_per_epoch:g}, step {step}: {split} {', '.join(shown)}{mark}")

    def after_test(self, step: int, split: str, model: str, scores: dict[str, Any]) -> None:
        """The final scores of a saved model."""
        self.run.log(step, step / self.plan.steps_per_epoch, split, {"model": model, **scores})
        self.tracking.log(f"test/{model}", scores, step)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
