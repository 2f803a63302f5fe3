"""The processes that one launcher (``torchrun``, ``accelerate launch``) started for one command.

The first does the command; the others follow it, and join in what processes do together. Only meanwhile
is there a process group, so that everything else happens in the first process as it would in one alone.
The launcher's key-value store carries word from one to another; waiting for it costs nothing and never
times out, and whoever waits can be interrupted.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

from neft.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store

# How long a process waits for another inside a collective operation: for the slowest save, not for the
# work of other stages, which happens outside.
_TIMEOUT = timedelta(hours=2)
# Seconds between two looks for word.
_PAUSE = 0.1
# What the engines leave in the environment, where they would read it again.
_TRACES = ("ACCELERATE_", "FSDP_")


def num_processes() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process does the command, and writes its files."""
    return process_index() == 0


def leave_launcher() -> None:
    """Be a process like any other: the libraries take a launch of one for a launch of several."""
    os.environ.pop("LOCAL_RANK", None)


def check_launch() -> None:
    """Refuse a launch that this machine, or this package, cannot carry out.

    Raises:
        UsageError: more processes than accelerators, or a launcher that sets up an engine of its own.
    """
    import torch

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.accelerator.is_available() and here > torch.accelerator.device_count():
        raise UsageError(
            f"{here} processes were started on a machine with {torch.accelerator.device_count()} "
            "accelerators. Start one for each: torchrun --nproc-per-node, accelerate launch "
            "--num_processes."
        )
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if num_processes() > 1 and os.environ.get(name, "false").lower() == "true":
            raise UsageError(
                f"accelerate's configuration asks for an engine ({name}), which the recipe decides: set "
                "distributed.engine there, and launch with torchrun, or by accelerate launch --multi_gpu "
                "without a configuration file."
            )


def tell(key: str, text: str) -> None:
    """Leave word for the other processes."""
    _store().set(key, text)


def told(key: str, patience: float = math.inf) -> str | None:
    """Wait for word; ``None`` if it does not come within so many seconds."""
    deadline = time.monotonic() + patience
    # Not the store's own wait, which no signal ends.
    while not _store().check([key]):
        if time.monotonic() > deadline:
            return None
        time.sleep(_PAUSE)
    word: str = _store().get(key).decode()
    return word


@cache
def _store() -> Store:
    from torch.distributed.rendezvous import rendezvous

    store: Store = next(rendezvous("env://"))[0]
    return store


@contextmanager
def process_group(name: str) -> Iterator[None]:
    """Let the processes of this launch work together; all of them must come here.

    Args:
        name: of this meeting; every one has another.
    """
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore

    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    before = {key: value for key, value in os.environ.items() if key.startswith(_TRACES)}
    distributed.init_process_group(
        _backend(device),
        store=PrefixStore(name, _store()),
        rank=process_index(),
        world_size=num_processes(),
        timeout=_TIMEOUT,
    )
    try:
        yield
    finally:
        _leave_group()
        for key in [key for key in os.environ if key.startswith(_TRACES)]:
            del os.environ[key]
        os.environ.update(before)


def _leave_group() -> None:
    """Leave the group, and let DeepSpeed forget it too, where it was at work."""
    from torch import distributed

    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    else:
        distributed.destroy_process_group()


def _backend(device: torch.device | None) -> str:
    """An accelerator's own, and gloo for what lies in the machine's memory."""
    if device is None:
        return "gloo"
    from torch.distributed import get_default_backend_for_device

    return f"{device.type}:{get_default_backend_for_device(device)},cpu:gloo"


def in_group() -> bool:
    """Whether processes work together just now."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def wait_for_all() -> None:
    """Go on once all processes of the group are here; at once without one."""
    # Not a barrier, which an accelerator's backend would put into its queue of kernels.
    any_process(False)


def sum_over_all(values: torch.Tensor) -> torch.Tensor:
    """Add up the values of all processes of the group, all of which must come here; on the CPU."""
    from torch import distributed

    if in_group():
        distributed.all_reduce(values)
    return values


def any_process(condition: bool) -> bool:
    """Whether ``condition`` holds in any process of the group; all of them must ask."""
    import torch
    from torch import distributed

    if not in_group():
        return condition
    votes = torch.tensor(int(condition))
    distributed.all_reduce(votes, distributed.ReduceOp.MAX)
    return bool(votes)
