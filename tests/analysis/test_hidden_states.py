"""Mean hidden states against transformers' own, one text at a time."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.numpy import save_file

from neft.analysis.hidden_states import HiddenStateCollector, HiddenStates, mean_hidden_states
from neft.errors import DataError, RunError
from neft.neurons import NeuronSet
from neft.projections import find_projections
from neft.streaming import stream
from neft.tuner import NeftConfig
from reference.analysis import hidden_states

TEXTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [14, 15], [5, 6, 7]]
FINAL_NORMS = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
}


@pytest.fixture
def model(tiny_model):
    return tiny_model(seed=3, initializer_range=0.3, num_hidden_layers=3)


@pytest.mark.parametrize("architecture", FINAL_NORMS)
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_mean_over_tokens_then_texts(tiny_model, architecture, batch_size) -> None:
    model = tiny_model(architecture, seed=3, initializer_range=0.3, num_hidden_layers=3)
    found = mean_hidden_states(model, TEXTS, batch_size=batch_size)
    expected = hidden_states(model, TEXTS, FINAL_NORMS[architecture])
    assert found.means.dtype == np.float64
    assert (found.num_layers, found.hidden_size) == found.means.shape == (3, 32)
    assert (found.num_texts, found.num_tokens) == (5, 16)
    np.testing.assert_allclose(found.means, expected, rtol=1e-4, atol=1e-5)


def test_sums_are_float64(model) -> None:
    # Twice as many copies of a text have the same mean, to far more than the 7 digits of float32.
    one = mean_hidden_states(model, [TEXTS[2]], batch_size=1)
    many = mean_hidden_states(model, [TEXTS[2]] * 37, batch_size=1)
    np.testing.assert_allclose(many.means, one.means, rtol=1e-13)


def test_16_bit_states_are_summed_in_float64(model) -> None:
    model = model.to(torch.bfloat16)
    found = mean_hidden_states(model, TEXTS, batch_size=1)
    np.testing.assert_allclose(found.means, hidden_states(model, TEXTS, "model.norm"), rtol=1e-12)


def test_an_adapter_counts(model) -> None:
    neurons = NeuronSet(find_projections(model), {"model.layers.0.mlp.up_proj": [0, 5, 9]})
    plain = mean_hidden_states(model, TEXTS, batch_size=2)
    wrapped = get_peft_model(copy.deepcopy(model), NeftConfig(neurons=neurons))
    unchanged = mean_hidden_states(wrapped, TEXTS, batch_size=2)
    np.testing.assert_array_equal(unchanged.means, plain.means)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.mul_(3)
    trained = mean_hidden_states(wrapped, TEXTS, batch_size=2)
    merged = mean_hidden_states(wrapped.merge_and_unload(), TEXTS, batch_size=2)
    np.testing.assert_allclose(trained.means, merged.means, rtol=1e-5, atol=1e-6)
    assert not np.allclose(trained.means, plain.means, rtol=1e-2)


def test_beside_another_collector(model) -> None:
    one, other = HiddenStateCollector(), HiddenStateCollector()
    stream(model, TEXTS, [one, other], batch_size=2, title="Both")
    np.testing.assert_array_equal(one.result.means, other.result.means)
    assert one.result.num_texts == 5


def test_a_state_that_is_not_finite(model) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = torch.inf
    with pytest.raises(RunError, match=r"Layer 1: a hidden state of text \d is not finite"):
        mean_hidden_states(model, TEXTS, batch_size=2)


def test_the_text_with_such_a_state_is_named(model) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight[8] = torch.nan
    with pytest.raises(RunError, match=r"Layer 0: a hidden state of text 2 is not finite"):
        mean_hidden_states(model, TEXTS, batch_size=8)


def test_save_and_load(model, tmp_path) -> None:
    states = mean_hidden_states(model, TEXTS, batch_size=2)
    path = tmp_path / "new" / "states.safetensors"
    states.save(path)
    loaded = HiddenStates.load(path)
    np.testing.assert_array_equal(loaded.means, states.means)
    assert (loaded.num_texts, loaded.num_tokens) == (5, 16)


def test_saving_a_view(tmp_path) -> None:
    means = np.arange(24.0).reshape(4, 6)[::2, ::3]
    HiddenStates(means, 1, 1).save(tmp_path / "states.safetensors")
    np.testing.assert_array_equal(HiddenStates.load(tmp_path / "states.safetensors").means, means)


def test_loading_something_else(tmp_path) -> None:
    path = tmp_path / "states.safetensors"
    for write, fault in [
        (lambda: None, "cannot be read"),
        (lambda: path.write_bytes(b"torn"), "cannot be read"),
        (lambda: save_file({"means": np.zeros((1, 2))}, path), "not a hidden states file"),
        (
            lambda: save_file(
                {"means": np.zeros((1, 2))},
                path,
                {"neft-hidden-states": json.dumps({"version": 9})},
            ),
            "version 9",
        ),
    ]:
        write()
        with pytest.raises(DataError, match=f"{re.escape(str(path))}: .*{fault}"):
            HiddenStates.load(path)
