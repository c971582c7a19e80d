"""How much memory a piece of work needs beyond what was there before.

On a CPU nothing counts what libraries allocate but the kernel, which counts the pages that a process holds. glibc keeps
freed blocks for later, which would hide what is needed or show what is not; so while memory is measured every large
block gets pages of its own (``mallopt``) and the kernel's high-water mark is set back before each run.
"""

import ctypes
import gc
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cityseg_hf.launch import use_cpu_well

# From glibc's malloc.h.
_M_MMAP_THRESHOLD, _M_MMAP_MAX = -3, -4
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def exact_allocations() -> Iterator[None]:
    """Within the block, blocks of 128 KiB and more come from the kernel and go back to it."""
    glibc = platform.libc_ver()[0] == "glibc"
    if glibc:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 2**16)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**17)
    try:
        yield
    finally:
        if glibc:
            use_cpu_well()  # as the timings and a training run have it


def peak_extra_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes held at once during ``run()``, less those held before. ``None`` where nothing counts them."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc" or not _CLEAR_REFS.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR_REFS.write_text("5")  # sets the high-water mark to what is held now: man 5 proc
    except OSError:
        return None
    before = _status("VmHWM")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A number of ``/proc/self/status`` in bytes."""
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
