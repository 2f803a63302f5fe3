"""Utilization against scipy's correlation of one pair of vectors at a time."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from neft.analysis.hidden_states import HiddenStates
from neft.analysis.table import Table
from neft.analysis.utilization import Utilization, neuron_utilization
from neft.checkpoints import open_weights
from neft.errors import CheckpointError, DataError, NeuronError
from neft.projections import find_projections
from reference.analysis import utilization

NUM_LAYERS, HIDDEN = 3, 32
UP_0 = "model.layers.0.mlp.up_proj"
UP_1 = "model.layers.1.mlp.up_proj"


@pytest.fixture
def hidden() -> HiddenStates:
    means = np.random.RandomState(0).standard_normal((NUM_LAYERS, HIDDEN)) + 0.7
    return HiddenStates(means, num_texts=4, num_tokens=20)


@pytest.fixture
def make(tiny_model):
    return lambda architecture="llama": tiny_model(architecture, num_hidden_layers=NUM_LAYERS)


def expected(model, projection, hidden) -> tuple[list[float], list[int]]:
    weight = model.get_submodule(projection.name).weight.detach().double().numpy()
    vectors = weight if projection.neuron_dim == 0 else weight.T
    found = [utilization(vector, hidden.means, projection.layer) for vector in vectors]
    return [value for value, _ in found], [peak for _, peak in found]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("from_folder", [True, False])
def test_strongest_correlation_with_own_layer_and_above(
    make, hidden, tmp_path, architecture, from_folder
) -> None:
    model = make(architecture)
    model.save_pretrained(tmp_path)
    weights = open_weights(tmp_path if from_folder else model)
    projections = find_projections(model)
    found = neuron_utilization(weights, hidden, reversed(projections))
    assert list(found.projections) == [projection.name for projection in projections]
    assert len(found) == NUM_LAYERS * 128
    for projection in projections:
        values, peaks = expected(model, projection, hidden)
        np.testing.assert_allclose(found.values[projection.name], values, rtol=1e-10)
        np.testing.assert_array_equal(found.peaks[projection.name], peaks)
        assert found.peaks[projection.name].dtype == np.int64
    assert found.provenance["weights"] == weights.label
    assert (found.provenance["num_texts"], found.provenance["num_tokens"]) == (4, 20)


def test_attention_that_reads_and_writes_the_residual_stream(make, hidden) -> None:
    model = make()
    projections = find_projections(model, ["q", "v", "o"])
    found = neuron_utilization(open_weights(model), hidden, projections)
    for projection in projections:
        values, _ = expected(model, projection, hidden)
        np.testing.assert_allclose(found.values[projection.name], values, rtol=1e-10)


def test_scale_sign_and_offset_do_not_count(make, hidden) -> None:
    model = make()
    with torch.no_grad():
        weight = model.get_submodule(UP_1).weight
        weight[0] = torch.tensor(hidden.means[2]) * -1e-3 + 4
        weight[1] = torch.tensor(hidden.means[0])  # below its own layer, so it does not count
    found = neuron_utilization(open_weights(model), hidden, find_projections(model))
    assert found.values[UP_1][0] == pytest.approx(1, abs=1e-6)
    assert found.values[UP_1].max() <= 1
    assert found.peaks[UP_1][0] == 2
    assert found.values[UP_1][1] < 0.9


@pytest.mark.parametrize("constant", [0.0, 0.1])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_neuron_without_variance_is_not_used(make, hidden, constant, architecture) -> None:
    model = make(architecture)
    for projection in find_projections(model):
        weight = model.get_submodule(projection.name).weight
        with torch.no_grad():
            weight.select(projection.neuron_dim, 5).fill_(constant)
    found = neuron_utilization(open_weights(model), hidden, find_projections(model))
    for name, projection in found.projections.items():
        assert found.values[name][5] == 0
        assert found.peaks[name][5] == projection.layer
        assert (found.values[name][[4, 6]] > 0).all()


def test_equal_values_are_no_variance_whatever_the_rounding_of_their_mean(tiny_model) -> None:
    model = tiny_model(num_hidden_layers=1, hidden_size=28).double()  # no power of two
    with torch.no_grad():
        weight = model.get_submodule(UP_0).weight
        weight.copy_(torch.rand(len(weight), 1, dtype=torch.float64).expand_as(weight))
    states = HiddenStates(np.random.RandomState(0).standard_normal((1, 28)), 1, 1)
    found = neuron_utilization(open_weights(model), states, find_projections(model, ["up"]))
    assert not found.values[UP_0].any()


def test_rounding_does_not_lift_it_above_one(make, hidden) -> None:
    model = make().double()
    with torch.no_grad():
        weight = model.get_submodule(UP_1).weight
        scales = torch.rand(len(weight), 1, dtype=torch.float64)
        weight.copy_(scales * torch.from_numpy(hidden.means[1]))
    found = neuron_utilization(open_weights(model), hidden, find_projections(model, ["up"]))
    np.testing.assert_allclose(found.values[UP_1], 1, rtol=1e-14)
    assert found.values[UP_1].max() <= 1


def test_a_hidden_state_without_variance_resembles_nothing(make, hidden) -> None:
    model = make()
    hidden.means[1:] = 0.1
    found = neuron_utilization(open_weights(model), hidden, find_projections(model))
    assert not found.values[UP_1].any()
    assert found.values[UP_0].all()


def test_blocks_of_neurons_change_nothing(make, hidden, monkeypatch) -> None:
    model = make()
    whole = neuron_utilization(open_weights(model), hidden, find_projections(model))
    monkeypatch.setattr("neft.analysis.utilization._BLOCK", 5 * HIDDEN)  # 64 neurons: 12 x 5 + 4
    parts = neuron_utilization(open_weights(model), hidden, find_projections(model))
    for name in whole.projections:
        np.testing.assert_allclose(parts.values[name], whole.values[name], rtol=1e-12)
        np.testing.assert_array_equal(parts.peaks[name], whole.peaks[name])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("role", ["up", "down"])
def test_weights_that_are_not_finite(make, hidden, value, role) -> None:
    model = make()
    name = f"model.layers.1.mlp.{role}_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[7, 9] = value
    neuron = 7 if role == "up" else 9
    message = rf"{re.escape(name)}: a weight of neuron {neuron} is {value}"
    with pytest.raises(CheckpointError, match=message):
        neuron_utilization(open_weights(model), hidden, find_projections(model))


def test_weights_too_large_to_be_squared(make, hidden) -> None:
    model = make().double()
    with torch.no_grad():
        model.get_submodule(UP_1).weight[3, 0] = 1e200
    with pytest.raises(CheckpointError, match=r"neuron 3 is 1e\+200"):
        neuron_utilization(open_weights(model), hidden, find_projections(model))


def test_hidden_states_of_another_model(make, hidden) -> None:
    model = make()
    fewer = HiddenStates(hidden.means[:2], 4, 20)
    with pytest.raises(NeuronError, match=r"has 3 layers, and the hidden states are of 2"):
        neuron_utilization(open_weights(model), fewer, find_projections(model))
    narrower = HiddenStates(hidden.means[:, :16], 4, 20)
    with pytest.raises(
        NeuronError, match=r"up_proj: its neurons have length 32, and hidden states 16"
    ):
        neuron_utilization(open_weights(model), narrower, find_projections(model))


def test_neurons_that_face_no_hidden_state(make, hidden) -> None:
    model = make()
    with pytest.raises(NeuronError, match=r"lm_head: lies outside the stack of layers"):
        neuron_utilization(open_weights(model), hidden, find_projections(model, ["lm_head"]))
    units = find_projections(model, ["down"], {"down": "row"})
    with pytest.raises(NeuronError, match=r"down_proj: its neurons have length 64"):
        neuron_utilization(open_weights(model), hidden, units)


def test_weights_of_another_shape(make, tiny_model, hidden) -> None:
    other = tiny_model(num_hidden_layers=NUM_LAYERS, intermediate_size=48)
    with pytest.raises(
        CheckpointError, match=r"up_proj.weight has shape \[48, 32\].*need \[64, 32\]"
    ):
        neuron_utilization(open_weights(other), hidden, find_projections(make()))


def test_save_and_load(make, hidden, tmp_path) -> None:
    model = make()
    found = neuron_utilization(open_weights(model), hidden, find_projections(model))
    path = tmp_path / "utilization.parquet"
    found.save(path)
    loaded = Utilization.load(path)
    assert loaded.projections == found.projections
    assert list(loaded.projections) == list(found.projections)
    assert loaded.provenance == found.provenance
    for name in found.projections:
        np.testing.assert_array_equal(loaded.values[name], found.values[name])
        np.testing.assert_array_equal(loaded.peaks[name], found.peaks[name])
    row = found.table().rows()[64 + 3]  # after the first projection's 64
    assert row == {
        "module": "model.layers.0.mlp.down_proj",
        "layer": 0,
        "role": "down",
        "index": 3,
        "utilization": found.values["model.layers.0.mlp.down_proj"][3],
        "peak": found.peaks["model.layers.0.mlp.down_proj"][3],
    }


def test_loading_another_table(tmp_path) -> None:
    path = tmp_path / "other.parquet"
    Table({"a": [1]}).save(path)
    with pytest.raises(
        DataError, match=r"other\.parquet: a table of neft, but not one of utilization"
    ):
        Utilization.load(path)
    Table({"a": [1]}, {"format": "neft-utilization", "version": 7}).save(path)
    with pytest.raises(DataError, match="version 7"):
        Utilization.load(path)
