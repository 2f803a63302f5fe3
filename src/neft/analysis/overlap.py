"""Overlap of neuron sets, and what chance alone would give (paper, Table 5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np

from neft.analysis.matching import check_same_projections
from neft.analysis.table import Table
from neft.errors import NeuronError
from neft.neurons import NeuronScores, NeuronSet

_COLUMNS = (
    "a",
    "b",
    "percent",
    "layer",
    "num_a",
    "num_b",
    "num_both",
    "share",
    "jaccard",
    "chance_share",
    "chance_jaccard",
)


def overlap_table(
    selections: Mapping[str, NeuronSet | NeuronScores],
    percents: Sequence[float] = (),
    *,
    by_layer: bool = False,
) -> Table:
    """How far selections agree, beside how far random ones of the same sizes would (Table 5).

    Args:
        selections: name -> neurons; of scores, the lowest are selected at each percent, while sets are
            taken as they are. Two or more, of the same projections.
        percents: budgets in percent of all parameters, for scores.
        by_layer: add a row for each layer.

    Returns:
        A row for each percent and ordered pair: ``a``, ``b``, ``percent`` (``None`` for two sets),
        ``layer`` (``None`` for all of them), ``num_a``, ``num_b``, ``num_both``, ``share`` (of A that is
        in B too), ``jaccard`` (share of what is in either that is in both), and what to expect of these
        two if A and B were drawn at random from the candidates, in these sizes (in a layer: the sizes
        that they have there): ``chance_share`` and ``chance_jaccard``. Shares of nothing are ``None``.

    Raises:
        NeuronError: fewer than two selections, an empty one, selections of different projections, scores
            without percents, or a percent that the scored projections cannot hold.
    """
    _check(selections, percents)
    sets = {name: chosen for name, chosen in selections.items() if isinstance(chosen, NeuronSet)}
    by_percent: dict[float | None, dict[str, NeuronSet]] = {None: sets}
    for percent in percents:
        by_percent[percent] = {name: _at(percent, held) for name, held in selections.items()}
    rows: list[tuple[Any, ...]] = []
    for budget, chosen in by_percent.items():
        for a, b in permutations(chosen, 2):
            if budget is not None and a in sets and b in sets:
                continue  # the same at every percent
            for layer, sizes in _sizes(chosen[a], chosen[b], by_layer=by_layer):
                rows.append((a, b, budget, layer, *sizes[:3], *_measures(*sizes)))
    columns = [list(column) for column in zip(*rows, strict=True)]
    return Table(dict(zip(_COLUMNS, columns, strict=True)))


def _check(selections: Mapping[str, NeuronSet | NeuronScores], percents: Sequence[float]) -> None:
    if len(selections) < 2:
        raise NeuronError(f"There are {len(selections)} selections to compare; give two or more.")
    first = next(iter(selections))
    for name, chosen in selections.items():
        check_same_projections(selections[first].projections, chosen.projections, (first, name))
        if not len(chosen):
            raise NeuronError(
                f"{name}: holds no neurons, and the overlap of nothing is not defined."
            )
        if isinstance(chosen, NeuronScores) and not percents:
            raise NeuronError(f"{name}: holds scores; give percents at which to select from them.")


def _at(percent: float, chosen: NeuronSet | NeuronScores) -> NeuronSet:
    return chosen if isinstance(chosen, NeuronSet) else chosen.select(percent=percent)


def _sizes(
    a: NeuronSet, b: NeuronSet, *, by_layer: bool
) -> Iterator[tuple[int | None, tuple[int, int, int, int]]]:
    """(layer, (|A|, |B|, |A & B|, candidates)), first of all layers together."""
    both = a & b
    yield None, (len(a), len(b), len(both), a.num_candidates)
    if not by_layer:
        return
    candidates: dict[int, int] = {}
    for projection in a.projections.values():
        if projection.layer is not None:
            candidates[projection.layer] = (
                candidates.get(projection.layer, 0) + projection.num_neurons
            )
    of_a, of_b, of_both = (chosen.counts_by_layer() for chosen in (a, b, both))
    for layer, count in candidates.items():
        yield layer, (of_a[layer], of_b[layer], of_both[layer], count)


def _measures(
    num_a: int, num_b: int, num_both: int, num_candidates: int
) -> tuple[float | None, float | None, float | None, float | None]:
    """Share, Jaccard, and what chance gives of each."""
    either = num_a + num_b - num_both
    return (
        num_both / num_a if num_a else None,
        num_both / either if either else None,
        num_b / num_candidates if num_a else None,
        _chance_jaccard(num_a, num_b, num_candidates) if either else None,
    )


def _chance_jaccard(num_a: int, num_b: int, num_candidates: int) -> float:
    """Expected Jaccard index of two random sets of these sizes, not both empty.

    The number in both is hypergeometric; neighbouring probabilities have the ratio

        P(k + 1) / P(k) = (|A| - k) (|B| - k) / ((k + 1) (N - |A| - |B| + k + 1)).
    """
    both = np.arange(
        max(0, num_a + num_b - num_candidates), min(num_a, num_b) + 1, dtype=np.float64
    )
    k = both[:-1]
    up = np.log((num_a - k) * (num_b - k))
    down = np.log((k + 1) * (num_candidates - num_a - num_b + k + 1))
    logs = np.concatenate([[0.0], np.cumsum(up - down)])
    probabilities = np.exp(logs - logs.max())
    jaccard = both / (num_a + num_b - both)
    return float((probabilities * jaccard).sum() / probabilities.sum())
