"""A run's trainer checkpoints on disk: which are whole, and which are still needed.

The trainer writes a checkpoint file by file. A marker, written once everything else has reached the disk,
tells a whole checkpoint from one that a kill or a power cut tore, and by the sizes of its files from one
that was damaged since; it goes first when one is deleted.
"""

from __future__ import annotations

import json
import logging
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from neft.files import changed_files, file_sizes, follow_umask, sync, write_json

_log = logging.getLogger(__name__)

MARKER = "complete.json"
"""Comes into a checkpoint last."""
CHECKPOINTS = "checkpoints"
"""Holds them, in the folder of a run."""
_STATE = "trainer_state.json"
# What serves a resumed run alone; the rest of a checkpoint is the model or adapter.
_TRAINER_FILES = (
    MARKER,
    _STATE,
    "training_args.bin",
    "optimizer*.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
)
# The whole of an adapter.
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Where the trainer keeps the checkpoint of ``step``."""
    return checkpoints / f"checkpoint-{step}"


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as whole, after forcing its files to the disk."""
    for path in (checkpoint, *checkpoint.rglob("*")):
        sync(path)
    write_json(checkpoint / MARKER, file_sizes(checkpoint))


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The whole checkpoint with the most steps, if the best weights until then are whole too."""
    for folder in sorted(_all(checkpoints), key=_step, reverse=True):
        if _is_whole(folder):
            best = _best_until(folder)
            if best is None or _is_whole(best, without_trainer=True):
                return folder
    return None


def _is_whole(checkpoint: Path, *, without_trainer: bool = False) -> bool:
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    changed = changed_files(checkpoint, sizes)
    return all(without_trainer and _is_trainer_file(Path(name)) for name in changed)


def _best_until(checkpoint: Path) -> Path | None:
    """Where the weights are that were the best at a whole checkpoint, if any were measured."""
    step = read_state(checkpoint)["best_global_step"]
    return None if step is None else checkpoint_folder(checkpoint.parent, step)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state at a whole checkpoint: steps, best step, history."""
    state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    return state


def link_weights(checkpoint: Path, result: Path) -> None:
    """Give the model or adapter in ``checkpoint`` a second name: a folder that appears whole.

    The weights are not copied, and outlive the checkpoint.
    """
    result.parent.mkdir(exist_ok=True)
    part = result.with_name(f".{result.name}.part")
    for leftover in (part, result):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir()
    is_adapter = (checkpoint / _ADAPTER_FILES[0]).is_file()
    for file in checkpoint.iterdir():
        if file.name in _ADAPTER_FILES or not (is_adapter or _is_trainer_file(file)):
            _link(file, part / file.name)
    sync(part)
    part.rename(result)
    sync(result.parent)


def _link(file: Path, new_name: Path) -> None:
    try:
        new_name.hardlink_to(file)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, new_name)
    follow_umask(new_name)
    sync(new_name)


def _is_trainer_file(file: Path) -> bool:
    """Whether a file of a checkpoint serves the trainer, and is no part of the model or adapter."""
    return any(fnmatch(file.name, pattern) for pattern in _TRAINER_FILES)


def discard_torn(checkpoints: Path) -> None:
    """Delete checkpoints from which nothing goes on: what lies in them must not mix with a later save."""
    last = last_checkpoint(checkpoints)
    needed = () if last is None else (last, _best_until(last))
    for folder in _all(checkpoints):
        if folder in needed:
            continue
        is_later = last is None or _step(folder) > _step(last)
        if is_later and (folder / MARKER).is_file():
            _log.warning(
                "%s: deleted, as files of it or of the best checkpoint before it were damaged; training "
                "goes on from %s.",
                folder,
                "the beginning" if last is None else last,
            )
        shutil.rmtree(folder)


def discard_superseded(checkpoints: Path, best: int | None, last: int) -> None:
    """Keep the last checkpoint to resume from, and the weights of the best; delete all others."""
    for folder in _all(checkpoints):
        if _step(folder) == last:
            continue
        if _step(folder) == best:
            for file in folder.iterdir():
                if _is_trainer_file(file) and file.name != MARKER:
                    file.unlink()
        else:
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder)


def _all(checkpoints: Path) -> list[Path]:
    return [folder for folder in checkpoints.glob("checkpoint-*") if folder.is_dir()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))
