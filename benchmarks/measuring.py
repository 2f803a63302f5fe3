"""What the benchmarks share: the machine, memory, and ratios of what ran side by side."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Ratio:
    """One quantity over another, taken round by round: the median, and the range."""

    name: str
    median: float
    min: float
    max: float
    target: float | None
    """What the median must not exceed; None where there is no promise."""

    @property
    def is_missed(self) -> bool:
        return self.target is not None and self.median > self.target

    def __str__(self) -> str:
        spread = "" if self.min == self.max else f"  ({self.min:.3f} .. {self.max:.3f})"
        target = "" if self.target is None else f"  target <= {self.target}"
        return f"{self.name:28} {self.median:.3f}{spread}{target}{'  MISSED' if self.is_missed else ''}"


def options_parser(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """Of a benchmark's command line: its first line of help, and what ``--quick`` leaves out."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser


def ratio(
    name: str, uppers: Sequence[float], lowers: Sequence[float], target: float | None = None
) -> Ratio:
    """``uppers`` over ``lowers``, each pair measured in the same round.

    Raises:
        ValueError: not as many of the one as of the other.
    """
    values = [upper / lower for upper, lower in zip(uppers, lowers, strict=True)]
    return Ratio(name, statistics.median(values), min(values), max(values), target)


def in_turn(tasks: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each task returned in each round; all run side by side in this process.

    Args:
        tasks: by name; they run in this order in every round.
        rounds: counted rounds. One before them warms up: files in the page cache, pools of memory.
    """
    returned: dict[str, list[T]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            result = task()
            if number:
                returned[name].append(result)
        print(f"\rround {number}/{rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return returned


def timed(task: Callable[[], object]) -> Callable[[], float]:
    """``task`` made to return the seconds that it took."""

    def run() -> float:
        start = time.perf_counter()
        task()
        return time.perf_counter() - start

    return run


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; the benchmarks need Linux.")


def restart_peak() -> None:
    """Let ``VmHWM`` count from here: without what imports and preparations held for a while."""
    Path("/proc/self/clear_refs").write_text("5")


def machine(packages: Iterable[str] = ("torch", "transformers", "peft", "neft")) -> dict[str, Any]:
    """What the figures were measured on, with the versions of ``packages`` and the commit."""
    import torch

    from neft.products import onednn_is_faster

    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "onednn_is_faster": onednn_is_faster(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("MALLOC_", "OMP_", "MKL_"))
        },
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "commit": commit.stdout.strip() or None,
    }


def write_figures(path: Path, ratios: Iterable[Ratio], **sections: Any) -> None:
    """The figures of one run as JSON: its ``sections``, the machine, and the ratios."""
    figures = sections | {"machine": machine(), "ratios": [asdict(row) for row in ratios]}
    path.write_text(json.dumps(figures, indent=1) + "\n")
