"""Scores of a model whose weights are quantized, against those of the values that they stand for."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from neft.checkpoints import open_weights
from neft.errors import ArchitectureError
from neft.projections import find_projections
from neft.quantized import dequantized, keep_format, quantized_layers
from neft.scoring import score_by_activation, score_by_gradient, score_by_norm, score_neurons
from neft.scoring.gradient import GradientSigns

pytest.importorskip("bitsandbytes")

IDS = torch.randint(3, 100, (3, 2, 9), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in IDS]


def quantized(model: PreTrainedModel, folder: Path, bits: str) -> PreTrainedModel:
    model.save_pretrained(folder)
    config = BitsAndBytesConfig(
        load_in_4bit=bits == "4bit", load_in_8bit=bits == "8bit", bnb_4bit_quant_type="nf4"
    )
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    keep_format(loaded)
    return loaded


def plain(model: PreTrainedModel, like: PreTrainedModel) -> PreTrainedModel:
    """The same with the values of the quantized weights."""
    result = copy.deepcopy(like)
    for name, layer in quantized_layers(model):
        result.get_submodule(name).weight.data.copy_(dequantized(layer))
    return result


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_gradients_of_weights_that_have_none(tiny_model, tmp_path, bits, checkpointing):
    model = quantized(tiny_model(), tmp_path, bits)
    reference = plain(model, tiny_model())
    for each in (model.train(), reference.train()):
        if checkpointing:
            each.gradient_checkpointing_enable({"use_reentrant": False})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = ["up", "gate", "down", "q", "o"]

    def sums(of: PreTrainedModel) -> dict[str, Tensor]:
        signs = GradientSigns.nothing_yet(find_projections(of, modules), len(BATCHES))
        signs.add(of, BATCHES)
        assert signs.count == len(BATCHES)
        return signs.sums

    expected, found = sums(reference), sums(model)
    assert expected.keys() == found.keys()
    for name, signs in expected.items():
        # Of gradients next to zero, rounding decides the sign.
        assert (found[name] == signs).float().mean() > 0.999, name
        assert signs.any()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantized_model_as_a_source_of_weights(tiny_model, tmp_path, bits):
    model = quantized(tiny_model(), tmp_path, bits)
    found, expected = open_weights(model), open_weights(plain(model, tiny_model()))
    assert found.tensors == expected.tensors
    assert found.num_parameters == expected.num_parameters
    for name in expected.tensors:
        assert torch.equal(found.read(name), expected.read(name)), name
    for way in (score_by_norm, lambda w: score_neurons(tiny_model(), w)):
        scores, reference = way(found), way(expected)
        for name, distances in reference.distances.items():
            np.testing.assert_array_equal(scores.distances[name], distances)


def test_ways_without_training(tiny_model, tmp_path):
    model = quantized(tiny_model(), tmp_path, "4bit")
    reference = plain(model, tiny_model())
    for way in (score_by_gradient, score_by_activation):
        scores, expected = way(model, BATCHES), way(reference, BATCHES)
        for name, distances in expected.distances.items():
            np.testing.assert_allclose(scores.distances[name], distances, rtol=0.02, atol=1e-6)


def test_rounding_to_4_bits_turns_neurons_more_than_training(tiny_model, tmp_path):
    """So cosines of two quantized checkpoints tell nothing: a step of training turns by 1e-6 or so."""
    model = quantized(tiny_model(), tmp_path, "4bit")
    scores = score_neurons(tiny_model(), model)
    assert min(distances.min() for distances in scores.distances.values()) > 1e-3


def test_a_conv1d_has_no_gradient_by_neurons(tiny_model, tmp_path):
    model = quantized(tiny_model("gpt2"), tmp_path, "4bit")
    with pytest.raises(ArchitectureError, match=r"c_fc: was a Conv1D before it was quantized"):
        score_by_gradient(model, BATCHES)
