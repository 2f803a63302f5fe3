"""Everything that is cheap to check, before anything expensive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from neft.evaluation import bleu_tokenizer
from neft.files import write_json, write_text
from neft.models import load_tokenizer
from neft.neurons import NeuronScores
from neft.recipe import Recipe
from neft.sft.data import load_examples
from neft.sft.methods import find_method
from neft.sft.prompts import encode_all, prompt_ids

RECIPE = "recipe.yaml"
SUMMARY = "summary.json"


def prepare(recipe: Recipe, folder: Path) -> None:
    """Check model, data and budget of a recipe; keep a summary, and the recipe in full.

    Raises:
        UsageError: what would otherwise stop the run later.
    """
    from neft.sft.train import check_machine

    if recipe.data.task != "classification":
        bleu_tokenizer(recipe.data.target_language)
    for options in (recipe.warmup, recipe.train):
        if options is not None:
            check_machine(recipe.model, options)
    summary = _check_data(recipe) | _check_model(recipe)
    write_json(folder / SUMMARY, summary)
    write_text(folder / RECIPE, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def _check_model(recipe: Recipe) -> dict[str, Any]:
    """Read the headers of the weights, and try whether the budget of neurons can be spent."""
    from neft.checkpoints import open_weights
    from neft.projections import find_projections

    weights = open_weights(recipe.model.path, recipe.model.revision)
    summary = {"num_parameters": weights.num_parameters}
    if not find_method(recipe.train.method).needs_neurons:
        return {"model": summary}
    assert recipe.select is not None
    projections = find_projections(weights.network, recipe.score.modules)
    unmoved = {projection.name: np.zeros(projection.num_neurons) for projection in projections}
    scores = NeuronScores(projections, unmoved, weights.num_parameters)
    chosen = scores.select(**recipe.select.model_dump())
    return {
        "model": summary,
        "neurons": {
            "num_projections": len(projections),
            "num_candidates": len(scores),
            "num_to_train": len(chosen),
            "num_parameters_to_train": chosen.num_parameters,
        },
    }


def _check_data(recipe: Recipe) -> dict[str, Any]:
    """Read and encode every example."""
    tokenizer = load_tokenizer(recipe.model)
    counts: dict[str, Any] = {}
    for split in ("train", "dev"):
        examples = load_examples(recipe.data, split)
        encoded = encode_all(examples, tokenizer, recipe.data)
        counts[split] = {
            "num_examples": len(examples),
            "num_dropped": encoded.num_dropped,
            "num_truncated": encoded.num_truncated,
        }
    examples = load_examples(recipe.data, "test")
    for example in examples:
        prompt_ids(example, tokenizer, recipe.data)
    return {"data": counts | {"test": {"num_examples": len(examples)}}}
