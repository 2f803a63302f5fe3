"""Rules of selection, against sorted lists, queues and sets of plain Python."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from neft.errors import NeuronError
from neft.neurons import Axis, NeuronScores, NeuronSet, Projection

Neuron = tuple[str, int]
Unit = tuple[Neuron, ...]
WHICH = ("lowest", "highest", "random")
RULES = ("paper", "even", "floor", "units")
TOTAL = 5_000


def projection(layer: int | None, role: str, num_neurons: int, length: int = 4) -> Projection:
    axis = Axis.COLUMN if role in ("down", "o") else Axis.ROW
    return Projection(f"layers.{layer}.{role}", layer, role, axis, num_neurons, length)


def made_up(seed: int, *, lengths: Iterable[int] = (4,), ties: bool = False) -> NeuronScores:
    """Layers of different sizes, some with attention, one matrix outside of them."""
    stream = random.Random(seed)
    choices = [*lengths]
    projections = [
        projection(layer, role, stream.randint(1, 6), stream.choice(choices))
        for layer in (0, 1, 2, 10)
        for role in stream.sample(("up", "down", "q", "v"), stream.randint(1, 4))
    ]
    projections.append(projection(None, "lm_head", stream.randint(1, 6), stream.choice(choices)))
    return scored(projections, stream, ties)


def feed_forward(seed: int, roles: Iterable[str], *, ties: bool = False) -> NeuronScores:
    """Layers with different numbers of units."""
    stream = random.Random(seed)
    projections: list[Projection] = []
    for layer in range(3):
        num_units = stream.randint(1, 5)
        projections += [
            projection(layer, role, 2 * num_units if role == "gate_up" else num_units)
            for role in roles
        ]
    return scored(projections, stream, ties)


def scored(projections: list[Projection], stream: random.Random, ties: bool) -> NeuronScores:
    def distance() -> float:
        return stream.randrange(3) / 4 if ties else stream.random()

    stream.shuffle(projections)
    distances = {p.name: [distance() for _ in range(p.num_neurons)] for p in projections}
    return NeuronScores(projections, distances, TOTAL)


def members(chosen: NeuronSet) -> set[Neuron]:
    return {(name, int(index)) for name, indices in chosen.items() for index in indices}


def singles(scores: NeuronScores) -> list[Unit]:
    """All neurons in canonical order, each by itself."""
    ordered = sorted(scores.projections.values(), key=lambda p: p.order)
    return [((p.name, index),) for p in ordered for index in range(p.num_neurons)]


def units(scores: NeuronScores) -> list[Unit]:
    """All units, by layer and number; a fused projection holds all gates, then all ups."""
    found: dict[tuple[int, int], list[Neuron]] = {}
    for ((name, index),) in singles(scores):
        p = scores.projections[name]
        num_units = p.num_neurons // (2 if p.role == "gate_up" else 1)
        assert p.layer is not None
        found.setdefault((p.layer, index % num_units), []).append((name, index))
    return [tuple(found[place]) for place in sorted(found)]


def distance(scores: NeuronScores, unit: Unit) -> float:
    return sum(float(scores.distances[name][index]) for name, index in unit) / len(unit)


def ranked(scores: NeuronScores, candidates: list[Unit], which: str, seed: int = 0) -> list[Unit]:
    if which == "random":
        return [candidates[i] for i in np.random.RandomState(seed).permutation(len(candidates))]
    sign = -1 if which == "lowest" else 1
    return sorted(candidates, key=lambda unit: sign * distance(scores, unit))


def cost(scores: NeuronScores, unit: Unit, in_neurons: bool) -> int:
    return sum(1 if in_neurons else scores.projections[name].vector_length for name, _ in unit)


def layer_of(scores: NeuronScores, unit: Unit) -> float:
    layer = scores.projections[unit[0][0]].layer
    return math.inf if layer is None else layer


def queues(scores: NeuronScores, ranking: list[Unit]) -> dict[float, deque[Unit]]:
    """The ranking of each layer, by layer."""
    found: dict[float, deque[Unit]] = {
        layer: deque() for layer in sorted({layer_of(scores, unit) for unit in ranking})
    }
    for unit in ranking:
        found[layer_of(scores, unit)].append(unit)
    return found


def oracle(
    scores: NeuronScores, budget: int, in_neurons: bool, which: str, rule: str, floor: float = 50
) -> set[Neuron]:
    """Spend the budget neuron by neuron, until the next one costs too much."""

    def price(unit: Unit) -> int:
        return cost(scores, unit, in_neurons)

    ranking = ranked(scores, units(scores) if rule == "units" else singles(scores), which)
    waiting = queues(scores, ranking)
    spent = dict.fromkeys(waiting, 0)
    order: list[Unit] = []
    if rule == "even":
        while any(waiting.values()):
            layer = min((layer for layer in waiting if waiting[layer]), key=lambda one: spent[one])
            order.append(waiting[layer].popleft())
            spent[layer] += price(order[-1])
    elif rule == "floor":
        share = Fraction(floor) / 100 * budget / len(waiting)
        for layer, queue in waiting.items():
            while queue and spent[layer] + price(queue[0]) <= share:
                order.append(queue.popleft())
                spent[layer] += price(order[-1])
        order += [unit for unit in ranking if unit not in set(order)]
    else:
        order = ranking
    chosen: set[Neuron] = set()
    left = budget
    for unit in order:
        if price(unit) > left:
            break
        chosen |= set(unit)
        left -= price(unit)
    return chosen


# --- Budgets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("rule", ["paper", "even", "floor"])
@pytest.mark.parametrize("seed", range(4))
def test_every_count(which: Any, rule: Any, seed: int) -> None:
    scores = made_up(seed, lengths=(2, 3, 5), ties=seed % 2 == 0)
    for count in range(len(scores) + 1):
        chosen = scores.select(count=count, which=which, rule=rule)
        assert len(chosen) == count
        assert members(chosen) == oracle(scores, count, True, which, rule)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("rule", ["paper", "even", "floor"])
@pytest.mark.parametrize("lengths", [(4,), (2, 3, 5)])
@pytest.mark.parametrize("seed", range(2))
def test_scalars_of_every_size(which: Any, rule: Any, lengths: tuple[int, ...], seed: int) -> None:
    scores = made_up(seed, lengths=lengths)
    held = sum(p.num_neurons * p.vector_length for p in scores.projections.values())
    for scalars in range(max(lengths), held + 1):
        expected = oracle(scores, scalars, False, which, rule)
        # One percent of the model are 50 scalars; a megabyte of float32 holds 250,000.
        by_percent = scores.select(percent=scalars / 50, which=which, rule=rule)
        by_size = scores.select(megabytes=scalars * 4 / 10**6, which=which, rule=rule)
        assert members(by_percent) == members(by_size) == expected
        assert scalars - max(lengths) < by_size.num_parameters <= scalars


def test_megabytes_of_the_papers_model() -> None:
    """100,000 neurons of 4096 are 1638.4 MB."""
    up = [projection(layer, "up", 11008, 4096) for layer in range(32)]
    scores = NeuronScores(up, {p.name: np.zeros(11008) for p in up}, 6_738_415_616)
    assert len(scores.select(megabytes=1638.4)) == 100_000
    assert len(scores.select(megabytes=1638.399)) == 99_999


@pytest.mark.parametrize("rule", ["paper", "even", "floor"])
@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"megabytes": 0}, "megabytes is 0; it must be a number above 0"),
        ({"megabytes": math.nan}, "megabytes is nan; it must be a number above 0"),
        ({"megabytes": 1, "count": 1}, "Give a budget by percent, count or megabytes, one of the"),
        (
            {"megabytes": 0.001},
            r"megabytes is 0.001, but the scored projections hold only 0.00016 MB of an adapter's "
            r"float32 vectors\. Lower it, or score more",
        ),
        (
            {"megabytes": 0.000015},
            "megabytes is 1.5e-05: that is 3 parameters, and the first of the ranking takes 4",
        ),
    ],
)
def test_budgets_that_do_not_fit(budget: Any, message: str, rule: Any) -> None:
    scores = NeuronScores([projection(0, "up", 10)], {"layers.0.up": np.zeros(10)}, TOTAL)
    with pytest.raises(NeuronError, match=message):
        scores.select(**budget, rule=rule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "best"}, "rule is 'best'; choose 'paper', 'even', 'floor' or 'units'"),
        ({"rule": "floor", "floor": 0}, "floor is 0; it must be above 0 and up to 100"),
        ({"rule": "floor", "floor": 101}, "floor is 101; it must be above 0"),
        ({"rule": "floor", "floor": math.nan}, "floor is nan; it must be above 0"),
    ],
)
def test_rules_that_are_none(options: Any, message: str) -> None:
    with pytest.raises(NeuronError, match=message):
        made_up(0).select(count=1, **options)


# --- Even and floor --------------------------------------------------------------------------------


@pytest.mark.parametrize("which", WHICH)
def test_even_layers_differ_by_one_neuron(which: Any) -> None:
    sizes = {0: 3, 1: 12, 2: 12, 3: 7}
    ups = [projection(layer, "up", size) for layer, size in sizes.items()]
    scores = scored([*ups], random.Random(0), False)
    for count in range(sum(sizes.values()) + 1):
        chosen = scores.select(count=count, which=which, rule="even").counts_by_layer()
        most = max(chosen.values())
        for layer, size in sizes.items():
            assert chosen[layer] in (most, most - 1) or chosen[layer] == size < most
    # 3 that the first layer holds, 18 among three others.
    even = scores.select(count=21, which=which, rule="even")
    assert even.counts_by_layer() == {0: 3, 1: 6, 2: 6, 3: 6}


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("floor", [0.1, 33.3, 50, 80, 100])
def test_floors(which: Any, floor: float) -> None:
    for seed in range(4):
        scores = made_up(seed)
        sizes = NeuronSet(
            scores.projections.values(),
            {p.name: range(p.num_neurons) for p in scores.projections.values()},
        ).counts_by_layer()
        for count in range(len(scores) + 1):
            chosen = scores.select(count=count, which=which, rule="floor", floor=floor)
            share = math.floor(Fraction(str(floor)) / 100 * count / len(sizes))
            assert members(chosen) == oracle(scores, count, True, which, "floor", floor)
            for layer, found in chosen.counts_by_layer().items():
                assert found >= min(share, sizes[layer])


def test_a_layer_that_moved_most_takes_all_but_the_floors() -> None:
    ups = [projection(layer, "up", 20) for layer in range(4)]
    distances = {p.name: np.full(20, p.layer == 2, dtype=float) for p in ups}
    scores = NeuronScores(ups, distances, TOTAL)

    def counts(**options: Any) -> list[int]:
        return [*scores.select(count=20, **options).counts_by_layer().values()]

    assert counts() == [0, 0, 20, 0]
    assert counts(rule="floor") == [2, 2, 14, 2]
    assert counts(rule="floor", floor=20) == [1, 1, 17, 1]
    assert counts(rule="even") == counts(rule="floor", floor=100) == [5, 5, 5, 5]


# --- Units -----------------------------------------------------------------------------------------

UNITS = [("up", "down"), ("up", "gate", "down"), ("gate_up", "down"), ("down",), ("gate_up",)]


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("roles", UNITS)
@pytest.mark.parametrize("ties", [False, True])
def test_units_come_whole(which: Any, roles: tuple[str, ...], ties: bool) -> None:
    size = len(roles) + ("gate_up" in roles)
    for seed in range(4):
        scores = feed_forward(seed, roles, ties=ties)
        for count in range(0, len(scores) + 1, size):
            chosen = scores.select(count=count, which=which, rule="units")
            assert len(chosen) == count
            assert members(chosen) == oracle(scores, count, True, which, "units")
            inside = [len(set(unit) & members(chosen)) for unit in units(scores)]
            assert set(inside) <= {0, size}
        for scalars in range(4 * size, 4 * len(scores) + 1):
            chosen = scores.select(percent=scalars / 50, which=which, rule="units")
            assert members(chosen) == oracle(scores, scalars, False, which, "units")


@pytest.mark.parametrize("count", [3, 6, 9])
def test_no_other_units_have_moved_more(count: int) -> None:
    scores = feed_forward(1, ("up", "gate", "down"))

    def moved(neurons: Iterable[Neuron]) -> float:
        return sum(float(scores.distances[name][index]) for name, index in neurons)

    best = max(
        moved(neuron for unit in some for neuron in unit)
        for some in combinations(units(scores), count // 3)
    )
    chosen = members(scores.select(count=count, rule="units"))
    assert moved(chosen) == pytest.approx(best)


def test_units_of_different_sizes_compete_by_their_mean() -> None:
    projections = [projection(0, "up", 2), projection(1, "up", 2), projection(1, "down", 2)]
    distances = {"layers.0.up": [5, 1], "layers.1.up": [4, 3], "layers.1.down": [4, 4]}
    scores = NeuronScores(projections, distances, TOTAL)
    assert members(scores.select(count=1, rule="units")) == {("layers.0.up", 0)}
    assert members(scores.select(count=3, rule="units")) == {
        ("layers.0.up", 0),
        ("layers.1.up", 0),
        ("layers.1.down", 0),
    }
    with pytest.raises(NeuronError, match="count is 2, but whole units make 1 or 3 neurons"):
        scores.select(count=2, rule="units")


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (1, "count is 1, but whole units make 0 or 3 neurons: take one of these"),
        (8, "count is 8, but whole units make 6 or 9 neurons"),
        (13, "count is 13, but the scored projections hold only 12 neurons"),
    ],
)
def test_counts_that_whole_units_do_not_make(count: int, message: str) -> None:
    projections = [projection(0, role, 4) for role in ("up", "gate", "down")]
    scores = scored(projections, random.Random(0), False)
    with pytest.raises(NeuronError, match=message):
        scores.select(count=count, rule="units")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([projection(0, "q", 4)], "layers.0.q: its neurons belong to no feed-forward unit"),
        ([projection(None, "lm_head", 4)], "layers.None.lm_head: its neurons belong to no feed"),
        ([projection(0, "down", 5)], "layers.0.down: its 5 neurons do not pair with the 4 units"),
        ([projection(0, "gate_up", 9)], "layers.0.gate_up: its 9 neurons do not pair with the 4"),
        (
            [Projection("layers.0.experts.1.up", 0, "up", Axis.ROW, 4, 4)],
            "layers.0.up: its 4 neurons do not pair with the 4",
        ),
    ],
)
def test_neurons_without_a_unit(others: list[Projection], message: str) -> None:
    scores = scored([projection(0, "up", 4), *others], random.Random(0), False)
    with pytest.raises(NeuronError, match=message):
        scores.select(count=2, rule="units")


# --- Above the rounding floor ----------------------------------------------------------------------

FLOOR = 0.25


def rounded(scores: NeuronScores) -> NeuronScores:
    """The same scores with a record of rounding; with ties, many lie just at the floor."""
    return NeuronScores(
        scores.projections.values(),
        scores.distances,
        TOTAL,
        {"rounding": {"dtype": "bfloat16", "floor": FLOOR, "share_below": 0.5}},
    )


def spared(scores: NeuronScores, candidates: list[Unit]) -> list[Unit]:
    """Without those with a neuron at or below the floor."""
    return [
        unit
        for unit in candidates
        if all(scores.distances[name][index] > FLOOR for name, index in unit)
    ]


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("group", [singles, units])
def test_nothing_below_the_rounding_floor(
    which: Any, group: Callable[[NeuronScores], list[Unit]]
) -> None:
    rule: Any = "units" if group is units else "paper"
    for seed in range(4):
        scores = rounded(feed_forward(seed, ("up", "down"), ties=seed > 1))
        everything = ranked(scores, group(scores), which)
        left = [unit for unit in everything if unit in spared(scores, everything)]
        for number in range(len(left) + 1):
            count = sum(map(len, left[:number]))
            chosen = scores.select(count=count, which=which, rule=rule, above_rounding=True)
            assert members(chosen) == {neuron for unit in left[:number] for neuron in unit}


@pytest.mark.parametrize("rule", ["even", "floor"])
def test_rules_deal_among_those_above_the_rounding_floor(rule: Any) -> None:
    for seed in range(4):
        scores = rounded(made_up(seed, ties=True))
        above = {neuron for ((neuron),) in spared(scores, singles(scores))}
        # The oracle sees a model that holds no other neurons, each matrix packed.
        kept = {
            name: np.flatnonzero(values > FLOOR)
            for name, values in scores.distances.items()
            if (values > FLOOR).any()
        }
        packed = NeuronScores(
            [
                projection(p.layer, p.role, kept[p.name].size)
                for p in scores.projections.values()
                if p.name in kept
            ],
            {name: scores.distances[name][indices] for name, indices in kept.items()},
            TOTAL,
        )
        for count in range(len(above) + 1):
            chosen = members(scores.select(count=count, rule=rule, above_rounding=True))
            expected = oracle(packed, count, True, "lowest", rule)
            assert chosen == {(name, int(kept[name][index])) for name, index in expected}
            assert chosen <= above


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            {"count": 3},
            "count is 3, but the neurons above the rounding floor of 2.5e-01 hold only 2",
        ),
        (
            {"percent": 0.2},
            r"percent is 0.2, but the neurons above .* only 0.16% of the model's 5,000",
        ),
        ({"megabytes": 1}, "megabytes is 1, but the neurons above .* hold only 3.2e-05 MB"),
    ],
)
def test_too_few_above_the_rounding_floor(budget: Any, message: str) -> None:
    distances = {"layers.0.up": [0.25, 0.2, 0.3, 0.5]}
    scores = rounded(NeuronScores([projection(0, "up", 4)], distances, TOTAL))
    with pytest.raises(NeuronError, match=message):
        scores.select(**budget, above_rounding=True)
    assert len(scores.select(count=3)) == 3


def test_nothing_above_the_rounding_floor() -> None:
    scores = rounded(NeuronScores([projection(0, "up", 4)], {"layers.0.up": [0] * 4}, TOTAL))
    assert len(scores.select(count=0, above_rounding=True, rule="floor")) == 0
    with pytest.raises(NeuronError, match="hold only 0 neurons"):
        scores.select(count=1, above_rounding=True)


@pytest.mark.parametrize("rule", RULES)
def test_scores_without_rounding_leave_nothing_out(rule: Any) -> None:
    scores = feed_forward(0, ("up", "down"))
    everything = scores.select(count=len(scores), rule=rule, above_rounding=True)
    assert len(everything) == len(scores)


# --- What all rules share --------------------------------------------------------------------------


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("rule", RULES)
def test_order_of_projections_does_not_decide(which: Any, rule: Any) -> None:
    scores = feed_forward(2, ("up", "gate", "down"), ties=True)
    turned = NeuronScores([*scores.projections.values()][::-1], scores.distances, TOTAL)
    for number in range(len(scores) // 3 + 1):
        options = {"count": 3 * number, "which": which, "rule": rule}
        assert scores.select(**options) == turned.select(**options)


@pytest.mark.parametrize("rule", RULES)
def test_random_choices_depend_on_the_seed_alone(rule: Any) -> None:
    roles = ("up", "down")
    scores, others = (feed_forward(3, roles, ties=ties) for ties in (False, True))
    draws = [
        members(scores.select(count=6, which="random", seed=seed, rule=rule)) for seed in range(30)
    ]
    assert draws[7] == members(others.select(count=6, which="random", seed=7, rule=rule))
    drawn = Counter(neuron for draw in draws for neuron in draw)
    assert drawn.keys() == {neuron for ((neuron),) in singles(scores)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"count": 4}, {"which": "lowest", "percent": None, "count": 4}),
        ({"count": 4, "seed": 3, "floor": 20}, {"which": "lowest", "percent": None, "count": 4}),
        (
            {"megabytes": 0.00004, "rule": "even", "which": "random"},
            {
                "which": "random",
                "percent": None,
                "count": 2,
                "megabytes": 0.00004,
                "seed": 0,
                "rule": "even",
            },
        ),
        (
            {"percent": 0.2, "rule": "floor"},
            {"which": "lowest", "percent": 0.2, "count": 2, "rule": "floor", "floor": 50},
        ),
        (
            {"count": 2, "rule": "units", "above_rounding": True},
            {
                "which": "lowest",
                "percent": None,
                "count": 2,
                "rule": "units",
                "above_rounding": True,
            },
        ),
    ],
)
def test_selections_say_what_they_are(options: Any, expected: dict[str, Any]) -> None:
    chosen = feed_forward(0, ("up", "down")).select(**options)
    assert chosen.provenance["selection"] == expected
