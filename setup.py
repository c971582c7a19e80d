"""Packaging: what cityseg_hf needs, and what its extras add."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="cityseg_hf",
    version="0.1.0",
    description="Train, judge, reload and share semantic-segmentation networks on Cityscapes",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["cityseg_hf", "cityseg_hf.*"]),
    package_data={"cityseg_hf": ["py.typed"], "cityseg_hf.report": ["page.*"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "accelerate>=1.15",
        "transformers>=5.17",
        "datasets>=4.0",
        "pyarrow>=21.0",
        "filelock>=3.12",
        "evaluate>=0.4.6",
        "safetensors>=0.5",
        "wandb>=0.20",
        "numpy>=1.26",
        "pillow>=11.0",
        "pyyaml>=6.0",
        "tqdm>=4.66",
    ],
    extras_require={
        # cityscapesscripts is the oracle of the scores; the trackers are tested for real.
        "test": [
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.8",
            "cityscapesscripts>=2.2",
            "tensorboard>=2.18",
            "trackio>=0.5",
            "av>=15.0",
            # The report, opened in a Chromium of the system.
            "plotly>=6.0",
            "jinja2>=3.1",
            "playwright>=1.50",
        ],
        # Videos for scripts/predict.py.
        "video": ["av>=15.0"],
        "report": ["plotly>=6.0", "jinja2>=3.1"],
        # The peers of scripts/benchmark.py; albumentations is what transformers' example augments with.
        "bench": [
            "segmentation-models-pytorch>=0.5",
            "torchmetrics>=1.8",
            "albumentations>=2.0",
            "cityscapesscripts>=2.2",
        ],
        "trackers": ["tensorboard>=2.18", "trackio>=0.5"],
    },
)
