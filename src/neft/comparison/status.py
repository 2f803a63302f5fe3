"""How far a comparison has got, read from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neft.comparison.cells import Cells
from neft.comparison.plan import Plan, Row
from neft.comparison.schema import load_comparison
from neft.comparison.tuning import Trial
from neft.pipeline.run import COMPARISON


@dataclass(frozen=True)
class RowStatus:
    """One method on one task."""

    task: str
    name: str
    state: str
    """``tuning``, ``training`` (its rate is chosen), ``done`` or ``failed``."""
    trials: tuple[Trial, ...]
    """Of its own grid; none where it takes another row's rate."""
    rate: float | None
    """The rate that was chosen."""
    num_done: int
    """Seeds that are trained and evaluated."""
    num_seeds: int
    failure: str | None


def is_comparison_folder(folder: Path) -> bool:
    """Whether a comparison has worked in ``folder``."""
    return (folder / COMPARISON).is_file()


def read_comparison_status(folder: Path) -> list[RowStatus]:
    """Status of every row, in order.

    Raises:
        UsageError: files that the comparison names have gone.
    """
    comparison = load_comparison(folder / COMPARISON).model_copy(update={"output": str(folder)})
    cells = Cells(comparison)
    return [_status(cells, row) for row in Plan(cells).rows()]


def _status(cells: Cells, row: Row) -> RowStatus:
    return RowStatus(
        row.task,
        row.name,
        row.state,
        row.trials,
        row.rate,
        sum(map(cells.is_evaluated, row.cells)),
        len(cells.comparison.seeds),
        row.failure,
    )
