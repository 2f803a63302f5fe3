"""What is to be done next: one rule for all methods, from what is finished alone.

Every rate of a row's grid is trained with the first seed (see ``tuning``). All seeds train at the rate
with the lowest development loss, and only those cells are evaluated on the test split. A rate at which
training broke down loses to all others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest

from neft.comparison.cells import Cell, Cells, Job, dev_loss
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

    def state(self, row: Row) -> RowState:
        """How far a row has got; failed only when nothing of it can go on."""
        if row.failure is not None:
            return RowState.FAILED
        if row.rate is None:
            return RowState.TUNING
        is_open = [cell for cell in row.cells if self._is_open(cell, "evaluate")]
        if is_open:
            return RowState.TRAINING
        failed = any(self.failure(cell) for cell in row.cells)
        return RowState.FAILED if failed else RowState.DONE

    def failure(self, cell: Cell) -> str | None:
        """Why a cell cannot be evaluated."""
        return self._cells.failure(cell, "evaluate")

    def ready(self) -> list[Job]:
        """Jobs that can start now, each once, in the order of the comparison."""
        found: dict[object, Job] = {}
        for cell, stage in self._wanted():
            if not self._is_open(cell, stage):
                continue
            for job in self._cells.ready(cell, stage):
                found.setdefault(job.folder, job)
        return list(found.values())

    def open(self) -> list[tuple[Cell, str]]:
        """Trainings and evaluations that are still to be done, those included that must wait."""
        waiting: list[tuple[Cell, str]] = []
        for row in self.rows():
            if row.failure is not None:
                continue
            if row.rate is None:
                waiting += [(cell, "train") for cell in self._open_trials(row)]
                # Whatever rate wins, all seeds are evaluated at it, and all but the first trained.
                stand_in = self._comparison.rates_of(row.entry)[0]
                for seed in self._comparison.seeds:
                    cell = Cell(row.task, row.name, seed, stand_in)
                    if row.entry.rate_of or seed != self._comparison.seeds[0]:
                        waiting.append((cell, "train"))
                    waiting.append((cell, "evaluate"))
            for cell in row.cells:
                waiting += [(cell, s) for s in ("train", "evaluate") if self._is_open(cell, s)]
        return waiting

    def spent(self) -> Iterator[Cell]:
        """Cells whose weights nothing needs any more: rates that lost, and cells that are evaluated."""
        for row in self.rows():
            if row.rate is None:
                continue
            for trial in row.trials:
                if trial.rate != row.rate and trial.dev_loss not in (None, math.inf):
                    yield self._trial_cell(row.task, row.entry, trial.rate)
            for cell in row.cells:
                job = self._cells.job(cell, "evaluate")
                if job is not None and self._cells.finished(job) is not None:
                    yield cell

    # ----------------------------------------------------------------------------------------------

    def _wanted(self) -> Iterator[tuple[Cell, str]]:
        """What is to be done: a whole table of the first seed before the next seed begins."""
        rows = [row for row in self.rows() if row.failure is None]
        for row in rows:
            if row.rate is None:
                yield from ((cell, "train") for cell in self._open_trials(row))
            yield from ((cell, "evaluate") for cell in row.cells[:1])
        for cells in zip_longest(*(row.cells[1:] for row in rows)):
            yield from ((cell, "evaluate") for cell in cells if cell is not None)

    def _is_open(self, cell: Cell, stage: str) -> bool:
        job = self._cells.job(cell, stage)
        is_done = job is not None and self._cells.finished(job) is not None
        return not is_done and self._cells.failure(cell, stage) is None

    def _open_trials(self, row: Row) -> list[Cell]:
        return [
            self._trial_cell(row.task, row.entry, trial.rate)
            for trial in row.trials
            if trial.dev_loss is None
        ]

    def _row(self, task: str, entry: MethodEntry) -> Row:
        own = entry if entry.rate_of is None else self._comparison.row(entry.rate_of)
        assert own.learning_rates is not None
        tried = trials(
            own.learning_rates, self._comparison.widen, lambda rate: self._dev_loss(task, own, rate)
        )
        chosen, failure = best(tried), None
        if chosen is not None and chosen.dev_loss == math.inf:
            failure = self._cells.failure(self._trial_cell(task, own, chosen.rate), "train")
            chosen = None
        rate = None if chosen is None else chosen.rate
        seeds = () if rate is None else self._comparison.seeds
        return Row(
            task,
            entry,
            tried if own is entry else (),
            rate,
            rate is not None and is_at_edge(tried, rate),
            tuple(Cell(task, entry.name, seed, rate) for seed in seeds if rate is not None),
            failure,
        )

    def _dev_loss(self, task: str, entry: MethodEntry, rate: float) -> float | None:
        cell = self._trial_cell(task, entry, rate)
        if self._cells.failure(cell, "train") is not None:
            return math.inf
        return dev_loss(self._cells, cell)

    def _trial_cell(self, task: str, entry: MethodEntry, rate: float) -> Cell:
        return Cell(task, entry.name, self._comparison.seeds[0], rate)


class Forecast:
    """Time left, from what like jobs have taken."""

    def __init__(self, cells: Cells, plan: Plan) -> None:
        self._cells = cells
        self._plan = plan
        self._seconds: dict[tuple[str, str], list[float]] = {}

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
