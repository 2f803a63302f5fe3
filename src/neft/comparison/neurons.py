"""What methods did to the neurons, side by side: the paper's Table 5 and Figures 3, 5 and 6.

Everything comes from the analyses of finished cells; no model is loaded.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neft.analysis import files
from neft.analysis.overlap import overlap_table
from neft.analysis.ranks import EDGES, bucket_of, unrelated_change
from neft.analysis.table import Table
from neft.comparison.cells import Cell, Cells
from neft.comparison.plan import Plan
from neft.neurons import NeuronScores
from neft.pipeline.selection import SCORES

PERCENTS = (3, 6, 9, 12)
"""Budgets at which scores are compared, as in Table 5."""


@dataclass(frozen=True)
class RowNeurons:
    """What one method did to the neurons of the base model; means over seeds."""

    name: str
    seeds: tuple[int, ...]
    average_rank_change: float
    """Avg(dRank) against the base model."""
    spread: float | None
    """Its standard deviation over seeds; ``None`` for a single one."""
    by_role: Mapping[str, float]
    strong: float
    suppressed: float
    indirect: float
    """Strongly affected, suppressed and indirectly affected neurons (Figure 6)."""
    change: float
    """Mean ``|after - before| / |before|`` of the neurons that training changed."""
    buckets: tuple[float, ...]
    """Mean ``|dRank|`` between the percentiles of the base model's ranks (Figure 3)."""


@dataclass(frozen=True)
class Pair:
    """How far the orders of utilization of two methods lie apart (Figure 5); means over seeds."""

    a: str
    b: str
    average_rank_change: float
    buckets: tuple[float, ...]
    """Between the percentiles of ``a``'s ranks."""


@dataclass(frozen=True)
class TaskNeurons:
    """All methods on one task."""

    task: str
    num_neurons: int
    unrelated: float
    """Avg(dRank) to expect of two unrelated orders: a third of a list's length."""
    rows: tuple[RowNeurons, ...]
    pairs: tuple[Pair, ...]
    selections: tuple[Mapping[str, Any], ...]
    """Rows of ``overlap_table``: warm-ups, named by the first method that used each."""
    causal: Mapping[str, Sequence[Mapping[str, Any]]]
    """Method -> rows of the causal test, with the first seed."""


def collect_neurons(cells: Cells, plan: Plan) -> list[TaskNeurons]:
    """What is there of each task that has a finished analysis."""
    found = []
    for task in cells.comparison.tasks:
        analysed = {
            row.name: cells_of_row
            for row in plan.rows()
            if row.task == task
            and (cells_of_row := [cell for cell in row.cells if _folder(cells, cell, "analysis")])
        }
        if analysed:
            found.append(_task(cells, task, analysed))
    return found


def _folder(cells: Cells, cell: Cell, stage: str) -> Path | None:
    job = cells.jobs(cell).get(stage)
    return None if job is None or cells.finished(job) is None else job.folder


def _task(cells: Cells, task: str, analysed: Mapping[str, Sequence[Cell]]) -> TaskNeurons:
    tables = {
        name: {cell.seed: _load(cells, cell, files.NEURONS) for cell in of_row}
        for name, of_row in analysed.items()
    }
    first = next(iter(next(iter(tables.values())).values()))
    return TaskNeurons(
        task=task,
        num_neurons=len(first),
        unrelated=_unrelated(first),
        rows=tuple(_row(name, of_row) for name, of_row in tables.items()),
        pairs=tuple(
            _pair(a, b, tables)
            for a, b in combinations(tables, 2)
            if tables[a].keys() & tables[b].keys()
        ),
        selections=tuple(_selections(cells, analysed).rows()),
        causal={
            name: _load(cells, of_row[0], files.CAUSAL).rows()
            for name, of_row in analysed.items()
            if (_analysis(cells, of_row[0]) / files.CAUSAL).exists()
        },
    )


def _analysis(cells: Cells, cell: Cell) -> Path:
    folder = _folder(cells, cell, "analysis")
    assert folder is not None
    return folder


def _load(cells: Cells, cell: Cell, name: str) -> Table:
    return Table.load(_analysis(cells, cell) / name)


def _row(name: str, tables: Mapping[int, Table]) -> RowNeurons:
    def mean(value: Callable[[Table], float]) -> float:
        return statistics.fmean(map(value, tables.values()))

    averages = [table.about["average_rank_change"] for table in tables.values()]
    overall = [average["all"] for average in averages]
    changes = [np.asarray(table["change"]) for table in tables.values()]
    return RowNeurons(
        name=name,
        seeds=tuple(tables),
        average_rank_change=statistics.fmean(overall),
        spread=statistics.stdev(overall) if len(overall) > 1 else None,
        by_role={
            role: statistics.fmean(average[role] for average in averages)
            for role in averages[0]
            if role != "all"
        },
        strong=mean(lambda table: table.about["counts"]["strong"]),
        suppressed=mean(lambda table: table.about["counts"]["suppressed"]),
        indirect=mean(lambda table: table.about["counts"]["indirect"]),
        change=statistics.fmean(
            float(change[change > 0].mean()) if change.any() else 0.0 for change in changes
        ),
        buckets=_buckets((table, table, "rank_before", "rank_after") for table in tables.values()),
    )


def _pair(a: str, b: str, tables: Mapping[str, Mapping[int, Table]]) -> Pair:
    seeds = [seed for seed in tables[a] if seed in tables[b]]
    sides = [(tables[a][seed], tables[b][seed]) for seed in seeds]
    differences = [np.abs(_column(right) - _column(left)).mean() for left, right in sides]
    return Pair(
        a,
        b,
        float(np.mean(differences)),
        _buckets((left, right, "rank_after", "rank_after") for left, right in sides),
    )


def _column(table: Table, name: str = "rank_after") -> NDArray[np.int64]:
    return np.asarray(table[name])


def _buckets(sides: Iterable[tuple[Table, Table, str, str]]) -> tuple[float, ...]:
    """Mean ``|dRank|`` between percentiles of the first side's ranks, each in the list of its role."""
    found = []
    for left, right, ours, theirs in sides:
        before = _column(left, ours)
        buckets = np.empty_like(before)
        for own in _by_role(left):
            buckets[own] = bucket_of(before[own], int(np.count_nonzero(own)))
        moved = np.abs(_column(right, theirs) - before)
        found.append(
            [
                float(moved[inside].mean()) if (inside := buckets == number).any() else np.nan
                for number in range(len(EDGES) - 1)
            ]
        )
    return tuple(np.mean(found, axis=0).tolist())


def _by_role(table: Table) -> list[NDArray[np.bool_]]:
    """For each role, which rows are of it."""
    roles = np.asarray(table["role"])
    return [roles == role for role in dict.fromkeys(roles)]


def _unrelated(table: Table) -> float:
    """Avg(dRank) to expect of two unrelated orders."""
    lengths = [int(np.count_nonzero(own)) for own in _by_role(table)]
    return sum(n * unrelated_change(n) for n in lengths) / sum(lengths)


def _selections(cells: Cells, analysed: Mapping[str, Sequence[Cell]]) -> Table:
    """Overlap of what different warm-ups would choose."""
    scores: dict[Path, str] = {}
    for name, of_row in analysed.items():
        folder = _folder(cells, of_row[0], "score")
        if folder is not None:
            scores.setdefault(folder, name)
    loaded = {name: NeuronScores.load(folder / SCORES) for folder, name in scores.items()}
    return overlap_table(loaded, PERCENTS) if len(loaded) > 1 else Table({})
