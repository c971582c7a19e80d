"""Experiment trackers through Accelerate: one run per training, on the main process, never fatal."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from cityseg_hf.config import Config
from cityseg_hf.data.loading import SegmentationDataset
from cityseg_hf.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize
from cityseg_hf.errors import UserError, one_line
from cityseg_hf.inference import predict
from cityseg_hf.labels import PALETTE

logger = logging.getLogger(__name__)


def _never_fatal(method: Callable[..., None]) -> Callable[..., None]:
    """A tracker that is down costs one warning, not the training: all its scores are in the run folder anyway."""

    @functools.wraps(method)
    def guarded(self: "Tracking", *args: Any, **kwargs: Any) -> None:
        if not self.alive:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.alive = False
            logger.warning("%s failed (%s); training goes on without it", self.kind, one_line(error))

    return guarded


class Tracking:
    """Sends configuration, scores and a panel of predictions to the tracker of ``--report_to``.

    Args:
        accelerator: made with ``log_with``.
        config: the run's settings.
        run_folder: where offline files go.
    """

    def __init__(self, accelerator: Accelerator, config: Config, run_folder: Path) -> None:
        self.accelerator, self.config, self.folder = accelerator, config, run_folder
        self.kind = config.run.report_to
        self.alive = self.kind != "none" and accelerator.is_main_process
        if self.kind != "none" and not accelerator.log_with:
            raise UserError(f"--report_to {self.kind}: the package is not there; pip install {self.kind}")

    @_never_fatal
    def start(self, family: str, run_id: str | None = None) -> None:
        """Opens the tracker's run, or goes on with the one of ``run_id``."""
        run = self.config.run
        options: dict[str, dict[str, Any]] = {}
        if self.kind == "wandb":
            options["wandb"] = {"name": self.folder.name, "group": family, "dir": str(self.folder), "resume": "allow"}
            options["wandb"]["id"] = run_id
        elif self.kind == "trackio":
            options["trackio"] = {"name": self.folder.name, "group": family, "resume": "allow"}
        flat = {name: _plain(value) for name, value in self.config.to_dict().items()}
        self.accelerator.project_configuration.logging_dir = str(self.folder)
        self.accelerator.init_trackers(run.project_name, config=flat, init_kwargs=options)

    @property
    def run_id(self) -> str | None:
        """What the tracker calls this run, so that a resumed training goes on with it."""
        if not self.alive or self.kind != "wandb":
            return None
        return getattr(self.accelerator.get_tracker("wandb", unwrap=True), "id", None)

    @_never_fatal
    def log(self, split: str, scores: dict[str, Any], step: int) -> None:
        """Sends scores under ``split/name``."""
        values = {f"{split}/{name}": value for name, value in scores.items() if value is not None}
        self.accelerator.log(values, step=step)

    @_never_fatal
    def log_panel(self, model: PreTrainedModel, dataset: SegmentationDataset, step: int) -> None:
        """Sends the first image of a split, its label and what the network makes of it, side by side.

        Args:
            model: in evaluation mode.
            dataset: images of the split, with labels.
            step: the optimiser step.
        """
        sample = dataset[(0, 0)]
        pixel_values, labels = normalize(sample["pixel_values"].to(self.accelerator.device)), sample["labels"]
        predictions = predict(model, pixel_values[None], tuple(labels.shape))
        panel = make_panel(pixel_values, labels, predictions[0])
        tracker = self.accelerator.get_tracker(self.kind)
        if hasattr(tracker, "log_images"):
            # TensorBoard takes [N, H, W, C] with dataformats, wandb takes a list of [H, W, C].
            options = {"dataformats": "NHWC"} if self.kind == "tensorboard" else {}
            tracker.log_images({"panel/image_label_prediction": panel[None]}, step=step, **options)

    @_never_fatal
    def finish(self) -> None:
        """Closes the tracker's run."""
        # Not end_training(): that also takes down the process group, on this process alone.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers.clear()


def make_panel(pixel_values: Tensor, labels: Tensor, predictions: Tensor) -> np.ndarray:
    """``uint8[H, 3 W, 3]``: image, label and prediction in the Cityscapes colours; void is black."""
    mean, std = (torch.tensor(v, device=pixel_values.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    image = ((pixel_values * std + mean).clamp(0, 1) * 255).round()
    image = torch.nn.functional.interpolate(image[None], size=tuple(labels.shape), mode="nearest")[0]
    pixels = image.permute(1, 2, 0).to(torch.uint8).cpu().numpy()  # [3, H, W] -> [H, W, 3]
    maps = [PALETTE[ids.cpu().numpy().astype(np.uint8)] for ids in (labels, predictions)]
    return np.concatenate([pixels, *maps], axis=1)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool)) else str(value)
