"""What the settings are made of: fields that know their flags, and the words that their values are written in."""

import re
from dataclasses import field
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from cityseg_hf.errors import UserError, one_line


def flag(default: Any, help: str, *aliases: str, **argparse_options: Any) -> Any:
    """A dataclass field that knows its help text, short flags and argparse options."""
    return field(default=default, metadata={"help": help, "aliases": list(aliases), **argparse_options})


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def parse_duration(text: str, name: str = "--save_every") -> tuple[float, str]:
    """``500``, ``2e`` or ``10m`` -> the number, and ``""`` for steps, ``"e"`` for epochs or ``"m"`` for minutes.

    Raises:
        UserError: it is none of these, or not above 0; steps are whole.
    """
    found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)([em])", text)
    number = float(found[1] or found[2]) if found else 0.0
    require(number > 0, f"{name} takes steps, epochs or minutes, such as 500, 2e or 10m; got {text!r}")
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
        require(
            share > 0 and found[2] in LOSSES and found[2] not in shares,
            f"--loss is a sum of {', '.join(LOSSES)}, each once, with a factor or without, such as ce+0.5*lovasz; "
            f"got {text!r}",
        )
        shares[found[2]] = share
    return shares


def check_size(name: str, size: list[int] | None) -> None:
    """Raises UserError unless it is a height and a width, or nothing."""
    require(
        size is None or (len(size) == 2 and min(size) >= 32),
        f"--{name} takes a height and a width of at least 32, for example --{name} 512 1024; got {size}",
    )


def check_repository(name: str) -> None:
    """Raises UserError unless the Hub could have a repository of that name."""
    # The Hub would say so as well, but after the training.
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {name!r} is no name of a repository: {one_line(error)}") from None
