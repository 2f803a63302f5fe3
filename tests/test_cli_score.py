"""``neft score``, of weights that are there and by a recipe, against what it stands for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from neft.cli import app
from neft.errors import RunError
from neft.neurons import NeuronScores
from neft.pipeline import finding
from neft.pipeline.run import run
from neft.recipe import load_recipe
from neft.scoring import score_by_norm, score_neurons


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["score", *map(str, arguments)])


def scored(output: Path, *arguments: object) -> NeuronScores:
    result = call(*arguments, "-o", output)
    assert result.exit_code == 0, result.stderr
    return NeuronScores.load(output)


def refused(folder: Path, *arguments: object) -> str:
    before = sorted(folder.rglob("*"))
    result = call(*arguments, "-o", folder / "scores.safetensors")
    assert result.exit_code == 2, result.output
    assert sorted(folder.rglob("*")) == before
    return " ".join(result.stderr.replace("│", " ").split())


def equal(one: NeuronScores, other: NeuronScores) -> bool:
    assert one.distances.keys() == other.distances.keys()
    return all(np.array_equal(d, other.distances[name]) for name, d in one.distances.items())


@pytest.fixture
def recipe(tiny_recipe, tmp_path: Path) -> Path:
    return tiny_recipe(tmp_path)


@pytest.mark.parametrize("method", ["full", "lora", "gradient", "activation", "norm"])
def test_by_a_recipe(recipe: Path, tmp_path: Path, method: str) -> None:
    own = scored(tmp_path / "own.safetensors", "--recipe", recipe, "--method", method)
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".own*"))
    options = load_recipe(recipe, [f"warmup.method={method}"])
    run(options, say=lambda line: None)
    assert equal(own, NeuronScores.load(tmp_path / "run" / "score" / "scores.safetensors"))


def test_says_what_the_recipe_says(recipe: Path, tmp_path: Path) -> None:
    own = scored(tmp_path / "a.safetensors", "--recipe", recipe, "--set", "warmup.method=norm")
    assert equal(own, score_by_norm(tmp_path / "model"))


def test_modules_of_a_recipe(recipe: Path, tmp_path: Path) -> None:
    arguments = ("--recipe", recipe, "--method", "gradient", "--modules", "q", "--modules", "o")
    own = scored(tmp_path / "a.safetensors", *arguments)
    assert {projection.role for projection in own.projections.values()} == {"q", "o"}


def test_of_weights(recipe: Path, tmp_path: Path) -> None:
    options = load_recipe(recipe, ["warmup.method=lora"])
    run(options, say=lambda line: None)
    base, adapter = tmp_path / "model", tmp_path / "run" / "warmup" / "adapter"
    merged = NeuronScores.load(tmp_path / "run" / "score" / "scores.safetensors")
    assert equal(scored(tmp_path / "a.safetensors", base, adapter), merged)
    assert equal(scored(tmp_path / "b.safetensors", base, "--method", "norm"), score_by_norm(base))
    full = load_recipe(recipe, ["output=" + str(tmp_path / "full")])
    run(full, say=lambda line: None)
    tuned = tmp_path / "full" / "warmup" / "model"
    assert equal(scored(tmp_path / "c.safetensors", base, tuned), score_neurons(base, tuned))


def test_a_tied_head_is_refused_before_the_warmup(recipe, tiny_model, tmp_path: Path) -> None:
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    arguments = ("--recipe", recipe, "--method", "full", "--modules", "lm_head")
    assert "lm_head: its weight is tied to model.embed_tokens" in refused(tmp_path, *arguments)


def test_killed_goes_on(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = scored(tmp_path / "a.safetensors", "--recipe", recipe)
    options = load_recipe(recipe)

    def die(*_: object) -> None:
        raise RunError("killed")

    file = tmp_path / "b"
    with monkeypatch.context() as patched:
        patched.setattr("neft.pipeline.stages.score", die)
        with pytest.raises(RunError):
            finding.find(options, file, say=lambda line: None)
    said: list[str] = []
    finding.find(options, file, say=said.append)
    assert said[0].startswith("warmup: already done")
    assert equal(unbroken, NeuronScores.load(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--method cosine scores 2 checkpoints; 0 given."),
        (["model"], "--method cosine scores 2 checkpoints; 1 given."),
        (["model", "model", "--method", "norm"], "--method norm scores 1 checkpoint; 2 given."),
        (["model", "--method", "gradient"], "--method gradient reads data: name a recipe"),
        (["--recipe", "recipe.yaml", "--method", "cosine"], "say how the second comes about"),
        (
            ["--recipe", "recipe.yaml", "--method", "probe"],
            "needs labels, so data.task classification",
        ),
        (["model", "--recipe", "recipe.yaml"], "--recipe names the model"),
        (["nowhere", "model"], "nowhere: no such folder"),
    ],
)
def test_refuses(
    arguments: list[str], message: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    assert message in refused(recipe.parent, *arguments)


def test_recipe_without_a_way(recipe: Path) -> None:
    fields = yaml.safe_load(recipe.read_text())
    del fields["warmup"]
    fields["select"]["which"] = "random"
    recipe.write_text(yaml.safe_dump(fields))
    assert "has no section warmup" in refused(recipe.parent, "--recipe", recipe)
