"""What is to be done next: one rule for all methods, from what is finished alone.

Every rate of a row's grid is trained with the first seed (see ``tuning``). All seeds train at the rate
with the lowest development loss, and only those cells are evaluated on the test split. A rate at which
training broke down loses to all others; any other failure fails the row.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest
from pathlib import Path

from neft.comparison.cells import Cell, Cells, Failure, Job, read_training
from neft.comparison.schema import MethodEntry
from neft.comparison.tuning import Trial, best, is_at_edge, trials


class RowState(StrEnum):
    """How far a row has got."""

    TUNING = "tuning"
    TRAINING = "training"
    """Its rate is chosen."""
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class Row:
    """One method on one task: what it has tried, and what it is to do."""

    task: str
    entry: MethodEntry
    trials: tuple[Trial, ...]
    """Of its own grid, ascending by rate; none where it takes another row's."""
    rate: float | None
    """The learning rate, once it is chosen."""
    at_edge: bool
    """Whether the chosen rate is the lowest or highest that was tried, of several."""
    cells: tuple[Cell, ...]
    """What is evaluated: one for each seed, once the rate is chosen."""
    failure: str | None
    """Why it cannot be tuned, or why a cell cannot be evaluated."""
    state: RowState

    @property
    def name(self) -> str:
        """The method's name in the comparison."""
        return self.entry.name


class Plan:
    """The rows of a comparison, and the jobs that bring them to an end."""

    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        self._comparison = cells.comparison

    def rows(self) -> list[Row]:
        """Every row of every task, as things stand."""
        return [
            self._row(task, entry)
            for task in self._comparison.tasks
            for entry in self._comparison.rows_of(task)
        ]

    def ready(self) -> list[Job]:
        """Jobs that can start now, each once, in the order of the comparison."""
        found: dict[Path, Job] = {}
        for wanted in self._wanted():
            for job in self._cells.ready(wanted):
                found.setdefault(job.folder, job)
        return list(found.values())

    def open(self) -> list[tuple[Cell, str]]:
        """Cells' own stages that are still to be done, those included that must wait."""
        waiting: list[tuple[Cell, str]] = []
        for row in self.rows():
            if row.state is RowState.TUNING:
                waiting += [(cell, "train") for cell in self._open_trials(row)]
                # Whatever rate wins, all seeds are evaluated at it, and all but a tuned first trained.
                stand_in = self._comparison.rates_of(row.entry)[0]
                for number, seed in enumerate(self._comparison.seeds):
                    cell = Cell(row.task, row.name, seed, stand_in)
                    is_trial = number == 0 and row.entry.rate_of is None
                    waiting += [(cell, name) for name in self._cells.own_stages(cell)[is_trial:]]
            for cell in row.cells:
                jobs = self._cells.jobs(cell)
                waiting += [
                    (cell, name)
                    for name in self._cells.own_stages(cell)
                    if self._is_open(jobs[name])
                ]
        return waiting

    def spent(self) -> list[Job]:
        """Trainings whose weights nothing needs any more: rates that lost, cells that are evaluated."""
        done: dict[Path, Job] = {}
        needed: set[Path] = set()
        for row in self.rows():
            tried = [self._trial_cell(row.task, row.entry, trial.rate) for trial in row.trials]
            for cell in (*tried, *row.cells):
                train = self._cells.jobs(cell)["train"]
                done[train.folder] = train
                is_chosen = row.rate is None or cell in row.cells
                if is_chosen and not self._cells.is_finished(cell):
                    needed.add(train.folder)
        return [job for folder, job in done.items() if folder not in needed]

    # ----------------------------------------------------------------------------------------------

    def _wanted(self) -> Iterator[Job]:
        """What is to be done: a whole table of the first seed before the next seed begins."""
        rows = self.rows()
        first = [cell for row in rows for cell in (*self._open_trials(row), *row.cells[:1])]
        later = zip_longest(*(row.cells[1:] for row in rows))
        for cell in [*first, *(cell for cells in later for cell in cells if cell is not None)]:
            jobs = self._cells.jobs(cell)
            is_trial = not any(cell in row.cells for row in rows)
            for name in ("train",) if is_trial else self._cells.last_stages(cell):
                if self._is_open(jobs[name]):
                    yield jobs[name]

    def _is_open(self, job: Job) -> bool:
        return self._cells.finished(job) is None and self._cells.failure(job) is None

    def _open_trials(self, row: Row) -> list[Cell]:
        if row.state is RowState.FAILED:
            return []
        return [
            self._trial_cell(row.task, row.entry, trial.rate)
            for trial in row.trials
            if trial.dev_loss is None
        ]

    def _row(self, task: str, entry: MethodEntry) -> Row:
        own = entry if entry.rate_of is None else self._comparison.row(entry.rate_of)
        assert own.learning_rates is not None
        tried = trials(
            own.learning_rates, self._comparison.widen, lambda rate: self._attempt(task, own, rate)
        )
        accident = next((t.failure for t in tried if t.failure and t.dev_loss is None), None)
        chosen = best(tried)
        if chosen is None or chosen.dev_loss == math.inf:
            failure = accident or (chosen.failure if chosen is not None else None)
            state = RowState.TUNING if failure is None else RowState.FAILED
            return Row(task, entry, tried if own is entry else (), None, False, (), failure, state)
        cells = tuple(Cell(task, entry.name, seed, chosen.rate) for seed in self._comparison.seeds)
        failure, state = self._progress(cells)
        at_edge = is_at_edge(tried, chosen.rate)
        return Row(
            task, entry, tried if own is entry else (), chosen.rate, at_edge, cells, failure, state
        )

    def _progress(self, cells: tuple[Cell, ...]) -> tuple[str | None, RowState]:
        """The first failure of cells at a rate that is chosen, and how far they have got."""
        failures = [
            failure.reason
            for cell in cells
            if not self._cells.is_finished(cell)
            and (failure := self._last_failure(cell)) is not None
        ]
        num_ended = len(failures) + sum(map(self._cells.is_finished, cells))
        if num_ended < len(cells):
            return next(iter(failures), None), RowState.TRAINING
        return next(iter(failures), None), RowState.FAILED if failures else RowState.DONE

    def _last_failure(self, cell: Cell) -> Failure | None:
        """Why a cell cannot be finished."""
        jobs = self._cells.jobs(cell)
        return self._cells.failure(jobs[self._cells.last_stages(cell)[-1]])

    def _attempt(self, task: str, entry: MethodEntry, rate: float) -> Trial:
        job = self._cells.jobs(self._trial_cell(task, entry, rate))["train"]
        if self._cells.finished(job) is not None:
            return Trial(rate, read_training(job)["best_dev_loss"])
        failure = self._cells.failure(job)
        if failure is None:
            return Trial(rate, None)
        return Trial(rate, math.inf if failure.is_divergence else None, failure.reason)

    def _trial_cell(self, task: str, entry: MethodEntry, rate: float) -> Cell:
        return Cell(task, entry.name, self._comparison.seeds[0], rate)


class Forecast:
    """Time left, from what like jobs have taken."""

    def __init__(self, cells: Cells, plan: Plan) -> None:
        self._cells = cells
        self._plan = plan
        self._seconds: dict[tuple[str, str], list[float]] = {}
        for row in plan.rows():
            for cell in row.cells:
                for name in cells.own_stages(cell):
                    job = cells.jobs(cell)[name]
                    record = cells.finished(job)
                    # Of a job that was resumed, the record has the time of the last part alone.
                    if record is not None and record.attempts == 1:
                        self.note(job, record.seconds)

    def note(self, job: Job, seconds: float) -> None:
        """A job took this long."""
        for key in self._keys(job.stage, job.cell):
            self._seconds.setdefault(key, []).append(seconds)

    def seconds_left(self, num_parallel: int) -> float | None:
        """Estimate for all that is open; ``None`` as long as nothing like it has been done."""
        total = 0.0
        for cell, stage in self._plan.open():
            like = next(
                (found for key in self._keys(stage, cell) if (found := self._seconds.get(key))),
                None,
            )
            if like is None:
                return None
            total += statistics.fmean(like)
        return total / num_parallel

    def _keys(self, stage: str, cell: Cell) -> tuple[tuple[str, str], ...]:
        """What a job is like, the closest first: its row, its method, its kind."""
        method = self._cells.comparison.row(cell.row).method
        return (stage, f"row {cell.row}"), (stage, f"method {method}"), (stage, "")
