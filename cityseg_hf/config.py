"""Every setting of a training run, documented once. The command line is made from these classes (``cityseg_hf.cli``).

All fields of all classes but ``RunConfig`` can change the result; together they name the run folder.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from cityseg_hf.errors import UserError, one_line


def _flag(default: Any, help: str, *aliases: str, **argparse_options: Any) -> Any:
    """A dataclass field that knows its help text, short flags and argparse options."""
    return field(default=default, metadata={"help": help, "aliases": list(aliases), **argparse_options})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def parse_duration(text: str) -> tuple[float, str]:
    """``500``, ``2e`` or ``10m`` -> the number, and ``""`` for steps, ``"e"`` for epochs or ``"m"`` for minutes.

    Raises:
        UserError: it is none of these, or not above 0; steps are whole.
    """
    found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)([em])", text)
    number = float(found[1] or found[2]) if found else 0.0
    _require(number > 0, f"--save_every takes steps, epochs or minutes, such as 500, 2e or 10m; got {text!r}")
    return number, found[3] or ""


LOSSES = ("ce", "focal", "ohem", "dice", "lovasz", "boundary")


def parse_loss(text: str) -> dict[str, float]:
    """``ce+0.5*lovasz`` -> how much each of ``LOSSES`` counts.

    Raises:
        UserError: it is no such sum.
    """
    shares = {}
    for part in text.replace(" ", "").split("+"):
        found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)\*)?([a-z]+)", part)
        share = float(found[1] or 1) if found else 0.0
        _require(
            share > 0 and found[2] in LOSSES and found[2] not in shares,
            f"--loss is a sum of {', '.join(LOSSES)}, each once, with a factor or without, such as ce+0.5*lovasz; "
            f"got {text!r}",
        )
        shares[found[2]] = share
    return shares


def _check_size(name: str, size: list[int] | None) -> None:
    _require(
        size is None or (len(size) == 2 and min(size) >= 32),
        f"--{name} takes a height and a width of at least 32, for example --{name} 512 1024; got {size}",
    )


def _check_repository(name: str) -> None:
    # The Hub would say so as well, but after the training.
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {name!r} is no name of a repository: {one_line(error)}") from None


@dataclass(frozen=True)
class DataConfig:
    """What is read, and what is done to it before the network sees it."""

    _argument_group_name = "data"

    base_dataset_path: str | None = _flag(
        None, "root that holds leftImg8bit/ and gtFine/, or their zips (default: ./cityscapes_data)", "-d"
    )
    image_size: list[int] | None = _flag(
        None,
        "height and width every whole image is resized to (default: 512 1024, or the images' own size if smaller)",
        metavar=("H", "W"),
        nargs=2,
    )
    crop_size: list[int] | None = _flag(
        None,
        "height and width of the training crops of 'standard' (default: --image_size)",
        metavar=("H", "W"),
        nargs=2,
    )
    augmentation: str = _flag(
        "none",
        "none, flip, original (flip, sharpness, colour jitter, blur) or standard (scale 0.5 to 2, crop, flip, "
        "photometric distortion); the flag alone means original",
        "-a",
        nargs="?",
        const="original",
    )
    scale_range: list[float] | None = _flag(
        None, "lowest and highest scale of 'standard' (default: 0.5 2)", metavar=("LOW", "HIGH"), nargs=2
    )
    rare_class_crops: float = _flag(
        0.0, "share of the crops of 'standard' that are laid around a class drawn evenly of those in the image, 0 to 1"
    )
    holdout_cities: list[str] | None = _flag(
        None, "train cities moved into a selection split of their own, so that val can serve as an honest test"
    )

    def __post_init__(self) -> None:
        _check_size("image_size", self.image_size)
        _check_size("crop_size", self.crop_size)
        # The original's set files and YAML say True and False.
        names = {"true": "original", "false": "none"}
        object.__setattr__(
            self, "augmentation", names.get(str(self.augmentation).lower(), str(self.augmentation).lower())
        )
        known = ("none", "flip", "original", "standard")
        _require(
            self.augmentation in known,
            f"unknown --augmentation {self.augmentation!r}; choose from {', '.join(known)}",
        )
        _require(
            0 <= self.rare_class_crops <= 1, f"--rare_class_crops is a share of 0 to 1, got {self.rare_class_crops}"
        )
        scales = self.scale_range or [0.5, 2.0]
        _require(
            len(scales) == 2 and 0 < scales[0] <= scales[1] <= 10,
            f"--scale_range takes a lowest and a highest scale, such as --scale_range 0.5 2; got {self.scale_range}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Which network, and which weights it starts from."""

    _argument_group_name = "model"

    model_type: str = _flag(
        "resnet_50",
        "a preset (see --list_models), or any semantic-segmentation checkpoint of the Hub or on disk",
        "-m",
        "--model",
    )
    init_from: str | None = _flag(
        None, "weights to start a preset from: a checkpoint folder or Hub name, or 'imagenet' for the resnet presets"
    )
    model_args: list[str] | None = _flag(
        None, "settings of the network's configuration, e.g. norm=group dilation=true", metavar="KEY=VALUE"
    )
    freeze_batchnorm: bool = _flag(False, "keep the statistics of batch normalisation as loaded (small batches)")


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule."""

    _argument_group_name = "optimisation"

    learning_rate: float | None = _flag(
        None, "peak learning rate (default: 1e-3 from random weights, 1e-4 from given ones)", "-l"
    )
    weight_decay: float = _flag(1e-4, "weight decay; never on norms and biases", "-w")
    optimizer: Literal["adamw", "sgd"] = _flag("adamw", "optimiser")
    momentum: float = _flag(0.9, "momentum of sgd")
    amsgrad: bool = _flag(False, "the AMSGrad variant of adamw, as the original used")
    schedule: Literal["exponential", "poly", "cosine", "constant"] | None = _flag(
        None, "learning-rate schedule (default: exponential where -g is given, else poly)"
    )
    gamma: float | None = _flag(None, "factor of the exponential schedule, once an epoch (default there: 0.99)", "-g")
    poly_power: float = _flag(1.0, "power of the poly schedule")
    min_lr_ratio: float = _flag(0.0, "share of the peak rate that poly and cosine end at")
    warmup_steps: int = _flag(0, "optimiser steps of linear warm-up")
    warmup_ratio: float = _flag(1e-6, "share of the rate that the warm-up starts from")
    head_lr_multiplier: float = _flag(1.0, "factor on the learning rate of the decode head")
    max_grad_norm: float | None = _flag(None, "clip gradients to this norm")

    def __post_init__(self) -> None:
        _require(
            self.learning_rate is None or 0 < self.learning_rate < float("inf"),
            f"--learning_rate must be a number above 0, got {self.learning_rate}",
        )
        for name in ("weight_decay", "head_lr_multiplier"):
            _require(
                0 <= getattr(self, name) < float("inf"),
                f"--{name} must be a number that is not negative, got {getattr(self, name)}",
            )
        _require(self.gamma is None or 0 < self.gamma <= 1, f"--gamma must lie in (0, 1], got {self.gamma}")
        _require(self.warmup_steps >= 0, f"--warmup_steps must not be negative, got {self.warmup_steps}")
        _require(0 <= self.momentum < 1, f"--momentum must lie in [0, 1), got {self.momentum}")
        _require(self.poly_power > 0, f"--poly_power must be above 0, got {self.poly_power}")
        for name in ("min_lr_ratio", "warmup_ratio"):
            _require(0 <= getattr(self, name) <= 1, f"--{name} must lie in [0, 1], got {getattr(self, name)}")
        _require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            f"--max_grad_norm must be above 0, got {self.max_grad_norm}",
        )
        if self.gamma is not None and self.schedule not in (None, "exponential"):
            raise UserError(f"--gamma belongs to --schedule exponential, not to {self.schedule}: drop one of the two")
        if self.schedule is None:
            object.__setattr__(self, "schedule", "poly" if self.gamma is None else "exponential")
        if self.schedule == "exponential" and self.gamma is None:
            object.__setattr__(self, "gamma", 0.99)


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, and what is judged on the way."""

    _argument_group_name = "training"

    num_epochs: int = _flag(80, "epochs", "-e")
    max_steps: int | None = _flag(None, "optimiser steps; overrides --num_epochs")
    batch_size: int = _flag(16, "images per process and step", "-b")
    gradient_accumulation_steps: int = _flag(1, "batches that make one optimiser step")
    global_batch_size: int | None = _flag(
        None, "images per optimiser step over all processes; --batch_size follows from it"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = _flag(
        None,
        "precision of the forward pass (default: what accelerate was launched with; where that is fp32, bf16 on GPUs "
        "that have it)",
    )
    compile: bool = _flag(
        False, "compile the network block by block, and the loss (torch.compile): slow to start, then faster"
    )
    auxiliary_loss_weight: float = _flag(0.4, "weight of the auxiliary head's loss, for networks that have one")
    ema_decay: float | None = _flag(
        None,
        "judge and save a moving average of the weights that keeps this share of itself at each step, such as 0.999",
    )
    loss: str = _flag(
        "ce",
        "what is trained: a sum of ce (cross-entropy), focal, ohem, dice, lovasz and boundary, such as ce+0.5*lovasz",
    )
    class_weights: Literal["none", "enet", "enet_sqrt", "inverse", "median", "effective"] = _flag(
        "none",
        "weights of the classes in the loss, from the training labels: 1 / ln(1.02 + share), its square root, "
        "1 / share, median frequency by its own, or 1 / effective number of images",
    )
    val_freq: int = _flag(1, "validate every f epochs", "-f")
    early_stopping_patience: int = _flag(
        20, "stop after so many validations without a lower loss; 0 never stops early", "-p"
    )
    seed: int = _flag(0, "seed of everything random")
    deterministic: bool = _flag(
        False, "use only algorithms that give the same bits every time (slower on GPUs; CPUs do so anyway)"
    )

    def __post_init__(self) -> None:
        for name in ("num_epochs", "batch_size", "gradient_accumulation_steps", "val_freq"):
            _require(getattr(self, name) >= 1, f"--{name} must be at least 1, got {getattr(self, name)}")
        _require(
            self.global_batch_size is None or self.global_batch_size >= 1,
            f"--global_batch_size must be at least 1, got {self.global_batch_size}",
        )
        _require(self.max_steps is None or self.max_steps >= 1, f"--max_steps must be at least 1, got {self.max_steps}")
        _require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"--ema_decay must lie between 0 and 1, for example 0.999; got {self.ema_decay}",
        )
        _require(
            0 <= self.auxiliary_loss_weight < float("inf"),
            f"--auxiliary_loss_weight must be a number that is not negative, got {self.auxiliary_loss_weight}",
        )
        parse_loss(self.loss)
        _require(self.early_stopping_patience >= 0, "--early_stopping_patience must not be negative (0: never stop)")
        _require(0 <= self.seed < 2**32, f"--seed must lie in 0..{2**32 - 1}, got {self.seed}")

    def split(self, batch_size: int, accumulation: int) -> "TrainConfig":
        """These settings with another cut of the same global batch."""
        return dataclasses.replace(self, batch_size=batch_size, gradient_accumulation_steps=accumulation)

    def for_processes(self, num_processes: int) -> "TrainConfig":
        """These settings with the batch size per process that makes the global one.

        Raises:
            UserError: the global batch cannot be shared evenly.
        """
        if self.global_batch_size is None:
            return self
        shares = num_processes * self.gradient_accumulation_steps
        if self.global_batch_size % shares:
            raise UserError(
                f"a global batch of {self.global_batch_size} cannot be shared by {num_processes} processes x "
                f"{self.gradient_accumulation_steps} accumulated batches: give --batch_size instead"
            )
        return dataclasses.replace(self, batch_size=self.global_batch_size // shares)


@dataclass(frozen=True)
class RunConfig:
    """Where things go and who is told: nothing here changes a number."""

    _argument_group_name = "run"

    save_model_path: str = _flag("./saved_models", "where run folders are made", "-s", "--output_dir")
    run_name: str | None = _flag(None, "name of the run folder (default: made from every setting that counts)")
    prepared: str | None = _flag(
        None, "folder of scripts/prepare_data.py to read from, instead of decoding the download", metavar="DIR"
    )
    num_workers: int = _flag(2, "processes that load data, per training process")
    logging_steps: int = _flag(10, "write the training loss every so many steps")
    save_every: str | None = _flag(
        None, "save a checkpoint every so many steps (500), epochs (2e) or minutes (10m); default: with each validation"
    )
    keep_checkpoints: int = _flag(2, "how many checkpoints stay on disk", "--keep")
    max_skipped_steps: int = _flag(
        10, "stop after so many steps in a row whose loss or gradient is not finite (they are skipped)"
    )
    find_batch_size: bool = _flag(
        False, "lower --batch_size until it fits the memory, and accumulate to keep the global batch"
    )
    report_to: Literal["none", "wandb", "tensorboard", "trackio"] = _flag("none", "experiment tracker")
    project_name: str = _flag("Image-Segmentation", "project of the tracker")
    push_to_hub: str | None = _flag(None, "Hub repository that gets the best model at the end", metavar="REPO")

    def __post_init__(self) -> None:
        _require(self.num_workers >= 0, f"--num_workers must not be negative, got {self.num_workers}")
        _require(self.logging_steps >= 1, f"--logging_steps must be at least 1, got {self.logging_steps}")
        _require(self.keep_checkpoints >= 1, f"--keep_checkpoints must be at least 1, got {self.keep_checkpoints}")
        _require(self.max_skipped_steps >= 1, f"--max_skipped_steps must be at least 1, got {self.max_skipped_steps}")
        if self.save_every is not None:
            parse_duration(self.save_every)
        if self.push_to_hub is not None:
            _check_repository(self.push_to_hub)
        name = self.run_name
        if name is not None and (Path(name).name != name or name in ("", "..") or len(name.encode()) > 200):
            raise UserError(f"--run_name must be a plain folder name of 200 letters at most, got {name!r}")


@dataclass(frozen=True)
class Config:
    """A whole training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.optim.learning_rate is None:
            starts_random = self.model.init_from is None and not _is_checkpoint(self.model.model_type)
            rate = 1e-3 if starts_random else 1e-4
            object.__setattr__(self, "optim", dataclasses.replace(self.optim, learning_rate=rate))

    def settings(self) -> dict[str, Any]:
        """Every setting that can change the result, flat, by the name of its flag."""
        parts = (self.data, self.model, self.optim, self.train)
        return {name: value for part in parts for name, value in dataclasses.asdict(part).items()}

    def identity(self, num_processes: int) -> dict[str, Any]:
        """What makes two runs the same: the settings, but of the batch only how large it is over all processes."""
        settings = self.settings()
        shares = [settings.pop(name) for name in ("batch_size", "gradient_accumulation_steps", "global_batch_size")]
        settings["global_batch_size"] = shares[2] or shares[0] * shares[1] * num_processes
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Every setting, flat, by the name of its flag."""
        return {**self.settings(), **dataclasses.asdict(self.run)}

    def run_name(self, num_processes: int = 1) -> str:
        """The name of the run folder: ``--run_name``, or one that no run with another setting shares.

        The settings people vary are spelled out; a hash of all of them keeps the others apart. Of the batch the global
        one counts, so that a run can go on with another number of processes.
        """
        if self.run.run_name:
            return self.run.run_name
        settings = self.identity(num_processes)
        # The same data may be mounted elsewhere next time: where it lies does not change the result.
        settings["base_dataset_path"] = Path(settings["base_dataset_path"] or "synthetic").name
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
        train, optim = self.train, self.optim
        length = f"s{train.max_steps}" if train.max_steps else f"e{train.num_epochs}"
        parts = [
            Path(self.model.model_type).name[:100],
            self.data.augmentation,
            length,
            f"b{settings['global_batch_size']}",
        ]
        parts += [f"lr{optim.learning_rate:g}", f"wd{optim.weight_decay:g}"]
        parts += [f"g{optim.gamma:g}" if optim.gamma else optim.schedule, f"seed{train.seed}", digest]
        return "_".join(parts)


def _is_checkpoint(model_type: str) -> bool:
    """Presets are plain names; everything else is a folder or a Hub name."""
    return "/" in model_type or Path(model_type).is_dir()
