"""Every way of finding neurons, from recipe to results; what is killed on the way goes on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from neft.errors import CheckpointError
from neft.models import load_model, load_tokenizer
from neft.neurons import NeuronScores
from neft.pipeline import measure as measuring
from neft.pipeline.results import Results
from neft.pipeline.run import run
from neft.pipeline.selection import SCORES
from neft.pipeline.stages import stage_names
from neft.recipe import Recipe, load_recipe
from neft.scoring import (
    score_by_activation,
    score_by_gradient,
    score_by_norm,
    score_neurons,
)
from neft.sft.batches import batches_of, padded
from neft.sft.prompts import load_encoded

WARMED = ["full", "lora", "gradient", "activation"]


def loaded(recipe: Path, *settings: str) -> Recipe:
    return load_recipe(recipe, settings)


def quietly(recipe: Recipe) -> Results:
    return run(recipe, say=lambda line: None)


def scores_of(recipe: Recipe) -> NeuronScores:
    return NeuronScores.load(Path(recipe.output) / "score" / SCORES)


def equal(one: NeuronScores, other: NeuronScores) -> bool:
    assert one.distances.keys() == other.distances.keys()
    return all(np.array_equal(d, other.distances[name]) for name, d in one.distances.items())


def training_batches(recipe: Recipe) -> list[dict[str, torch.Tensor]]:
    """What the warm-up reads."""
    assert recipe.warmup is not None
    encoded = load_encoded(recipe.data, "train", load_tokenizer(recipe.model))
    order = batches_of(encoded, recipe.warmup, recipe.seed)
    return [padded(encoded, positions) for positions in order]


@pytest.fixture
def recipe(tiny_recipe, tmp_path: Path) -> Path:
    return tiny_recipe(tmp_path)


@pytest.mark.parametrize("method", [*WARMED, "norm"])
def test_whole_run(recipe: Path, method: str) -> None:
    options = loaded(recipe, f"warmup.method={method}")
    assert ("warmup" in stage_names(options)) == (method in WARMED)
    results = quietly(options)
    assert 8.5 < results.percent_trainable <= 9
    expected = "cosine" if method in ("full", "lora") else method
    assert scores_of(options).provenance["method"] == expected
    cost = json.loads((Path(options.output) / "score" / "cost.json").read_text())
    assert cost["peak_memory_bytes"] is None or cost["peak_memory_bytes"] > 0


def test_gradient_is_that_of_the_warmups_batches(recipe: Path) -> None:
    options = loaded(recipe, "warmup.method=gradient", "warmup.group_by_length=true")
    quietly(options)
    expected = score_by_gradient(load_model(options.model), training_batches(options))
    for name, distances in scores_of(options).distances.items():
        np.testing.assert_allclose(distances, expected.distances[name], rtol=1e-9)
    record = json.loads((Path(options.output) / "warmup" / "measured.json").read_text())
    assert record["num_batches"] == 4
    assert record["examples"]["used"] == 16


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_gradient_with_checkpointing_is_the_same(recipe: Path, model_type: str, tiny_model) -> None:
    # Two of them have dropout by default.
    tiny_model(model_type).save_pretrained(recipe.parent / "model")
    plain = loaded(recipe, "warmup.method=gradient")
    lean = loaded(
        recipe,
        "warmup.method=gradient",
        "warmup.gradient_checkpointing=true",
        f"output={plain.output}_lean",
    )
    quietly(plain)
    quietly(lean)
    assert equal(scores_of(plain), scores_of(lean))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_checkpointed_layers_are_computed_again(model_type: str, tiny_model) -> None:
    model = tiny_model(model_type)
    measuring._checkpoint_layers(model)
    read: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm) or name.endswith("norm"):
            module.register_forward_hook(lambda *_, name=name: read.append(name))
    loss = model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]]), use_cache=False).loss
    num_forward = len(read)
    loss.backward()
    # The last norm is of no layer.
    assert sorted(read[num_forward:]) == sorted(read[: num_forward - 1])


def test_activation_is_that_of_the_warmups_texts(recipe: Path) -> None:
    options = loaded(recipe, "warmup.method=activation", "score.modules=[down, o]")
    quietly(options)
    expected = score_by_activation(
        load_model(options.model), training_batches(options), ["down", "o"]
    )
    assert equal(scores_of(options), expected)


def test_norm_needs_no_length(recipe: Path) -> None:
    fields = loaded(recipe).model_dump(mode="json") | {"warmup": {"method": "norm"}}
    options = Recipe.model_validate(fields)
    quietly(options)
    assert equal(scores_of(options), score_by_norm(options.model.path))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_warmup_from_a_16_bit_base_rounds_nothing(
    recipe: Path, tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    AutoModelForCausalLM.from_pretrained(tmp_path / "model").bfloat16().save_pretrained(
        tmp_path / "model"
    )
    options = loaded(recipe, f"warmup.method={method}", "model.dtype=float32")
    quietly(options)
    provenance = scores_of(options).provenance
    assert provenance["dtypes"] == {"before": ["bfloat16"], "after": ["float32"]}
    assert "rounding" not in provenance
    assert "ounding" not in caplog.text


def test_lora_is_merged(recipe: Path) -> None:
    options = loaded(recipe, "warmup.method=lora", "warmup.rank=2")
    quietly(options)
    from peft import PeftModel

    adapter = Path(options.output) / "warmup" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 2
    merged = PeftModel.from_pretrained(load_model(options.model), adapter).merge_and_unload()
    assert equal(scores_of(options), score_neurons(options.model.path, merged))


def test_checkpoint_that_is_there(recipe: Path, tmp_path: Path) -> None:
    full = loaded(recipe)
    quietly(full)
    warm = Path(full.output) / "warmup" / "model"
    fields = full.model_dump(mode="json") | {
        "output": str(tmp_path / "other"),
        "warmup": {"method": "none", "checkpoint": str(warm)},
    }
    options = Recipe.model_validate(fields)
    assert stage_names(options)[2:4] == ["score", "select"]
    quietly(options)
    assert equal(scores_of(options), scores_of(full))


def test_checkpoint_of_the_same_model(recipe: Path) -> None:
    fields = loaded(recipe).model_dump(mode="json")
    fields["warmup"] = {"method": "none", "checkpoint": fields["model"]["path"]}
    with pytest.raises(CheckpointError, match=r"no neuron of .* differs"):
        quietly(Recipe.model_validate(fields))


@pytest.mark.parametrize("settings", [["in_backward=true"], ["optimizer=adafactor"]])
def test_lean_warmup(recipe: Path, settings: list[str]) -> None:
    options = loaded(recipe, *(f"warmup.{setting}" for setting in settings))
    assert quietly(options).num_trainable > 0
    assert scores_of(options).provenance["method"] == "cosine"


# ------------------------------------------------------------------------------- being killed


class Killed(BaseException):
    """Nothing of the package catches it."""


@pytest.mark.parametrize("method", ["gradient", "activation"])
@pytest.mark.parametrize("at", range(4))
def test_killed_measurement_goes_on(
    recipe: Path, method: str, at: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unbroken = loaded(recipe, f"warmup.method={method}")
    quietly(unbroken)
    broken = loaded(recipe, f"warmup.method={method}", f"output={tmp_path / 'broken'}")
    num_read = 0

    def die(*args: Any) -> Any:
        nonlocal num_read
        if num_read == at:
            raise Killed
        num_read += 1
        return padded(*args)

    with monkeypatch.context() as patched:
        patched.setattr("neft.sft.batches.padded", die)
        with pytest.raises(Killed):
            quietly(broken)
    num_read = -100
    with monkeypatch.context() as patched:
        patched.setattr("neft.sft.batches.padded", die)
        quietly(broken)
    # Sums are kept every second batch.
    assert num_read == -100 + 4 - at // 2 * 2
    assert equal(scores_of(unbroken), scores_of(broken))


def test_interrupted_measurement_keeps_the_batch_in_hand(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = loaded(recipe, "warmup.method=gradient", "warmup.evaluate_every=100")

    def interrupt(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return padded(*args)

    with monkeypatch.context() as patched:
        patched.setattr("neft.sft.batches.padded", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quietly(options)
    kept = Path(options.output) / ".warmup.partial" / measuring.MEASURED
    assert kept.is_file()
    _, progress = measuring._resumed(kept)
    assert progress.num_batches == 1
    quietly(options)
