"""Mixtures of experts from the command line: a whole run, and what is made of its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from neft import NeuronSet
from neft.cli import app
from neft.report.neuron_table import neuron_table
from neft.report.run_data import read_run


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.stdout


def recipe_of(tiny_recipe, tiny_model, folder: Path, model_type: str, **changes) -> Path:
    recipe: Path = tiny_recipe(folder, **changes)
    for file in (*(folder / "model").glob("*.safetensors"), folder / "model" / "config.json"):
        file.unlink()
    tiny_model(model_type).save_pretrained(folder / "model")
    return recipe


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_a_whole_run(tiny_recipe, tiny_model, tmp_path, model_type) -> None:
    recipe = recipe_of(tiny_recipe, tiny_model, tmp_path, model_type)
    done("run", recipe)
    run = tmp_path / "run"
    neurons = NeuronSet.load(run / "select" / "neurons.json")
    total = sum(parameter.numel() for parameter in tiny_model(model_type).parameters())
    assert len(neurons) == int(0.09 * total / 32)
    assert any(neurons.projections[name].expert is not None for name in neurons.modules())

    shown = done("neurons", "show", run / "select" / "neurons.json")
    assert "expert" in shown
    for place in ("select/neurons.json", "train/adapter", "score/scores.safetensors"):
        assert "gate_up" in done("info", run / place, "--json")
        done("info", run / place)
    done("select", run / "score" / "scores.safetensors", "--count", 50, "-o", tmp_path / "n.json")
    assert len(NeuronSet.load(tmp_path / "n.json")) == 50
    done("report", run, "-o", tmp_path / "report.html")
    assert "Trained neurons: " in (tmp_path / "report.html").read_text()
    listed = neuron_table(read_run(run))
    assert listed is not None
    assert list(zip(*(listed.columns[key] for key in ("expert", "index")), strict=True)) == [
        (neurons.projections[name].expert, index)
        for name, each in neurons.items()
        for index in each
    ]

    # The plain checkpoint has the trained vectors, and all else as it was.
    done("merge", run / "train" / "adapter", "-o", tmp_path / "merged")
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "merged")
    )
    chosen = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in before.named_parameters()}
    vectors = load_file(run / "train" / "adapter" / "adapter_model.safetensors")
    for name, indices in neurons.items():
        projection = neurons.projections[name]
        inside = projection.weight_in(chosen[projection.parameter])
        inside.index_fill_(projection.neuron_dim, torch.from_numpy(indices), True)
        rows = projection.weight_in(dict(after.named_parameters())[projection.parameter])
        rows = rows if projection.neuron_dim == 0 else rows.T
        trained = vectors[f"base_model.model.{name}.neft_vectors.weight"]
        assert torch.equal(rows[indices], trained)
    moved = 0
    for name, parameter in before.named_parameters():
        same = parameter == dict(after.named_parameters())[name]
        assert same[~chosen[name]].all()
        moved += int((~same).sum())
    assert moved > 0


def test_extract_and_diff(tiny_model, tiny_tokenizer, tmp_path) -> None:
    base, finetuned = tmp_path / "base", tmp_path / "finetuned"
    before, after = tiny_model("mixtral", seed=0), tiny_model("mixtral", seed=1)
    before.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    after.save_pretrained(finetuned, save_original_format=False)
    found = json.loads(done("diff", base, finetuned, "--json"))
    assert found["left_out"] == {}
    weights = [row["weight"] for row in found["weights"]]
    # Each expert's two matrices, in both layers; the stacks as such are not compared again.
    assert sum(".experts." in name for name in weights) == 2 * 2 * 4
    assert len(weights) == 2 * 2 * 4 + len(list(before.named_parameters())) - 2 * 2
    assert sum(row["share"] for row in found["by_role"]) == pytest.approx(1)

    done("extract", base, finetuned, "--count", 60, "-o", tmp_path / "adapter")
    done("merge", tmp_path / "adapter", "-o", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = {name: p.detach().clone() for name, p in before.named_parameters()}
    held = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["neurons"]
    chosen = NeuronSet.from_dict(held)
    assert len(chosen) == 60
    for name, indices in chosen.items():
        projection = chosen.projections[name]
        ours = projection.weight_in(expected[projection.parameter])
        theirs = projection.weight_in(dict(after.named_parameters())[projection.parameter]).detach()
        places = torch.from_numpy(indices)
        ours.index_copy_(
            projection.neuron_dim, places, theirs.index_select(projection.neuron_dim, places)
        )
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, expected[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup.method": "activation"}, "Score them by cosine, gradient or norm"),
        ({"analysis": {}}, "cannot be watched"),
    ],
)
def test_what_cannot_be_watched_is_refused_first(
    tiny_recipe, tiny_model, tmp_path, changes, message
) -> None:
    recipe = recipe_of(tiny_recipe, tiny_model, tmp_path, "mixtral", **changes)
    result = call("run", recipe)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "run" / "baseline").exists()


def test_gradient_warmup(tiny_recipe, tiny_model, tmp_path) -> None:
    changes = {"warmup.method": "gradient", "train.steps": 2}
    recipe = recipe_of(tiny_recipe, tiny_model, tmp_path, "qwen3_moe", **changes)
    done("run", recipe)
    neurons = NeuronSet.load(tmp_path / "run" / "select" / "neurons.json")
    assert all(neurons.projections[name].expert is not None for name in neurons.modules())
