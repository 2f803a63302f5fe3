"""Restoring neurons: which, by hand; their losses; and that the model is as it was afterwards."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from neft import NeftConfig
from neft.analysis.causal import NOTHING, Group, causal, groups, restored
from neft.checkpoints import open_weights
from neft.errors import AdapterError, CheckpointError, NeuronError
from neft.evaluation import target_loss
from neft.neurons import Axis, NeuronScores, NeuronSet, Projection
from neft.projections import find_projections

IDS = [[5, 6, 7, 8, 9], [10, 11, 12]]


def loss(model) -> float:
    return target_loss(model, IDS, IDS, batch_size=2).loss


def some_neurons(model) -> NeuronSet:
    projections = find_projections(model)
    generator = np.random.default_rng(0)
    chosen = {p.name: generator.choice(p.num_neurons, 20, replace=False) for p in projections}
    return NeuronSet(projections, chosen)


def random_scores(model) -> NeuronScores:
    projections = find_projections(model)
    generator = np.random.default_rng(1)
    distances = {p.name: generator.random(p.num_neurons) for p in projections}
    return NeuronScores(projections, distances, 100_000)


def many_layers(count: int) -> list[Projection]:
    return [
        Projection(f"layers.{n}.{role}", n, role, axis, 8, 4)
        for n in range(count)
        for role, axis in {"up": Axis.ROW, "down": Axis.COLUMN}.items()
    ]


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, weights) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), weights[name].view(torch.uint8)), name


def flat(neurons: NeuronSet) -> set[tuple[str, int]]:
    return {(name, int(n)) for name, indices in neurons.items() for n in indices}


class TestGroups:
    def test_by_score(self, tiny_model) -> None:
        neurons, scores = some_neurons(tiny_model()), random_scores(tiny_model())
        found = {group.kind: group for group in groups(neurons, scores, share=0.2)}
        ordered = sorted(flat(neurons), key=lambda place: scores.distances[place[0]][place[1]])
        size = 16
        assert flat(found["all"].neurons) == flat(neurons)
        assert flat(found["lowest"].neurons) == set(ordered[-size:])  # low cosine, large distance
        assert flat(found["highest"].neurons) == set(ordered[:size])
        assert found["lowest"].name == "lowest 20% by cosine"
        assert len(found["random"].neurons) == size
        assert flat(found["random"].neurons) < flat(neurons)

    def test_ties_break_in_canonical_order(self) -> None:
        projections = many_layers(2)
        neurons = NeuronSet(projections, {p.name: range(8) for p in projections})
        scores = NeuronScores(projections, {p.name: np.ones(8) for p in projections}, 1000)
        found = {group.kind: group.neurons for group in groups(neurons, scores, share=0.1)}
        assert flat(found["lowest"]) == {("layers.0.up", n) for n in range(3)}
        assert flat(found["highest"]) == {("layers.1.down", n) for n in (5, 6, 7)}

    def test_a_seed_names_the_random_ones(self, tiny_model) -> None:
        neurons = some_neurons(tiny_model())
        one, same, other = (
            next(group.neurons for group in groups(neurons, seed=seed) if group.kind == "random")
            for seed in (1, 1, 2)
        )
        assert one == same
        assert one != other

    @pytest.mark.parametrize(
        ("num_layers", "layers_per_band", "expected"),
        [
            (2, None, ["layer 0", "layer 1"]),
            (30, None, [f"layers {n}-{n + 2}" for n in range(0, 30, 3)]),
            (32, None, [f"layers {n}-{n + 3}" for n in range(0, 32, 4)]),
            (12, None, [f"layers {n}-{n + 1}" for n in range(0, 12, 2)]),
            (12, 1, [f"layer {n}" for n in range(12)]),
            (5, 2, ["layers 0-1", "layers 2-3", "layer 4"]),
        ],
    )
    def test_bands_of_layers(self, num_layers, layers_per_band, expected) -> None:
        projections = many_layers(num_layers)
        neurons = NeuronSet(projections, {p.name: [1, 5] for p in projections})
        bands = [
            group
            for group in groups(neurons, layers_per_band=layers_per_band)
            if group.kind == "layer"
        ]
        assert [band.name for band in bands] == expected
        assert sum(len(band.neurons) for band in bands) == len(neurons)
        assert set().union(*(flat(band.neurons) for band in bands)) == flat(neurons)

    def test_layers_without_a_trained_neuron_are_left_out(self) -> None:
        neurons = NeuronSet(many_layers(4), {"layers.2.up": [3]})
        bands = {group.name: group.neurons for group in groups(neurons) if group.kind == "layer"}
        assert bands == {"layer 2": neurons}

    def test_neurons_outside_the_layers_are_in_no_band(self) -> None:
        head = Projection("lm_head", None, "lm_head", Axis.ROW, 8, 4)
        neurons = NeuronSet([*many_layers(1), head], {"lm_head": [1], "layers.0.up": [2]})
        found = {group.name: len(group.neurons) for group in groups(neurons)}
        assert found == {"all trained neurons": 2, "random 25%": 1, "layer 0": 1}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"share": 0}, "share is 0"),
            ({"share": 1.5}, "share is 1.5"),
            ({"seed": -1}, "seed is -1"),
            ({"layers_per_band": 0}, "layers_per_band is 0"),
        ],
    )
    def test_options_out_of_range(self, tiny_model, options, message) -> None:
        with pytest.raises(NeuronError, match=message):
            groups(some_neurons(tiny_model()), **options)

    def test_no_neurons(self, tiny_model) -> None:
        with pytest.raises(NeuronError, match="empty"):
            groups(NeuronSet(find_projections(tiny_model()), {}))

    @pytest.mark.parametrize("shape", [{"num_hidden_layers": 1}, {"intermediate_size": 48}])
    def test_scores_of_another_model(self, tiny_model, shape) -> None:
        with pytest.raises(NeuronError, match=r"_proj: .* scored"):
            groups(some_neurons(tiny_model()), random_scores(tiny_model(**shape)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_a_copy_that_is_written_by_hand(tiny_model, tmp_path, architecture, dtype) -> None:
    original = tiny_model(architecture, seed=1, initializer_range=0.3).to(dtype)
    original.save_pretrained(tmp_path)
    trained = tiny_model(architecture, seed=2, initializer_range=0.3).to(dtype)
    weights = weights_of(trained)
    neurons = some_neurons(trained)
    made = groups(neurons, random_scores(trained))
    measures = {"task": loss, "general": lambda model: 2 * loss(model)}
    table = causal(trained, open_weights(tmp_path), made, measures)
    assert_unchanged(trained, weights)
    assert list(table.columns) == [
        *("group", "kind", "num_neurons"),
        *("task_loss", "general_loss", "task_rise", "general_rise"),
    ]
    first, *rows = table.rows()
    assert first == {
        "group": NOTHING,
        "kind": "none",
        "num_neurons": 0,
        "task_loss": loss(trained),
        "general_loss": 2 * loss(trained),
        "task_rise": 0.0,
        "general_rise": 0.0,
    }
    assert [(row["group"], row["kind"]) for row in rows] == [(g.name, g.kind) for g in made]
    for group, row in zip(made, rows, strict=True):
        by_hand = copy.deepcopy(trained)
        for name, neuron in flat(group.neurons):
            dim = neurons.projections[name].neuron_dim
            with torch.no_grad():
                by_hand.get_submodule(name).weight.select(dim, neuron).copy_(
                    original.get_submodule(name).weight.select(dim, neuron)
                )
        assert row["num_neurons"] == len(group.neurons)
        assert row["task_loss"] == loss(by_hand)
        assert row["task_rise"] == row["task_loss"] - first["task_loss"]
        assert row["general_rise"] == row["general_loss"] - first["general_loss"]


def test_all_that_an_adapter_trained_makes_the_base_model_again(tiny_model) -> None:
    base = tiny_model(seed=1, initializer_range=0.3)
    neurons = some_neurons(base)
    wrapped = get_peft_model(copy.deepcopy(base), NeftConfig(neurons=neurons))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "neft_vectors" in name:
                parameter.add_(0.3)
    merged = wrapped.merge_and_unload()
    table = causal(merged, open_weights(base), groups(neurons), {"task": loss})
    assert table["task_loss"][0] != loss(base)
    assert table["task_loss"][1] == loss(base)
    with restored(merged, open_weights(base), neurons):
        assert_unchanged(merged, weights_of(base))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_trained_vectors_come_back_when_a_measure_fails(tiny_model, error) -> None:
    original, trained = tiny_model(seed=1), tiny_model(seed=2)
    neurons = some_neurons(trained)
    with torch.no_grad():  # bits that arithmetic would not bring back
        name, indices = next(neurons.items())
        trained.get_submodule(name).weight[indices[0], :3] = torch.tensor([torch.nan, -0.0, 1e-42])
    weights = weights_of(trained)
    seen = []

    def failing(model) -> float:
        seen.append(weights_of(model))
        if len(seen) == 3:
            raise error("stop")
        return 0.0

    with pytest.raises(error, match="stop"):
        causal(trained, open_weights(original), groups(neurons), {"task": failing})
    assert not all(torch.equal(tensor, weights[name]) for name, tensor in seen[2].items())
    assert_unchanged(trained, weights)


def test_trained_vectors_come_back_when_the_original_cannot_be_read(tiny_model) -> None:
    original, trained = open_weights(tiny_model(seed=1)), tiny_model(seed=2)
    weights = weights_of(trained)
    read, calls = original.read, []

    def torn(name, index=None):
        calls.append(name)
        if len(calls) == 3:
            raise CheckpointError("torn")
        return read(name, index)

    original.read = torn
    with (
        pytest.raises(CheckpointError, match="torn"),
        restored(trained, original, some_neurons(trained)),
    ):
        pass
    assert_unchanged(trained, weights)


class TestWhatDoesNotFit:
    @pytest.mark.parametrize("shape", [{"num_hidden_layers": 3}, {"intermediate_size": 48}])
    def test_neurons_of_another_model(self, tiny_model, shape) -> None:
        other = tiny_model(**shape)
        [group, *_] = groups(some_neurons(other))
        with pytest.raises(NeuronError, match=r"_proj: this LlamaForCausalLM has .* another model"):
            causal(tiny_model(), open_weights(other), [group], {"task": _not_reached})

    def test_original_of_another_shape(self, tiny_model) -> None:
        trained = tiny_model()
        other = open_weights(tiny_model(intermediate_size=48))
        with pytest.raises(CheckpointError, match=r"has shape \[48, 32\]"):
            causal(trained, other, groups(some_neurons(trained)), {"task": _not_reached})

    def test_a_later_group_is_found_before_any_measure(self, tiny_model) -> None:
        trained = tiny_model()
        good = groups(some_neurons(trained))
        bad = Group("bad", "all", some_neurons(tiny_model(num_hidden_layers=3)))
        with pytest.raises(NeuronError, match=r"layers\.2"):
            causal(trained, open_weights(trained), [*good, bad], {"task": _not_reached})

    def test_adapter_that_is_not_merged(self, tiny_model) -> None:
        base = tiny_model()
        neurons = some_neurons(base)
        wrapped = get_peft_model(copy.deepcopy(base), NeftConfig(neurons=neurons))
        with pytest.raises(AdapterError, match="Merge it"):
            causal(wrapped, open_weights(base), groups(neurons), {"task": _not_reached})

    def test_adapter_inside_a_plain_model(self, tiny_model) -> None:
        base = tiny_model()
        neurons = some_neurons(base)
        model = copy.deepcopy(base)
        model.add_adapter(LoraConfig(target_modules=["down_proj"]))
        with pytest.raises(AdapterError, match="Merge it"):
            causal(model, open_weights(base), groups(neurons), {"task": _not_reached})


def _not_reached(_model) -> float:
    raise AssertionError("measured before all groups were checked")


def test_neurons_of_one_expert_are_restored(tiny_model) -> None:
    original, trained = tiny_model("gpt_oss", seed=1), tiny_model("gpt_oss", seed=2)
    weights, stack = weights_of(trained), "model.layers.1.mlp.experts.down_proj"
    projections = find_projections(trained, [stack])
    with restored(trained, open_weights(original), NeuronSet(projections, {f"{stack}.2": [3, 5]})):
        expected = weights[stack].clone()
        expected[2, [3, 5]] = original.state_dict()[stack][2, [3, 5]]
        assert torch.equal(trained.state_dict()[stack], expected)
    assert_unchanged(trained, weights)
