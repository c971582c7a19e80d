"""SegFormer (Xie et al., 2021): transformers' own network and weights, with a decode head that does less work.

The published head projects each of four feature maps to D channels, upsamples all of them, concatenates 4 D channels
and applies a 1x1 convolution. A 1x1 convolution mixes channels and bilinear upsampling mixes pixels, so the two
commute, and projection and fusion are one matrix per stage, applied before the upsampling:

    F concat(up(W_i x_i + b_i)) = sum_i up((F_i W_i) x_i) + sum_i F_i b_i

Parameters, names and checkpoints are transformers'; logits agree to float32's rounding.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import SegformerConfig
from transformers import SegformerForSemanticSegmentation as TransformersSegformer
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead


class FoldedDecodeHead(SegformerDecodeHead):
    """The all-MLP head with projection and fusion folded into one matrix per stage."""

    def forward(self, encoder_hidden_states: tuple[Tensor, ...], **kwargs: object) -> Tensor:
        """``[B, C_i, H/s_i, W/s_i]`` for strides 4, 8, 16, 32 -> logits ``[B, num_labels, H/4, W/4]``."""
        size = encoder_hidden_states[0].shape[-2:]
        fused = None
        # The shallowest map is added last, at full resolution; the others are upsampled to it.
        for features, weight, bias in reversed(list(zip(encoder_hidden_states, *self._folded(), strict=True))):
            # Channels last: bilinear upsampling is then whole vectors of channels, several times as fast on a CPU.
            features = features.contiguous(memory_format=torch.channels_last)
            stage = F.conv2d(features, weight[:, :, None, None], bias)  # [B, C_i, h, w] -> [B, D, h, w]
            if stage.shape[-2:] != size:
                stage = F.interpolate(stage, size=size, mode="bilinear", align_corners=False)
            fused = stage if fused is None else fused + stage
        hidden_states = self.dropout(self.activation(self.batch_norm(fused)))
        return self.classifier(hidden_states)

    def _folded(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Per stage the matrix ``F_i W_i`` ``[D, C_i]``; all biases go to the first stage, once."""
        projections = [mlp.proj for mlp in self.linear_projections]
        # transformers concatenates from the deepest stage to the shallowest: [D, 4 D, 1, 1] -> four [D, D]
        fuse = self.linear_fuse.weight.flatten(1).chunk(len(projections), dim=1)[::-1]
        # The products of weights stay in float32 under autocast: they are small, and rounding here would be felt twice.
        with torch.autocast(fuse[0].device.type, enabled=False):
            weights = [part @ projection.weight for part, projection in zip(fuse, projections, strict=True)]
            bias = sum(part @ projection.bias for part, projection in zip(fuse, projections, strict=True))
        return weights, [bias, *[None] * (len(projections) - 1)]


class SegformerForSemanticSegmentation(TransformersSegformer):
    """transformers' class with the folded head; saved folders load with either."""

    # The loss is a mean: transformers' Trainer must divide it by its accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__(config)
        # The same modules and names, another forward pass. What the first head drew at random is drawn anew.
        self.decode_head = FoldedDecodeHead(config)
        self.post_init()
