"""From an image to train ids at its own resolution."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, PreTrainedModel

from cityseg_hf.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize, resize_image
from cityseg_hf.errors import UserError, one_line
from cityseg_hf.labels import NUM_CLASSES
from cityseg_hf.models.weights import read_checkpoint
from cityseg_hf.upsampled import argmax


def load_model_folder(source: str | Path) -> tuple[PreTrainedModel, Any]:
    """A trained network and its image processor, from a model folder or the Hub. Reads safetensors only.

    Raises:
        UserError: there is no such folder or model, its weights are not whole, or it was not trained on the 19 classes
            and images normalised as ours.
    """
    model, missing, mismatched = read_checkpoint(AutoModelForSemanticSegmentation, source)
    try:
        processor = AutoImageProcessor.from_pretrained(source)
    except Exception as error:  # a broken file raises what the library that meets it raises
        if Path(source).is_dir() and not (Path(source) / "preprocessor_config.json").is_file():
            raise UserError(f"cannot load {source}: there is no preprocessor_config.json in it") from None
        raise UserError(f"cannot load the image processor of {source}: {one_line(error)}") from None
    if model.config.num_labels != NUM_CLASSES:
        raise UserError(
            f"{source} has {model.config.num_labels} classes, Cityscapes has {NUM_CLASSES}: fine-tune it first"
        )
    if missing:
        raise UserError(
            f"{source} lacks {len(missing)} of its weights, first {missing[0]}: train it first, or copy the whole file"
        )
    if mismatched:
        raise UserError(
            f"{source} has {len(mismatched)} weights of other sizes than its config.json says, first {mismatched[0]}"
        )
    means = (getattr(processor, "image_mean", None), getattr(processor, "image_std", None))
    if not getattr(processor, "do_normalize", False) or not np.allclose(
        means, (IMAGENET_MEAN, IMAGENET_STD), atol=1e-3
    ):
        raise UserError(
            f"{source} does not normalise images as ImageNet's (mean and deviation {means}): fine-tune it first"
        )
    return model.eval(), processor


def processor_size(processor: Any) -> tuple[int, int] | None:
    """The height and width that an image processor resizes to, or ``None`` where it does not resize."""
    if not getattr(processor, "do_resize", False):
        return None
    size = dict(processor.size)
    if "height" not in size:
        raise UserError(f"the image processor resizes by {size}: only a fixed height and width can be evaluated")
    return size["height"], size["width"]


@torch.no_grad()
def predict(model: PreTrainedModel, pixel_values: Tensor, size: tuple[int, int]) -> Tensor:
    """The best class of every pixel at a given resolution.

    Args:
        model: in evaluation mode.
        pixel_values: ``float[B, 3, h, w]``, normalised, on the model's device.
        size: height and width wanted.

    Returns:
        ``uint8[B, *size]``, train ids 0..18.
    """
    return argmax(model(pixel_values=pixel_values).logits, size)


def segment(model: PreTrainedModel, processor: Any, image: np.ndarray) -> np.ndarray:
    """Segments one image at its own resolution.

    Args:
        model, processor: as ``load_model_folder`` gives them.
        image: ``uint8[H, W, 3]``, RGB.

    Returns:
        ``uint8[H, W]``, train ids 0..18.
    """
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)  # [H, W, 3] -> [3, H, W]
    size = processor_size(processor) or image.shape[:2]
    pixel_values = normalize(resize_image(pixels, size))[None].to(model.device)
    return predict(model, pixel_values, image.shape[:2])[0].cpu().numpy()
