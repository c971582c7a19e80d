"""Reading a checkpoint's weights: safetensors only, and what it did not bring is said by name."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from cityseg_hf.errors import UserError, one_line


class Read(NamedTuple):
    """A network and the parameters that its checkpoint did not bring: they are random.

    Attributes:
        model: in float32.
        missing: names that the checkpoint does not have.
        mismatched: names that it has in another size.
    """

    model: PreTrainedModel
    missing: list[str]
    mismatched: list[str]


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def _check_folder(source: str | Path) -> None:
    """Says of a folder what it lacks; transformers would speak of the Hub."""
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_file():
            raise UserError(f"cannot load {source}: it is a file; name the folder that holds config.json and weights")
        if str(source).startswith((".", "/", "~")):
            raise UserError(f"cannot load {source}: there is no such folder")
        return
    names = sorted(path.name for path in folder.iterdir())
    if "config.json" not in names:
        raise UserError(f"cannot load {source}: there is no config.json in it")
    if not any(name.endswith(".safetensors") for name in names):
        pickled = [name for name in names if name.endswith(PICKLES)]
        why = f"{pickled[0]} is pickled, which can run code: save it as safetensors" if pickled else "it has no weights"
        raise UserError(f"cannot load {source}: there is no model.safetensors in it ({why})")


def why_not(error: BaseException) -> str:
    """What transformers says of a checkpoint, without advice that our users cannot follow."""
    words = one_line(error)
    if "use_safetensors" in words:
        return "it has no model.safetensors (pickled weights are not read), or the Hub cannot be reached"
    if "custom code" in words or "trust_remote_code" in words:
        return "its network is code of its own, which is not run"
    if words.startswith("Unrecognized configuration class"):
        return "it is no network for semantic segmentation"
    return words


def read_checkpoint(auto_class: Any, source: str | Path, **options: Any) -> Read:
    """``from_pretrained`` that tells the caller, not the terminal, what the checkpoint lacks.

    Args:
        auto_class: a network's class, or one of transformers' Auto classes.
        source: a folder, or a name of the Hub.
        **options: for ``from_pretrained``.

    Raises:
        UserError: there is no such checkpoint, or it cannot be read.
    """
    _check_folder(source)
    verbosity = transformers_logging.get_verbosity()
    # Its table of parameters is the same news in a hundred lines.
    transformers_logging.set_verbosity_error()
    try:
        model, info = auto_class.from_pretrained(
            source,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # a broken file raises what the library that meets it raises
        raise UserError(f"cannot load {source}: {why_not(error)}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    mismatched = [entry[0] if isinstance(entry, (tuple, list)) else entry for entry in info["mismatched_keys"]]
    # A counter that no forward pass reads; files of long ago do not have it.
    missing = [name for name in info["missing_keys"] if not name.endswith("num_batches_tracked")]
    return Read(model, sorted(missing), sorted(mismatched))
