"""UNet (Ronneberger et al., 2015) for semantic segmentation, with padding so that the output is as large as the input.

Imports nothing of this project but its configuration, so that the file travels with a model folder.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput

from .configuration_unet import UNetConfig


class UNetBlock(nn.Sequential):
    """Two 3x3 convolutions, each followed by a normalisation (or none) and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            # A bias before a normalisation would be subtracted again.
            layers.append(nn.Conv2d(channels, out_channels, kernel_size=3, padding=1, bias=norm == "none"))
            if norm == "batch":
                layers.append(nn.BatchNorm2d(out_channels))
            elif norm == "group":
                # 32 groups, or as many as divide a narrow level.
                layers.append(nn.GroupNorm(math.gcd(32, out_channels), out_channels))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class UNetForSemanticSegmentation(PreTrainedModel):
    """UNet whose logits have the size of the input (stride 1)."""

    config_class = UNetConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["UNetBlock"]
    # The loss is a mean: transformers' Trainer must divide it by its accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths = config.hidden_sizes
        self.encoder = nn.ModuleList(
            UNetBlock(in_channels, width, config.norm)
            for in_channels, width in zip([config.num_channels, *widths[:-1]], widths, strict=True)
        )
        self.upsample = nn.ModuleList(
            nn.ConvTranspose2d(deep, width, kernel_size=2, stride=2)
            for deep, width in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.decoder = nn.ModuleList(UNetBlock(2 * width, width, config.norm) for width in widths[-2::-1])
        self.classifier = nn.Conv2d(widths[0], config.num_labels, kernel_size=1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # He et al., 2015, equation 14: fan-out for the layers that a ReLU follows.
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            if module is self.classifier:
                # Small logits: training starts from even odds for every class, at a loss of ln(num_labels).
                init.normal_(module.weight, std=0.01)
            else:
                init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> SemanticSegmenterOutput | tuple[Tensor, ...]:
        """
        Args:
            pixel_values: ``float[B, 3, H, W]``, ImageNet-normalised; H and W of at least 32.
            labels: ``long[B, H', W']``, train ids with 255 ignored.

        Returns:
            ``logits float[B, num_labels, H, W]`` and, with labels, the mean cross-entropy at their resolution.
        """
        hidden_states, skips = pixel_values, []
        for level, block in enumerate(self.encoder):
            if level > 0:
                skips.append(hidden_states)
                # ceil_mode keeps the last row and column of an odd size: [B, C, h, w] -> [B, C, ceil(h/2), ceil(w/2)]
                hidden_states = F.max_pool2d(hidden_states, kernel_size=2, ceil_mode=True)
            hidden_states = block(hidden_states)
        for upsample, block, skip in zip(self.upsample, self.decoder, reversed(skips), strict=True):
            height, width = skip.shape[-2:]
            # [B, 2C, h, w] -> [B, C, 2h, 2w] -> cut to the skip's size -> [B, 2C, height, width]
            hidden_states = upsample(hidden_states)[..., :height, :width]
            hidden_states = block(torch.cat([skip, hidden_states], dim=1))
        logits = self.classifier(hidden_states)

        loss = None
        if labels is not None:
            scores = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(scores, labels, ignore_index=self.config.semantic_loss_ignore_index)
        output = SemanticSegmenterOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output
