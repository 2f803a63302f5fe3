"""Runs over a quantized base: from recipe to results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from neft.errors import CheckpointError, RecipeError, UsageError
from neft.models import load_model
from neft.neurons import NeuronScores
from neft.pipeline.adapter import load_adapter, merge_adapter
from neft.pipeline.results import Results
from neft.pipeline.run import run
from neft.pipeline.selection import SCORES
from neft.quantized import quantized_layers
from neft.recipe import Recipe, load_recipe

bnb = pytest.importorskip("bitsandbytes")

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


@pytest.mark.parametrize("bits", BITS)
def test_lora_over_a_quantized_base_is_trained_in_float32(tiny_recipe, tmp_path, bits):
    """QLoRA, but for the masters: TRL would round them to bfloat16."""
    path = tiny_recipe(tmp_path, **{"train.lora": {"match": "neft"}})
    recipe = loaded(path, f"model.quantization={bits}", "train.method=lora", "warmup.method=norm")
    quietly(recipe)
    tuned = load_adapter(load_model(recipe.model), tmp_path / "run/train/adapter")
    found = [p for name, p in tuned.named_parameters() if ".lora_" in name]
    assert {p.dtype for p in found} == {torch.float32}
    assert any(not torch.equal(p, p.bfloat16().float()) for p in found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.method=full"], "train.method 'full' trains the model's own weights"),
        (["train.method=embed"], "train.method 'embed' trains the model's own weights"),
        (["train.method=mask"], "train.method 'mask' trains the model's own weights"),
        ([], "warmup.method 'full' trains all weights, .* choose lora, gradient"),
        (
            ["warmup.method=norm", "analysis={}"],
            "the section analysis compares weights, which model.quantization '4bit' rounds",
        ),
        (["model.quantization=3bit"], r"model.quantization: .*'4bit' or '8bit'.* \(found '3bit'\)"),
    ],
)
def test_what_a_quantized_base_is_not_for(tiny_recipe, tmp_path, settings, message):
    path = tiny_recipe(tmp_path)
    with pytest.raises(RecipeError, match=message):
        loaded(path, "model.quantization=4bit", *settings)


def test_without_bitsandbytes(tiny_recipe, tmp_path, monkeypatch):
    recipe = loaded(tiny_recipe(tmp_path), "model.quantization=4bit", "warmup.method=norm")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest),
    )
    with pytest.raises(UsageError, match=r"'4bit', .* pip install 'neft\[quantized\]'"):
        quietly(recipe)


def test_on_a_machine_without_kernels(tiny_recipe, tmp_path, monkeypatch):
    recipe = loaded(tiny_recipe(tmp_path), "model.quantization=8bit", "warmup.method=norm")
    monkeypatch.setattr(bnb, "supported_torch_devices", {"hpu"})
    kind = torch.accelerator.current_accelerator() or torch.device("cpu")
    with pytest.raises(UsageError, match=rf"'8bit', .* no kernels on {kind.type}\. .* hpu"):
        quietly(recipe)


@pytest.mark.parametrize("bits", BITS)
def test_merging_into_a_quantized_checkpoint_is_refused(tiny_recipe, tmp_path, bits):
    recipe = loaded(tiny_recipe(tmp_path), f"model.quantization={bits}", "warmup.method=norm")
    quietly(recipe)
    load_model(recipe.model).save_pretrained(tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"packed: its weights are stored quantized"):
        merge_adapter(
            tmp_path / "run/train/adapter", tmp_path / "merged", base=str(tmp_path / "packed")
        )
    assert not (tmp_path / "merged").exists()
