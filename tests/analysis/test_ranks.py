"""Ranks and their changes against plain lists."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from neft.analysis import ranks as ranks_module
from neft.analysis.ranks import (
    EDGES,
    affected_neurons,
    average_rank_changes,
    rank_buckets,
    rank_changes,
    ranks,
)
from neft.analysis.utilization import Utilization
from neft.errors import NeuronError
from neft.neurons import Axis, NeuronSet, Projection
from reference import analysis as naive

PROJECTIONS = {
    f"layers.{layer}.{role}": Projection(f"layers.{layer}.{role}", layer, role, axis, count, 8)
    for layer in range(3)
    for role, axis, count in (("up", Axis.ROW, 40), ("down", Axis.COLUMN, 25))
}
UPS = [name for name in PROJECTIONS if name.endswith("up")]
DOWNS = [name for name in PROJECTIONS if name.endswith("down")]


def used(seed: int, digits: int = 1, projections=PROJECTIONS) -> Utilization:
    """Random values with many ties."""
    random = np.random.RandomState(seed)
    values = {name: random.rand(p.num_neurons).round(digits) for name, p in projections.items()}
    peaks = {name: np.zeros(len(found), dtype=np.int64) for name, found in values.items()}
    return Utilization(projections, values, peaks)


def flat(arrays, names) -> list:
    return [value for name in names for value in arrays[name].tolist()]


def naive_ranks(utilization, jointly: bool) -> dict[str, list[int]]:
    found = {}
    for names in [list(PROJECTIONS)] if jointly else [UPS, DOWNS]:
        listed = naive.ranks(flat(utilization.values, names))
        for name in names:
            count = PROJECTIONS[name].num_neurons
            found[name], listed = listed[:count], listed[count:]
    return found


@pytest.mark.parametrize("jointly", [True, False])
def test_most_used_first_and_ties_in_canonical_order(jointly) -> None:
    found = ranks(used(0), jointly=jointly)
    assert list(found) == list(PROJECTIONS)
    assert {name: rank.tolist() for name, rank in found.items()} == naive_ranks(used(0), jointly)
    assert found["layers.0.up"].dtype == np.int64


@pytest.mark.parametrize("jointly", [True, False])
def test_changes_and_averages(jointly) -> None:
    changes = rank_changes(used(0), used(1), jointly=jointly)
    before, after = naive_ranks(used(0), jointly), naive_ranks(used(1), jointly)
    moved = {
        name: [b - a for a, b in zip(before[name], after[name], strict=True)]
        for name in PROJECTIONS
    }
    assert {name: change.tolist() for name, change in changes.changes.items()} == moved

    def average(names) -> float:
        values = [abs(change) for name in names for change in moved[name]]
        return sum(values) / len(values)

    assert changes.average == pytest.approx(average(PROJECTIONS))
    assert changes.average_by_role == pytest.approx({"up": average(UPS), "down": average(DOWNS)})
    lengths = {"up": 195, "down": 195} if jointly else {"up": 120, "down": 75}
    for name, projection in PROJECTIONS.items():
        assert changes.list_lengths[name] == lengths[projection.role]


def test_a_model_against_itself() -> None:
    changes = rank_changes(used(0), used(0))
    assert changes.average == 0
    assert affected_neurons(changes, NeuronSet([], {})).counts == dict.fromkeys(
        ("strong", "suppressed", "indirect"), 0
    )


@pytest.mark.parametrize("jointly", [True, False])
@pytest.mark.parametrize("edges", [EDGES, (0, 100), (0, 0.5, 33.3, 100)])
def test_buckets_by_percentile_of_rank_before(jointly, edges) -> None:
    changes = rank_changes(used(0), used(1), jointly=jointly)
    inside = {}
    for name, projection in PROJECTIONS.items():
        length = changes.list_lengths[name]
        pairs = zip(changes.before[name].tolist(), changes.after[name].tolist(), strict=True)
        for before, after in pairs:
            number = naive.bucket(before, length, edges)
            for role in ("all", projection.role):
                inside.setdefault((role, number), []).append(abs(after - before))
    rows = rank_buckets(changes, edges).rows()
    assert [row["role"] for row in rows[:: len(edges) - 1]] == ["all", "up", "down"]
    for place, row in enumerate(rows):
        number = place % (len(edges) - 1)
        values = inside.get((row["role"], number), [])
        assert (row["low"], row["high"]) == edges[number : number + 2]
        assert row["num_neurons"] == len(values)
        if values:
            assert row["mean_rank_change"] == pytest.approx(sum(values) / len(values))
        else:
            assert row["mean_rank_change"] is None
    assert sum(row["num_neurons"] for row in rows if row["role"] == "all") == 195


def test_a_rank_on_an_edge_counts_above_it() -> None:
    one = {"up": Projection("up", 0, "up", Axis.ROW, 100, 8)}
    changes = rank_changes(used(0, 9, one), used(1, 9, one))
    counts = [row["num_neurons"] for row in rank_buckets(changes).rows()]
    assert counts[:10] == [1, 2, 7, 20, 20, 20, 20, 7, 2, 1]


@pytest.mark.parametrize("edges", [(0, 50), (1, 100), (0, 50, 50, 100), (0, 70, 30, 100), (0,), ()])
def test_edges_that_make_no_buckets(edges) -> None:
    with pytest.raises(NeuronError, match="must ascend from 0 to 100"):
        rank_buckets(rank_changes(used(0), used(1)), edges)


@pytest.mark.parametrize("jointly", [True, False])
@pytest.mark.parametrize("threshold", [ranks_module.THRESHOLD, 0.1, 0, 1])
def test_types_of_affected_neurons(jointly, threshold) -> None:
    changes = rank_changes(used(0), used(1), jointly=jointly)
    chosen = {"layers.0.up": [1, 5, 7, 30], "layers.2.down": list(range(20))}
    found = affected_neurons(changes, NeuronSet(PROJECTIONS.values(), chosen), threshold)
    counts = {"strong": 0, "suppressed": 0, "indirect": 0}
    for name in PROJECTIONS:
        for neuron, change in enumerate(changes.changes[name].tolist()):
            strong = abs(change) > Fraction(str(threshold)) * changes.list_lengths[name]
            indirect = strong and neuron not in chosen.get(name, [])
            assert found.strong[name][neuron] == strong
            assert found.suppressed[name][neuron] == (strong and change > 0)
            assert found.indirect[name][neuron] == indirect
            counts["strong"] += strong
            counts["suppressed"] += strong and change > 0
            counts["indirect"] += indirect
    assert found.counts == counts
    assert found.threshold == float(threshold)
    if threshold == ranks_module.THRESHOLD:
        assert counts["strong"] > counts["indirect"] > 0 < counts["suppressed"] < counts["strong"]


def test_threshold_is_the_papers_where_the_list_is_the_papers() -> None:
    one = {"up": Projection("up", 0, "up", Axis.ROW, 352_256, 8)}
    order = np.arange(352_256, dtype=np.int64)
    # All but the first fall by one; the first falls by ``fall`` ranks.
    for fall, strong in ((100_000, 0), (100_001, 1)):
        values = -order.astype(float)
        values[0] = -(fall + 0.5)
        before, after = (
            Utilization(one, {"up": found}, {"up": order})
            for found in (-order.astype(float), values)
        )
        found = affected_neurons(rank_changes(before, after), NeuronSet([], {}))
        assert found.counts["strong"] == strong


def test_a_threshold_that_is_no_share() -> None:
    with pytest.raises(NeuronError, match="threshold is 28"):
        affected_neurons(rank_changes(used(0), used(1)), NeuronSet([], {}), 28)


def test_trained_neurons_of_another_model() -> None:
    changes = rank_changes(used(0), used(1))
    other = Projection("layers.0.up", 0, "up", Axis.ROW, 41, 8)
    with pytest.raises(NeuronError, match=r"layers\.0\.up is 41 row neurons .* and 40 row neurons"):
        affected_neurons(changes, NeuronSet([other], {"layers.0.up": [40]}))
    unknown = Projection("h.0.mlp", 0, "up", Axis.ROW, 40, 8)
    with pytest.raises(NeuronError, match=r"e\.g\. h\.0\.mlp"):
        affected_neurons(changes, NeuronSet([unknown], {"h.0.mlp": [1]}))


def test_every_pair_of_models_once() -> None:
    models = {"base": used(0), "10k": used(1), "100k": used(2)}
    rows = average_rank_changes(models).rows()
    assert [(row["a"], row["b"], row["role"]) for row in rows] == [
        (a, b, role)
        for a, b in (("base", "10k"), ("base", "100k"), ("10k", "100k"))
        for role in ("all", "up", "down")
    ]
    for row in rows:
        pair = rank_changes(models[row["a"]], models[row["b"]])
        averages = {"all": pair.average, **pair.average_by_role}
        assert row["average_rank_change"] == averages[row["role"]]
        assert row["num_neurons"] == {"all": 195, "up": 120, "down": 75}[row["role"]]


def test_models_of_different_shape() -> None:
    fewer = {name: PROJECTIONS[name] for name in UPS}
    with pytest.raises(NeuronError, match=r"3 of the 6 projections of before .* layers\.0\.down"):
        rank_changes(used(0), used(1, projections=fewer))
    with pytest.raises(NeuronError, match=r"3 of the 6 projections of after"):
        rank_changes(used(1, projections=fewer), used(0))
    wide = Projection("layers.0.up", 0, "up", Axis.ROW, 40, 16)
    with pytest.raises(
        NeuronError, match=r"small and large: .*length 8 .* in small and .* length 16"
    ):
        average_rank_changes(
            {"small": used(0), "large": used(1, projections=PROJECTIONS | {"layers.0.up": wide})}
        )
    with pytest.raises(NeuronError, match="There are 1 models"):
        average_rank_changes({"one": used(0)})
