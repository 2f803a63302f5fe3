"""The most memory that training has used: on the accelerator where there is one, else of the process."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
# What the kernel understands as: forget the highest use so far (proc(5)).
_FORGET_PEAK = "5"


def release_free_memory() -> None:
    """Give back what earlier work has freed, so that it does not count in what comes next.

    Trainers hold their models in reference cycles; and glibc keeps what is freed inside its heap
    until it is told not to.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reset_peak_memory() -> None:
    """Begin a new measurement."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _can_reset():
        _RESET.write_text(_FORGET_PEAK)


def peak_memory() -> int | None:
    """Bytes since ``reset_peak_memory``; ``None`` on platforms that cannot tell."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if not _can_reset():
        return None
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    found = next(line for line in lines if line.startswith("VmHWM:"))
    return int(found.split()[1]) * 1024


def _can_reset() -> bool:
    return os.access(_RESET, os.W_OK)
