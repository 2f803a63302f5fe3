"""The contract of a stage: what determines its result, and the fingerprint of that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One step of a run: reads the folders of earlier stages, and fills one of its own."""

    name: str
    """In a run, also the name of its folder."""
    version: int
    """Raised whenever the code gives another result for the same ingredients."""
    ingredients: Mapping[str, Any]
    """What determines the result beside the stages that are read: place in the recipe -> JSON value,
    or the identity of a file's content (see ``identity``)."""
    reads: tuple[str, ...]
    """Earlier stages whose folders it reads."""
    run: Callable[[Path, Mapping[str, Path]], None]
    """Fills the folder that it is given; the mapping has the finished folder of each stage it reads."""
    resumes_from: tuple[str, ...] = ()
    """Patterns of the files in its folder from any of which ``run`` continues after a killed attempt. An
    attempt that left none of them starts anew."""
    derived: bool = False
    """Whether the result is made again in little time from the stages it reads, and so may be replaced
    without asking when the recipe changes."""
    on_shortage: Callable[[], str] | None = None
    """Tells what the stage was estimated to take and what lowers that, once memory has run out."""

    def fingerprint(self, inputs: Mapping[str, str]) -> str:
        """Hash of all that determines the result.

        Args:
            inputs: the fingerprints of (at least) the stages it reads.
        """
        return _hash(
            {
                "stage": self.name,
                "version": self.version,
                "ingredients": dict(self.ingredients),
                "reads": {name: inputs[name] for name in self.reads},
            }
        )


def _hash(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
