"""Cells of a comparison and the stages that they share, each in a folder named by its fingerprint.

A stage that two cells have in common (the base model's evaluation, a warm-up, its scores) has one
fingerprint and so one folder: it is made once. What is finished is read from the folders alone, so that a
comparison can be killed at any moment, and goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from neft.comparison.schema import Comparison, MethodEntry, NeuronFiles
from neft.files import write_json
from neft.pipeline.run import planned_records
from neft.pipeline.stages import NEURONS, stages_of
from neft.pipeline.store import Record, StageFolder, State
from neft.recipe import Recipe

_DIGITS = 16


@dataclass(frozen=True)
class Cell:
    """One training run of a comparison."""

    task: str
    row: str
    seed: int
    rate: float

    def __str__(self) -> str:
        return f"{self.task}, {self.row}, rate {self.rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Job:
    """One stage to bring to its finished state, in any process."""

    stage: str
    cell: Cell
    """For which it is done first; others may share it."""
    recipe: Mapping[str, Any]
    """The cell's, as plain values."""
    record: Record
    """What it will have made."""
    folder: Path
    inputs: Mapping[str, Path]
    """The finished folder of each stage that it reads."""

    def __str__(self) -> str:
        if self.stage == "baseline":
            return f"baseline of {self.cell.task}"
        if self.stage in ("warmup", "score"):
            return f"{self.stage} for {self.cell.task}"
        return f"{self.stage} of {self.cell}"


class Cells:
    """The stages of every cell, and how far they have got.

    Args:
        comparison: what is compared.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.output = Path(comparison.output).expanduser()
        self._stages = self.output / "stages"
        self._done: dict[Path, Record] = {}
        self._jobs = cache(self._make_jobs)
        self.recipe = cache(self._recipe)

    def settle(self) -> None:
        """Bring to an end what a killed worker was about to publish; only while no worker runs."""
        for working in self._stages.glob(".*.partial"):
            name = working.name.removeprefix(".").removesuffix(".partial")
            StageFolder(self._stages / name).settle()

    def job(self, cell: Cell, stage: str) -> Job | None:
        """A stage of a cell; ``None`` as long as it depends on neurons of other tasks to come."""
        jobs = self._jobs(cell) if self._missing_set(cell) is None else None
        return None if jobs is None else jobs[stage]

    def ready(self, cell: Cell, stage: str) -> list[Job]:
        """What can be started now towards a stage of a cell; nothing if it is done."""
        other = self._missing_set(cell)
        if other is not None:
            return self.ready(other, "select")
        return self._ready(self._jobs(cell), stage)

    def _ready(self, jobs: Mapping[str, Job], stage: str) -> list[Job]:
        job = jobs[stage]
        if self.finished(job) is not None:
            return []
        needed = [name for name in job.inputs if not self._can_be_read(jobs[name])]
        return [found for name in needed for found in self._unless_readable(jobs, name)] or [job]

    def _unless_readable(self, jobs: Mapping[str, Job], stage: str) -> list[Job]:
        released = self.finished(jobs[stage])
        if released is not None and released.released:
            return [jobs[stage]]
        return self._ready(jobs, stage)

    def _can_be_read(self, job: Job) -> bool:
        record = self.finished(job)
        return record is not None and not record.released

    def finished(self, job: Job) -> Record | None:
        """The record of a job, if it is done."""
        if job.folder not in self._done:
            folder = StageFolder(job.folder)
            record = folder.finished()
            if record is None or folder.state() is not State.DONE:
                return None
            self._done[job.folder] = record
        return self._done[job.folder]

    def forget(self, job: Job) -> None:
        """Look at a job's folder again when asked next."""
        self._done.pop(job.folder, None)

    def release(self, cell: Cell) -> None:
        """Delete the whole checkpoint of a cell that is not needed any more; adapters stay."""
        job = self._jobs(cell)["train"]
        if self.finished(job) is not None and (job.folder / "model").is_dir():
            StageFolder(job.folder).release("model")
            self.forget(job)

    # --- failures ---------------------------------------------------------------------------------

    def failure(self, cell: Cell, stage: str) -> str | None:
        """Why a stage of a cell, or one that it needs, failed earlier."""
        other = self._missing_set(cell)
        if other is not None:
            return self.failure(other, "select")
        jobs = self._jobs(cell)
        pending = [stage]
        while pending:
            job = jobs[pending.pop()]
            if self.finished(job) is not None:
                continue
            file = self._failure_file(job)
            if file.is_file():
                reason: str = json.loads(file.read_text(encoding="utf-8"))["reason"]
                return reason if job.stage == stage else f"{job.stage}: {reason}"
            pending += job.inputs
        return None

    def note_failure(self, job: Job, reason: str) -> None:
        """Remember that a job failed, so that it is not tried again unasked."""
        write_json(self._failure_file(job), {"job": str(job), "reason": reason})

    def forget_failures(self) -> None:
        """Let everything that failed be tried again."""
        for file in self._failures.glob("*.json"):
            file.unlink()

    def _failure_file(self, job: Job) -> Path:
        return self._failures / f"{job.folder.name}.json"

    @property
    def _failures(self) -> Path:
        return self.output / "failures"

    # --- making jobs ------------------------------------------------------------------------------

    def _entry(self, cell: Cell) -> MethodEntry:
        return self.comparison.row(cell.row)

    def _missing_set(self, cell: Cell) -> Cell | None:
        """A cell of another task whose neurons this one joins, and that has not chosen them yet."""
        for task in self._entry(cell).other_tasks:
            other = Cell(task, cell.row, cell.seed, cell.rate)
            if self.finished(self._own_jobs(other)["select"]) is None:
                return other
        return None

    def _recipe(self, cell: Cell) -> Recipe:
        return self.comparison.cell(
            cell.task, self._entry(cell), cell.seed, cell.rate, self._sets(cell)
        )

    def _sets(self, cell: Cell) -> NeuronFiles | None:
        entry = self._entry(cell)
        if not entry.other_tasks:
            return None

        def file(task: str) -> str:
            other = Cell(task, cell.row, cell.seed, cell.rate)
            return str(self._own_jobs(other)["select"].folder / NEURONS)

        return NeuronFiles(
            tuple(map(file, entry.union_with)), tuple(map(file, entry.intersection_with))
        )

    def _own_jobs(self, cell: Cell) -> Mapping[str, Job]:
        """Jobs of a cell as if it joined no neurons of other tasks."""
        return self._jobs(cell, alone=True)

    def _make_jobs(self, cell: Cell, *, alone: bool = False) -> Mapping[str, Job]:
        recipe = (
            self.comparison.cell(cell.task, self._entry(cell), cell.seed, cell.rate)
            if alone
            else self.recipe(cell)
        )
        stages = [stage for stage in stages_of(recipe) if stage.name != "prepare"]
        records = planned_records(stages)
        folders = {
            name: self._stages / f"{name}-{record.fingerprint[:_DIGITS]}"
            for name, record in records.items()
        }
        fields = recipe.model_dump(mode="json")
        return {
            stage.name: Job(
                stage.name,
                cell,
                fields,
                records[stage.name],
                folders[stage.name],
                {name: folders[name] for name in stage.reads},
            )
            for stage in stages
        }


def dev_loss(cells: Cells, cell: Cell) -> float | None:
    """The lowest development loss of a cell's training, if that is done."""
    job = cells.job(cell, "train")
    if job is None or cells.finished(job) is None:
        return None
    loss: float = read_training(job.folder)["best_dev_loss"]
    return loss


@cache
def read_training(folder: Path) -> dict[str, Any]:
    """What a finished training run recorded."""
    fields: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return fields
