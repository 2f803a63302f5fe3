"""Runs over a quantized base: from recipe to results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from neft.errors import AdapterError, RecipeError, UsageError
from neft.models import load_model
from neft.neurons import NeuronScores
from neft.pipeline.adapter import load_adapter, merge_adapter
from neft.pipeline.results import Results
from neft.pipeline.run import run
from neft.pipeline.selection import SCORES
from neft.quantized import quantized_layers
from neft.recipe import Recipe, load_recipe

pytest.importorskip("bitsandbytes")

BITS = ("4bit", "8bit")


def loaded(recipe: Path, *settings: str) -> Recipe:
    return load_recipe(recipe, settings)


def quietly(recipe: Recipe) -> Results:
    return run(recipe, say=lambda line: None)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("warmup", ["lora", "gradient", "activation", "norm"])
def test_a_whole_run(tiny_recipe, tmp_path, bits, warmup):
    recipe = loaded(tiny_recipe(tmp_path), f"model.quantization={bits}", f"warmup.method={warmup}")
    quietly(recipe)
    record = json.loads((tmp_path / "run/train/training.json").read_text())
    whole = load_model(loaded(tiny_recipe(tmp_path)).model)
    assert record["num_parameters"] == whole.num_parameters()
    losses = [entry["loss"] for entry in record["history"]["train"]]
    assert losses[-1] < losses[0]

    adapter = tmp_path / "run/train/adapter"
    tuned = load_adapter(load_model(recipe.model), adapter)
    dtypes = {p.dtype for name, p in tuned.named_parameters() if ".neft_" in name}
    assert dtypes == {torch.float32}
    assert len([*quantized_layers(tuned)]) == 14
    scores = NeuronScores.load(tmp_path / "run/score" / SCORES)
    assert len(scores) == 256

    # Into the model that was quantized, which holds the vectors as they are.
    merge_adapter(adapter, tmp_path / "merged")
    merged = load_model(recipe.model.model_copy(update={"path": str(tmp_path / "merged")}))
    assert any(True for _ in quantized_layers(merged))
    plain = load_model(
        recipe.model.model_copy(update={"path": str(tmp_path / "merged"), "quantization": None})
    )
    neurons = tuned.peft_config["default"].neurons
    for name, parameter in tuned.named_parameters():
        if ".neft_vectors." not in name:
            continue
        module = name.removeprefix("base_model.model.").partition(".neft_")[0]
        weight = plain.get_submodule(module).weight
        chosen = torch.from_numpy(neurons[module])
        dim = neurons.projections[module].neuron_dim
        found = weight.index_select(dim, chosen)
        assert torch.equal(found if dim == 0 else found.T, parameter)
