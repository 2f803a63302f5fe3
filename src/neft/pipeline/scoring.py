"""Scores of all candidate neurons, whichever way a recipe has them found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neft.checkpoints import WeightSource, open_weights
from neft.files import write_json
from neft.memory import peak_memory, reset_peak_memory
from neft.neurons import NeuronScores
from neft.pipeline.adapter import load_adapter
from neft.pipeline.measure import read_measured
from neft.pipeline.selection import SCORES
from neft.recipe import ModelSection, Recipe

COST = "cost.json"
"""``peak_memory_bytes`` of scoring: on the accelerator, else of the process."""


def score(recipe: Recipe, warmup: Path | None, working: Path) -> None:
    """Score the base model's neurons (Algorithm 1, step 2), and write scores and cost.

    Args:
        recipe: says how.
        warmup: folder of the finished warm-up, if the recipe has one.
        working: gets the files.

    Raises:
        UsageError: weights or data that cannot be used.
        RunError: a model that breaks down, or too little memory.
    """
    reset_peak_memory()
    _scores(recipe, warmup).save(working / SCORES)
    write_json(working / COST, {"peak_memory_bytes": peak_memory()})


def _scores(recipe: Recipe, warmup: Path | None) -> NeuronScores:
    from neft.scoring import score_by_norm, score_neurons

    if recipe.score.method == "probe":
        from neft.pipeline.probing import probe_scores

        return probe_scores(recipe)
    options, modules = recipe.warmup, recipe.score.modules
    assert options is not None
    base = open_weights(recipe.model.path, recipe.model.revision)
    if options.method == "norm":
        return score_by_norm(base, modules)
    if options.checkpoint is not None:
        return score_neurons(base, open_weights(options.checkpoint), modules)
    assert warmup is not None
    match options.method:
        case "full":
            step = recipe.score.step
            folder = warmup / ("model" if step is None else f"snapshots/{step}")
            return score_neurons(base, open_weights(folder), modules, exact_start=True)
        case "lora":
            tuned = merged(recipe.model, warmup / "adapter")
            return score_neurons(base, tuned, modules, exact_start=True)
        case _:
            return read_measured(warmup).scores(base)


def merged(model: ModelSection, adapter: Path) -> WeightSource:
    """Base and adapter as one, in float32: in fewer bits, short steps would be lost to rounding.

    Raises:
        AdapterError: the adapter is incomplete, or does not fit the base.
    """
    from neft.models import load_model

    whole = model.model_copy(update={"dtype": "float32", "quantization": None})
    tuned: Any = load_adapter(load_model(whole), adapter)
    return open_weights(tuned.merge_and_unload())
