"""What the cells of a comparison will take: one estimate a row of a task, and for its warm-ups."""

from __future__ import annotations

from dataclasses import dataclass

from neft.comparison.schema import Comparison
from neft.pipeline.estimate import Estimator, StageEstimate, network_of


@dataclass(frozen=True)
class RowEstimate:
    """A stage of a cell, once for all rows of a task that share it."""

    task: str
    row: str
    """The first row that needs it."""
    estimate: StageEstimate


def estimate_rows(comparison: Comparison, *, calibrate: bool = False) -> list[RowEstimate]:
    """Warm-ups and training of every row of every task, by their first cells.

    Args:
        comparison: what is compared.
        calibrate: as for ``neft.pipeline.estimate.estimate``; takes seconds a row.

    Raises:
        UsageError: a configuration or data that cannot be read, or budgets that the model cannot hold.
    """
    network = network_of(comparison.model)
    rows: list[RowEstimate] = []
    warmed_up: set[tuple[str, str]] = set()
    for task, entry in comparison.first_cells():
        recipe = comparison.first_recipe(task, entry)
        estimator = Estimator(recipe, network)
        if recipe.warmup is not None and "warmup" in estimator.names:
            shared = (task, recipe.warmup.model_dump_json())
            if shared not in warmed_up:
                rows.append(
                    RowEstimate(task, entry.name, estimator.stage("warmup", calibrate=calibrate))
                )
            warmed_up.add(shared)
        rows.append(RowEstimate(task, entry.name, estimator.stage("train", calibrate=calibrate)))
    return rows
