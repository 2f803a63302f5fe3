"""How far a run has got, read from its folder."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from neft.errors import UsageError
from neft.pipeline.prepare import recipe_of
from neft.pipeline.run import LOCK
from neft.pipeline.stages import stage_names
from neft.pipeline.store import Record, StageFolder, State, is_locked


@dataclass(frozen=True)
class StageStatus:
    """One stage of a run."""

    stage: str
    state: str
    """``done``, ``running``, ``partial`` (an interrupted attempt, which the next run continues),
    ``damaged`` (files have gone, or its record cannot be read), ``stale`` (made from an earlier result of
    a stage that it reads) or ``missing``."""
    seconds: float | None
    """Duration of the last attempt."""
    num_bytes: int
    finished: str | None
    """When, in UTC."""


def read_status(run: Path) -> list[StageStatus]:
    """Status of every stage of the run in folder ``run``, in order.

    Raises:
        UsageError: no run has worked in this folder.
    """
    prepare = StageFolder(run / "prepare")
    if prepare.working.exists() and not prepare.path.exists():
        names = ["prepare"]
    else:
        names = stage_names(recipe_of(run))
    running = is_locked(run / LOCK)
    statuses: list[StageStatus] = []
    fingerprints: dict[str, str] = {}
    for name in names:
        folder = StageFolder(run / name)
        record, is_damaged = _record(folder)
        if record is not None:
            fingerprints[name] = record.fingerprint
        is_stale = record is not None and any(
            fingerprints.get(read, fingerprint) != fingerprint
            for read, fingerprint in record.reads.items()
        )
        statuses.append(
            StageStatus(
                stage=name,
                state="damaged" if is_damaged else _state(folder, running, is_stale),
                seconds=record.seconds if record else None,
                num_bytes=(
                    record.num_bytes
                    if record
                    else _num_bytes(folder.path if is_damaged else folder.working)
                ),
                finished=record.finished if record else None,
            )
        )
    return statuses


def _record(folder: StageFolder) -> tuple[Record | None, bool]:
    """The record of a finished stage, and whether there is one that cannot be read."""
    try:
        return folder.finished(), False
    except UsageError:
        return None, True


def _state(folder: StageFolder, running: bool, is_stale: bool) -> str:
    if folder.working.exists():
        return "running" if running else str(State.PARTIAL)
    return "stale" if is_stale else str(folder.state())


def _num_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # A run that is at work may remove a file while we look.
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total
