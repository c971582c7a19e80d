"""The networks of others, used as their own examples do. Those of the extra ``bench`` are imported when needed."""

import copy
import importlib
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torchvision
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN, FCNHead
from transformers import PreTrainedModel

from cityseg_hf.errors import UserError
from cityseg_hf.labels import IGNORE, NUM_CLASSES
from cityseg_hf.models import FCNResNetForSemanticSegmentation, SegformerForSemanticSegmentation


def require(name: str) -> ModuleType:
    """Imports a peer.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing it would ask the network for newer versions
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(f"--peers needs {package}, which is not installed: pip install -e '.[bench]'") from None


class Peer(NamedTuple):
    """A network of others.

    Attributes:
        name: as the table shows it.
        network: with the weights of ours where it is the same network.
        loss: images ``float[B, 3, H, W]`` and labels ``long[B, H, W]`` -> the mean loss.
        note: what sets it apart from ours.
        same_work: whether it is the same network, so that times can be compared.
    """

    name: str
    network: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    note: str
    same_work: bool = True


def peers_of(ours: PreTrainedModel, *, extra: bool) -> Iterator[Peer]:
    """The peers of one of our networks, on its device.

    Args:
        ours: a network of ``build_model``.
        extra: also those of the extra ``bench``.
    """
    device = next(ours.parameters()).device
    if isinstance(ours, SegformerForSemanticSegmentation):
        network = transformers_segformer(ours)
        yield Peer("transformers", network, lambda x, y: network(pixel_values=x, labels=y).loss, "same weights")
    elif isinstance(ours, FCNResNetForSemanticSegmentation):
        fcn = torchvision_fcn(ours)
        if fcn is not None:
            note = "same weights; its training reference's loss"
            yield Peer("torchvision", fcn, lambda x, y: _cross_entropy(fcn(x)["out"], y), note)
    else:
        plain = copy.deepcopy(ours)
        note = "same network and weights; F.interpolate + F.cross_entropy"
        yield Peer("plain PyTorch", plain, lambda x, y: _cross_entropy(_at(plain(x).logits, y), y), note)
    if extra:
        for name, smp, note, same in _smp_networks(ours):
            smp.to(device)
            yield Peer(name, smp, lambda x, y, network=smp: _cross_entropy(network(x), y), note, same)


def transformers_segformer(ours: PreTrainedModel) -> PreTrainedModel:
    """transformers' own SegFormer with the weights of ours."""
    network = transformers.SegformerForSemanticSegmentation(copy.deepcopy(ours.config))
    network.load_state_dict(ours.state_dict(), strict=True)
    return network.to(next(ours.parameters()).device)


def torchvision_fcn(ours: PreTrainedModel) -> FCN | None:
    """torchvision's FCN with the weights of ours; ``None`` where torchvision cannot build it (18 or 34, dilated)."""
    config = ours.config
    if config.dilation and config.depth < 50:
        return None
    build = getattr(torchvision.models, f"resnet{config.depth}")
    backbone = build(replace_stride_with_dilation=[False, config.dilation, config.dilation])
    channels = backbone.fc.in_features
    # As torchvision's fcn_resnet50 is put together.
    network = FCN(IntermediateLayerGetter(backbone, {"layer4": "out"}), FCNHead(channels, NUM_CLASSES))
    network.classifier[3].p = config.dropout
    network.load_state_dict(ours.state_dict(), strict=True)
    return network.to(next(ours.parameters()).device)


def _smp_networks(ours: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str, bool]]:
    """What comes nearest in segmentation_models_pytorch; logits leave these at the size of the image."""
    smp = require("segmentation_models_pytorch")
    if isinstance(ours, SegformerForSemanticSegmentation):
        encoder = _mit_name(ours.config)
        if encoder is not None:
            width = ours.config.decoder_hidden_size
            options = {"decoder_segmentation_channels": width, "encoder_weights": None, "classes": NUM_CLASSES}
            yield f"smp Segformer {encoder}", smp.Segformer(encoder, **options), "its own head, random weights", True
    elif ours.config.model_type == "cityseg_unet":
        network = smp.Unet("resnet18", encoder_weights=None, classes=NUM_CLASSES)
        yield "smp Unet resnet18", network, "another network: no ratio", False


def _mit_name(config: transformers.SegformerConfig) -> str | None:
    depths = {(2, 2, 2, 2): 1, (3, 4, 6, 3): 2, (3, 4, 18, 3): 3, (3, 8, 27, 3): 4, (3, 6, 40, 3): 5}
    size = depths.get(tuple(config.depths))
    if size == 1 and config.hidden_sizes[0] == 32:
        size = 0
    widths = [32, 64, 160, 256] if size == 0 else [64, 128, 320, 512]
    return f"mit_b{size}" if size is not None and list(config.hidden_sizes) == widths else None


def _at(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits at the size of the labels."""
    size = labels.shape[-2:]
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=IGNORE)
