"""Overlap against Python's sets, and chance against scipy's hypergeometric distribution and draws."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from neft.analysis.overlap import overlap_table
from neft.errors import NeuronError
from neft.neurons import Axis, NeuronScores, NeuronSet, Projection
from reference.analysis import chance_jaccard

PROJECTIONS = [
    Projection(f"layers.{layer}.{role}", layer, role, axis, count, 8)
    for layer in range(2)
    for role, axis, count in (("up", Axis.ROW, 30), ("down", Axis.COLUMN, 20))
]
NUM_CANDIDATES = 100
TOTAL = 10_000


def scores(seed: int) -> NeuronScores:
    random = np.random.RandomState(seed)
    distances = {p.name: random.rand(p.num_neurons) for p in PROJECTIONS}
    return NeuronScores(PROJECTIONS, distances, TOTAL)


def chosen(neurons: NeuronSet, layer: int | None) -> set[tuple[str, int]]:
    return {
        (name, index)
        for name, indices in neurons.items()
        for index in indices.tolist()
        if layer is None or name.startswith(f"layers.{layer}.")
    }


def check(row, a: set, b: set, num_candidates: int) -> None:
    assert (row["num_a"], row["num_b"], row["num_both"]) == (len(a), len(b), len(a & b))
    assert row["share"] == (len(a & b) / len(a) if a else None)
    assert row["chance_share"] == (len(b) / num_candidates if a else None)
    if a | b:
        assert row["jaccard"] == len(a & b) / len(a | b)
        expected = chance_jaccard(len(a), len(b), num_candidates)
        assert row["chance_jaccard"] == pytest.approx(expected, rel=1e-9)
    else:
        assert row["jaccard"] is row["chance_jaccard"] is None


@pytest.mark.parametrize("by_layer", [True, False])
def test_sets_as_they_are(by_layer) -> None:
    sets = {
        "a": scores(0).lowest(30),
        "b": scores(1).lowest(70),
        "layer 1": NeuronSet(PROJECTIONS, {"layers.1.up": [3], "layers.1.down": [1, 2, 19]}),
    }
    rows = overlap_table(sets, by_layer=by_layer).rows()
    layers = [None, 0, 1] if by_layer else [None]
    assert [(row["a"], row["b"], row["layer"]) for row in rows] == [
        (*pair, layer) for pair in permutations(sets, 2) for layer in layers
    ]
    for row in rows:
        layer = row["layer"]
        assert row["percent"] is None
        a, b = (chosen(sets[row[side]], layer) for side in "ab")
        check(row, a, b, NUM_CANDIDATES if layer is None else 50)


def test_scores_at_each_percent() -> None:
    both = {"a": scores(0), "b": scores(1)}
    rows = overlap_table(both, [1, 2.5, 8]).rows()
    assert [row["percent"] for row in rows] == [1, 1, 2.5, 2.5, 8, 8]
    for row in rows:
        a, b = (chosen(both[row[side]].select(percent=row["percent"]), None) for side in "ab")
        assert len(a) == int(row["percent"] * TOTAL / 100 / 8)
        check(row, a, b, NUM_CANDIDATES)
    assert rows[-1]["share"] == rows[-1]["chance_share"] == 1  # all of them


def test_sets_beside_scores() -> None:
    mixed = {"x": scores(0).lowest(9), "s": scores(1), "y": scores(2).lowest(5)}
    rows = overlap_table(mixed, [2, 4]).rows()
    found = [(row["a"], row["b"], row["percent"]) for row in rows]
    with_scores = [("x", "s"), ("s", "x"), ("s", "y"), ("y", "s")]
    assert found == [("x", "y", None), ("y", "x", None)] + [
        (*pair, percent) for percent in (2, 4) for pair in with_scores
    ]
    for row in rows:
        sides = [mixed[row[side]] for side in "ab"]
        a, b = (
            chosen(s if isinstance(s, NeuronSet) else s.select(percent=row["percent"]), None)
            for s in sides
        )
        check(row, a, b, NUM_CANDIDATES)


def test_chance_is_what_random_sets_do() -> None:
    sets = {
        str(seed): scores(0).select(count=count, which="random", seed=seed)
        for seed, count in enumerate([40] * 12 + [25] * 12)
    }
    rows = [row for row in overlap_table(sets).rows() if row["num_a"] > row["num_b"]]
    assert len(rows) == 144
    for name in ("share", "jaccard"):
        mean = np.mean([row[name] for row in rows])
        assert mean == pytest.approx(rows[0][f"chance_{name}"], rel=0.05)


def test_chance_at_the_size_of_a_large_model() -> None:
    whole = Projection("up", 0, "up", Axis.ROW, 704_512, 8)
    a, b = NeuronSet([whole], {"up": range(63_000)}), NeuronSet([whole], {"up": range(90_000)})
    row = overlap_table({"a": a, "b": b}).rows()[0]
    both = 63_000 * 90_000 / 704_512
    assert row["chance_share"] == 90_000 / 704_512
    # So many neurons are close to their mean.
    assert row["chance_jaccard"] == pytest.approx(both / (153_000 - both), rel=1e-4)


def test_selections_that_cannot_be_compared() -> None:
    some = scores(0).lowest(3)
    other = NeuronSet(PROJECTIONS[:3], {"layers.0.up": [1]})
    with pytest.raises(
        NeuronError, match=r"a and b: 1 of the 4 projections of a .* layers\.1\.down"
    ):
        overlap_table({"a": some, "b": other})
    with pytest.raises(NeuronError, match="There are 1 selections"):
        overlap_table({"a": some})
    with pytest.raises(NeuronError, match=r"b: holds no neurons"):
        overlap_table({"a": some, "b": NeuronSet(PROJECTIONS, {})})
    with pytest.raises(NeuronError, match=r"b: holds scores; give percents"):
        overlap_table({"a": some, "b": scores(0)})
    with pytest.raises(NeuronError, match=r"percent is 9"):
        overlap_table({"a": some, "b": scores(0)}, [9])


def test_layers_are_those_with_candidates() -> None:
    head = Projection("lm_head", None, "lm_head", Axis.ROW, 10, 8)
    sets = {
        name: NeuronSet([PROJECTIONS[0], head], {"layers.0.up": [index], "lm_head": [2]})
        for name, index in (("a", 1), ("b", 2))
    }
    rows = overlap_table(sets, by_layer=True).rows()
    assert [(row["layer"], row["num_both"]) for row in rows[:2]] == [(None, 1), (0, 0)]
    assert len(rows) == 4
