"""Choosing a learning rate: one rule for every method, from development losses alone.

Every rate of the grid is tried. Where the best lies at an edge of what was tried, the grid goes on there,
at the ratio of its last two rates, a limited number of times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """One rate of a grid, with the first seed."""

    rate: float
    dev_loss: float | None
    """``None`` while it is to be done, infinite where training broke down."""
    failure: str | None = None
    """Why it broke down."""


def trials(
    grid: Sequence[float], widen: int, attempt: Callable[[float], Trial]
) -> tuple[Trial, ...]:
    """The rates to try, as far as the losses so far tell; ascending.

    Args:
        grid: one or more rates, ascending. A single one is left as it is.
        widen: how many rates may be added in all.
        attempt: how far the trial of a rate has got.
    """
    tried = tuple(map(attempt, grid))
    while len(tried) < len(grid) + widen and (further := _further_rate(tried)) is not None:
        tried = tuple(sorted([*tried, attempt(further)], key=lambda trial: trial.rate))
    return tried


def best(tried: Sequence[Trial]) -> Trial | None:
    """The trial with the lowest loss, the lower rate of equals; ``None`` before all are done.

    A single rate has no rival, and is chosen before it is tried.
    """
    if len(tried) == 1 and tried[0].failure is None:
        return tried[0]
    losses = [trial.dev_loss for trial in tried if trial.dev_loss is not None]
    if len(losses) < len(tried):
        return None
    return tried[losses.index(min(losses))]


def is_at_edge(tried: Sequence[Trial], rate: float) -> bool:
    """Whether ``rate`` is the lowest or the highest of several."""
    return len(tried) > 1 and rate in (tried[0].rate, tried[-1].rate)


def _further_rate(tried: Sequence[Trial]) -> float | None:
    """The rate that continues a grid at the edge where its best lies."""
    chosen = best(tried)
    if chosen is None or chosen.dev_loss == math.inf or not is_at_edge(tried, chosen.rate):
        return None
    rates = [trial.rate for trial in tried]
    edge, neighbour = rates[:2] if chosen.rate == rates[0] else rates[:-3:-1]
    # Two digits: 0.002 and not 0.0020000000000000005.
    return float(f"{edge * edge / neighbour:.2g}")
