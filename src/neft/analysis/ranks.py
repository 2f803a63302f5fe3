"""Ranks of neurons by utilization, and how fine-tuning changes them (paper, section 6)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from neft.analysis.matching import check_same_projections
from neft.analysis.neuron_columns import by_module, concatenated
from neft.analysis.table import Table
from neft.errors import NeuronError
from neft.neurons import Indices, NeuronSet, Projection

if TYPE_CHECKING:
    from neft.analysis.utilization import Utilization

THRESHOLD = Fraction(100_000, 352_256)
"""Change of rank, as a share of the list, above which a neuron is strongly affected: in the paper's
Llama-2-7B 100,000 of the 352,256 in or out neurons."""

EDGES = (0, 1, 3, 10, 30, 50, 70, 90, 97, 99, 100)
"""Percentiles between which Figure 3 averages."""

ALL_ROLES = "all"
"""Stands for a role in rows over the neurons of all roles."""


def ranks(utilization: Utilization, *, jointly: bool = False) -> dict[str, Indices]:
    """Rank of each neuron by utilization: 1 is the most used; ties break in canonical order.

    Args:
        utilization: of the neurons that are ranked.
        jointly: rank all neurons in one list; by default each role has a list of its own, as the paper
            ranks in and out neurons separately.

    Returns:
        Module name -> int64 ``[num_neurons]``.
    """
    found: dict[str, Indices] = {}
    for projections in _lists(utilization.projections.values(), jointly=jointly):
        values = concatenated(projections, utilization.values)
        rank = np.empty(len(values), dtype=np.int64)
        # A stable sort keeps the canonical order among equals.
        rank[np.argsort(-values, kind="stable")] = np.arange(1, len(values) + 1)
        found |= by_module(projections, rank)
    return {name: found[name] for name in utilization.projections}


def _lists(projections: Iterable[Projection], *, jointly: bool) -> list[list[Projection]]:
    """The projections whose neurons share one list of ranks."""
    lists: dict[str, list[Projection]] = {}
    for projection in projections:
        lists.setdefault(ALL_ROLES if jointly else projection.role, []).append(projection)
    return list(lists.values())


@dataclass(frozen=True)
class RankChanges:
    """Ranks of the same neurons in two models; arrays are ``[num_neurons]`` by module name."""

    projections: Mapping[str, Projection]
    """By module name, in canonical order."""
    before: Mapping[str, Indices]
    after: Mapping[str, Indices]
    list_lengths: Mapping[str, int]
    """Module name -> number of neurons among which its own are ranked."""

    @property
    def changes(self) -> dict[str, Indices]:
        """The paper's dRank, after - before: above 0 for a neuron that has fallen."""
        return {name: self.after[name] - self.before[name] for name in self.projections}

    @property
    def average(self) -> float:
        """Avg(dRank): the mean of ``|dRank|`` over all neurons."""
        return self.average_of(self.projections.values())

    @property
    def average_by_role(self) -> dict[str, float]:
        """Avg(dRank) over the neurons of each role."""
        return {role: self.average_of(projections) for role, projections in self.by_role()}

    def average_of(self, projections: Iterable[Projection]) -> float:
        """Mean of ``|dRank|`` over the neurons of these projections."""
        return float(np.abs(concatenated(projections, self.changes)).mean())

    def by_role(self) -> Iterator[tuple[str, list[Projection]]]:
        """(role, its projections), in canonical order."""
        for projections in _lists(self.projections.values(), jointly=False):
            yield projections[0].role, projections


def rank_changes(
    before: Utilization,
    after: Utilization,
    *,
    jointly: bool = False,
    names: tuple[str, str] = ("before", "after"),
) -> RankChanges:
    """Ranks of the same neurons in two models.

    Args:
        before: of the model that changes are counted from.
        after: of a model of the same shape.
        jointly: as in ``ranks``.
        names: what to call the two in errors.

    Raises:
        NeuronError: utilization of different projections, or of models of different shape.
    """
    check_same_projections(before.projections, after.projections, names)
    lengths = {
        projection.name: sum(member.num_neurons for member in members)
        for members in _lists(before.projections.values(), jointly=jointly)
        for projection in members
    }
    return RankChanges(
        before.projections, ranks(before, jointly=jointly), ranks(after, jointly=jointly), lengths
    )


def average_rank_changes(models: Mapping[str, Utilization], *, jointly: bool = False) -> Table:
    """Avg(dRank) of every pair of models (Figure 5).

    Args:
        models: name -> utilization, two or more models of one shape.
        jointly: as in ``ranks``.

    Returns:
        Columns ``a, b, role, num_neurons, average_rank_change``: of each pair, once, a row over all
        neurons (role ``all``) and one a role.

    Raises:
        NeuronError: fewer than two models, or of different shape.
    """
    if len(models) < 2:
        raise NeuronError(f"There are {len(models)} models to compare; give two or more.")
    first = next(iter(models))
    for name in models:
        check_same_projections(models[first].projections, models[name].projections, (first, name))
    found = {name: ranks(utilization, jointly=jointly) for name, utilization in models.items()}
    rows: list[tuple[str, str, str, int, float]] = []
    for a, b in combinations(models, 2):
        pair = RankChanges(models[a].projections, found[a], found[b], list_lengths={})
        for role, members in _all_and_by_role(pair):
            size = sum(projection.num_neurons for projection in members)
            rows.append((a, b, role, size, pair.average_of(members)))
    return _table(("a", "b", "role", "num_neurons", "average_rank_change"), rows)


def rank_buckets(changes: RankChanges, edges: Sequence[float] = EDGES) -> Table:
    """Mean ``|dRank|`` of neurons between percentiles of their rank before (Figure 3).

    Args:
        changes: from ``rank_changes``.
        edges: percentiles, ascending, from 0 to 100. A neuron of rank r in a list of n is at percentile
            100 r / n, and in the first bucket whose upper edge is not below that.

    Returns:
        Columns ``role, low, high, num_neurons, mean_rank_change``: a row a bucket, of all neurons (role
        ``all``; each by its percentile in its own list), then of each role. A bucket without neurons
        has no mean (``None``).

    Raises:
        NeuronError: edges that do not ascend from 0 to 100.
    """
    if (
        len(edges) < 2
        or edges[0] != 0
        or edges[-1] != 100
        or any(a >= b for a, b in pairwise(edges))
    ):
        raise NeuronError(f"edges are {list(edges)}; they must ascend from 0 to 100.")
    buckets = {
        name: bucket_of(rank, changes.list_lengths[name], edges)
        for name, rank in changes.before.items()
    }
    rows: list[tuple[str, float, float, int, float | None]] = []
    for role, members in _all_and_by_role(changes):
        bucket = concatenated(members, buckets)
        moved = np.abs(concatenated(members, changes.changes))
        for number, (low, high) in enumerate(pairwise(edges)):
            inside = moved[bucket == number]
            rows.append((role, low, high, inside.size, inside.mean() if inside.size else None))
    return _table(("role", "low", "high", "num_neurons", "mean_rank_change"), rows)


def bucket_of(ranks: Indices, length: int, edges: Sequence[float] = EDGES) -> Indices:
    """The bucket of each rank in a list of ``length``, 0 for the most used; see ``rank_buckets``."""
    # Exactly: 3% of 100 is rank 3, whatever the rounding.
    last_ranks = [int(Fraction(str(edge)) * length / 100) for edge in edges[1:]]
    return np.searchsorted(last_ranks, ranks)


def unrelated_change(length: int) -> float:
    """Avg(dRank) to expect of two unrelated orders of ``length`` neurons: a third of it."""
    return (length**2 - 1) / (3 * length)


@dataclass(frozen=True)
class AffectedNeurons:
    """The paper's three types (section 6, Figure 6); booleans ``[num_neurons]`` by module name."""

    strong: Mapping[str, NDArray[np.bool_]]
    """Strongly affected: ``|dRank|`` above the threshold."""
    suppressed: Mapping[str, NDArray[np.bool_]]
    """Strongly affected and fallen."""
    indirect: Mapping[str, NDArray[np.bool_]]
    """Strongly affected and not trained."""
    threshold: float
    """Share of the list, 0..1."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of neurons of each type: ``strong``, ``suppressed``, ``indirect``."""
        types = {"strong": self.strong, "suppressed": self.suppressed, "indirect": self.indirect}
        return {
            name: sum(int(flags.sum()) for flags in by_name.values())
            for name, by_name in types.items()
        }


def affected_neurons(
    changes: RankChanges, trained: NeuronSet, threshold: float | Fraction = THRESHOLD
) -> AffectedNeurons:
    """Which neurons fine-tuning has moved far up or down the list (section 6, Figure 6).

    Args:
        changes: from ``rank_changes``, base model to trained model.
        trained: the neurons that were trained.
        threshold: share of the list of ranks, 0..1, that a strongly affected neuron has moved beyond.

    Raises:
        NeuronError: trained neurons of other projections, or a threshold outside 0..1.
    """
    if not 0 <= threshold <= 1:
        raise NeuronError(f"threshold is {threshold}; it is a share of the neurons, in 0..1.")
    held = {name: trained.projections[name] for name in trained.modules()}
    ranked = {name: projection for name, projection in changes.projections.items() if name in held}
    check_same_projections(held, ranked, ("the trained neurons", "the ranked neurons"))
    strong: dict[str, NDArray[np.bool_]] = {}
    suppressed: dict[str, NDArray[np.bool_]] = {}
    indirect: dict[str, NDArray[np.bool_]] = {}
    for name, change in changes.changes.items():
        # Ranks are whole, so this loses nothing; in floating point 100,000 might count as above 100,000.
        limit = int(Fraction(str(threshold)) * changes.list_lengths[name])
        strong[name] = np.abs(change) > limit
        suppressed[name] = strong[name] & (change > 0)
        indirect[name] = strong[name].copy()
        indirect[name][trained[name]] = False
    return AffectedNeurons(strong, suppressed, indirect, float(threshold))


def _all_and_by_role(changes: RankChanges) -> Iterator[tuple[str, list[Projection]]]:
    yield ALL_ROLES, list(changes.projections.values())
    yield from changes.by_role()


def _table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    return Table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
