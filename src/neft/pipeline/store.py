"""Folders that appear whole or not at all, and one process at a time.

A stage fills a hidden working folder; when all is there, a record goes in last and one rename publishes
the folder under its name. So a folder ``warmup`` is finished, whatever was killed when, and
``.warmup.partial`` is what an interrupted attempt left, from which training resumes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from neft.errors import RunError, UsageError
from neft.files import changed_files, check_folder, file_sizes, sync, write_json
from neft.pipeline.provenance import machine, package_versions, source_commit
from neft.pipeline.stage import Stage

RECORD = "stage.json"
STARTED = "started.json"


class State(StrEnum):
    """What stands in a stage's place."""

    MISSING = "missing"
    PARTIAL = "partial"
    """An interrupted attempt."""
    DAMAGED = "damaged"
    """Finished once, but files have gone or shrunk since."""
    DONE = "done"


@dataclass(frozen=True)
class Record:
    """What a folder holds and how it came about."""

    stage: str
    version: int
    fingerprint: str
    ingredients: Mapping[str, Any]
    reads: Mapping[str, str]
    """Stage that was read -> its fingerprint."""
    attempts: int = 1
    """How many processes worked on it; more than one when it was resumed."""
    seconds: float = 0.0
    """Duration of the last attempt."""
    finished: str | None = None
    """When, in UTC; ``None`` while work goes on."""
    files: Mapping[str, int] = field(default_factory=dict)
    """File, relative to the folder -> size in bytes."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions that made it; for the reader, not part of the fingerprint."""
    released: bool = False
    """Whether part of the result was deleted on purpose, once nothing needed it any more."""
    machine: Mapping[str, str | int] = field(default_factory=dict)
    commit: str | None = None
    """Of this project's source, where it runs from a git checkout; ``+`` after it: with changes."""

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())


def record_of(stage: Stage, inputs: Mapping[str, str]) -> Record:
    """The record of an attempt that is about to start."""
    return Record(
        stage=stage.name,
        version=stage.version,
        fingerprint=stage.fingerprint(inputs),
        ingredients=dict(stage.ingredients),
        reads={name: inputs[name] for name in stage.reads},
    )


def differences(there: Record, here: Record) -> Iterator[str]:
    """One line for each of a stage's own ingredients that differs between two records."""
    yield from differing(there.ingredients, here.ingredients)
    if there.version != here.version:
        yield (
            f"version {there.version} of stage {there.stage} there, version {here.version} in this "
            "release"
        )


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """One line for each setting that differs between two recipes, by its place."""
    for place in sorted(there.keys() | here.keys()):
        old, new = there.get(place), here.get(place)
        if old != new:
            yield f"{place} is {_shown(old)} there, {_shown(new)} in this recipe"


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= 40:
        return text
    # Two long values may begin alike.
    return f"{text[:37]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"


class StageFolder:
    """The place of one stage on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.working = path.with_name(f".{path.name}.partial")
        self._replaced = path.with_name(f".{path.name}.replaced")

    def finished(self) -> Record | None:
        """The record of the finished stage, if there is one.

        Raises:
            UsageError: something else stands in its place.
        """
        if not _holds_something(self.path):
            return None
        record = _read_record(self.path / RECORD)
        if record is None:
            raise UsageError(
                f"{self.path}: is in the way: no stage of a run made it (it has no readable {RECORD}). "
                "Move it away, and run the recipe again, or choose another output folder."
            )
        return record

    def started(self) -> Record | None:
        """The record of an interrupted attempt, if there is one."""
        return _read_record(self.working / STARTED)

    def has_progress(self, stage: Stage) -> bool:
        """Whether an interrupted attempt left something to continue from."""
        return any(
            file.name != STARTED
            for pattern in stage.resumes_from
            for file in self.working.glob(pattern)
        )

    def state(self) -> State:
        """What stands here."""
        record = self.finished()
        if record is not None:
            return State.DAMAGED if changed_files(self.path, record.files) else State.DONE
        return State.PARTIAL if self.working.exists() else State.MISSING

    def begin(self, record: Record, *, resume: bool) -> Record:
        """Make the working folder ready; with ``resume``, keep what an attempt of the same left."""
        earlier = self.started()
        if resume and earlier is not None and earlier.fingerprint == record.fingerprint:
            record = replace(record, attempts=earlier.attempts + 1)
            self._discard_parts()
        else:
            self.discard_working()
        self.working.mkdir(parents=True, exist_ok=True)
        write_json(self.working / STARTED, asdict(record))
        return record

    def discard_working(self) -> None:
        """Remove what an interrupted attempt left."""
        # The record goes first: a removal that is interrupted must not look like something to resume.
        (self.working / STARTED).unlink(missing_ok=True)
        if self.working.exists():
            shutil.rmtree(self.working)

    def _discard_parts(self) -> None:
        """Remove files that a killed attempt was about to rename into place."""
        for part in self.working.rglob(".*.part"):
            if part.is_file():
                part.unlink()

    def finish(self, record: Record, seconds: float) -> Record:
        """Publish the working folder; what stood in its place goes only then."""
        _sync_all(self.working)
        record = replace(
            record,
            seconds=round(seconds, 3),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            files={
                name: size for name, size in file_sizes(self.working).items() if name != STARTED
            },
            packages=package_versions(),
            machine=machine(),
            commit=source_commit(),
        )
        write_json(self.working / RECORD, asdict(record))
        self.settle()
        return record

    def release(self, name: str) -> None:
        """Delete a folder of a finished stage that nothing needs any more, and keep the rest."""
        record = self.finished()
        assert record is not None, self.path
        kept = {
            file: size for file, size in record.files.items() if not file.startswith(f"{name}/")
        }
        # The record goes first: it must not speak of files that have gone.
        write_json(self.path / RECORD, asdict(replace(record, files=kept, released=True)))
        shutil.rmtree(self.path / name, ignore_errors=True)

    def settle(self) -> None:
        """Bring to an end a publication that was cut off; every step of it can be repeated."""
        if (self.working / RECORD).exists():
            (self.working / STARTED).unlink(missing_ok=True)
            if self.path.exists():
                self.path.rename(self._replaced)
            self.working.rename(self.path)
            sync(self.path.parent)
        if self._replaced.exists():
            shutil.rmtree(self._replaced)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a working folder that becomes ``path`` in the end, or nothing at all.

    Raises:
        UsageError: ``path`` is there already, or cannot be made.
    """
    if _holds_something(path):
        raise UsageError(f"{path}: exists already. Move it, or choose another folder.")
    check_folder(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    working = path.with_name(f".{path.name}.{os.getpid()}.partial")
    working.mkdir()
    try:
        yield working
        _sync_all(working)
        working.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(working, ignore_errors=True)


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Hold ``lock`` against all other processes; the kernel lets go of it when this one dies.

    Raises:
        UsageError: its folder cannot be made, or written in.
        RunError: another process holds it.
    """
    check_folder(lock.parent)
    made_folder = not lock.parent.exists()
    lock.parent.mkdir(parents=True, exist_ok=True)
    handle = _acquire(lock)
    try:
        os.truncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)
        if made_folder:
            # A run that was refused at once leaves nothing behind.
            with suppress(OSError):
                lock.parent.rmdir()


def is_locked(lock: Path) -> bool:
    """Whether a process holds ``lock``."""
    try:
        handle = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(handle, fcntl.LOCK_SH)
    finally:
        os.close(handle)


# Seconds to wait for a lock: who only looks (is_locked) lets go of it in far less, a run does not.
_PATIENCE = 0.5
_PAUSE = 0.05


def _acquire(lock: Path) -> int:
    deadline = time.monotonic() + _PATIENCE
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        if _try_lock(handle, fcntl.LOCK_EX) and _is_file_of(handle, lock):
            return handle
        holder = os.read(handle, 32).decode()
        os.close(handle)
        if time.monotonic() > deadline:
            raise RunError(
                f"{lock.parent}: another process (id {holder or 'unknown'}) is working here. Wait until "
                "it is done, or choose another output folder."
            )
        time.sleep(_PAUSE)


def _try_lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_file_of(handle: int, lock: Path) -> bool:
    """Whether ``lock`` is still the file that was opened: its holder before may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), lock.stat())
    except FileNotFoundError:
        return False


def _holds_something(path: Path) -> bool:
    """Whether ``path`` is anything but an empty folder or nothing."""
    return path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None)


def _read_record(path: Path) -> Record | None:
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _sync_all(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        sync(path)
