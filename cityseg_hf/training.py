"""The training loop: step, validate, save. It deals in optimiser steps only."""

import time
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from accelerate.utils.memory import should_reduce_batch_size
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from cityseg_hf import checkpoint as ckpt
from cityseg_hf.config import Config
from cityseg_hf.cost import Stopwatch, write_cost
from cityseg_hf.data.augment import TrainTransform
from cityseg_hf.data.cityscapes import IMAGE_SUFFIX
from cityseg_hf.data.loading import SegmentationDataset, TrainBatches, make_loader, on_device, raise_errors
from cityseg_hf.data.sources import Source, selection_split, test_split
from cityseg_hf.data.transforms import EvalTransform
from cityseg_hf.errors import ProcessLost, Stopped
from cityseg_hf.evaluation import evaluate, evaluation_loader, judge
from cityseg_hf.inference import load_model_folder
from cityseg_hf.launch import StopSignals, agreed, lost_process
from cityseg_hf.losses import class_weights
from cityseg_hf.memory import out_of_memory
from cityseg_hf.optim import Plan
from cityseg_hf.reporting import Reporter
from cityseg_hf.runs import RunFolder
from cityseg_hf.step import TrainStep
from cityseg_hf.tracking import Tracking

ASK_EVERY = 10
"""Steps between two questions that make the host wait for a GPU."""


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
        self.train_set = SegmentationDataset(sources["train"], transform, seed=config.train.seed)
        # Looked up now: a fault of the test labels must not cost a training.
        self.test_split = test_split(sources)
        batches = self._batches()
        self.plan = Plan.of(config.train, batches.steps_per_epoch, config.run.save_every, config.run.stop_after)
        self.tracking = Tracking(accelerator, config, run.path)
        self.reporter = Reporter(
            accelerator,
            run,
            self.tracking,
            self.plan,
            global_batch=batches.global_batch,
            logging_steps=config.run.logging_steps,
        )
        kind, scores = config.train.class_weights, self.reporter.train_scores
        weights = None if kind == "none" else class_weights(sources["train"].count_classes(), kind)
        self.step = TrainStep(config, accelerator, model, self.plan, transform.augment, weights, scores)
        self.progress = ckpt.Progress()
        # All state that a run goes on from is registered here, once.
        self.parts = {**self.step.parts(), "progress": self.progress, "train_scores": scores}
        self.checkpoints = ckpt.Checkpoints(run.path, config.run.keep_checkpoints)

    def fit(self) -> dict[str, Any]:
        """Trains to the end, from where an earlier run of the same command stopped, and tests the saved models.

        Returns:
            The content of ``results.json``.

        Raises:
            Stopped: a signal asked for it; the state is saved.
            UserError: a fault of the data, a checkpoint that does not fit, or memory or disk that do not suffice.
            ProcessLost: another process is gone.
        """
        signals = StopSignals()
        try:
            self._resume()
            self.tracking.start(self.step.network.config.model_type, self.progress.tracker_run_id)
            self.progress.tracker_run_id = self.tracking.run_id or self.progress.tracker_run_id
            if not self.progress.stopped_early:
                self._train(signals)
            results = self._test(signals)
        except Exception as error:
            if should_reduce_batch_size(error):
                raise out_of_memory(self.config, self.image_size) from None
            if lost_process(error):
                saved = self.checkpoints.saved_step or 0
                raise ProcessLost(
                    f"another process is gone, seen at step {self.progress.step}: see what it says, and run the same "
                    f"command again to go on from step {saved}"
                ) from None
            raise
        finally:
            self.checkpoints.wait()
        if self.accelerator.is_main_process:
            write_cost(self.run.path, self.progress, self.reporter.global_batch, self.accelerator.device)
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
        whole, torn = self.checkpoints.newest()
        for line in torn:
            self.reporter.say(line)
        if whole is not None:
            ckpt.restore(whole, self.parts)
            self.checkpoints.saved_step = self.progress.step
            self.reporter.say(f"going on from step {self.progress.step} of {self.plan.total_steps}")
        self.run.forget_after(self.progress.step)
        self.accelerator.wait_for_everyone()

    def _train(self, signals: StopSignals) -> None:
        batches = self._batches()
        batches.first_step, batches.last_step = self.progress.step, self.plan.total_steps
        device, workers = self.accelerator.device, self.config.run.num_workers
        loader = make_loader(self.train_set, batches, num_workers=workers, pin_memory=device.type == "cuda")
        stream = on_device(raise_errors(loader), device)
        self.step.train()
        saved_at, watch = time.monotonic(), Stopwatch(self.progress, device)
        with self.reporter.bar(self.progress.step) as bar:
            while self.progress.step < self.plan.total_steps and not self.progress.stopped_early:
                if self.plan.pauses_at(self.progress.step):
                    raise Stopped(f"--stop_after {self.config.run.stop_after}: run the command without it to go on")
                rate = self.step.rate
                accumulated = list(islice(stream, self.config.train.gradient_accumulation_steps))
                loss = self.step(accumulated, self.progress.step)
                self.progress.step += 1
                step = self.progress.step
                self.reporter.after_step(step, loss, rate, self.step.skipped, bar)
                if self.plan.validates_at(step):
                    watch.lap("train_seconds")
                    self._validate()
                    watch.lap("validation_seconds")
                if self._host_may_wait:
                    self.step.skipped.check(self.config.run.max_skipped_steps, self._names(accumulated))
                late = time.monotonic() - saved_at > (self.plan.save_seconds or float("inf"))
                stop, late = self._agreed(signals.received is not None, late)
                if self.plan.saves_at(step) or self.progress.stopped_early or late or stop:
                    watch.lap("train_seconds")
                    self._save()
                    saved_at = time.monotonic()
                if stop:
                    self.checkpoints.wait()
                    why = signals.received or "a signal to another process"
                    raise Stopped(f"{why} at step {step}; run the same command again to go on")

    def _names(self, batches: list[dict[str, Any]]) -> list[str]:
        names = self.train_set.source.names
        return [names[index] + IMAGE_SUFFIX for batch in batches for _, _, index in batch["key"]]

    @property
    def _host_may_wait(self) -> bool:
        """A CPU's numbers are there; asking a GPU makes the host wait for it, which is too dear at every step."""
        return self.accelerator.device.type == "cpu" or self.progress.step % ASK_EVERY == 0

    def _agreed(self, *wishes: bool) -> list[bool]:
        if self.accelerator.num_processes > 1 and not self._host_may_wait:
            return [False] * len(wishes)
        return agreed(self.accelerator, *wishes)

    def _validate(self) -> None:
        split, step = selection_split(self.sources), self.progress.step
        judged = self.step.judged()
        loader = self._evaluation_loader(split)
        scores = dict(evaluate(judged, loader, title=split))
        better = self.progress.note_validation(scores["miou"], scores.get("loss", float("nan")))
        self.reporter.after_validation(step, split, scores, better)
        self.tracking.log_panel(judged, loader.dataset, step)
        for name in (*better, "last"):
            self._save_model(name, judged)
        patience = self.config.train.early_stopping_patience
        wish = torch.tensor(0 < patience <= self.progress.validations_without_gain, device=self.accelerator.device)
        # All processes have the same scores; the main one's word makes sure that they stop together.
        self.progress.stopped_early = bool(broadcast(wish.int()).item())
        if self.progress.stopped_early:
            self.reporter.say(f"stopping early: {patience} validations without a lower loss")
        self.step.train()

    def _evaluation_loader(self, split: str) -> DataLoader:
        dataset = SegmentationDataset(self.sources[split], EvalTransform(self.image_size), instances=True)
        return evaluation_loader(
            dataset, batch_size=self.config.train.batch_size, num_workers=self.config.run.num_workers
        )

    def _save_model(self, name: str, judged: PreTrainedModel) -> None:
        if self.accelerator.is_main_process:
            ckpt.save_model_folder(self.run.path / name, judged, self.processor)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        self.reporter.train_scores.collect()
        main = self.accelerator.is_main_process
        if main:
            self.run.sync()
        if main or self.step.engine.gathers:
            self.checkpoints.save(self.progress.step, self.parts, writes=main)

    def _test(self, signals: StopSignals) -> dict[str, Any]:
        """Tests each of the three saved models, reloaded as a user would."""
        tested, records = {}, {}
        for name in ("best_miou", "best_loss", "last"):
            if agreed(self.accelerator, signals.received is not None)[0]:
                raise Stopped(
                    f"{signals.received or 'a signal'} before the final test of {name}; run the command again"
                )
            model, _ = load_model_folder(self.run.path / name)
            model.to(self.accelerator.device)
            judged = judge(model, self._evaluation_loader(self.test_split), title=f"test {name}")
            tested[name] = dict(judged.scores())
            records[name] = {"split": self.test_split, **judged.record()}
        self.run.write_evaluation(records)
        for name, scores in tested.items():
            self.reporter.after_test(self.progress.step, self.test_split, name, scores)
        return {
            name: {f"{self.test_split}/{key}": value for key, value in scores.items()}
            for name, scores in tested.items()
        }
