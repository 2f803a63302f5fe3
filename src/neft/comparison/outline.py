"""A comparison before it runs: its cells, what each trains, and the memory that takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from neft.comparison.schema import Comparison, MethodEntry
from neft.pipeline.estimate import Estimator, network_of

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Outline:
    """One row on one task."""

    task: str
    name: str
    method: str
    num_trainable: int
    percent: float
    """Of the model's parameters."""
    num_bytes: int
    """What training holds from step to step, as ``neft estimate`` counts it; activations come on top."""
    num_runs: int
    """Training runs: one for each rate of the grid, and for each further seed."""
    note: str
    """What decides the row's size: neurons, rank."""
    rates: tuple[float, ...]
    """The grid of learning rates; empty where the row takes another's."""


def outline(comparison: Comparison) -> list[Outline]:
    """Every row of every task, in order; reads no weights and no data.

    Where neurons of other tasks join, which of them are the same is not known yet: they are left out.

    Raises:
        UsageError: a configuration that cannot be read, or budgets that the model cannot hold.
    """
    network = network_of(comparison.model)
    return [_outline(comparison, network, task, entry) for task, entry in comparison.first_cells()]


def _outline(comparison: Comparison, network: nn.Module, task: str, entry: MethodEntry) -> Outline:
    recipe = comparison.first_recipe(task, entry)
    estimator, note = Estimator(recipe, network), ""
    trained = estimator.trained
    if trained.neurons is not None:
        note = f"{len(trained.neurons):,} neurons"
        if entry.union_with:
            note += ", joined with those of " + ", ".join(entry.union_with)
        if entry.intersection_with:
            note += ", as far as " + ", ".join(entry.intersection_with) + " chose them too"
    if trained.lora is not None:
        note = f"rank {trained.lora.rank}"
    tuned = 0 if entry.learning_rates is None else len(entry.learning_rates)
    # The first seed's run at the chosen rate is one of the trials.
    num_runs = tuned + len(comparison.seeds) - (tuned > 0)
    total = sum(parameter.numel() for parameter in network.parameters())
    return Outline(
        task,
        entry.name,
        entry.method,
        trained.num_trainable,
        100 * trained.num_trainable / total,
        estimator.held_bytes,
        num_runs,
        note,
        entry.learning_rates or (),
    )
