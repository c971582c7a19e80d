"""Trains a network. Run the same command again to go on; a finished run says so.

accelerate launch scripts/train.py --model segformer_small
"""

import dataclasses
import os
import tempfile
from pathlib import Path

import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from cityseg_hf import PRESETS, build_model, load_cityscapes, make_synthetic
from cityseg_hf.cli import exit_with, parse_train_args
from cityseg_hf.config import Config, DataConfig
from cityseg_hf.data.cityscapes import DEFAULT_ROOT
from cityseg_hf.data.prepared import open_prepared
from cityseg_hf.data.sources import Source, file_sources, image_size_of
from cityseg_hf.errors import UserError, one_line
from cityseg_hf.hub import push_model_folder
from cityseg_hf.launch import make_accelerator
from cityseg_hf.memory import find_batch_size
from cityseg_hf.runs import RunFolder, describe_run
from cityseg_hf.training import Trainer

SYNTHETIC = {"train": 96, "val": 24, "test": 0, "size": (128, 256), "seed": 0}


def default_recipe(data: str | None) -> str | None:
    """The recipe when none was asked for: the small one where the built-in streets are all there is."""
    return "synthetic" if data is None and not Path(DEFAULT_ROOT).is_dir() else None


def data_root(config: Config, accelerator: Accelerator) -> Path:
    """Where the data lies; makes the built-in streets where no data was named and the default place is empty."""
    if config.data.base_dataset_path is not None:
        return Path(config.data.base_dataset_path)
    if Path(DEFAULT_ROOT).is_dir():
        return Path(DEFAULT_ROOT)
    height, width = SYNTHETIC["size"]
    accelerator.print(
        f"NO CITYSCAPES at {DEFAULT_ROOT} and no -d given: training on {SYNTHETIC['train']} SYNTHETIC streets of "
        f"{height}x{width}. The scores say nothing about Cityscapes."
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cityseg_hf"
    root = cache / f"streets_{SYNTHETIC['train']}_{SYNTHETIC['val']}_{height}x{width}_{SYNTHETIC['seed']}"
    with accelerator.local_main_process_first():
        if not root.is_dir():
            try:
                cache.mkdir(parents=True, exist_ok=True)
                # Made beside and renamed: an interrupted start leaves no half a data set behind.
                with tempfile.TemporaryDirectory(dir=cache) as beside:
                    make_synthetic(Path(beside) / "streets", **SYNTHETIC).rename(root)
            except OSError as error:
                if not root.is_dir():  # another launch may have been faster
                    raise UserError(f"cannot write the synthetic streets to {cache}: {error.strerror}") from None
    return root


def open_data(config: Config, accelerator: Accelerator) -> tuple[DataConfig, dict[str, Source]]:
    """The settings of the data with root and image size filled in, and where the splits are read from."""
    if config.run.prepared is not None:
        prepared = open_prepared(config.run.prepared)
        data, sources = prepared.fit(config.data, DEFAULT_ROOT), prepared.sources
    else:
        data = dataclasses.replace(config.data, base_dataset_path=str(data_root(config, accelerator)))
        sources = file_sources(load_cityscapes(data.base_dataset_path, holdout_cities=data.holdout_cities))
    for split in ("train", "val"):
        if split not in sources:
            raise UserError(f"{data.base_dataset_path} has no images in leftImg8bit/{split}")
    return dataclasses.replace(data, image_size=list(data.image_size or image_size_of(sources["train"]))), sources


def model_settings(pairs: list[str] | None) -> dict:
    """``KEY=VALUE`` words -> fields of a network's configuration."""
    settings = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--model_args takes KEY=VALUE, got {pair!r}")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--model_args {pair}: {one_line(error)}") from None
    return settings


def with_fitting_batch(
    config: Config, accelerator: Accelerator, model: PreTrainedModel, image_size: tuple[int, int]
) -> Config:
    """The configuration with a batch size that fits the memory."""
    train = find_batch_size(config, accelerator, model, image_size)
    if train != config.train:
        accelerator.print(
            f"--batch_size {train.batch_size} fits: {train.gradient_accumulation_steps} batches are accumulated a step"
        )
    return dataclasses.replace(config, train=train)


def share(config: Config, accelerator: Accelerator, folder: Path) -> int:
    """Pushes the best model where that was asked for, once no process waits for another."""
    accelerator.end_training()
    if config.run.push_to_hub and accelerator.is_main_process:
        push_model_folder(folder / "best_miou", config.run.push_to_hub)
    return 0


def main(argv: list[str]) -> int:
    if "--list_models" in argv:
        print("\n".join(PRESETS))
        return 0
    config = parse_train_args(argv, default_recipe)
    transformers_logging.disable_progress_bar()
    accelerator = make_accelerator(config)
    data, sources = open_data(config, accelerator)
    config = dataclasses.replace(
        config,
        data=data,
        train=dataclasses.replace(
            config.train.for_processes(accelerator.num_processes), mixed_precision=accelerator.mixed_precision
        ),
    )
    set_seed(config.train.seed)
    settings = model_settings(config.model.model_args)
    model = build_model(config.model.model_type, init_from=config.model.init_from, **settings)
    if config.run.find_batch_size:
        config = with_fitting_batch(config, accelerator, model, tuple(data.image_size))
    folder = Path(config.run.save_model_path) / config.run_name(accelerator.num_processes)
    run = RunFolder(folder, accelerator.is_main_process)
    run.open(describe_run(config, accelerator, sources))
    accelerator.wait_for_everyone()
    accelerator.print(f"run folder: {folder}")
    if run.finished:
        accelerator.print("this run is finished: see results.json")
        return share(config, accelerator, folder)
    results = Trainer(config, accelerator, model, sources, tuple(data.image_size), run).fit()
    for name, scores in results.items():
        line = ", ".join(
            f"{key} {value:.4f}" for key, value in scores.items() if key.count("/") == 1 and value is not None
        )
        accelerator.print(f"{name}: {line}")
    return share(config, accelerator, folder)


if __name__ == "__main__":
    exit_with(main)
