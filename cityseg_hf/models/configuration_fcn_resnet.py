"""Configuration of ``FCNResNetForSemanticSegmentation``."""

from typing import Any

from transformers import PretrainedConfig


class FCNResNetConfig(PretrainedConfig):
    """The shape of an FCN on a torchvision ResNet.

    Args:
        depth: 18, 34, 50, 101 or 152 layers.
        dilation: dilate the last two stages instead of striding: logits at stride 8 instead of 32.
        auxiliary_head: a second FCN head on stage 3, for the loss of training only.
        dropout: probability before the last 1x1 convolution of a head.
        auxiliary_loss_weight: weight of the auxiliary head in the model's own loss.
        semantic_loss_ignore_index: label that is left out of the loss.
    """

    model_type = "cityseg_fcn_resnet"

    def __init__(
        self,
        depth: int = 50,
        dilation: bool = False,
        auxiliary_head: bool = False,
        dropout: float = 0.1,
        auxiliary_loss_weight: float = 0.4,
        semantic_loss_ignore_index: int = 255,
        **kwargs: Any,
    ) -> None:
        if depth not in (18, 34, 50, 101, 152):
            raise ValueError(f"depth must be 18, 34, 50, 101 or 152, got {depth}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.depth = depth
        self.dilation = dilation
        self.auxiliary_head = auxiliary_head
        self.dropout = dropout
        self.auxiliary_loss_weight = auxiliary_loss_weight
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        super().__init__(**kwargs)
