"""From what a user gives to a source of weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from neft.checkpoints.folder import FolderWeights
from neft.checkpoints.hub import fetch
from neft.checkpoints.module import ModuleWeights
from neft.checkpoints.source import WeightSource
from neft.errors import CheckpointError
from neft.neurons import PathLike

if TYPE_CHECKING:
    from torch import nn


def open_weights(source: PathLike | nn.Module, revision: str | None = None) -> WeightSource:
    """Open a checkpoint or a module as a source of weights; only headers are read.

    Args:
        source: a local folder with ``model.safetensors`` or its shards, a Hub id, or a module, plain or
            wrapped by PEFT. A string that names no folder is taken for a Hub id if it can be one.
        revision: of a Hub id: branch, tag or commit.

    Raises:
        CheckpointError: nothing there, or weights that are missing, torn or pickled.
    """
    if not isinstance(source, str | os.PathLike):
        return ModuleWeights(source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return FolderWeights(folder, label=str(source))
    if folder.exists():
        raise CheckpointError(f"{source}: is a file; a checkpoint is a folder.")
    if not (isinstance(source, str) and _can_be_hub_id(source)):
        raise CheckpointError(f"{source}: no such folder.")
    label = source if revision is None else f"{source}@{revision}"
    return FolderWeights(fetch(source, revision), label)


def _can_be_hub_id(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1
