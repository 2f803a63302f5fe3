"""Everything that is cheap to check, before anything expensive."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from neft.errors import DataError, UsageError
from neft.evaluation import check_metrics
from neft.files import write_json, write_text
from neft.models import check_quantization, load_tokenizer
from neft.pipeline.identity import model_identity
from neft.pipeline.probing import check_probe
from neft.pipeline.selection import choose, unscored, with_rank
from neft.projections import check_can_be_watched, find_projections
from neft.recipe import DataSection, ModelSection, Recipe, load_recipe
from neft.sft.data import Split, load_examples, load_texts
from neft.sft.methods import find_method
from neft.sft.prompts import encode, encode_all, prompt_ids
from neft.streaming import context_length

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

RECIPE = "recipe.yaml"
SUMMARY = "summary.json"


def prepare(recipe: Recipe, folder: Path) -> None:
    """Check model, data and budget of a recipe; keep a summary, and the recipe in full.

    Raises:
        UsageError: what would otherwise stop the run later.
    """
    summary = {"data": check_data(recipe)} | check_method(recipe)
    write_json(folder / SUMMARY, summary)
    write_text(folder / RECIPE, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def recipe_of(run: Path) -> Recipe:
    """The recipe of the run in a folder, with that folder as its output.

    Raises:
        UsageError: no run has got beyond its first stage there.
    """
    if not (file := run / "prepare" / RECIPE).is_file():
        raise UsageError(f"{run}: no folder of a run; it has no prepare/{RECIPE}.")
    return load_recipe(file).model_copy(update={"output": str(run)})


def finds_neurons(recipe: Recipe) -> bool:
    """Whether neurons are chosen by scores."""
    select = recipe.select
    return (
        find_method(recipe.train.method).needs_neurons
        and select is not None
        and select.needs_scores
    )


def check_method(recipe: Recipe) -> dict[str, Any]:
    """Read the headers of the weights, and try whether the method applies to this model.

    Returns:
        Counts: of the model's parameters, of trained parameters, and of neurons for methods with them.

    Raises:
        UsageError: a machine, a model or a budget with which the method cannot be carried out.
    """
    from neft.checkpoints import open_weights
    from neft.sft.footprint import Trained, trained_tensors
    from neft.sft.train import check_machine

    check_quantization(recipe.model)
    if recipe.warmup is not None and recipe.warmup.trains:
        check_machine(recipe.model, recipe.warmup, recipe.distributed, recipe.warmup.method)
    check_machine(recipe.model, recipe.train, recipe.distributed, recipe.train.method)
    weights = open_weights(recipe.model.path, recipe.model.revision)
    network = weights.network
    _check_watching(recipe, network)
    summary: dict[str, Any] = {"model": {"num_parameters": weights.num_parameters}}
    neurons = None
    if find_method(recipe.train.method).needs_neurons:
        assert recipe.select is not None
        candidates = unscored(network, recipe)
        neurons = choose(candidates, recipe.select, model_identity(recipe.model))
        # Chosen by their scores, neurons may overlap otherwise with the sets that are joined to them.
        summary["neurons"] = {
            "num_projections": len(candidates.projections),
            "num_candidates": len(candidates),
            "num_to_train": len(neurons),
        }
    train = recipe.train
    lora = train.lora and with_rank(train.lora, network, recipe)
    tensors = trained_tensors(network, train.method, neurons, lora)
    trained = Trained(train.method, recipe.model.dtype, train, tensors, neurons, lora)
    return summary | {"num_to_train": trained.num_trainable}


def _check_watching(recipe: Recipe, network: nn.Module) -> None:
    """Check that the modules whose activations the recipe needs can be watched."""
    from neft.analysis.units import WITHOUT_UNITS
    from neft.scoring.activation import ActivationSums

    if finds_neurons(recipe) and recipe.warmup is not None and recipe.warmup.method == "activation":
        ActivationSums.nothing_yet(find_projections(network, recipe.score.modules))
    if recipe.analysis is not None:
        check_can_be_watched(find_projections(network, ["down"]), WITHOUT_UNITS)


def check_data(recipe: Recipe) -> dict[str, Any]:
    """Read and encode every example.

    Returns:
        Counts of each split.

    Raises:
        UsageError: a file, row or field that cannot be used, a text that is too long for the model, or a
            language that no metric can score.
    """
    tokenizer = load_tokenizer(recipe.model)
    context = _Context.of(recipe.model)
    splits: tuple[Split, ...] = ("train", "dev")
    counts = {str(split): _count(recipe.data, split, tokenizer, context) for split in splits}
    if recipe.warmup is not None:
        elsewhere = recipe.warmup.data_of(recipe.data)
        for split in splits:
            fields = (split, f"{split}_limit")
            if any(getattr(elsewhere, name) != getattr(recipe.data, name) for name in fields):
                counts[f"warmup.{split}"] = _count(elsewhere, split, tokenizer, context)
    counts["test"] = _count_test(recipe, tokenizer, context)
    if finds_neurons(recipe) and not recipe.score.needs_warmup:
        texts, _ = check_probe(recipe)
        counts["probe"] = {"num_texts": len(texts)}
    general = recipe.evaluate.general
    if general is not None:
        counts["general"] = {"num_texts": len(load_texts(general))}
        if general.max_length > context.length:
            raise context.exceeded(
                f"evaluate.general.max_length: {general.max_length} tokens",
                f"Lower it to {context.length}.",
            )
    return counts


def _count(
    data: DataSection, split: Split, tokenizer: PreTrainedTokenizerBase, context: _Context
) -> dict[str, int]:
    """Examples of a split that is learnt from."""
    examples = load_examples(data, split)
    encoded = encode_all(examples, tokenizer, data)
    longest = max(encoded.input_ids, key=len)
    if len(longest) > context.length:
        place = next(
            example.place
            for example in examples
            if encode(example, tokenizer, data)[0][: data.max_length] == longest
        )
        raise context.exceeded(
            f"{place}: {len(longest)} tokens", f"Lower data.max_length to {context.length}."
        )
    return {
        "num_examples": len(examples),
        "num_dropped": encoded.num_dropped,
        "num_truncated": encoded.num_truncated,
    }


def _count_test(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: _Context
) -> dict[str, int]:
    examples = load_examples(recipe.data, "test")
    prompts = [len(prompt_ids(example, tokenizer, recipe.data)) for example in examples]
    longest, num_new = max(prompts), recipe.evaluate.max_new_tokens
    if longest + num_new > context.length:
        raise context.exceeded(
            f"{examples[prompts.index(longest)].place}: {longest} tokens, and evaluate.max_new_tokens = "
            f"{num_new} more",
            "Lower evaluate.max_new_tokens, or leave the example out.",
        )
    references = [example.target for example in examples]
    check_metrics(recipe.data.task, recipe.data.target_language, references)
    return {"num_examples": len(examples)}


@dataclass(frozen=True)
class _Context:
    """How much a model can read at once."""

    model: str
    length: float
    """In tokens; infinite where the model does not say."""

    @classmethod
    def of(cls, model: ModelSection) -> _Context:
        from neft.checkpoints import open_weights

        network = open_weights(model.path, model.revision).network
        return cls(model.path, context_length(network) or math.inf)

    def exceeded(self, what: str, remedy: str) -> DataError:
        """The error that something is longer."""
        return DataError(f"{what}; the context of {self.model} has {self.length}. {remedy}")
