"""The training loop: step, validate, save. It deals in optimiser steps only."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from cityseg_hf import checkpoint as ckpt
from cityseg_hf.config import Config
from cityseg_hf.data.augment import TrainTransform
from cityseg_hf.data.loading import (
    SegmentationDataset,
    TrainBatches,
    make_loader,
    on_device,
    raise_errors,
    random_seed,
)
from cityseg_hf.data.sources import Source, selection_split, test_split
from cityseg_hf.data.transforms import EvalTransform, normalize
from cityseg_hf.errors import Stopped
from cityseg_hf.evaluation import evaluate, evaluation_loader
from cityseg_hf.inference import load_model_folder, predict
from cityseg_hf.launch import StopSignals, prepare_network
from cityseg_hf.losses import Criterion, class_weights, label_mass
from cityseg_hf.models import freeze_batchnorm
from cityseg_hf.optim import Plan, make_optimizer, rate_factor
from cityseg_hf.reporting import Reporter
from cityseg_hf.runs import RunFolder
from cityseg_hf.tracking import Tracking


class Trainer:
    """Trains one network into one run folder.

    Args:
        config: all settings.
        accelerator: from ``launch.make_accelerator``.
        model: with its initial weights.
        sources: ``train``, ``val`` and perhaps ``holdout`` and ``test``.
        image_size: the height and width whole images are resized to.
        run: the opened run folder.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: PreTrainedModel,
        sources: dict[str, Source],
        image_size: tuple[int, int],
        run: RunFolder,
    ) -> None:
        self.config, self.accelerator, self.sources, self.run = config, accelerator, sources, run
        self.image_size, self.processor = image_size, ckpt.image_processor(image_size)
        transform = TrainTransform(config.data, image_size)
        self.augment = transform.augment
        self.train_set = SegmentationDataset(sources["train"], transform, seed=config.train.seed)
        # Looked up now: a fault of the test labels must not cost a training.
        self.test_split = test_split(sources)
        self.progress = ckpt.Progress()
        batches = self._batches()
        self.plan = Plan.of(config.train, batches.steps_per_epoch)
        self.tracking = Tracking(accelerator, config, run.path)
        self.reporter = Reporter(
            accelerator,
            run,
            self.tracking,
            self.plan,
            global_batch=batches.global_batch,
            logging_steps=config.run.logging_steps,
        )
        self.network = prepare_network(model, accelerator, compiled=config.train.compile)
        optimizer = make_optimizer(self.network, config.optim)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor(config.optim, self.plan))
        kind = config.train.class_weights
        self.class_weights = None
        if kind != "none":
            self.class_weights = class_weights(sources["train"].count_pixels(), kind).to(accelerator.device)
        criterion = Criterion(
            self.network, config.train.auxiliary_loss_weight, self.class_weights, compiled=config.train.compile
        )
        self.criterion, self.optimizer = accelerator.prepare(criterion, optimizer)
        # All state that a run goes on from is registered here, once; weights and optimiser were by prepare().
        accelerator.register_for_checkpointing(self.progress, self.scheduler)

    def fit(self) -> dict[str, Any]:
        """Trains to the end, from where an earlier run of the same command stopped, and tests the saved models.

        Returns:
            The content of ``results.json``.

        Raises:
            Stopped: a signal asked for it; the state is saved.
            UserError: a fault of the data, or a checkpoint that does not fit.
        """
        signals = StopSignals()
        self._resume()
        self.tracking.start(self.network.config.model_type, self.progress.tracker_run_id)
        self.progress.tracker_run_id = self.tracking.run_id or self.progress.tracker_run_id
        if not self.progress.stopped_early:
            self._train(signals)
        results = self._test(signals)
        self.run.write_results(results)
        self.tracking.finish()
        return results

    def _batches(self) -> TrainBatches:
        train = self.config.train
        return TrainBatches(
            len(self.train_set),
            batch_size=train.batch_size,
            accumulation=train.gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            seed=train.seed,
        )

    def _resume(self) -> None:
        latest = ckpt.latest_checkpoint(self.run.path)
        if latest is not None:
            ckpt.restore_checkpoint(self.accelerator, latest)
            self.reporter.train_scores.restore(self.progress.train_scores)
            self.reporter.say(f"going on from step {self.progress.step} of {self.plan.total_steps}")
        self.run.forget_after(self.progress.step)

    def _train(self, signals: StopSignals) -> None:
        batches = self._batches()
        batches.first_step, batches.last_step = self.progress.step, self.plan.total_steps
        device, workers = self.accelerator.device, self.config.run.num_workers
        loader = make_loader(self.train_set, batches, num_workers=workers, pin_memory=device.type == "cuda")
        stream = on_device(raise_errors(loader), device)
        self._set_train_mode()
        with self.reporter.bar(self.progress.step) as bar:
            while self.progress.step < self.plan.total_steps and not self.progress.stopped_early:
                rate = self.scheduler.get_last_lr()[0]
                loss = self._step(stream)
                self.progress.step += 1
                self.reporter.after_step(self.progress.step, loss, rate, bar)
                if self.plan.validates_at(self.progress.step):
                    self._validate()
                    self._save()
                if signals.agreed(self.accelerator, self.progress.step):
                    self._save()
                    why = signals.received or "a signal to another process"
                    raise Stopped(f"{why} at step {self.progress.step}; run the same command again to go on")

    def _set_train_mode(self) -> None:
        self.criterion.train()
        if self.config.model.freeze_batchnorm:
            freeze_batchnorm(self.network.modules())

    def _step(self, stream: Iterator[dict[str, Any]]) -> Tensor:
        """One optimiser step; returns this process's share of the global batch's mean loss."""
        accelerator, train = self.accelerator, self.config.train
        # The masks of dropout belong to the samples. Whatever else a network draws depends on the step and no more.
        torch.manual_seed(random_seed(train.seed, self.progress.step, accelerator.process_index))
        batches = list(islice(stream, train.gradient_accumulation_steps))
        # The mean is over the valid pixels of the whole global batch: a mean of means would weight void unequally.
        valid = torch.stack([label_mass(batch["labels"], self.class_weights) for batch in batches]).sum()
        valid = accelerator.reduce(valid, "sum").clamp(min=1)
        total = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(batches, start=1):
            # Gradients cross processes once a step, with the last batch.
            with nullcontext() if number == len(batches) else accelerator.no_sync(self.criterion):
                pixel_values, labels = self.augment(batch["pixel_values"], batch["labels"], batch["augmentation"])
                loss, logits = self.criterion(pixel_values, labels, batch["key"])
                loss = loss / valid
                # Data parallelism averages gradients over processes; the division by valid has done so already.
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
            self.reporter.train_scores.update(logits, labels)
        if self.config.optim.max_grad_norm is not None:
            accelerator.clip_grad_norm_(self.criterion.parameters(), self.config.optim.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return total

    def _validate(self) -> None:
        split, step = selection_split(self.sources), self.progress.step
        self._share_buffers()
        loader = self._evaluation_loader(split)
        scores = dict(evaluate(self.network, loader, title=split))
        better = self.progress.note_validation(scores["miou"], scores.get("loss", float("nan")))
        self.reporter.after_validation(step, split, scores, better)
        self._send_panel(loader)
        for name in (*better, "last"):
            self._save_model(name)
        patience = self.config.train.early_stopping_patience
        wish = torch.tensor(0 < patience <= self.progress.validations_without_gain, device=self.accelerator.device)
        # All processes have the same scores; the main one's word makes sure that they stop together.
        self.progress.stopped_early = bool(broadcast(wish.int()).item())
        if self.progress.stopped_early:
            self.reporter.say(f"stopping early: {patience} validations without a lower loss")
        self._set_train_mode()

    def _share_buffers(self) -> None:
        """Gives every process the main one's statistics of batch normalisation, so that all judge the same network."""
        if self.accelerator.num_processes > 1:
            for buffer in self.network.buffers():
                broadcast(buffer)

    def _evaluation_loader(self, split: str) -> DataLoader:
        dataset = SegmentationDataset(self.sources[split], EvalTransform(self.image_size), instances=True)
        return evaluation_loader(
            dataset, batch_size=self.config.train.batch_size, num_workers=self.config.run.num_workers
        )

    def _send_panel(self, loader: DataLoader) -> None:
        if self.tracking.alive:
            sample = loader.dataset[(0, 0)]
            pixel_values = normalize(sample["pixel_values"].to(self.accelerator.device))
            predictions = predict(self.network, pixel_values[None], tuple(sample["labels"].shape))
            self.tracking.log_panel(pixel_values, sample["labels"], predictions[0], self.progress.step)

    def _save_model(self, name: str) -> None:
        if self.accelerator.is_main_process:
            ckpt.save_model_folder(self.run.path / name, self.network, self.processor)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        self.progress.train_scores = self.reporter.train_scores.gather()
        ckpt.save_checkpoint(self.accelerator, self.run.path, self.progress.step, self.config.run.keep_checkpoints)

    def _test(self, signals: StopSignals) -> dict[str, Any]:
        """Tests each of the three saved models, reloaded as a user would."""
        tested = {}
        for name in ("best_miou", "best_loss", "last"):
            if signals.agreed(self.accelerator, step=0):
                raise Stopped(
                    f"{signals.received or 'a signal'} before the final test of {name}; run the command again"
                )
            model, _ = load_model_folder(self.run.path / name)
            model.to(self.accelerator.device)
            tested[name] = dict(evaluate(model, self._evaluation_loader(self.test_split), title=f"test {name}"))
        for name, scores in tested.items():
            self.reporter.after_test(self.progress.step, self.test_split, name, scores)
        return {
            name: {f"{self.test_split}/{key}": value for key, value in scores.items()}
            for name, scores in tested.items()
        }
