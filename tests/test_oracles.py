"""The networks against others' code: transformers' SegFormer, torchvision's ResNet and FCN, a UNet written plainly."""

import copy

import pytest
import torch
import torchvision
import transformers
from test_models import liven
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN, FCNHead
from transformers import PreTrainedModel

from cityseg_hf import build_model
from cityseg_hf.labels import NUM_CLASSES
from cityseg_hf.models import SegformerForSemanticSegmentation


def check_informative(logits: Tensor) -> None:
    """Logits near zero, or the same everywhere, would agree with anything."""
    assert 0.1 < logits.std().item() < 100
    assert logits.std(dim=(0, 2, 3)).min().item() > 0.02


# SegFormer


def segformer_pair(name: str, **config: float) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Ours and transformers', with the same weights; both refuse a name that they do not know."""
    ours = liven(build_model(name, **config)).eval()
    stock = transformers.SegformerForSemanticSegmentation(copy.deepcopy(ours.config)).eval()
    assert isinstance(ours, SegformerForSemanticSegmentation)
    stock.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return ours, stock


@pytest.mark.parametrize("name", [f"segformer_b{size}" for size in range(6)])
def test_segformer_computes_what_transformers_does(name: str) -> None:
    ours, stock = segformer_pair(name)
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found, expected = ours(pixel_values).logits, stock(pixel_values).logits
    check_informative(expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_segformer_learns_as_transformers_does() -> None:
    """In float64, where rounding hides nothing: the gradients of some biases are zero but for it."""
    ours, stock = (
        model.double().train()
        for model in segformer_pair("segformer_b0", drop_path_rate=0.0, classifier_dropout_prob=0.0)
    )
    pixel_values = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    labels = torch.randint(NUM_CLASSES, (2, 64, 96))
    for model in (ours, stock):
        model(pixel_values=pixel_values, labels=labels).loss.backward()
    expected = {name: parameter.grad for name, parameter in stock.named_parameters()}
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-12, msg=name)
    # The statistics that batch normalisation kept of this batch.
    torch.testing.assert_close(dict(ours.named_buffers()), dict(stock.named_buffers()))


# FCN


def torchvision_fcn(depth: int, *, dilation: bool, auxiliary: bool) -> FCN:
    """Put together from torchvision's parts, the way its own ``fcn_resnet50`` is."""
    resnet = getattr(torchvision.models, f"resnet{depth}")(replace_stride_with_dilation=[False, dilation, dilation])
    channels = resnet.fc.in_features
    layers = {"layer4": "out", **({"layer3": "aux"} if auxiliary else {})}
    return FCN(
        IntermediateLayerGetter(resnet, return_layers=layers),
        FCNHead(channels, NUM_CLASSES),
        FCNHead(channels // 2, NUM_CLASSES) if auxiliary else None,
    )


@pytest.mark.parametrize(("depth", "dilation", "auxiliary"), [(18, False, False), (50, False, False), (50, True, True)])
def test_fcn_computes_what_torchvision_does(depth: int, dilation: bool, auxiliary: bool) -> None:
    ours = liven(build_model(f"resnet_{depth}", dilation=dilation, auxiliary_head=auxiliary)).eval()
    theirs = torchvision_fcn(depth, dilation=dilation, auxiliary=auxiliary).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found = ours(pixel_values).logits
        expected = theirs.classifier(theirs.backbone(pixel_values)["out"])
    check_informative(expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_dilated_fcn_is_torchvisions_own() -> None:
    """State dicts fit both ways, and so do both heads, training and not."""
    ours = liven(build_model("resnet_50", dilation=True, auxiliary_head=True, dropout=0.0))
    theirs = torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=NUM_CLASSES, aux_loss=True
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    pixel_values = torch.randn(2, 3, 64, 64)
    size = pixel_values.shape[-2:]
    for training in (False, True):
        with torch.no_grad():
            found, expected = ours.train(training)(pixel_values), theirs.train(training)(pixel_values)
        check_informative(expected["out"])
        for logits, upsampled in ((found.logits, expected["out"]), (found.auxiliary_logits, expected["aux"])):
            if logits is not None:
                logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
                torch.testing.assert_close(logits, upsampled, rtol=1e-5, atol=1e-5)
        assert (found.auxiliary_logits is not None) == training


@pytest.mark.parametrize("depth", [18, 50])
def test_dilation_computes_what_striding_skips(depth: int) -> None:
    """The algorithme a trous: every fourth feature of the dilated network is one of the strided network.

    So weights of ImageNet mean the same in both. Torchvision is no oracle for basic blocks: it does not dilate them.
    """
    strided = liven(build_model(f"resnet_{depth}")).eval()
    dilated = build_model(f"resnet_{depth}", dilation=True).eval()
    dilated.load_state_dict(strided.state_dict(), strict=True)
    pixel_values = torch.randn(1, 3, 97, 160)
    with torch.no_grad():
        coarse, fine = (model.backbone(pixel_values)["out"] for model in (strided, dilated))
    assert coarse.shape[-2:] == (4, 5)
    assert fine.shape[-2:] == (13, 20)
    assert coarse.std().item() > 0.1
    torch.testing.assert_close(fine[..., ::4, ::4], coarse, rtol=1e-4, atol=1e-4)


# UNet


def plain_unet(weights: dict[str, Tensor], norm: str, image: Tensor, levels: int) -> Tensor:
    """Figure 1 of Ronneberger et al., 2015, with padding, as a recursion over the levels."""

    def double_convolution(features: Tensor, block: str) -> Tensor:
        # Modules in a block: convolution, normalisation (if any), ReLU, and again.
        for position in (0, 2 if norm == "none" else 3):
            convolution, normalisation = f"{block}.{position}", f"{block}.{position + 1}"
            features = F.conv2d(
                features, weights[f"{convolution}.weight"], weights.get(f"{convolution}.bias"), padding=1
            )
            if norm != "none":
                scale, shift = weights[f"{normalisation}.weight"], weights[f"{normalisation}.bias"]
                if norm == "batch":
                    mean, variance = weights[f"{normalisation}.running_mean"], weights[f"{normalisation}.running_var"]
                else:
                    groups = 32
                    grouped = features.unflatten(1, (groups, -1))
                    mean, variance = (
                        statistic.expand(-1, -1, grouped.shape[2], 1, 1).flatten(1, 2)
                        for statistic in (
                            grouped.mean(dim=(2, 3, 4), keepdim=True),
                            grouped.var(dim=(2, 3, 4), keepdim=True, unbiased=False),
                        )
                    )
                if norm == "batch":
                    mean, variance = mean[:, None, None], variance[:, None, None]
                features = (features - mean) / (variance + 1e-5).sqrt() * scale[:, None, None] + shift[:, None, None]
            features = features.clamp(min=0)
        return features

    def level(features: Tensor, depth: int) -> Tensor:
        features = double_convolution(features, f"encoder.{depth}")
        if depth == levels - 1:
            return features
        below, step = level(F.max_pool2d(features, 2), depth + 1), levels - 2 - depth
        up = F.conv_transpose2d(below, weights[f"upsample.{step}.weight"], weights[f"upsample.{step}.bias"], stride=2)
        return double_convolution(torch.cat([features, up], dim=1), f"decoder.{step}")

    return F.conv2d(level(image, 0), weights["classifier.weight"], weights["classifier.bias"])


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_unet_computes_what_a_plain_one_does(norm: str) -> None:
    model = liven(build_model("unet_small", norm=norm, hidden_sizes=[32, 64, 96])).eval()
    pixel_values = torch.randn(2, 3, 32, 56)
    with torch.no_grad():
        found = model(pixel_values).logits
        expected = plain_unet(model.state_dict(), norm, pixel_values, levels=3)
    check_informative(expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Sizes

PARAMETERS = {
    "resnet_18": 11_769_043,
    "resnet_34": 21_877_203,
    "resnet_50": 32_955_987,
    "resnet_101": 51_948_115,
    "resnet_152": 67_591_763,
    # Xie et al., 2021, table 1, for 150 classes and to a tenth of a million: 3.8, 13.7, 27.5, 47.3, 64.1, 84.7.
    "segformer_b0": 3_719_027,
    "segformer_b1": 13_682_131,
    "segformer_b2": 27_361_235,
    "segformer_b3": 47_237_075,
    "segformer_b4": 64_007_635,
    "segformer_b5": 84_607_955,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        assert build_model(name).num_parameters() == PARAMETERS[name]


def test_published_unet_has_31_million_parameters() -> None:
    with torch.device("meta"):
        assert build_model("unet_small", norm="none").num_parameters() == 31_032_915
