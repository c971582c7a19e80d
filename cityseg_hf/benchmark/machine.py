"""What a measurement was taken on."""

import os
import platform
from datetime import datetime, timezone
from typing import Any

import torch

from cityseg_hf.cost import describe_cpu
from cityseg_hf.runs import git_commit, package_version

PACKAGES = (
    "cityseg_hf",
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "evaluate",
    "numpy",
    "pillow",
    "segmentation_models_pytorch",
    "torchmetrics",
    "albumentations",
    "cityscapesscripts",
)
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
"""What a CPU can do that changes a ratio: above all whether it has arithmetic for bf16."""


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, device, versions, date and commit."""
    model, flags = describe_cpu()
    return {
        "cpu": model,
        "cpu_flags": [flag for flag in FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
    }
