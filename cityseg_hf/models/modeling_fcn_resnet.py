"""FCN (Long et al., 2015) on a torchvision ResNet, with torchvision's parameter names: its weights load as they are.

Imports nothing of this project but its configuration, so that the file travels with a model folder.
"""

from dataclasses import dataclass

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCNHead
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput

from .configuration_fcn_resnet import FCNResNetConfig


@dataclass
class FCNResNetOutput(SemanticSegmenterOutput):
    """``auxiliary_logits``: ``float[B, num_labels, h, w]`` of the auxiliary head, in training mode only."""

    auxiliary_logits: Tensor | None = None


def _dilate(stage: nn.Sequential, before: int, after: int) -> None:
    """Turns the stride of a stage into dilation (Yu and Koltun, 2016), for basic and bottleneck blocks alike.

    What comes up to and with the former stride keeps the dilation of the stage before; what follows it sees a grid
    twice as fine and doubles its own. Every weight then means what it meant with the stride: the dilated features at
    every second pixel are the strided ones. For bottlenecks this is torchvision's ``replace_stride_with_dilation``.
    """
    dilation = before
    for module in stage.modules():  # in the order of the forward pass; the shortcut's 1x1 has no dilation
        if isinstance(module, nn.Conv2d):
            strided = module.stride != (1, 1)
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (dilation, dilation)
            if strided:
                dilation = after


class FCNResNetForSemanticSegmentation(PreTrainedModel):
    """ResNet and FCN head; logits at stride 32, or 8 with dilation."""

    config_class = FCNResNetConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["BasicBlock", "Bottleneck"]
    # The loss is a mean: transformers' Trainer must divide it by its accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: FCNResNetConfig) -> None:
        super().__init__(config)
        resnet = getattr(torchvision.models, f"resnet{config.depth}")(weights=None)
        if config.dilation:
            _dilate(resnet.layer3, before=1, after=2)
            _dilate(resnet.layer4, before=2, after=4)
        channels = resnet.fc.in_features
        stages = {"layer4": "out", **({"layer3": "aux"} if config.auxiliary_head else {})}
        self.backbone = IntermediateLayerGetter(resnet, return_layers=stages)
        self.classifier = FCNHead(channels, config.num_labels)
        self.classifier[3].p = config.dropout
        self.aux_classifier = None
        if config.auxiliary_head:
            self.aux_classifier = FCNHead(channels // 2, config.num_labels)
            self.aux_classifier[3].p = config.dropout
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # As torchvision initialises its ResNets: He et al., 2015, fan-out.
        if isinstance(module, nn.Conv2d):
            if module in self._last_layers():
                # Small logits: training starts from even odds for every class, at a loss of ln(num_labels).
                init.normal_(module.weight, std=0.01)
            else:
                init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def _last_layers(self) -> list[nn.Module]:
        return [head[-1] for head in (self.classifier, self.aux_classifier) if head is not None]

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> FCNResNetOutput | tuple[Tensor, ...]:
        """
        Args:
            pixel_values: ``float[B, 3, H, W]``, ImageNet-normalised; H and W of at least 32.
            labels: ``long[B, H', W']``, train ids with 255 ignored.

        Returns:
            ``logits float[B, num_labels, ceil(H/s), ceil(W/s)]``, s = 32 (8 with dilation) and, with labels, the mean
            cross-entropy at their resolution (plus the auxiliary head's share).
        """
        features = self.backbone(pixel_values)
        logits = self.classifier(features["out"])
        auxiliary_logits = None
        if self.aux_classifier is not None and self.training:
            auxiliary_logits = self.aux_classifier(features["aux"])

        loss = None
        if labels is not None:
            loss = self._cross_entropy(logits, labels)
            if auxiliary_logits is not None:
                loss = loss + self.config.auxiliary_loss_weight * self._cross_entropy(auxiliary_logits, labels)
        output = FCNResNetOutput(loss=loss, logits=logits, auxiliary_logits=auxiliary_logits)
        return output.to_tuple() if return_dict is False else output

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        scores = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(scores, labels, ignore_index=self.config.semantic_loss_ignore_index)
