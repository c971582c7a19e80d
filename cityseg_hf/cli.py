"""The door of every script: flags from the configuration classes, defaults from recipes and YAML, exit statuses."""

import argparse
import difflib
import errno
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from cityseg_hf.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from cityseg_hf.errors import EXIT_STOPPED, EXIT_USER_ERROR, LocalFault, ProcessLost, Stopped, UserError, one_line
from cityseg_hf.recipes import RECIPES


class Parser(HfArgumentParser):
    """Makes flags of dataclass fields, and one line of every mistake."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation that works today means something else when a flag is added tomorrow.
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.HelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()
        if message.startswith("unrecognized arguments") and unknown[0].startswith("-"):
            message = f"unknown flag {unknown[0]}{did_you_mean(unknown[0], self._option_string_actions)}"
        raise UserError(f"{message} (--help lists the flags)")


def did_you_mean(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """``; did you mean X?`` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def train_parser() -> Parser:
    """The parser of ``scripts/train.py``."""
    parser = Parser(
        (DataConfig, ModelConfig, OptimConfig, TrainConfig, RunConfig),
        description="Train a semantic-segmentation network on Cityscapes. Run the same command again to go on.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of defaults, by the long names of the flags")
    parser.add_argument("--recipe", metavar="NAME", help=f"row of the recipe table: {', '.join(RECIPES)}")
    parser.add_argument("--list_models", action="store_true", help="print the presets and exit")
    return parser


def parse_train_args(argv: Sequence[str], fallback_recipe: Callable[[str | None], str | None]) -> Config:
    """The configuration of a training run: the recipe's settings, then the YAML file's, then the flags'.

    Args:
        argv: the words of the command line, without the program's name.
        fallback_recipe: called with ``-d`` or ``--prepared`` as given (or ``None``); names the recipe to use when none
            was asked for.

    Raises:
        UserError: an unknown flag, key, recipe or value.
    """
    parser = train_parser()
    given = _given(argv)
    layers: list[tuple[str, dict[str, Any]]] = []  # where settings come from and what they are, highest first
    if "config" in given:
        settings = _read_yaml(given["config"])
        words = _words(settings, parser, given["config"])
        try:
            from_file = _given(words)
        except UserError as error:
            raise UserError(f"{given['config']}: {error}") from None
        layers.append((given["config"], _without(given, settings)))
        given = {**from_file, **given}
    recipe = given.get("recipe") or fallback_recipe(given.get("base_dataset_path") or given.get("prepared"))
    if recipe is not None:
        if recipe not in RECIPES:
            near = did_you_mean(recipe, RECIPES)
            raise UserError(f"unknown --recipe {recipe!r}{near}; choose from {', '.join(RECIPES)}")
        layers.append((recipe, _without(given, RECIPES[recipe].settings)))
    # Later words win: what the user typed overrides the file, and the file the recipe.
    words = [word for where, settings in reversed(layers) for word in _words(settings, parser, where)]
    parts = parser.parse_args_into_dataclasses([*words, *argv], look_for_args_file=False)
    return Config(*parts[:5])


REPLACES = {"schedule": "gamma", "gamma": "schedule", "num_epochs": "max_steps", "batch_size": "global_batch_size"}
"""A setting that a higher layer gives also replaces the lower layers' other way of saying the same."""


def _given(words: Sequence[str]) -> dict[str, Any]:
    """What a command line says itself, without defaults."""
    parser = train_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(list(words)))


def _without(given: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a lower layer that still stand when a higher one says what is given."""
    dropped = {REPLACES[name] for name in given if name in REPLACES}
    return {name: value for name, value in settings.items() if name not in dropped}


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is no YAML: {one_line(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold lines of 'flag: value'")
    return content


def _words(settings: Mapping[str, Any], parser: Parser, where: str) -> list[str]:
    """Writes settings as the words of a command line, so that one parser checks them all."""
    flags = {action.dest for action in parser._actions} - {"help", "config", "list_models"}
    words: list[str] = []
    for name, value in settings.items():
        if name not in flags:
            # `model: segformer_small` in a file means what --model means on the line.
            action = parser._option_string_actions.get(f"--{name}")
            if action is None or action.dest not in flags:
                raise UserError(f"{where}: unknown setting {name!r}{did_you_mean(str(name), flags)}")
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *map(str, values)]
    return words


def train_command(arguments: Mapping[str, Any]) -> list[str]:
    """The words that repeat a training, whatever its recipe and files say today.

    Args:
        arguments: every setting by the name of its flag, as ``run.json`` holds them.

    Returns:
        Flags and values for ``scripts/train.py``, of every setting that is not the flag's default.
    """
    defaults = {action.dest: action.default for action in train_parser()._actions}
    words: list[str] = []
    for name, value in arguments.items():
        if value is None or value == defaults.get(name):
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}"] if value is True else [f"--{name}", *map(str, values)]
    return words


def check_output_file(path: str | None) -> None:
    """Raises UserError now for an ``--output`` that could not be written after long work."""
    if path is None:
        return
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {target.parent}")
    if target.is_dir():
        raise UserError(f"--output {path} is a folder: name a file in it")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"--output {path}: {target.parent} cannot be written to")


def exit_with(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs a script's ``main`` and turns what it raises into the statuses of ``cityseg_hf.errors``."""
    try:
        status = main(sys.argv[1:]) or 0
    except UserError as error:
        # Most mistakes are met by every process of a launch: one of them says it.
        if isinstance(error, LocalFault) or int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr)
        status = EXIT_USER_ERROR
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror}{where}: make room and run the same command again", file=sys.stderr)
        status = EXIT_USER_ERROR
    except RuntimeError as error:
        # torch's words, raised wherever this process happens to be when the system tells it.
        if "DataLoader worker" not in str(error):
            raise
        print(
            f"error: a process that loads data was lost ({one_line(error)}): if memory ran out, lower --num_workers; "
            "run the same command again to go on",
            file=sys.stderr,
        )
        status = 1
    except ProcessLost as lost:
        print(f"error: {lost}", file=sys.stderr)
        status = 1
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        status = EXIT_STOPPED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130  # 128 + SIGINT, as shells have it
    finally:
        for worker in multiprocessing.active_children():
            # Those that are deaf to signals outlive one that is meant for the run; Python would wait for them for ever.
            worker.kill()
    sys.stdout.flush()
    sys.exit(status)
