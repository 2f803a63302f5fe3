"""Memory that is used and that there is: of the accelerator if there is one, else of the machine."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from neft.errors import OutOfMemoryError

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_MACHINE = Path("/proc/meminfo")
_GROUPS = Path("/sys/fs/cgroup")
# By both versions of control groups: limit, use, and statistics with the name of what of the use is the
# cache of files that nobody has read again, which the kernel gives up as soon as memory is wanted.
_CONTAINER = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
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
    return _kilobytes(_STATUS, "VmHWM") * 1024


def resident_memory() -> int | None:
    """Bytes that this process holds now, whatever for; ``None`` on platforms that cannot tell."""
    return _kilobytes(_STATUS, "VmRSS") * 1024 if _STATUS.is_file() else None


@dataclass(frozen=True)
class Available:
    """The memory that training has, in bytes."""

    place: str
    """What it belongs to: ``GPU``, ``machine``, ``container`` or ``process``."""
    total: int
    free: int


def available_memory() -> Available | None:
    """Of the accelerator if there is one, else what is tightest of machine, container and process.

    ``None`` on platforms that cannot tell.
    """
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Available("GPU", total, free)
    if not _MACHINE.is_file():
        return None
    there = (_of_machine(), *_of_process(), *of_container(_GROUPS))
    return min(there, key=lambda place: place.free)


def _of_machine() -> Available:
    total, free = (_kilobytes(_MACHINE, name) * 1024 for name in ("MemTotal", "MemAvailable"))
    return Available("machine", total, free)


def _of_process() -> Iterator[Available]:
    """What the machine's user lets a process have, where that is limited."""
    import resource

    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        yield Available("process", space, space - _kilobytes(_STATUS, "VmSize") * 1024)


def of_container(groups: Path) -> Iterator[Available]:
    """What a container has been given, where that is limited.

    Args:
        groups: folder of the control groups.
    """
    for limit, used, statistics, cache in _CONTAINER:
        # Where there is no limit, it says "max", or a number beyond all machines.
        if (groups / limit).is_file() and (text := (groups / limit).read_text().strip()).isdigit():
            total = int(text)
            lines = (groups / statistics).read_text().splitlines()
            idle = next((int(n) for name, n in map(str.split, lines) if name == cache), 0)
            taken = int((groups / used).read_text()) - idle
            yield Available("container", total, total - taken)


def _kilobytes(file: Path, name: str) -> int:
    lines = file.read_text(encoding="ascii").splitlines()
    found = next(line for line in lines if line.startswith(f"{name}:"))
    return int(found.split()[1])


def _can_reset() -> bool:
    return os.access(_RESET, os.W_OK)


@contextmanager
def naming_shortage(place: Callable[[], str]) -> Iterator[None]:
    """Turn a failed allocation, whoever's, into one kind of error.

    Args:
        place: what was being done, for the message.

    Raises:
        OutOfMemoryError: an allocation failed within ``with``.
    """
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        # Its frames hold what filled the memory, and whoever explains the error needs some.
        traceback.clear_frames(error.__traceback__)
        raise OutOfMemoryError(f"{place()}: {told_shortage(error)}") from error


def is_shortage(error: BaseException) -> bool:
    """Whether an error is a failed allocation, of Python, the system, torch or the accelerator."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # What torch raises where the CPU has no more has no type of its own.
    return isinstance(error, RuntimeError) and any(told in str(error) for told in _TOLD)


_TOLD = ("can't allocate memory", "Cannot allocate memory", "could not create a memory object")


def told_shortage(error: BaseException) -> str:
    """What to tell of a failed allocation."""
    if isinstance(error, OutOfMemoryError):
        return str(error)
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"memory ran out ({reason})"
