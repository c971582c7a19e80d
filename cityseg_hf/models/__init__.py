"""The networks. Importing this makes UNet and FCNResNet known to transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForSemanticSegmentation, SegformerConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from cityseg_hf.models.configuration_fcn_resnet import FCNResNetConfig
from cityseg_hf.models.configuration_unet import UNetConfig
from cityseg_hf.models.modeling_fcn_resnet import FCNResNetForSemanticSegmentation
from cityseg_hf.models.modeling_segformer import SegformerForSemanticSegmentation
from cityseg_hf.models.modeling_unet import UNetForSemanticSegmentation
from cityseg_hf.models.presets import PRESETS, build_model, freeze_batchnorm

# transformers converts the names in the published files for classes of its own alone, unless asked for others.
if (_renaming := get_checkpoint_conversion_mapping(SegformerForSemanticSegmentation.__name__)) is not None:
    register_checkpoint_conversion_mapping(SegformerForSemanticSegmentation.__name__, _renaming, overwrite=True)
# The folded head computes transformers' logits from transformers' weights, with less work.
AutoModelForSemanticSegmentation.register(SegformerConfig, SegformerForSemanticSegmentation, exist_ok=True)
if AutoModelForSemanticSegmentation._model_mapping[SegformerConfig] is not SegformerForSemanticSegmentation:
    # transformers 5.17 passes over registrations for its own configurations, whatever exist_ok says.
    AutoModelForSemanticSegmentation._model_mapping._extra_content[SegformerConfig] = SegformerForSemanticSegmentation

for _config, _model in (
    (UNetConfig, UNetForSemanticSegmentation),
    (FCNResNetConfig, FCNResNetForSemanticSegmentation),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForSemanticSegmentation.register(_config, _model, exist_ok=True)
    # Saved folders carry the code, for readers without this package (trust_remote_code=True).
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForSemanticSegmentation")

__all__ = [
    "PRESETS",
    "FCNResNetConfig",
    "FCNResNetForSemanticSegmentation",
    "SegformerForSemanticSegmentation",
    "UNetConfig",
    "UNetForSemanticSegmentation",
    "build_model",
    "freeze_batchnorm",
]
