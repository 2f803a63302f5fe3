"""What a number came from, beside the recipe: versions, commit and machine."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

_PACKAGES = (
    "neft",
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "sacrebleu",
    "rouge-score",
    "numpy",
)


@cache
def package_versions() -> dict[str, str]:
    """Versions of this package and of those that its results depend on."""
    return {name: version(name) for name in _PACKAGES}


@cache
def source_commit() -> str | None:
    """Commit of this project's source; ``None`` where it does not run from a git checkout of it.

    A ``+`` at the end stands for changes that are not committed.
    """
    folder = Path(__file__).parent
    found = _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
    commit = found and _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    return commit + (
        "+" if _git(folder, "status", "--porcelain", "--", folder.parent.as_posix()) else ""
    )


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@cache
def machine() -> dict[str, str | int]:
    """The machine in words: processor, cores, accelerator."""
    import torch

    facts: dict[str, str | int] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "platform": platform.platform(terse=True),
    }
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
        facts["num_accelerators"] = torch.cuda.device_count()
    return facts


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
