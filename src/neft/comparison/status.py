"""How far a comparison has got, read from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neft.comparison.cells import Cells
from neft.comparison.plan import Plan, Row
from neft.comparison.run import RECIPE
from neft.comparison.schema import load_comparison


@dataclass(frozen=True)
class RowStatus:
    """One method on one task."""

    task: str
    name: str
    state: str
    """``tuning``, ``training`` (its rate is chosen), ``done`` or ``failed``."""
    rates: dict[float, float | None]
    """Rate that is tried -> development loss; ``None`` while it is to be done, infinite if it failed."""
    rate: float | None
    """The rate that was chosen."""
    num_done: int
    """Seeds that are trained and evaluated."""
    num_seeds: int


def is_comparison_folder(folder: Path) -> bool:
    """Whether a comparison has worked in ``folder``."""
    return (folder / RECIPE).is_file()


def read_comparison_status(folder: Path) -> list[RowStatus]:
    """Status of every row, in order.

    Raises:
        UsageError: files that the comparison names have gone.
    """
    comparison = load_comparison(folder / RECIPE).model_copy(update={"output": str(folder)})
    cells = Cells(comparison)
    plan = Plan(cells)
    return [_status(cells, plan, row) for row in plan.rows()]


def _status(cells: Cells, plan: Plan, row: Row) -> RowStatus:
    jobs = [cells.job(cell, "evaluate") for cell in row.cells]
    return RowStatus(
        row.task,
        row.name,
        plan.state(row),
        {trial.rate: trial.dev_loss for trial in row.trials},
        row.rate,
        sum(job is not None and cells.finished(job) is not None for job in jobs),
        len(cells.comparison.seeds),
    )
