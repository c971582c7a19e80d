"""Recipes: named sets of defaults for ``scripts/train.py --recipe NAME``. Flags and ``--config`` override them.

Each row says where it comes from, what it is expected to score on Cityscapes val (single scale), and on what. A score
that nobody of this project has measured is marked *published*: it is that of the source, not ours.
"""

from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """A row of the table."""

    about: str
    expected: str
    settings: dict[str, Any]


RECIPES: dict[str, Recipe] = {
    "original": Recipe(
        about="the student project this one succeeds: 256x256 squares, AdamW with AMSGrad, exponential decay",
        expected="not comparable: it was judged on squashed labels",
        settings={
            "image_size": [256, 256],
            "num_epochs": 80,
            "batch_size": 16,
            "learning_rate": 1e-4,
            "weight_decay": 1e-4,
            "amsgrad": True,
            "schedule": "exponential",
            "gamma": 0.99,
            "early_stopping_patience": 20,
        },
    ),
    "segformer": Recipe(
        about="SegFormer (Xie et al., 2021), as mmsegmentation trains it; global batch 8, 160k steps; start from "
        "--init_from nvidia/mit-bN",
        expected="published: B0 76.5, B1 78.6, B2 81.1, B3 81.9, B4 81.9, B5 82.3; 1024x1024 crops, 8 GPUs x 1 image",
        settings={
            "image_size": [1024, 2048],
            "crop_size": [1024, 1024],
            "augmentation": "standard",
            "max_steps": 160_000,
            "global_batch_size": 8,
            "learning_rate": 6e-5,
            "weight_decay": 0.01,
            "head_lr_multiplier": 10.0,
            "schedule": "poly",
            "poly_power": 1.0,
            "warmup_steps": 1500,
            "warmup_ratio": 1e-6,
            "val_freq": 10,
            "early_stopping_patience": 0,
        },
    ),
    "fcn": Recipe(
        about="FCN on a dilated ResNet, as mmsegmentation trains it; global batch 8, 80k steps; --init_from imagenet",
        expected="published: R18 71.1, R50 73.6, R101 76.8; 512x1024 crops, 4 GPUs",
        settings={
            "image_size": [1024, 2048],
            "crop_size": [512, 1024],
            "augmentation": "standard",
            "max_steps": 80_000,
            "global_batch_size": 8,
            "optimizer": "sgd",
            "learning_rate": 0.01,
            "weight_decay": 5e-4,
            "schedule": "poly",
            "poly_power": 0.9,
            "min_lr_ratio": 0.01,
            "model_args": ["dilation=true", "auxiliary_head=true"],
            "val_freq": 10,
            "early_stopping_patience": 0,
        },
    ),
    "unet": Recipe(
        about="UNet, as mmsegmentation trains it; global batch 16, 160k steps",
        expected="published, for its UNet-S5: 69.1; 512x1024 crops, 4 GPUs",
        settings={
            "image_size": [1024, 2048],
            "crop_size": [512, 1024],
            "augmentation": "standard",
            "max_steps": 160_000,
            "global_batch_size": 16,
            "optimizer": "sgd",
            "learning_rate": 0.01,
            "weight_decay": 5e-4,
            "schedule": "poly",
            "poly_power": 0.9,
            "min_lr_ratio": 0.01,
            "val_freq": 20,
            "early_stopping_patience": 0,
        },
    ),
    "camvid": Recipe(
        about="SegFormer B0 from random weights on 367 small images (CamVid) in half an hour of two CPU cores; with "
        "--model_args drop_path_rate=0 classifier_dropout_prob=0, since so short a training underfits",
        expected="0.551 CamVid val mIoU over the 11 classes present, best of five validations; 50 CPU minutes (LOG.md)",
        settings={
            "image_size": [288, 384],
            "augmentation": "flip",
            "class_weights": "enet_sqrt",
            "max_steps": 7000,
            "batch_size": 2,
            "learning_rate": 7e-4,
            "weight_decay": 0.01,
            "warmup_steps": 150,
            "val_freq": 8,
            "early_stopping_patience": 0,
            "logging_steps": 50,
        },
    ),
    "synthetic": Recipe(
        about="the built-in streets, when there is no Cityscapes: shows that everything works, in minutes on a CPU",
        expected="see LOG.md; two CPU cores, a few minutes",
        settings={
            "num_epochs": 12,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 10,
            "class_weights": "enet",
            "logging_steps": 5,
        },
    ),
}
