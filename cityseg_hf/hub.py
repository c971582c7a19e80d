"""Sharing a trained network on a model hub."""

import logging
from pathlib import Path

from cityseg_hf.errors import one_line
from cityseg_hf.inference import load_model_folder

logger = logging.getLogger(__name__)


def push_model_folder(folder: Path, repo: str) -> bool:
    """Uploads a model folder (network, processor and the code they need) with transformers' own ``push_to_hub``.

    Never fatal: what was trained lies on disk. Call it on the main process only.

    Returns:
        Whether it went up.
    """
    try:
        model, processor = load_model_folder(folder)
        model.push_to_hub(repo)
        processor.push_to_hub(repo)
    except Exception as error:
        logger.warning("the Hub refused %s (%s); the model lies in %s", repo, one_line(error), folder)
        return False
    return True
