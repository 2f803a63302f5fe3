"""The stages of a run, as a recipe determines them.

    prepare    checks all that is cheap to check, before anything expensive
    baseline   the base model on the test split
    warmup     a short full fine-tune: it moves the neurons that the task needs (Algorithm 1, step 1)
    score      how far each neuron has moved (step 2)
    select     which neurons are trained (step 3)
    train      the base model again, of which only those neurons change (step 4)
    evaluate   the trained model on the test split, beside the base model

Methods that need no neurons go without warmup, score and select.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neft.models import load_model
from neft.neurons import NeuronScores, NeuronSet
from neft.pipeline.adapter import load_adapter, read_config
from neft.pipeline.evaluate import evaluate
from neft.pipeline.identity import data_identity, folder_identity, model_identity
from neft.pipeline.prepare import prepare
from neft.pipeline.results import collect_results
from neft.pipeline.stage import Stage
from neft.recipe import Recipe, TrainingSection
from neft.sft.methods import find_method

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

SCORES = "scores.safetensors"
NEURONS = "neurons.json"


def stage_names(recipe: Recipe) -> list[str]:
    """Names of the stages of ``recipe``, in order."""
    finding = ["warmup", "score", "select"] if _needs_neurons(recipe) else []
    return ["prepare", "baseline", *finding, "train", "evaluate"]


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages of ``recipe``, in order.

    Raises:
        DataError: a data file that is missing or cannot be read.
        CheckpointError: a file of the base model that cannot be read.
    """
    content = _Content(recipe)
    return [_MAKERS[name](recipe, content) for name in stage_names(recipe)]


def training_stage(name: str, recipe: Recipe, neurons: Path | None) -> Stage:
    """Training alone, with the neurons of a file."""
    chosen = None if neurons is None else NeuronSet.load(neurons)
    content = _Content(recipe)
    ingredients = content.learning | content.section("train", without=_NO_INGREDIENTS)
    if chosen is not None:
        ingredients["neurons"] = chosen.to_dict()["projections"]

    def run(working: Path) -> None:
        _train_on(recipe, recipe.train, recipe.train.method, chosen, working)

    return Stage(name, 1, ingredients, (), run, resumable=True)


def evaluation_stage(name: str, recipe: Recipe, adapter: Path | None) -> Stage:
    """Evaluation alone, of the recipe's model with or without an adapter."""
    content = _Content(recipe)
    ingredients = content.model | content.testing
    if adapter is not None:
        read_config(adapter)
        ingredients["adapter"] = folder_identity(adapter)

    def run(working: Path) -> None:
        model = load_model(recipe.model)
        evaluate(model if adapter is None else load_adapter(model, adapter), recipe, working)

    return Stage(name, 1, ingredients, (), run)


class _Content:
    """A recipe's fields and what the files in it hold, as ingredients of stages."""

    _SOURCES = ("train", "dev", "test")
    # What the examples of the test split do not depend on.
    _TRAINING_ONLY = ("max_length", "overlong", "train_limit", "dev_limit")

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe.model_dump(mode="json")
        self._sources = {
            f"data.{split}": data_identity(getattr(recipe.data, split), f"data.{split}")
            for split in self._SOURCES
        }
        self._model = model_identity(recipe.model)

    def section(self, name: str, without: Collection[str] = ()) -> dict[str, Any]:
        """Fields of a section by their place in the recipe."""
        fields: Mapping[str, Any] = self._recipe[name]
        return {f"{name}.{key}": value for key, value in fields.items() if key not in without}

    @property
    def model(self) -> dict[str, Any]:
        """The base model."""
        return {"model": self._model} | self.section("model", without=("path", "revision"))

    @property
    def learning(self) -> dict[str, Any]:
        """What training depends on, beside its own section."""
        fields = self.section("data", without=(*self._SOURCES, "test_limit"))
        sources = {place: self._sources[place] for place in ("data.train", "data.dev")}
        return self.model | fields | sources | {"seed": self._recipe["seed"]}

    @property
    def testing(self) -> dict[str, Any]:
        """What evaluation depends on, beside the model."""
        fields = self.section("data", without=(*self._SOURCES, *self._TRAINING_ONLY))
        return fields | {"data.test": self._sources["data.test"]} | self.section("evaluate")

    @property
    def everything(self) -> dict[str, Any]:
        """The whole recipe, and the content of all files."""
        return {"recipe": self._recipe, "model": self._model} | self._sources


# Fields of a training section on which its result does not depend.
_NO_INGREDIENTS = ("report_to",)


def _needs_neurons(recipe: Recipe) -> bool:
    return find_method(recipe.train.method).needs_neurons


def _folder(recipe: Recipe, stage: str) -> Path:
    return Path(recipe.output).expanduser() / stage


def _prepare(recipe: Recipe, content: _Content) -> Stage:
    def run(working: Path) -> None:
        prepare(recipe, working)

    return Stage("prepare", 1, content.everything, (), run, derived=True)


def _baseline(recipe: Recipe, content: _Content) -> Stage:
    def run(working: Path) -> None:
        evaluate(load_model(recipe.model), recipe, working)

    return Stage("baseline", 1, content.model | content.testing, (), run)


def _warmup(recipe: Recipe, content: _Content) -> Stage:
    assert recipe.warmup is not None
    options = recipe.warmup

    def run(working: Path) -> None:
        _train_on(recipe, options, options.method, None, working)

    ingredients = content.learning | content.section("warmup", without=_NO_INGREDIENTS)
    return Stage("warmup", 1, ingredients, (), run, resumable=True)


def _score(recipe: Recipe, content: _Content) -> Stage:
    def run(working: Path) -> None:
        from neft.checkpoints import open_weights
        from neft.scoring import METHODS

        before = open_weights(recipe.model.path, recipe.model.revision)
        after = open_weights(_folder(recipe, "warmup") / "model")
        scores = METHODS[recipe.score.method](before, after, recipe.score.modules)
        scores.save(working / SCORES)

    ingredients = content.model | content.section("score")
    return Stage("score", 1, ingredients, ("warmup",), run, derived=True)


def _select(recipe: Recipe, content: _Content) -> Stage:
    assert recipe.select is not None
    options = recipe.select

    def run(working: Path) -> None:
        scores = NeuronScores.load(_folder(recipe, "score") / SCORES)
        scores.select(**options.model_dump()).save(working / NEURONS)

    return Stage("select", 1, content.section("select"), ("score",), run, derived=True)


def _train(recipe: Recipe, content: _Content) -> Stage:
    def run(working: Path) -> None:
        chosen = _folder(recipe, "select") / NEURONS
        neurons = NeuronSet.load(chosen) if _needs_neurons(recipe) else None
        _train_on(recipe, recipe.train, recipe.train.method, neurons, working)

    ingredients = content.learning | content.section("train", without=_NO_INGREDIENTS)
    reads = ("select",) if _needs_neurons(recipe) else ()
    return Stage("train", 1, ingredients, reads, run, resumable=True)


def _evaluate(recipe: Recipe, content: _Content) -> Stage:
    def run(working: Path) -> None:
        train, baseline = _folder(recipe, "train"), _folder(recipe, "baseline")
        evaluate(_load_trained(recipe, train), recipe, working)
        collect_results(recipe.train.method, baseline, train, working)

    return Stage("evaluate", 1, content.testing, ("baseline", "train"), run)


_MAKERS: dict[str, Callable[[Recipe, _Content], Stage]] = {
    "prepare": _prepare,
    "baseline": _baseline,
    "warmup": _warmup,
    "score": _score,
    "select": _select,
    "train": _train,
    "evaluate": _evaluate,
}


def _train_on(
    recipe: Recipe, options: TrainingSection, method: str, neurons: NeuronSet | None, folder: Path
) -> None:
    from neft.sft.train import train

    train(
        recipe.model,
        recipe.data,
        options,
        method=method,
        neurons=neurons,
        seed=recipe.seed,
        folder=folder,
    )
    # The trainer held its model in reference cycles; the next stage needs that memory.
    gc.collect()


def _load_trained(recipe: Recipe, train: Path) -> PreTrainedModel | PeftModel:
    if find_method(recipe.train.method).makes_adapter:
        return load_adapter(load_model(recipe.model), train / "adapter")
    tuned = {"path": str(train / "model"), "revision": None}
    return load_model(recipe.model.model_copy(update=tuned))
