"""Files that appear whole or not at all."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from neft.errors import UsageError


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, from the system's cache to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Files up to this size are hashed whole. Of a larger one (weights) blocks of 4 KiB are, spread evenly:
# 16 MiB in all, enough to meet every matrix of a model several times.
_WHOLE_UP_TO = 16 * 2**20
_NUM_BLOCKS = 4096
_BLOCK = 4096


def file_identity(path: Path) -> str:
    """``sha256:...`` of the content; ``sampled:...`` of size and sampled blocks above 16 MiB."""
    found = path.stat()
    return _identity(path, found.st_size, (found.st_mtime_ns, found.st_ino))


@lru_cache(maxsize=256)
def _identity(path: Path, size: int, _stamp: tuple[int, int]) -> str:
    # Cached, as hundreds of cells of a comparison read the same few files.
    with path.open("rb", buffering=0) as file:
        if size <= _WHOLE_UP_TO:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        digest = hashlib.sha256(str(size).encode())
        for block in range(_NUM_BLOCKS):
            # The first block is the start of the file, the last one its end.
            offset = block * (size - _BLOCK) // (_NUM_BLOCKS - 1)
            digest.update(os.pread(file.fileno(), _BLOCK, offset))
        return f"sampled:{digest.hexdigest()}"


def follow_umask(file: Path) -> None:
    """Give a file the permissions that the user's umask gives any new one.

    mkstemp makes files private, and so do writers that rename a file of their own into place.
    """
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def check_folder(folder: Path) -> None:
    """Refuse a folder in which nothing can be written, before any work is done for it.

    Raises:
        UsageError: it is no folder, cannot be made, or belongs to somebody else.
    """
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        reason = "is a file" if there == folder else f"cannot be made, as {there} is a file"
        raise UsageError(f"{folder}: {reason}. Choose another output folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{there}: may not be written in. Choose another output folder.")


@contextmanager
def replaced_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed into place.

    A reader, or a process killed at any moment, sees the old file or the new one, never a part.

    Raises:
        OSError: names ``path``, where it is the temporary file that cannot be made or renamed.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    with _named(final):
        handle, name = tempfile.mkstemp(dir=final.parent, prefix=f".{final.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with _named(final):
            follow_umask(part)
            sync(part)
            part.replace(final)
        sync(final.parent)
    finally:
        part.unlink(missing_ok=True)


def file_sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of every file, by its path relative to ``folder``."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def changed_files(folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """Those of ``sizes`` that have gone from ``folder`` or have another size now."""
    return [
        name
        for name, size in sizes.items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != size
    ]


@contextmanager
def _named(final: Path) -> Iterator[None]:
    """Let errors about a temporary file name the one that the user knows."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(final)) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` in UTF-8, atomically."""
    with replaced_atomically(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON in UTF-8, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
