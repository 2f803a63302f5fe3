"""Which neurons a budget buys: the paper's one ranking, and other rules to deal the budget out.

A rule chooses *groups* of neurons, of which each is taken whole or not at all: single neurons, or with
the rule ``units`` those of a feed-forward unit. Every rule puts the groups in an order; the longest start
of it that fits the budget is the choice.

Pure functions over arrays; positions count neurons in canonical order (layer, projection, index).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from neft.errors import NeuronError

Indices: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Measure: TypeAlias = Literal["percent", "count", "megabytes"]
Which: TypeAlias = Literal["lowest", "highest", "random"]
Rule: TypeAlias = Literal["paper", "even", "floor", "units"]


def plain_number(name: str, value: Any) -> Any:
    """A number as Python's own, which files can hold; numpy's are taken too.

    Raises:
        NeuronError: it is none.
    """
    number = value.item() if isinstance(value, np.generic) else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise NeuronError(f"{name} is {value}; it must be a number.")
    return number


@dataclass(frozen=True)
class Budget:
    """How much may be chosen.

    Raises:
        NeuronError: a value that is no budget.
    """

    name: Measure
    value: float
    total_parameters: int
    """Of the whole model."""

    def __post_init__(self) -> None:
        if self.in_neurons:
            if not isinstance(self.value, int) or self.value < 0:
                raise NeuronError(f"count is {self.value}; it must be a whole number from 0.")
        elif not (math.isfinite(self.value) and self.value > 0):
            raise NeuronError(f"{self.name} is {self.value}; it must be a number above 0.")

    @classmethod
    def given(
        cls,
        percent: float | None,
        count: int | None,
        megabytes: float | None,
        total_parameters: int,
    ) -> Budget:
        """The one of three that is not ``None``; raises ``NeuronError`` unless it is just one."""
        values: dict[Measure, float | None]
        values = {"percent": percent, "count": count, "megabytes": megabytes}
        given = [
            (name, plain_number(name, value)) for name, value in values.items() if value is not None
        ]
        if len(given) != 1:
            raise NeuronError("Give a budget by percent, count or megabytes, one of the three.")
        return cls(*given[0], total_parameters)

    @property
    def in_neurons(self) -> bool:
        """Whether it is spent in neurons; else in scalars."""
        return self.name == "count"

    def largest(self, held: int) -> float:
        """The budget that buys all of ``held`` neurons or scalars."""
        return float(held / self._rate)

    def limit(self, held: int, holders: str) -> int:
        """The budget in neurons or scalars.

        Args:
            held: neurons or scalars that there are to buy.
            holders: what holds them, for the error.

        Raises:
            NeuronError: it is larger than that.
        """
        largest = self.largest(held)
        if self.value > largest:
            of_what = {
                "percent": f"% of the model's {self.total_parameters:,} parameters",
                "count": " neurons",
                "megabytes": " MB of an adapter's float32 vectors",
            }[self.name]
            raise NeuronError(
                f"{self.name} is {self.value:.12g}, but {holders} hold only {largest:.12g}{of_what}. "
                "Lower it, or score more projections."
            )
        if self.value == largest:
            return held  # whatever its rounding
        # Exact arithmetic: 9% of a round number must not lose a neuron to binary rounding.
        return math.floor(Fraction(str(self.value)) * self._rate)

    @property
    def _rate(self) -> Fraction:
        """Neurons or scalars that one of the measure buys."""
        rates = {
            "percent": Fraction(self.total_parameters, 100),
            "count": Fraction(1),
            "megabytes": Fraction(10**6, 4),  # an adapter's vectors are float32
        }
        return rates[self.name]


@dataclass(frozen=True)
class Preference:
    """Which neurons come first, and how the budget is dealt out; as in ``NeuronScores.select``.

    Raises:
        NeuronError: a value that is none.
    """

    which: Which
    seed: int
    rule: Rule
    floor: float
    """For the rule ``floor``: what each layer gets at least, in percent of an even share."""

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("which", self.which, get_args(Which)),
            ("rule", self.rule, get_args(Rule)),
        ):
            if value not in choices:
                *others, last = map(repr, choices)
                raise NeuronError(f"{name} is {value!r}; choose {', '.join(others)} or {last}.")
        if self.which == "random" and not (isinstance(self.seed, int) and 0 <= self.seed < 2**32):
            raise NeuronError(f"seed is {self.seed}; it must be a whole number in 0..2**32 - 1.")
        if self.rule == "floor" and not 0 < self.floor <= 100:
            raise NeuronError(f"floor is {self.floor}; it must be above 0 and up to 100 percent.")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; what does not count is left out, and so is the paper's rule."""
        fields: dict[str, Any] = {"which": self.which}
        if self.which == "random":
            fields["seed"] = self.seed
        if self.rule != "paper":
            fields["rule"] = self.rule
        if self.rule == "floor":
            fields["floor"] = self.floor
        return fields


@dataclass(frozen=True)
class Candidates:
    """The neurons to choose from: arrays of one entry a neuron."""

    distances: Floats
    lengths: Indices
    """Scalars in the vector."""
    layers: Indices
    """Number of the layer, from 0."""
    groups: Indices
    """Number of the group, each number from 0 to the last."""
    rounding_floor: float | None = None
    """Groups with a neuron whose distance is not larger are left out."""

    def left_out(self) -> Mask:
        """Whether a group is left out, one entry a group."""
        if self.rounding_floor is None:
            return np.zeros(self.groups.max() + 1, dtype=np.bool_)
        return np.bincount(self.groups, self.distances <= self.rounding_floor) > 0

    @property
    def holders(self) -> str:
        """What they are, for errors."""
        if self.rounding_floor is None:
            return "the scored projections"
        return f"the neurons above the rounding floor of {self.rounding_floor:.1e}"


def choose(candidates: Candidates, budget: Budget, preference: Preference) -> Indices:
    """Positions of the chosen neurons, ascending.

    A group's distance is the mean of its neurons': where groups are of one size, those that the rule
    ``units`` takes have the largest sum of distances of all sets of as many.

    Raises:
        NeuronError: a budget that the candidates cannot hold, that buys not even the first group, or a
            ``count`` that whole groups do not make.
    """
    groups, left_out = candidates.groups, candidates.left_out()
    costs = _sums(groups, np.ones_like(groups) if budget.in_neurons else candidates.lengths)
    limit = budget.limit(int(costs[~left_out].sum()), candidates.holders)
    distances = np.bincount(groups, candidates.distances) / np.bincount(groups)
    ranking = _ranking(distances, preference)
    ranking = ranking[~left_out[ranking]]
    if preference.rule in ("even", "floor"):
        layers = np.empty_like(costs)
        layers[groups] = candidates.layers
        ranking = _dealt(ranking, costs, layers, limit, preference)
    spent = np.cumsum(costs[ranking])
    num_chosen = int(np.searchsorted(spent, limit, side="right"))
    _check_spent(budget, limit, spent, num_chosen)
    chosen = np.zeros(len(costs), dtype=np.bool_)
    chosen[ranking[:num_chosen]] = True
    return np.flatnonzero(chosen[groups])


def _sums(groups: Indices, values: Indices) -> Indices:
    """Sum of the values of each group."""
    # bincount adds in float64, exact up to 2^53.
    return np.bincount(groups, values).astype(np.int64)


def _ranking(distances: Floats, preference: Preference) -> Indices:
    """All groups, in the order of one ranking."""
    if preference.which == "random":
        # RandomState's stream is frozen by numpy's compatibility policy (NEP 19), so that a seed
        # names the same neurons on every machine; Generator's may change between releases.
        return np.random.RandomState(preference.seed).permutation(len(distances)).astype(np.int64)
    # A stable sort keeps the canonical order among equals.
    return np.argsort(-distances if preference.which == "lowest" else distances, kind="stable")


def _dealt(
    ranking: Indices, costs: Indices, layers: Indices, limit: int, preference: Preference
) -> Indices:
    """A ranking in the order in which layers take turns (``even``), or get their floor first."""
    costs, layers = costs[ranking], layers[ranking]
    numbers = np.unique(layers)
    # What a layer has spent once it has got a group, in its own order.
    spent = np.empty_like(costs)
    for number in numbers:
        own = np.flatnonzero(layers == number)
        spent[own] = np.cumsum(costs[own])
    if preference.rule == "even":
        # The turn is with the layer that has spent least, among equals the first; one that has no more
        # groups is passed over.
        return ranking[np.lexsort((layers, spent - costs))]
    share = math.floor(Fraction(str(preference.floor)) / 100 * limit / max(1, len(numbers)))
    guaranteed = spent <= share
    return np.concatenate([ranking[guaranteed], ranking[~guaranteed]])


def _check_spent(budget: Budget, limit: int, spent: Indices, num_chosen: int) -> None:
    """Refuse a budget that whole groups cannot make."""
    if budget.in_neurons:
        below = int(spent[num_chosen - 1]) if num_chosen else 0
        if below != limit:
            raise NeuronError(
                f"count is {limit}, but whole units make {below} or {spent[num_chosen]} neurons: take "
                "one of these."
            )
    elif not num_chosen:
        raise NeuronError(
            f"{budget.name} is {budget.value:.12g}: that is {limit} parameters, and the first of the "
            f"ranking takes {spent[0]}. Raise it."
        )
