from __future__ import annotations

import base64
import itertools
import json
import math
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from neft.errors import NeuronError
from neft.neurons import Axis, NeuronScores, NeuronSet, Projection

# The oracle of this file: a neuron set is a plain set of (module name, index).
Members = set[tuple[str, int]]


def projection(
    layer: int | None,
    role: str,
    num_neurons: int = 12,
    vector_length: int = 8,
    name: str | None = None,
) -> Projection:
    return Projection(
        name=name or f"model.layers.{layer}.{role}_proj",
        layer=layer,
        role=role,
        axis=Axis.COLUMN if role in ("down", "o") else Axis.ROW,
        num_neurons=num_neurons,
        vector_length=vector_length,
    )


# 11 layers, so that names and layers sort differently; counts that are no multiple of 8.
LAYERS = [projection(layer, role) for layer in range(11) for role in ("down", "up")]
MIXED = [
    projection(None, "lm_head", 5, 8, name="lm_head"),
    projection(1, "o", 7, 3),
    projection(0, "up", 17, 8),
    projection(0, "down", 17, 8),
    projection(0, "q", 8, 5),
    projection(1, "up", 16, 8),
]


def neurons(members: Members, projections: list[Projection] = MIXED) -> NeuronSet:
    indices: dict[str, list[int]] = {}
    for name, index in members:
        indices.setdefault(name, []).append(index)
    return NeuronSet(projections, indices)


def members(chosen: NeuronSet) -> Members:
    return {(name, int(index)) for name, indices in chosen.items() for index in indices}


def all_members(projections: list[Projection] = MIXED) -> Members:
    return {(p.name, index) for p in projections for index in range(p.num_neurons)}


def draw(seed: int, count: int, projections: list[Projection] = MIXED) -> Members:
    return set(random.Random(seed).sample(sorted(all_members(projections)), count))


# --- Projection ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "transposed", "neuron_dim", "shape"),
    [
        (Axis.ROW, False, 0, (12, 8)),
        (Axis.COLUMN, False, 1, (8, 12)),
        (Axis.ROW, True, 1, (8, 12)),
        (Axis.COLUMN, True, 0, (12, 8)),
    ],
)
def test_shape_of_the_stored_weight(
    axis: Axis, transposed: bool, neuron_dim: int, shape: tuple[int, int]
) -> None:
    one = Projection("m", 0, "up", axis, num_neurons=12, vector_length=8, transposed=transposed)
    assert (one.neuron_dim, one.weight_shape) == (neuron_dim, shape)
    assert Projection.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_order_of_projections() -> None:
    in_order = [
        projection(0, "up"),
        projection(0, "gate"),
        projection(0, "gate_up"),
        projection(0, "down"),
        projection(0, "q"),
        projection(0, "k"),
        projection(0, "v"),
        projection(0, "qkv"),
        projection(0, "o"),
        projection(0, "own"),
        projection(0, "own", name="model.layers.0.z"),
        projection(2, "up"),
        projection(10, "up"),
        projection(None, "up", name="outside"),
    ]
    shuffled = random.Random(0).sample(in_order, len(in_order))
    assert sorted(shuffled, key=lambda p: p.order) == in_order


# --- NeuronSet: content ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 30, 70])
def test_content(count: int) -> None:
    expected = draw(count, count)
    chosen = neurons(expected)
    assert len(chosen) == count
    assert members(chosen) == expected
    assert chosen.num_candidates == 70
    lengths = {p.name: p.vector_length for p in MIXED}
    assert chosen.num_parameters == sum(lengths[name] for name, _ in expected)
    assert chosen.percent_of(1000) == pytest.approx(chosen.num_parameters / 10)
    for p in MIXED:
        assert chosen[p.name].tolist() == sorted(i for name, i in expected if name == p.name)
        assert (p.name in chosen) == any(name == p.name for name, _ in expected)
    layers = {p.name: p.layer for p in MIXED}
    roles = {p.name: p.role for p in MIXED}
    assert chosen.counts_by_layer() == {
        layer: sum(layers[name] == layer for name, _ in expected) for layer in (0, 1, None)
    }
    assert chosen.counts_by_role() == {
        role: sum(roles[name] == role for name, _ in expected)
        for role in ("up", "down", "q", "o", "lm_head")
    }


def test_items_go_by_layer_then_role_and_leave_out_the_empty() -> None:
    chosen = neurons(
        all_members(LAYERS) - {("model.layers.3.up_proj", i) for i in range(12)}, LAYERS
    )
    assert [name for name, _ in chosen.items()] == [
        f"model.layers.{layer}.{role}_proj"
        for layer in range(11)
        for role in ("up", "down")
        if (layer, role) != (3, "up")
    ]


def test_indices_are_sorted_and_unique() -> None:
    chosen = NeuronSet(MIXED, {"lm_head": np.array([4, 0, 4, 2, 0], dtype=np.uint8)})
    assert chosen["lm_head"].tolist() == [0, 2, 4]
    assert chosen["lm_head"].dtype == np.int64
    assert len(chosen) == 3


def test_repr_and_percent() -> None:
    chosen = neurons(all_members())
    assert repr(chosen) == "NeuronSet(70 neurons in 6 projections, 501 parameters)"
    with pytest.raises(NeuronError, match="total_parameters must be positive, got 0"):
        chosen.percent_of(0)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({"lm_head": [5]}, r"lm_head: neuron index 5 is outside 0\.\.4"),
        ({"lm_head": [0, -1]}, r"lm_head: neuron index -1 is outside 0\.\.4"),
        ({"lm_head": [2**63]}, "lm_head: neuron index 9223372036854775808 is outside"),
        ({"lm_head": [2**70]}, "lm_head: neuron indices must be a one-dimensional list of whole"),
        ({"lm_head": [1.0]}, "must be a one-dimensional list of whole numbers, got float64"),
        ({"lm_head": [True, False]}, "whole numbers, got bool"),
        ({"lm_head": ["1"]}, "must be a one-dimensional list of whole numbers"),
        ({"lm_head": [[0, 1]]}, r"got int64 of shape \(1, 2\)"),
        ({"lm_head": [[0], [1, 2]]}, "lm_head: neuron indices are no list"),
        ({"lm_head": 3}, r"got int64 of shape \(\)"),
        ({"lm_heed": [0]}, r"lm_heed: not among the 6 projections of this model \(e\.g\. model"),
    ],
)
def test_indices_that_do_not_fit(indices: Any, message: str) -> None:
    with pytest.raises(NeuronError, match=message):
        NeuronSet(MIXED, indices)


# --- NeuronSet: algebra ----------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [*itertools.product([0, 1, 35, 70], repeat=2)])
def test_algebra(sizes: tuple[int, int]) -> None:
    left, right = draw(1, sizes[0]), draw(2, sizes[1])
    a, b = neurons(left), neurons(right)
    assert members(a | b) == left | right
    assert members(a & b) == left & right
    assert members(a - b) == left - right
    assert (a == b) == (left == right)
    assert (a | b) == (b | a)
    assert (a & b) == (b & a)
    assert members(a) == left, "operands are left alone"
    if left:
        assert a.overlap(b) == len(left & right) / len(left)


def test_overlap_of_nothing() -> None:
    with pytest.raises(NeuronError, match="empty"):
        neurons(set()).overlap(neurons(draw(0, 3)))


def test_algebra_over_different_candidates() -> None:
    """Sets that were chosen from different projections of one model combine."""
    a = neurons({("model.layers.0.up_proj", 3)}, [MIXED[2]])
    b = neurons({("model.layers.0.down_proj", 3)}, [MIXED[3]])
    assert members(a | b) == {("model.layers.0.up_proj", 3), ("model.layers.0.down_proj", 3)}
    assert (a | b).num_candidates == 34
    assert len(a & b) == 0
    assert members(a - b) == members(a)


def test_sets_of_different_models_do_not_combine() -> None:
    a = neurons({("lm_head", 0)})
    b = NeuronSet([projection(None, "lm_head", 5, 16, name="lm_head")], {"lm_head": [0]})
    assert a != b
    for operation in (NeuronSet.__or__, NeuronSet.__and__, NeuronSet.__sub__, NeuronSet.overlap):
        with pytest.raises(NeuronError, match=r"lm_head: two different descr.*different models"):
            operation(a, b)


def test_equality_is_about_neurons_alone() -> None:
    chosen = draw(3, 9)
    a = neurons(chosen)
    b = NeuronSet([*reversed(MIXED), projection(7, "up")], dict(a.items()), {"method": "other"})
    assert a == b
    assert a != neurons(chosen - {min(chosen)})
    assert a != "a neuron set"
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)


def test_combined_sets_remember_where_they_come_from() -> None:
    a, b = (NeuronSet(MIXED, {}, {"method": name}) for name in "ab")
    assert (a - b).provenance == {
        "operation": "-",
        "left": {"method": "a"},
        "right": {"method": "b"},
    }


# --- NeuronSet: files ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 33, 70])
def test_save_and_load(count: int, tmp_path: Path) -> None:
    chosen = NeuronSet(
        MIXED, dict(neurons(draw(5, count)).items()), {"base": "modèle", "percent": 9}
    )
    chosen.save(tmp_path / "new" / "neurons.json")
    loaded = NeuronSet.load(tmp_path / "new" / "neurons.json")
    assert loaded == chosen
    assert members(loaded) == draw(5, count)
    assert loaded.provenance == {"base": "modèle", "percent": 9}
    assert list(loaded.projections.values()) == list(chosen.projections.values())
    copied = NeuronSet.from_dict(json.loads(json.dumps(chosen.to_dict())))
    assert copied == chosen
    assert copied.to_dict() == chosen.to_dict()


def test_set_without_candidates(tmp_path: Path) -> None:
    NeuronSet([], {}).save(tmp_path / "none.json")
    assert len(NeuronSet.load(tmp_path / "none.json")) == 0


def test_file_is_one_for_a_human_to_open(tmp_path: Path) -> None:
    chosen = neurons(all_members(LAYERS), LAYERS)
    chosen.provenance = {"method": "cosine"}
    chosen.save(tmp_path / "neurons.json")
    lines = (tmp_path / "neurons.json").read_text(encoding="utf-8").splitlines()
    assert lines[:5] == [
        "{",
        '  "format": "neft-neurons",',
        '  "version": 1,',
        '  "num_neurons": 264,',
        '  "num_parameters": 2112,',
    ]
    assert sum("bitmap" in line for line in lines) == len(LAYERS)
    assert all(len(line) < 200 for line in lines)
    bitmap = json.loads("\n".join(lines))["projections"][0]["bitmap"]
    assert base64.b64decode(bitmap) == bytes([0xFF, 0xF0])  # 12 neurons


def test_files_of_equal_sets_are_equal(tmp_path: Path) -> None:
    indices = dict(neurons(draw(6, 20)).items())
    NeuronSet(MIXED, indices).save(tmp_path / "a")
    NeuronSet(MIXED[::-1], dict(reversed(indices.items()))).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def edited(edit: Callable[[dict[str, Any], dict[str, Any]], Any]) -> str:
    """A good file, after an edit of its fields or of its entry for ``lm_head``."""
    fields = neurons({("lm_head", 0), ("lm_head", 4)}).to_dict()
    edit(fields, next(entry for entry in fields["projections"] if entry["name"] == "lm_head"))
    return json.dumps(fields)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a JSON file"),
        ("[1, 2]", "expected a JSON object, found list"),
        ("{}", "not a neuron set .format is None, expected 'neft-neurons'"),
        (edited(lambda fields, _: fields.update(format="neft-scores")), "format is 'neft-scores'"),
        (
            edited(lambda fields, _: fields.update(version=2)),
            "version 2 of the neuron set .* Upgrade",
        ),
        (edited(lambda fields, _: fields.pop("version")), "version None"),
        (edited(lambda fields, _: fields.pop("projections")), "the field 'projections' is missing"),
        (edited(lambda fields, _: fields.pop("provenance")), "the field 'provenance' is missing"),
        (
            edited(lambda fields, _: fields.update(projections=3)),
            "malformed neuron set: .*not iterable",
        ),
        (edited(lambda fields, _: fields.update(projections={"a": 1})), "malformed neuron set"),
        (edited(lambda fields, _: fields.update(provenance="mine")), "malformed neuron set"),
        (
            edited(lambda fields, _: fields["projections"].append(fields["projections"][-1])),
            "lm_head: listed twice",
        ),
        (edited(lambda _, entry: entry.pop("bitmap")), "the field 'bitmap' is missing"),
        (edited(lambda _, entry: entry.pop("layer")), "the field 'layer' is missing"),
        (edited(lambda _, entry: entry.pop("chosen")), "the field 'chosen' is missing"),
        (edited(lambda _, entry: entry.update(bitmap="iA=")), "lm_head: the bitmap is not base64"),
        (
            edited(lambda _, entry: entry.update(bitmap="i?A==")),
            "lm_head: the bitmap is not base64",
        ),
        (edited(lambda _, entry: entry.update(bitmap="é")), "malformed neuron set"),
        (edited(lambda _, entry: entry.update(bitmap=7)), "malformed neuron set"),
        (
            edited(lambda _, entry: entry.update(bitmap="iIg=")),
            "lm_head: the bitmap has 2 bytes, 5 neurons need 1",
        ),
        (
            edited(lambda _, entry: entry.update(bitmap="")),
            "the bitmap has 0 bytes, 5 neurons need 1",
        ),
        (
            edited(lambda _, entry: entry.update(bitmap="jA==")),
            "lm_head: the bitmap marks neurons beyond the last",
        ),
        (
            edited(lambda _, entry: entry.update(bitmap="gA==")),
            "lm_head: the bitmap holds 1 neurons, the header says 2",
        ),
        (edited(lambda _, entry: entry.update(num_neurons=9)), "has 1 bytes, 9 neurons need 2"),
        (
            edited(lambda _, entry: entry.update(num_neurons=-5)),
            "lm_head has -5 neurons of length 8",
        ),
        (edited(lambda _, entry: entry.update(num_neurons=5.0)), "malformed neuron set: .*float"),
        (
            edited(lambda _, entry: entry.update(vector_length=0)),
            "lm_head has 5 neurons of length 0",
        ),
        (edited(lambda _, entry: entry.update(axis="diagonal")), "'diagonal' is not a valid Axis"),
        (edited(lambda _, entry: entry.update(layer="first")), "malformed neuron set: .*str"),
    ],
)
def test_malformed_file(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "neurons.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(NeuronError, match=message) as caught:
        NeuronSet.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "neurons.json"
    neurons(draw(4, 30)).save(path)
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(NeuronError, match="not a JSON file"):
            NeuronSet.load(path)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(NeuronError, match="cannot be read"):
            NeuronSet.load(path)
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    with pytest.raises(NeuronError, match="not a JSON file"):
        NeuronSet.load(tmp_path / "binary")


# --- NeuronSet: the authors' format ----------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 100, 264])
def test_authors_format_round_trip(count: int, tmp_path: Path) -> None:
    expected = draw(8, count, LAYERS)
    exported = neurons(expected, LAYERS).to_authors_json()
    assert exported == {
        f"{layer}_{side}": sorted(
            index for name, index in expected if name == f"model.layers.{layer}.{role}_proj"
        )
        for layer in range(11)
        for role, side in (("up", "in"), ("down", "out"))
    }
    path = tmp_path / "selection.json"
    path.write_text(json.dumps(exported), encoding="utf-8")
    assert members(NeuronSet.from_authors_json(exported, LAYERS)) == expected
    assert members(NeuronSet.from_authors_json(path, iter(LAYERS))) == expected


def test_authors_format_in_and_out() -> None:
    chosen = NeuronSet.from_authors_json({"10_in": [5, 2], "1_out": [0]}, [*LAYERS, *MIXED[:2]])
    assert members(chosen) == {
        ("model.layers.10.up_proj", 2),
        ("model.layers.10.up_proj", 5),
        ("model.layers.1.down_proj", 0),
    }


def test_authors_format_holds_up_and_down_alone() -> None:
    assert list(neurons({("model.layers.0.up_proj", 1)}).to_authors_json()) == [
        "0_in",
        "0_out",
        "1_in",
    ]
    with pytest.raises(NeuronError, match=r"model\.layers\.1\.o_proj: .* this one is 'o'"):
        neurons({("model.layers.1.o_proj", 1)}).to_authors_json()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"11_in": [0]},
            "'11_in' names no up or down projection of this model .0_in to 10_out.",
        ),
        ({"0_up": [0]}, "'0_up' names no up"),
        ({"0_in": [12]}, r"model\.layers\.0\.up_proj: neuron index 12 is outside 0\.\.11"),
        ({"0_in": [0.5]}, "list of whole numbers"),
        ({"0_in": 3}, "malformed selection: .*not iterable"),
        ({"0_in": None}, "malformed selection: .*not iterable"),
        ([1], "expected a JSON object, found list"),
    ],
)
def test_malformed_authors_file(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "selection.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(NeuronError, match=message) as caught:
        NeuronSet.from_authors_json(path, LAYERS)
    assert str(caught.value).startswith(f"{path}: ")


def test_authors_file_for_a_model_without_in_and_out_neurons() -> None:
    with pytest.raises(NeuronError, match=r"'0_in' names no up .* \(none\)"):
        NeuronSet.from_authors_json({"0_in": []}, [projection(0, "q")])


# --- NeuronScores ----------------------------------------------------------------------------------


def scores(
    seed: int = 0,
    projections: list[Projection] = MIXED,
    total_parameters: int = 1000,
    num_values: int | None = None,
) -> NeuronScores:
    """Random distances; with ``num_values``, only so many different ones, so that ties abound."""
    stream = random.Random(seed)

    def distance() -> float:
        return stream.random() if num_values is None else stream.randrange(num_values) / num_values

    distances = {p.name: [distance() for _ in range(p.num_neurons)] for p in projections}
    return NeuronScores(projections, distances, total_parameters, {"method": "cosine"})


def ranked(scored: NeuronScores, which: str) -> list[tuple[str, int]]:
    """Naive ranking: sort all neurons by cosine, then layer, projection, index."""
    sign = -1 if which == "lowest" else 1
    keyed = [
        (sign * float(scored.distances[p.name][index]), p.order, index, p.name)
        for p in scored.projections.values()
        for index in range(p.num_neurons)
    ]
    return [(name, index) for _, _, index, name in sorted(keyed)]


@pytest.mark.parametrize("which", ["lowest", "highest"])
@pytest.mark.parametrize("num_values", [None, 3, 1])
def test_select_by_count(which: Any, num_values: int | None) -> None:
    scored = scores(num_values=num_values)
    expected = ranked(scored, which)
    for count in range(71):
        chosen = scored.select(count=count, which=which)
        assert len(chosen) == count
        assert members(chosen) == set(expected[:count])
        assert (scored.lowest if which == "lowest" else scored.highest)(count) == chosen


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"percent": np.float64(9)}, {"percent": 9.0}),
        ({"percent": np.int64(9)}, {"percent": 9}),
        ({"percent": np.float32(12.5)}, {"percent": 12.5}),
        ({"megabytes": np.float64(1e-3)}, {"megabytes": 1e-3}),
        (
            {"count": np.int64(5), "which": "random", "seed": np.uint32(7)},
            {"count": 5, "which": "random", "seed": 7},
        ),
        (
            {"count": np.int32(5), "rule": "floor", "floor": np.float64(30)},
            {"count": 5, "rule": "floor", "floor": 30.0},
        ),
    ],
)
def test_numbers_of_numpy_can_be_saved(given: Any, plain: Any, tmp_path: Path) -> None:
    chosen, expected = scores().select(**given), scores().select(**plain)
    assert (chosen, chosen.provenance) == (expected, expected.provenance)
    chosen.save(tmp_path / "neurons.json")
    assert NeuronSet.load(tmp_path / "neurons.json").provenance == expected.provenance


def test_lowest_cosine_is_largest_distance() -> None:
    scored = NeuronScores([projection(0, "up", 3)], {"model.layers.0.up_proj": [1e-9, 2e-5, 0]}, 24)
    assert scored.lowest(1)["model.layers.0.up_proj"].tolist() == [1]
    assert scored.highest(1)["model.layers.0.up_proj"].tolist() == [2]
    assert scored.cosine("model.layers.0.up_proj").tolist() == [1 - 1e-9, 1 - 2e-5, 1]
    scored.provenance["method"] = "norm"
    with pytest.raises(NeuronError, match=r"scored by norm, so its distances are 1 / \(2 \|w"):
        scored.cosine("model.layers.0.up_proj")


def test_distances_too_close_for_the_cosine_still_rank() -> None:
    tiny = [i * 1e-18 for i in range(12)]
    scored = NeuronScores([projection(0, "up")], {"model.layers.0.up_proj": tiny}, 96)
    assert set(scored.cosine("model.layers.0.up_proj")) == {1.0}
    assert scored.lowest(3)["model.layers.0.up_proj"].tolist() == [9, 10, 11]


def test_order_of_projections_does_not_decide() -> None:
    scored = scores(num_values=2)
    turned = NeuronScores(MIXED[::-1], dict(reversed(scored.distances.items())), 1000)
    for which in ("lowest", "highest", "random"):
        assert scored.select(count=31, which=which) == turned.select(count=31, which=which)


def test_random() -> None:
    scored = scores()
    draws = [members(scored.select(count=20, which="random", seed=seed)) for seed in range(20)]
    assert all(len(drawn) == 20 for drawn in draws)
    assert len({frozenset(drawn) for drawn in draws}) == 20
    assert set.union(*draws) == all_members()
    assert draws[3] == members(scores(seed=9).select(count=20, which="random", seed=3))
    nested = scored.select(count=5, which="random", seed=3)
    assert members(nested) < draws[3]


def test_a_seed_names_the_same_neurons_everywhere() -> None:
    up = [projection(0, "up")]
    chosen = scores(projections=up).select(count=4, which="random", seed=7)
    assert chosen["model.layers.0.up_proj"].tolist() == [2, 5, 7, 10]


@pytest.mark.parametrize("which", ["lowest", "highest", "random"])
@pytest.mark.parametrize("percent", [0.8, 1, 9, 12.34, 33.3, 49.6])
@pytest.mark.parametrize("total", [1000, 1002, 1009])
def test_select_by_percent(which: Any, percent: float, total: int) -> None:
    """The longest start of the ranking whose scalars fit, in decimal arithmetic."""
    scored = scores(total_parameters=total)
    if which == "random":
        order = [set()] + [members(scored.select(count=n, which=which)) for n in range(1, 71)]
        ranking = [next(iter(after - before)) for before, after in itertools.pairwise(order)]
    else:
        ranking = ranked(scored, which)
    lengths = {p.name: p.vector_length for p in MIXED}
    budget = Decimal(str(percent)) * total / 100
    spent = list(itertools.accumulate(lengths[name] for name, _ in ranking))
    expected = {neuron for neuron, sum_ in zip(ranking, spent, strict=True) if sum_ <= budget}
    chosen = scored.select(percent=percent, which=which)
    assert members(chosen) == expected
    assert chosen.num_parameters <= budget < chosen.num_parameters + 8


@pytest.mark.parametrize(
    ("percent", "count"), [(0.4, 40), (1.1, 110), (9, 900), (9.01, 901), (29.3, 2930), (58.0, 5800)]
)
def test_percent_loses_no_neuron_to_rounding(percent: float, count: int) -> None:
    """A round share of a round total, where floats fall short: 29.3 / 100 * 10_000 < 2930."""
    wide = [projection(0, "up", 10_000, 1)]
    scored = NeuronScores(wide, {"model.layers.0.up_proj": np.zeros(10_000)}, 10_000)
    assert len(scored.select(percent=percent)) == count


def test_the_papers_budget() -> None:
    """NeFT_6% of Llama-2-7B: 100,000 neurons of 4096 are 409.6M of 6.738B parameters (section 4)."""
    projections = [
        projection(layer, role, 11008, 4096) for layer in range(32) for role in ("up", "down")
    ]
    total = 6_738_415_616
    rng = np.random.default_rng(0)
    distances = {p.name: rng.random(11008) for p in projections}
    scored = NeuronScores(projections, distances, total)
    assert len(scored) == 704_512
    chosen = scored.select(count=100_000)
    assert chosen.num_parameters == 409_600_000
    assert chosen.percent_of(total) == pytest.approx(6, abs=0.1)
    assert len(scored.select(percent=9)) == math.floor(total * 9 / 100 / 4096)


@pytest.mark.parametrize("total", range(501, 5000, 97))
def test_max_percent_takes_all(total: int) -> None:
    """Also where the float lies below the exact quotient."""
    scored = scores(total_parameters=total)
    assert scored.max_percent == pytest.approx(100 * 501 / total)
    assert len(scored.select(percent=scored.max_percent)) == 70
    with pytest.raises(NeuronError, match="score more projections"):
        scored.select(percent=math.nextafter(scored.max_percent, math.inf))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "by percent, count or megabytes, one of the three"),
        ({"percent": 9, "count": 3}, "by percent, count or megabytes, one of the three"),
        ({"percent": 0}, "percent is 0; it must be a number above 0"),
        ({"percent": -9}, "percent is -9; it must be a number above 0"),
        ({"percent": math.nan}, "percent is nan; it must be a number above 0"),
        ({"percent": math.inf}, "percent is inf; it must be a number above 0"),
        (
            {"percent": 50.2},
            "percent is 50.2, but the scored projections hold only 50.1% of the model's ",
        ),
        ({"percent": 101}, "percent is 101, but"),
        (
            {"percent": 0.05},
            "percent is 0.05: that is 0 parameters, and the first of the ranking takes [358]",
        ),
        ({"count": -1}, "count is -1; it must be a whole number"),
        ({"count": 71}, "count is 71, but the scored projections hold only 70 neurons"),
        ({"count": 3.0}, "count is 3.0; it must be a whole number"),
        (
            {"count": 3, "which": "middle"},
            "which is 'middle'; choose 'lowest', 'highest' or 'random'",
        ),
        ({"count": 3, "which": "random", "seed": -1}, "seed is -1"),
        ({"count": 3, "which": "random", "seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"count": 3, "which": "random", "seed": True}, "seed is True; it must be a number"),
        ({"count": True}, "count is True; it must be a number"),
        ({"count": np.bool_(True)}, "count is True; it must be a number"),
        ({"percent": True}, "percent is True; it must be a number"),
        ({"percent": "9"}, "percent is 9; it must be a number"),
        ({"count": 3, "which": "random", "seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_budget_that_does_not_fit(budget: Any, message: str) -> None:
    with pytest.raises(NeuronError, match=message):
        scores().select(**budget)


def test_selection_says_what_it_is(tmp_path: Path) -> None:
    scored = scores()
    chosen = scored.select(percent=9)
    assert chosen.provenance == {
        "method": "cosine",
        "selection": {"which": "lowest", "percent": 9, "count": len(chosen)},
    }
    by_numpy = scored.select(count=np.int64(5), which="random", seed=2)  # type: ignore[arg-type]
    by_numpy.save(tmp_path / "neurons.json")
    assert NeuronSet.load(tmp_path / "neurons.json").provenance["selection"] == {
        "which": "random",
        "percent": None,
        "count": 5,
        "seed": 2,
    }
    assert scored.provenance == {"method": "cosine"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_head": ...}, "lm_head: has no scores"),
        ({"lm_head": [0.0] * 4}, r"lm_head: scores of shape \(4,\), expected \(5,\)"),
        ({"lm_head": [[0.0] * 5]}, r"lm_head: scores of shape \(1, 5\), expected \(5,\)"),
        ({"lm_head": [0, 0, 0, math.nan, 0]}, "lm_head: the score of neuron 3 is nan"),
        ({"lm_head": [0, -math.inf, 0, 0, 0]}, "lm_head: the score of neuron 1 is -inf"),
        ({"elsewhere": [0.0]}, "elsewhere: has scores, but is not among the projections"),
    ],
)
def test_scores_that_do_not_fit(change: Any, message: str) -> None:
    distances = dict(scores().distances) | change
    distances = {name: values for name, values in distances.items() if values is not ...}
    with pytest.raises(NeuronError, match=message):
        NeuronScores(MIXED, distances, 1000)


def test_scores_of_nothing() -> None:
    with pytest.raises(NeuronError, match="no projections"):
        NeuronScores([], {}, 1000)
    with pytest.raises(NeuronError, match="total_parameters must be positive, got 0"):
        NeuronScores(MIXED, scores().distances, 0)


def test_scores_round_trip_is_bit_exact(tmp_path: Path) -> None:
    scored = scores()
    scored.distances["lm_head"][:] = [0.0, 5e-324, 1e-17, 1 / 3, 2.0]
    scored.save(tmp_path / "new" / "scores.safetensors")
    loaded = NeuronScores.load(tmp_path / "new" / "scores.safetensors")
    assert loaded.projections == scored.projections
    assert loaded.total_parameters == 1000
    assert loaded.provenance == {"method": "cosine"}
    assert loaded.distances.keys() == scored.distances.keys()
    for name, values in scored.distances.items():
        assert loaded.distances[name].dtype == np.float64
        assert loaded.distances[name].tobytes() == values.tobytes()
    assert repr(loaded) == "NeuronScores(70 neurons in 6 projections)"


def test_scores_that_lie_apart_in_memory(tmp_path: Path) -> None:
    table = np.random.default_rng(0).random((12, 2))
    NeuronScores([projection(0, "up")], {"model.layers.0.up_proj": table[:, 0]}, 96).save(
        tmp_path / "s"
    )
    loaded = NeuronScores.load(tmp_path / "s")
    assert loaded.distances["model.layers.0.up_proj"].tolist() == table[:, 0].tolist()


def test_files_of_equal_scores_are_equal(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        scores().save(tmp_path / name)
    contents = {(tmp_path / name).read_bytes() for name in "abcd"}
    assert len(contents) == 1


def rewritten(path: Path, edit: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    tensors = load_file(path)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    fields = json.loads(header["__metadata__"]["neft-scores"])
    edit(fields, tensors)
    save_file(tensors, path, {"neft-scores": json.dumps(fields)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda fields, tensors: fields.update(version=9),
            "version 9 of the scores format .* Upgrade",
        ),
        (lambda fields, tensors: fields.pop("version"), "the field 'version' is missing"),
        (lambda fields, tensors: fields.pop("projections"), "the field 'projections' is missing"),
        (lambda fields, tensors: fields.pop("total_parameters"), "'total_parameters' is missing"),
        (lambda fields, tensors: fields.pop("provenance"), "the field 'provenance' is missing"),
        (lambda fields, tensors: fields.update(total_parameters="1000"), "malformed scores file"),
        (lambda fields, tensors: fields.update(total_parameters=-1), "must be positive, got -1"),
        (lambda fields, tensors: fields.update(projections=[1]), "malformed scores file"),
        (
            lambda fields, tensors: fields["projections"][0].pop("axis"),
            "the field 'axis' is missing",
        ),
        (lambda fields, tensors: tensors.pop("lm_head"), "lm_head"),
        (
            lambda fields, tensors: tensors.update(lm_head=np.zeros(4)),
            r"lm_head: scores of shape \(4,\), expected \(5,\)",
        ),
        (
            lambda fields, tensors: tensors.update(lm_head=np.full(5, np.nan)),
            "lm_head: the score of neuron 0 is nan",
        ),
    ],
)
def test_malformed_scores_file(edit: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    scores().save(path)
    rewritten(path, edit)
    with pytest.raises(NeuronError, match=message) as caught:
        NeuronScores.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_files_that_are_no_scores(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for missing in (path, tmp_path):
        with pytest.raises(NeuronError, match="no such file"):
            NeuronScores.load(missing)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(
        NeuronError, match=r"file: not a scores file \(its metadata has no 'neft-scores'"
    ):
        NeuronScores.load(path)
    save_file({"weight": np.zeros(3)}, path, {"neft-scores": "{"})
    with pytest.raises(NeuronError, match="file: malformed scores file"):
        NeuronScores.load(path)
    path.write_text("{}")
    with pytest.raises(NeuronError, match="file: not a readable scores file"):
        NeuronScores.load(path)


def test_every_truncated_scores_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    scores().save(path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 61), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(NeuronError, match="not a readable scores file"):
            NeuronScores.load(path)


WRITER = """
import sys
import numpy as np
from neft.neurons import Axis, NeuronScores, Projection
projection = Projection("m", 0, "up", Axis.ROW, 200_000, 8)
print("ready", flush=True)
for value in range(1_000_000):
    scores = NeuronScores([projection], {"m": np.full(200_000, float(value))}, 1_600_000)
    scores.save(sys.argv[1])
    scores.select(count=value % 200_000).save(sys.argv[2])
    if value == 0:
        print("saved", flush=True)
"""


def test_killed_while_writing_files_stay_whole(tmp_path: Path) -> None:
    scores_file, neurons_file = tmp_path / "scores.safetensors", tmp_path / "neurons.json"
    command = [sys.executable, "-c", WRITER, str(scores_file), str(neurons_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert [writer.stdout.readline(), writer.stdout.readline()] == ["ready\n", "saved\n"]
        # Read while the other process writes, then kill it at no particular moment.
        for _ in range(20):
            values = NeuronScores.load(scores_file).distances["m"]
            assert np.unique(values).size == 1
            NeuronSet.load(neurons_file)
        writer.send_signal(signal.SIGKILL)
    assert np.unique(NeuronScores.load(scores_file).distances["m"]).size == 1
    NeuronSet.load(neurons_file)
