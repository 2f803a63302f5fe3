"""Changes of length and direction against numpy and the exact cosine, one neuron at a time."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from peft import get_peft_model

from neft.analysis.changes import neuron_changes
from neft.checkpoints import open_weights
from neft.errors import CheckpointError
from neft.neurons import NeuronSet
from neft.projections import find_projections
from neft.tuner import NeftConfig
from reference.cosine import cosine_distance

UP_1 = "model.layers.1.mlp.up_proj"


def moved(model, step: float):
    after = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * step)
    return after


def vectors(model, projections) -> list[np.ndarray]:
    found = []
    for projection in projections:
        weight = model.get_submodule(projection.name).weight.detach().double().numpy()
        found += list(weight if projection.neuron_dim == 0 else weight.T)
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("step", [1e-7, 1e-2, 10.0])
def test_against_one_neuron_at_a_time(tiny_model, tmp_path, architecture, step) -> None:
    before = tiny_model(architecture, num_hidden_layers=1)
    after = moved(before, step)
    after.save_pretrained(tmp_path)
    projections = find_projections(before)
    found = neuron_changes(open_weights(before), open_weights(tmp_path), projections)
    assert list(found) == ["norm_before", "norm_after", "change", "turn"]
    pairs = zip(vectors(before, projections), vectors(after, projections), strict=True)
    for row, (a, b) in enumerate(pairs):
        norm_a, norm_b, difference = (sum(v * v for v in x) ** 0.5 for x in (a, b, b - a))
        assert found["norm_before"][row] == pytest.approx(norm_a, rel=1e-12)
        assert found["norm_after"][row] == pytest.approx(norm_b, rel=1e-12)
        assert found["change"][row] == pytest.approx(difference / norm_a, rel=1e-12)
        turn = cosine_distance(a.tolist(), b.tolist())
        assert found["turn"][row] == pytest.approx(turn, rel=1e-9)
    assert row == len(found["turn"]) - 1 == 127


def test_rows_are_in_canonical_order(tiny_model) -> None:
    model = tiny_model()
    after = copy.deepcopy(model)
    with torch.no_grad():
        after.get_submodule(UP_1).weight[5] *= 2
    found = neuron_changes(
        open_weights(model), open_weights(after), reversed(find_projections(model))
    )
    # The first layer has 128 neurons, and in the second the up projection comes first.
    assert np.flatnonzero(found["change"]).tolist() == [128 + 5]
    assert found["change"][128 + 5] == pytest.approx(1)
    assert found["turn"][128 + 5] == pytest.approx(0, abs=1e-15)
    assert found["norm_after"][128 + 5] == pytest.approx(2 * found["norm_before"][128 + 5])


def test_only_trained_neurons_of_a_merged_adapter_change(tiny_model) -> None:
    base = tiny_model()
    neurons = NeuronSet(find_projections(base), {UP_1: [0, 5]})
    wrapped = get_peft_model(copy.deepcopy(base), NeftConfig(neurons=neurons))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.mul_(-1)
    merged = wrapped.merge_and_unload()
    found = neuron_changes(open_weights(base), open_weights(merged), find_projections(base))
    changed = [128, 133]
    assert np.flatnonzero(found["change"]).tolist() == changed
    np.testing.assert_allclose(found["turn"][changed], 2)
    np.testing.assert_allclose(found["change"][changed], 2)


def test_a_neuron_that_was_zero(tiny_model) -> None:
    before = tiny_model()
    with torch.no_grad():
        before.get_submodule(UP_1).weight[:3] = 0
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.get_submodule(UP_1).weight[0] = 1
        before.get_submodule(UP_1).weight[2] = 1
    found = neuron_changes(open_weights(before), open_weights(after), find_projections(before))
    appeared, still_zero, vanished = 128, 129, 130
    assert found["change"][[appeared, still_zero, vanished]].tolist() == [np.inf, 0, 1]
    assert found["turn"][[appeared, still_zero, vanished]].tolist() == [1, 0, 1]


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(tiny_model, side, value) -> None:
    models = {"before": tiny_model(), "after": tiny_model()}
    for name, model in models.items():
        model.config.name_or_path = name
    with torch.no_grad():
        models[side].get_submodule("model.layers.0.mlp.down_proj").weight[4, 9] = value
    message = (
        rf"\({side}\): {re.escape('model.layers.0.mlp.down_proj')}: a weight of neuron 9 is {value}"
    )
    with pytest.raises(CheckpointError, match=message):
        neuron_changes(
            open_weights(models["before"]),
            open_weights(models["after"]),
            find_projections(models["before"]),
        )


def test_another_model_or_quantized_weights(tiny_model) -> None:
    model, other = tiny_model(), tiny_model(intermediate_size=48)
    projections = find_projections(model)
    with pytest.raises(CheckpointError, match=r"has shape \[48, 32\]"):
        neuron_changes(open_weights(model), open_weights(other), projections)
    quantized = tiny_model()
    layer = quantized.get_submodule(UP_1)
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(CheckpointError, match=r"stored as int8; .* not quantized"):
        neuron_changes(open_weights(model), open_weights(quantized), projections)
