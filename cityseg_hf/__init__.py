"""cityseg_hf: semantic segmentation of street scenes on Cityscapes, in the manner of Accelerate and Transformers.

Importing it registers UNet and FCNResNet with transformers' Auto classes.
"""

from pathlib import Path

from cityseg_hf import labels
from cityseg_hf.data.cityscapes import load_cityscapes
from cityseg_hf.data.synthetic import make_synthetic
from cityseg_hf.errors import UserError
from cityseg_hf.metrics import SegmentationCounts
from cityseg_hf.models import (
    PRESETS,
    FCNResNetConfig,
    FCNResNetForSemanticSegmentation,
    UNetConfig,
    UNetForSemanticSegmentation,
    build_model,
)

__version__ = "0.1.0"

EVALUATE_METRIC = str(Path(__file__).with_name("cityscapes_scores.py"))
"""What ``evaluate.load`` takes to load the Cityscapes scores from this package."""

__all__ = [
    "EVALUATE_METRIC",
    "PRESETS",
    "FCNResNetConfig",
    "FCNResNetForSemanticSegmentation",
    "SegmentationCounts",
    "UNetConfig",
    "UNetForSemanticSegmentation",
    "UserError",
    "build_model",
    "labels",
    "load_cityscapes",
    "make_synthetic",
]
