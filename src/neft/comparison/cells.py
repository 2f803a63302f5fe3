"""Cells of a comparison and the stages that they share, each in a folder named by its fingerprint.

A stage that two cells have in common (the base model's evaluation, a warm-up, its scores) has one
fingerprint and so one folder: it is made once. What is finished is read from the folders alone, so that a
comparison can be killed at any moment, and goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from neft.comparison.schema import Comparison, MethodEntry
from neft.files import write_json
from neft.neurons import NeuronSet
from neft.pipeline.selection import NEURONS
from neft.pipeline.stage import Stage
from neft.pipeline.stages import stages_of
from neft.pipeline.store import Record, StageFolder, State, record_of
from neft.recipe import Recipe

_DIGITS = 16
_OWN = "own"
_EVALUATED = ("baseline", "train", "evaluate")


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
    joined: Join | None
    """For the stage ``join``."""
    record: Record
    """What it will have made."""
    folder: Path
    inputs: Mapping[str, Job]
    """Name under which the stage reads it -> the job that makes it."""

    def __str__(self) -> str:
        if self.stage == "baseline":
            return f"baseline of {self.cell.task}"
        if self.stage in ("warmup", "score"):
            return f"{self.stage} for {self.cell.task}"
        return f"{self.stage} of {self.cell}"


@dataclass(frozen=True)
class Join:
    """Neurons of other tasks that join a cell's own, chosen in the same way."""

    union: tuple[str, ...]
    """Tasks whose neurons are added (NeFT_Union)."""
    intersection: tuple[str, ...]
    """Tasks in whose choice a neuron must be too, to stay."""

    def stage(self) -> Stage:
        """The stage that reads all choices and leaves one."""

        def run(working: Path, inputs: Mapping[str, Path]) -> None:
            chosen = {name: NeuronSet.load(folder / NEURONS) for name, folder in inputs.items()}
            joined = chosen[_OWN]
            for task in self.union:
                joined |= chosen[_lent_by(task)]
            for task in self.intersection:
                joined &= chosen[_lent_by(task)]
            joined.save(working / NEURONS)

        ingredients = {"union": list(self.union), "intersection": list(self.intersection)}
        reads = (_OWN, *map(_lent_by, self.union + self.intersection))
        return Stage("join", 1, ingredients, reads, run, derived=True)


def _lent_by(task: str) -> str:
    """Name of the input with a task's neurons; whatever the task is called, it is not ``_OWN``."""
    return f"task {task}"


@dataclass(frozen=True)
class Failure:
    """Why a job failed."""

    reason: str
    is_divergence: bool
    """Whether training broke down of itself, and would again; otherwise it was an accident."""


class Cells:
    """The stages of every cell, and how far they have got.

    Args:
        comparison: what is compared.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.output = Path(comparison.output).expanduser()
        self._stages = self.output / "stages"
        self._failures = self.output / "failures"
        self._done: dict[Path, Record] = {}
        self.recipe: Callable[[Cell], Recipe] = cache(self._recipe)
        self.jobs: Callable[[Cell], Mapping[str, Job]] = cache(self._jobs)

    # --- what is done -----------------------------------------------------------------------------

    def settle(self) -> None:
        """Bring to an end what a killed worker was about to publish; only while no worker runs."""
        for working in self._stages.glob(".*.partial"):
            name = working.name.removeprefix(".").removesuffix(".partial")
            StageFolder(self._stages / name).settle()

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

    def is_evaluated(self, cell: Cell) -> bool:
        """Whether all is there that results are made of."""
        jobs = self.jobs(cell)
        return all(self.finished(jobs[name]) for name in _EVALUATED)

    def last_stages(self, cell: Cell) -> list[str]:
        """What a cell is brought to in the end."""
        return [name for name in (*_EVALUATED, "analysis") if name in self.jobs(cell)]

    def own_stages(self, cell: Cell) -> list[str]:
        """Those of the last stages that a cell seldom shares with others."""
        return [name for name in self.last_stages(cell) if name != "baseline"]

    def is_finished(self, cell: Cell) -> bool:
        """Whether nothing is left to do for a cell."""
        jobs = self.jobs(cell)
        return all(self.finished(jobs[name]) for name in self.last_stages(cell))

    def ready(self, job: Job) -> list[Job]:
        """What can be started now towards a job; nothing if it is done."""
        return [] if self.finished(job) else list(self._towards(job))

    def _towards(self, job: Job) -> Iterator[Job]:
        missing = [needed for needed in job.inputs.values() if not self._is_readable(needed)]
        if not missing:
            yield job
        for needed in missing:
            yield from self._towards(needed)

    def _is_readable(self, job: Job) -> bool:
        record = self.finished(job)
        return record is not None and not record.released

    def release(self, train: Job) -> None:
        """Delete the whole checkpoint of a training run that nothing needs; adapters stay."""
        if self.finished(train) is not None and (train.folder / "model").is_dir():
            StageFolder(train.folder).release("model")
            self.forget(train)

    # --- failures ---------------------------------------------------------------------------------

    def failure(self, job: Job) -> Failure | None:
        """Why a job that is not done, or one that it needs, failed earlier."""
        return None if self.finished(job) else self._failure(job)

    def _failure(self, job: Job) -> Failure | None:
        file = self._failure_file(job)
        if file.is_file():
            fields = json.loads(file.read_text(encoding="utf-8"))
            return Failure(fields["reason"], fields["is_divergence"])
        for needed in job.inputs.values():
            if not self._is_readable(needed) and (found := self._failure(needed)) is not None:
                return Failure(f"{needed}: {found.reason}", is_divergence=False)
        return None

    def note_failure(self, job: Job, failure: Failure) -> None:
        """Remember that a job failed, so that it is not tried again unasked."""
        fields = {"job": str(job), "reason": failure.reason, "is_divergence": failure.is_divergence}
        write_json(self._failure_file(job), fields)

    def forget_failures(self) -> None:
        """Let everything that failed be tried again."""
        for file in self._failures.glob("*.json"):
            file.unlink()

    def _failure_file(self, job: Job) -> Path:
        return self._failures / f"{job.folder.name}.json"

    # --- making jobs ------------------------------------------------------------------------------

    def _entry(self, cell: Cell) -> MethodEntry:
        return self.comparison.row(cell.row)

    def _recipe(self, cell: Cell) -> Recipe:
        return self.comparison.cell(cell.task, self._entry(cell), cell.seed, cell.rate)

    def _jobs(self, cell: Cell) -> Mapping[str, Job]:
        """Stage -> its job, of all stages of a cell."""
        recipe = self.recipe(cell)
        fields = recipe.model_dump(mode="json")
        entry = self._entry(cell)
        jobs: dict[str, Job] = {}
        for stage in stages_of(recipe):
            if stage.name == "prepare":
                continue
            inputs = {name: jobs[name] for name in stage.reads}
            if stage.name == "train" and entry.other_tasks:
                jobs["join"] = self._join(cell, entry, fields, inputs["select"])
            if "select" in inputs and "join" in jobs:
                inputs["select"] = jobs["join"]
            jobs[stage.name] = self._job(cell, fields, stage, inputs)
        return jobs

    def _join(self, cell: Cell, entry: MethodEntry, fields: Mapping[str, Any], own: Job) -> Job:
        join = Join(entry.union_with, entry.intersection_with)
        inputs = {_OWN: own}
        for task in entry.other_tasks:
            inputs[_lent_by(task)] = self._selection(Cell(task, cell.row, cell.seed, cell.rate))
        return self._job(cell, fields, join.stage(), inputs, join)

    def _selection(self, cell: Cell) -> Job:
        """The choice of a cell's own neurons."""
        recipe = self.recipe(cell)
        fields = recipe.model_dump(mode="json")
        jobs: dict[str, Job] = {}
        for stage in stages_of(recipe):
            if stage.name in ("warmup", "score", "select"):
                inputs = {name: jobs[name] for name in stage.reads}
                jobs[stage.name] = self._job(cell, fields, stage, inputs)
        return jobs["select"]

    def _job(
        self,
        cell: Cell,
        fields: Mapping[str, Any],
        stage: Stage,
        inputs: Mapping[str, Job],
        join: Join | None = None,
    ) -> Job:
        record = record_of(stage, {name: job.record.fingerprint for name, job in inputs.items()})
        folder = self._stages / f"{stage.name}-{record.fingerprint[:_DIGITS]}"
        return Job(stage.name, cell, fields, join, record, folder, inputs)


def stage_of(job: Job) -> Stage:
    """The stage that a job stands for, from the recipe as the files are now."""
    if job.joined is not None:
        return job.joined.stage()
    recipe = Recipe.model_validate(job.recipe)
    return next(stage for stage in stages_of(recipe) if stage.name == job.stage)


def read_training(train: Job) -> dict[str, Any]:
    """What a finished training run recorded."""
    text = (train.folder / "training.json").read_text(encoding="utf-8")
    fields: dict[str, Any] = json.loads(text)
    return fields
