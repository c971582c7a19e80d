"""What a run costs: time, memory, and the arithmetic of its network."""

import platform
import time
from pathlib import Path
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from cityseg_hf.checkpoint import Progress
from cityseg_hf.inference import load_model_folder, processor_size
from cityseg_hf.runs import write_json


class Stopwatch:
    """Adds up in a run's progress how long its steps and validations take, and the most memory they need.

    The progress is part of every checkpoint, so that the parts of a run that was cut add up. What was done after its
    last checkpoint is done again, and counts once.

    Args:
        progress: what is added to.
        device: what the run trains on.
    """

    def __init__(self, progress: Progress, device: torch.device) -> None:
        self.progress, self.device = progress, device
        self._since = time.monotonic()

    def lap(self, kind: Literal["train_seconds", "validation_seconds"]) -> None:
        """Adds the time since the last lap, or since the beginning, to one of the two."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # the host is steps ahead of it
        now = time.monotonic()
        setattr(self.progress, kind, getattr(self.progress, kind) + now - self._since)
        self.progress.peak_memory = max(self.progress.peak_memory, peak_memory(self.device))
        self._since = now


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held: on a CUDA device in tensors, elsewhere in its pages; 0 where none counts.

    Processes that load data are not part of it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has none
        return 0
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages if platform.system() == "Darwin" else pages * 1024


def describe_cpu() -> tuple[str, set[str]]:
    """Name and flags of the processor, as far as the system tells."""
    file = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    model = fields.get("model name") or platform.processor() or platform.machine()
    return model, set((fields.get("flags") or fields.get("Features") or "").split())


@torch.no_grad()
def forward_flops(model: PreTrainedModel, image_size: tuple[int, int]) -> int | None:
    """Floating-point operations of one image's way through a network, as PyTorch counts them.

    A multiplication and an addition are two; what is neither convolution nor matrix product is left out. Nothing is
    computed. Papers that state multiply-adds state half of it.

    Args:
        model: in evaluation mode, on the CPU.
        image_size: height and width of the image.

    Returns:
        ``None`` for a network whose way depends on the values it meets.
    """
    # Imported here, as few need it: it brings the symbolic shapes of torch.compile with it.
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        # Fused attention has no count on CPUs; written out, it is two matrix products, whatever computes it later.
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(pixel_values=torch.empty(1, 3, *image_size))
    except Exception:  # networks of others fail in ways of their own
        return None
    return counter.get_total_flops()


def write_cost(run: Path, progress: Progress, global_batch: int, device: torch.device) -> None:
    """Writes ``cost.json`` into the folder of a run that came to its end. Times are in seconds, memory in bytes.

    Args:
        run: the run folder; the network is read from its ``last``, free of what training wraps it in.
        progress: of the run.
        global_batch: images per optimiser step.
        device: what the run trained on.
    """
    model, processor = load_model_folder(run / "last")
    image_size = processor_size(processor)
    images = progress.step * global_batch
    cost = {
        "train_seconds": round(progress.train_seconds, 3),
        "validation_seconds": round(progress.validation_seconds, 3),
        "images": images,
        "images_per_second": images / progress.train_seconds if progress.train_seconds else None,
        "peak_memory": progress.peak_memory or None,
        "parameters": model.num_parameters(),
        "forward_flops": forward_flops(model, image_size),
        "image_size": list(image_size),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else describe_cpu()[0],
    }
    write_json(run / "cost.json", cost)
