"""The networks by name, and the one way to build or load any of them."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torchvision
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    PretrainedConfig,
    PreTrainedModel,
    SegformerConfig,
)

from cityseg_hf.errors import UserError, one_line
from cityseg_hf.labels import ID2LABEL, IGNORE, LABEL2ID
from cityseg_hf.models.configuration_fcn_resnet import FCNResNetConfig
from cityseg_hf.models.configuration_unet import UNetConfig
from cityseg_hf.models.modeling_fcn_resnet import FCNResNetForSemanticSegmentation
from cityseg_hf.models.modeling_segformer import SegformerForSemanticSegmentation
from cityseg_hf.models.modeling_unet import UNetForSemanticSegmentation
from cityseg_hf.models.weights import read_checkpoint, why_not

logger = logging.getLogger(__name__)


def _mit(hidden_sizes: tuple[int, ...], depths: tuple[int, ...], decoder_hidden_size: int) -> SegformerConfig:
    # Xie et al., SegFormer, 2021, table 6; what is not said here is transformers' default, which is the paper's.
    return SegformerConfig(
        hidden_sizes=list(hidden_sizes), depths=list(depths), decoder_hidden_size=decoder_hidden_size
    )


_WIDE = (64, 128, 320, 512)
PRESETS: dict[str, PretrainedConfig] = {
    "unet_small": UNetConfig(hidden_sizes=(64, 128, 256, 512, 1024)),
    "unet_base": UNetConfig(hidden_sizes=(64, 128, 256, 512, 1024, 2048)),
    "unet_large": UNetConfig(hidden_sizes=(64, 128, 256, 512, 1024, 2048, 4096)),
    "resnet_18": FCNResNetConfig(depth=18),
    "resnet_34": FCNResNetConfig(depth=34),
    "resnet_50": FCNResNetConfig(depth=50),
    "resnet_101": FCNResNetConfig(depth=101),
    "resnet_152": FCNResNetConfig(depth=152),
    "segformer_b0": _mit((32, 64, 160, 256), (2, 2, 2, 2), 256),
    "segformer_b1": _mit(_WIDE, (2, 2, 2, 2), 256),
    "segformer_b2": _mit(_WIDE, (3, 4, 6, 3), 768),
    "segformer_b3": _mit(_WIDE, (3, 4, 18, 3), 768),
    "segformer_b4": _mit(_WIDE, (3, 8, 27, 3), 768),
    "segformer_b5": _mit(_WIDE, (3, 6, 40, 3), 768),
}
PRESETS["segformer_small"] = PRESETS["segformer_b0"]
PRESETS["segformer_base"] = PRESETS["segformer_b1"]
PRESETS["segformer_large"] = PRESETS["segformer_b2"]

FAMILIES: dict[type[PretrainedConfig], type[PreTrainedModel]] = {
    UNetConfig: UNetForSemanticSegmentation,
    FCNResNetConfig: FCNResNetForSemanticSegmentation,
    SegformerConfig: SegformerForSemanticSegmentation,
}
CITYSCAPES_HEAD = {"id2label": ID2LABEL, "label2id": LABEL2ID}
HEADS = ("decode_head", "classifier", "aux_classifier", "auxiliary_head", "segmentation_head", "head")
"""First part of the names of parameters that belong to a network's head, over the families of transformers."""


def build_model(name: str, *, init_from: str | None = None, **config: Any) -> PreTrainedModel:
    """Builds a preset, or loads any semantic-segmentation checkpoint with a head for the 19 classes.

    Args:
        name: a key of ``PRESETS``, a model folder, or a model of the Hub.
        init_from: for presets, where to start from: a checkpoint (folder or Hub name) whose encoder fits, or
            ``"imagenet"`` (torchvision's weights, ResNets only). Random weights without it.
        **config: fields of the network's configuration, over the preset's.

    Raises:
        UserError: an unknown name or field, a checkpoint that does not fit or cannot be had.
    """
    if name not in PRESETS:
        if init_from is not None:
            raise UserError(f"--init_from starts presets; {name!r} is a checkpoint that has its own weights")
        return _load_checkpoint(name, config)
    preset = PRESETS[name]
    known = preset.to_dict()
    for key in config:
        if key not in known or key in ("id2label", "label2id", "model_type"):
            raise UserError(f"{name} has no setting {key!r}; it has {', '.join(_own_settings(preset))}")
    for key, value in config.items():
        if "drop" in key:
            if not (isinstance(value, (int, float)) and 0 <= value < 1):
                raise UserError(f"{name}: {key} must lie in [0, 1), got {value!r}")
        elif min(_numbers(value), default=1) <= 0 < min(_numbers(known[key]), default=0):
            raise UserError(f"{name}: {key} must be above 0, got {value!r}")
    if config.get("num_channels", 3) != 3:
        raise UserError(f"{name}: num_channels must be 3, the images are RGB; got {config['num_channels']!r}")
    fields = {**{k: v for k, v in known.items() if k != "model_type"}, **CITYSCAPES_HEAD, **config}
    try:
        configuration = type(preset)(**{**fields, "semantic_loss_ignore_index": IGNORE})
        model_class = FAMILIES[type(preset)]
        model = model_class(configuration) if init_from in (None, "imagenet") else None
    except Exception as error:  # sizes that do not fit raise as many kinds of errors as there are layers
        raise UserError(f"{name}: its settings do not fit: {one_line(error)}") from None
    if init_from == "imagenet":
        _load_torchvision(name, model)
    elif init_from is not None:
        model = _from_pretrained(model_class, init_from, {"config": configuration}, preset=name)
    return model


def _numbers(value: Any) -> list[float]:
    """The numbers in a setting, however deep its lists."""
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def _own_settings(preset: PretrainedConfig) -> list[str]:
    common = set(PretrainedConfig().to_dict())
    return sorted(key for key in preset.to_dict() if key not in common)


def _load_checkpoint(name: str, config: dict[str, Any]) -> PreTrainedModel:
    if "/" not in name and not Path(name).is_dir():
        raise UserError(f"unknown --model {name!r}: neither a folder nor one of {', '.join(PRESETS)}")
    options = {**CITYSCAPES_HEAD, **config}
    if hasattr(_read_config(name), "use_auxiliary_head"):
        # UperNet, BEiT, DPT: their auxiliary logits are not in the output, so the loop could not train that head.
        options.setdefault("use_auxiliary_head", False)
    model = _from_pretrained(AutoModelForSemanticSegmentation, name, options)
    model.config.semantic_loss_ignore_index = IGNORE
    return model


def _read_config(source: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load {source}: {why_not(error)}") from None


def _from_pretrained(auto_class: Any, source: str, options: dict[str, Any], preset: str | None = None) -> Any:
    """Reads a checkpoint to start from: a head that it does not bring is said, an encoder is refused."""
    model, missing, mismatched = read_checkpoint(auto_class, source, **options)
    absent = [*mismatched, *missing]
    strange = [key for key in absent if not _in_head(key)]
    if strange:
        fits = f" does not fit {preset}" if preset else " lacks weights of its own network"
        raise UserError(f"{source}{fits}: {len(strange)} parameters outside the head differ, first {strange[0]}")
    if absent:
        logger.warning("%d parameters of the head are not in %s: it starts at random", len(absent), source)
    return model


def _in_head(parameter: str) -> bool:
    return parameter.split(".")[0] in HEADS


def _load_torchvision(name: str, model: PreTrainedModel) -> None:
    if not isinstance(model, FCNResNetForSemanticSegmentation):
        raise UserError(
            f"--init_from imagenet is for the resnet presets; {name} takes a checkpoint such as nvidia/mit-b0"
        )
    weights = torchvision.models.get_model_weights(f"resnet{model.config.depth}").IMAGENET1K_V1
    try:
        # torch.load with weights_only: nothing in the file is executed.
        state = torch.hub.load_state_dict_from_url(weights.url, map_location="cpu", weights_only=True, progress=False)
    except Exception as error:  # no network, a full disk, a torn file
        place = f"{torch.hub.get_dir()}/checkpoints"
        raise UserError(f"cannot get {weights.url}; put the file into {place} ({one_line(error)})") from None
    report = model.backbone.load_state_dict(state, strict=False)
    if report.missing_keys or set(report.unexpected_keys) != {"fc.weight", "fc.bias"}:
        raise UserError(f"{weights.url} does not fit {name}: {report}")


def freeze_batchnorm(modules: Iterable[torch.nn.Module]) -> None:
    """Keeps the running statistics of batch normalisation as they are; call after every ``model.train()``."""
    for module in modules:
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
