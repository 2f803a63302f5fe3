"""Identities of the content that a recipe names: the same for the same content, wherever it lies.

File times and paths play no part, so a run can be moved, and a file that was touched but not changed
is still the same.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from neft.errors import CheckpointError, DataError
from neft.files import file_identity
from neft.recipe import DataSource, HubData, ModelSection, ParallelFiles

MODEL_IDENTITY = "model_identity"
"""Where the provenance of a neuron set names the identity of the base model it was chosen in."""

# What transformers reads from a checkpoint folder; not its README or licence.
_MODEL_SUFFIXES = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py"}


def data_identity(source: DataSource, place: str) -> str:
    """Identity of a data source: content of files, or what a recipe says of a set on the Hub.

    Args:
        source: as in the recipe.
        place: where it stands in the recipe, for errors.

    Raises:
        DataError: a file that is missing or cannot be read.
    """
    match source:
        case HubData():
            name = f"{source.id}@{source.revision or 'main'} {source.config or ''} {source.split}"
            return f"{name} {json.dumps(source.fields, sort_keys=True)}" if source.fields else name
        case ParallelFiles():
            sides = source.model_dump().items()
            return ", ".join(_data_file_identity(path, f"{place}.{side}") for side, path in sides)
        case _:
            return _data_file_identity(source, place)


def _data_file_identity(name: str, place: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no such file"
        raise DataError(f"{place}: {name}: {kind}. Relative paths start at {Path.cwd()}.")
    try:
        # The suffix decides how the content is read.
        return f"{path.suffix.lower()} {file_identity(path)}"
    except OSError as error:
        raise DataError(f"{place}: {name}: cannot be read: {error.strerror}.") from error


def model_identity(model: ModelSection) -> str:
    """Identity of a base model: content of a checkpoint folder, or id and revision on the Hub.

    A Hub id without ``revision`` is taken to mean the same model for ever: pin a commit to be sure.

    Raises:
        CheckpointError: a file of the folder that cannot be read.
    """
    return checkpoint_identity(model.path, model.revision)


def checkpoint_identity(path: str, revision: str | None = None) -> str:
    """Identity of a checkpoint folder, or of an id on the Hub; errors as in ``model_identity``."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder_identity(folder)
    return f"{path}@{revision or 'main'}"


def folder_identity(folder: Path) -> str:
    """Identity of a folder with a checkpoint or an adapter, by all that transformers or PEFT read.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _MODEL_SUFFIXES:
            try:
                digest.update(f"{path.name}\0{file_identity(path)}\0".encode())
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    return f"content:{digest.hexdigest()}"
