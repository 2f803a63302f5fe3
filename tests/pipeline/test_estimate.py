"""Estimates of a run against the run itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from transformers import MambaConfig

from neft.comparison.estimate import estimate_rows
from neft.comparison.outline import outline
from neft.comparison.schema import load_comparison
from neft.errors import ArchitectureError
from neft.memory import available_memory
from neft.pipeline.estimate import Estimator, estimate
from neft.pipeline.run import run
from neft.projections import as_module
from neft.recipe import Recipe, load_recipe
from neft.sft import callbacks

if TYPE_CHECKING:
    from conftest import TinyModel, TinyRecipe

PAPER = Path(__file__).parents[2] / "recipes" / "paper" / "table2.yaml"


@pytest.fixture
def recipe(tiny_recipe: TinyRecipe, tiny_model: TinyModel, tmp_path: Path) -> Recipe:
    """Of a model that outweighs the small files beside it: 1.6 million parameters."""
    length = {"train.steps": 6, "warmup.steps": 6}
    # A rate at which the loss falls: the step that is kept besides is not the best.
    calm = {"warmup.learning_rate": 1e-3, "warmup.snapshots": [2]}
    file = tiny_recipe(tmp_path, **length, **calm)
    wide = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2048, "head_dim": 64}
    tiny_model(**wide).save_pretrained(tmp_path / "model")
    return load_recipe(file)


def size_of(folder: Path) -> int:
    """Bytes on disk; a file with several names counts once."""
    files = {path.stat().st_ino: path.stat() for path in folder.rglob("*") if path.is_file()}
    return sum(found.st_size for found in files.values())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_disk_is_what_a_run_takes(
    method: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recipe.warmup is not None
    snapshots = recipe.warmup.snapshots if method == "full" else ()
    warmup = recipe.warmup.model_copy(update={"method": method, "snapshots": snapshots})
    recipe = recipe.model_copy(update={"warmup": warmup})
    most: dict[str, int] = {}
    discard = callbacks.discard_superseded

    def watched(checkpoints: Path, *args: Any) -> None:
        stage = checkpoints.parent.name.split(".")[1]
        most[stage] = max(most.get(stage, 0), size_of(checkpoints.parent))
        discard(checkpoints, *args)

    monkeypatch.setattr(callbacks, "discard_superseded", watched)
    run(recipe, say=lambda _line: None)
    stages = {stage.stage: stage for stage in estimate(recipe, calibrate=False)}
    assert set(most) == {"warmup", "train"}
    for name in ("warmup", "train"):
        kept = size_of(Path(recipe.output) / name)
        assert stages[name].kept_bytes == pytest.approx(kept, rel=0.1)
        # How many checkpoints meet depends on which was the best.
        assert most[name] <= 1.05 * stages[name].disk_bytes
        assert stages[name].disk_bytes < 1.7 * most[name]
    scores = (Path(recipe.output) / "score" / "scores.safetensors").stat().st_size
    assert stages["score"].kept_bytes == pytest.approx(scores, rel=0.3)


@pytest.mark.parametrize("method", ["gradient", "activation", "norm", "lora"])
def test_every_warmup_is_estimated(method: str, recipe: Recipe) -> None:
    assert recipe.warmup is not None
    options = recipe.warmup.model_copy(update={"method": method, "snapshots": ()})
    full = {stage.stage: stage for stage in estimate(recipe, calibrate=False)}
    found = estimate(recipe.model_copy(update={"warmup": options}), calibrate=False)
    stages = {stage.stage: stage for stage in found}
    assert ("warmup" in stages) == (method != "norm")
    if method != "norm":
        assert stages["warmup"].method == method
        assert stages["warmup"].peak_bytes < full["warmup"].peak_bytes


@pytest.mark.parametrize(
    ("changes", "num_batches", "width"),
    [
        ({"steps": 100, "gradient_accumulation": 2}, 200, 2),
        ({"steps": 127}, 127, 1),
        ({"steps": 128}, 128, 2),
        # 16 rows, 3 a batch: 6 batches an epoch.
        ({"steps": None, "epochs": 2.0, "batch_size": 3, "gradient_accumulation": 2}, 12, 1),
        ({"steps": 2**14, "gradient_accumulation": 2}, 2**15, 4),
    ],
)
def test_sums_of_signs_are_as_wide_as_their_batches_need(
    changes: dict[str, Any], num_batches: int, width: int, recipe: Recipe
) -> None:
    assert recipe.warmup is not None
    changes |= {"method": "gradient", "snapshots": ()}
    options = recipe.warmup.model_copy(update=changes)
    stage = Estimator(recipe.model_copy(update={"warmup": options})).stage("warmup")
    assert stage.num_steps == num_batches
    # Up and down in two layers.
    assert stage.kept_bytes == width * 4 * 256 * 512


@pytest.mark.parametrize(("steps", "num_batches"), [(100, 200), (None, None)])
def test_signs_of_batches_that_cannot_be_known(
    steps: int | None, num_batches: int | None, recipe: Recipe
) -> None:
    assert recipe.warmup is not None
    epochs = None if steps else 1.0
    changes = {"method": "gradient", "steps": steps, "epochs": epochs, "gradient_accumulation": 2}
    options = recipe.warmup.model_copy(update=changes | {"snapshots": ()})
    data = recipe.data.model_copy(update={"train": "elsewhere.jsonl"})
    changed = recipe.model_copy(update={"warmup": options, "data": data})
    stage = Estimator(changed).stage("warmup")
    assert stage.num_steps == num_batches
    assert stage.kept_bytes == 2 * 4 * 256 * 512


def test_calibration_takes_the_steps_of_training(recipe: Recipe) -> None:
    found = {stage.stage: stage for stage in estimate(recipe)}
    for name in ("warmup", "train"):
        assert found[name].seconds_per_step is not None
        assert found[name].seconds_per_step > 0
        if available_memory() is not None:
            assert found[name].measured_peak_bytes is not None
    assert found["score"].seconds_per_step is None
    assert not Path(recipe.output).exists()


def test_lengths_are_those_of_the_texts(recipe: Recipe) -> None:
    stage = Estimator(recipe).stage("train")
    assert stage.assumed is None
    assert stage.not_timed is not None
    assert "--calibrate" in stage.not_timed
    assert stage.longest_text is not None
    assert stage.longest_text < recipe.data.max_length
    data = recipe.data.model_copy(update={"train": "elsewhere.jsonl"})
    unknown = Estimator(recipe.model_copy(update={"data": data})).stage("train", calibrate=True)
    assert unknown.longest_text == recipe.data.max_length
    assert unknown.memory.loss > stage.memory.loss
    assert unknown.assumed == f"texts of {recipe.data.max_length} tokens, all of them targets"
    assert unknown.not_timed == "the data are not on this machine"


def test_neurons_lie_in_all_layers(recipe: Recipe) -> None:
    neurons = Estimator(recipe).neurons
    assert neurons is not None
    projections = neurons.projections.values()
    with_some = {projection.layer for projection in projections if len(neurons[projection.name])}
    assert with_some == {projection.layer for projection in projections}


def test_epochs_become_steps(recipe: Recipe) -> None:
    train = recipe.train.model_copy(update={"steps": None, "epochs": 2.0, "batch_size": 3})
    # 16 rows, 3 a step: 6 steps an epoch.
    assert Estimator(recipe.model_copy(update={"train": train})).stage("train").num_steps == 12


def test_calibration_of_fewer_batches_than_a_step_accumulates(recipe: Recipe) -> None:
    # 16 rows, 8 a batch: two batches for a step of five.
    changes = {"steps": None, "epochs": 1.0, "batch_size": 8, "gradient_accumulation": 5}
    train = recipe.train.model_copy(update=changes)
    sample = Estimator(recipe)._texts("train", train).sample()
    assert len(sample) == 5 * 5 * 8


def test_a_model_without_attention_is_weighed_but_not_estimated(recipe: Recipe) -> None:
    network = as_module(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))
    train = recipe.train.model_copy(update={"method": "full"})
    estimator = Estimator(recipe.model_copy(update={"train": train}), network)
    assert estimator.held_bytes == 16 * sum(p.numel() for p in network.parameters())
    with pytest.raises(ArchitectureError, match=r"MambaForCausalLM: .* names no attention heads"):
        estimator.stage("train")


def test_comparison_without_weights() -> None:
    comparison = load_comparison(PAPER)
    rows = estimate_rows(comparison)
    trained = [row for row in rows if row.estimate.stage == "train"]
    outlined = outline(comparison)
    assert [(row.task, row.row) for row in trained] == [(row.task, row.name) for row in outlined]
    for row, known in zip(trained, outlined, strict=True):
        assert row.estimate.num_trainable == known.num_trainable
        parts = row.estimate.memory
        assert known.num_bytes == parts.weights + parts.vectors + parts.gradients + parts.optimizer
        # What the outline leaves out comes on top; gradients need not meet activations.
        assert row.estimate.peak_bytes > 0.9 * known.num_bytes
        assert row.estimate.process_bytes == 0
        assert row.estimate.not_timed == "the weights are not on this machine"
    warmups = [row for row in rows if row.estimate.stage == "warmup"]
    assert [row.task for row in warmups] == list(comparison.tasks)
