"""The stages of a run, as a recipe determines them.

    prepare    checks all that is cheap to check, before anything expensive
    baseline   the base model on the test split
    warmup     a short full fine-tune: it moves the neurons that the task needs (Algorithm 1, step 1);
               or what foretells that for less
    score      how far each neuron has moved (step 2), or would
    select     which neurons are trained (step 3)
    train      the base model again, of which only those neurons change (step 4)
    evaluate   the trained model on the test split, beside the base model
    analysis   what training did to the neurons, if the recipe asks for it

Methods that need no neurons go without warmup, score and select; neurons that are drawn at random or
come from a file, without warmup and score; scores of weights that are there already, without warmup.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from neft.checkpoints import open_weights
from neft.errors import UsageError
from neft.models import load_model
from neft.neurons import NeuronScores, NeuronSet
from neft.pipeline.adapter import load_adapter, load_trained, read_config
from neft.pipeline.evaluate import evaluate
from neft.pipeline.identity import (
    checkpoint_identity,
    data_identity,
    folder_identity,
    model_identity,
)
from neft.pipeline.measure import MEASURED, measure
from neft.pipeline.neuron_sets import load_neurons
from neft.pipeline.prepare import prepare
from neft.pipeline.results import TRAINING, collect_results
from neft.pipeline.scoring import score
from neft.pipeline.selection import NEURONS, SCORES, choose, resolved_lora, unscored
from neft.pipeline.stage import Stage
from neft.pipeline.together import Task, carry_out
from neft.recipe import DataSection, Recipe
from neft.sft.methods import find_method
from neft.sft.resume import CHECKPOINTS, MARKER

_Folders: TypeAlias = Mapping[str, Path]

# From what a training goes on.
_OF_TRAINING = (f"{CHECKPOINTS}/*/{MARKER}", TRAINING)


def stage_names(recipe: Recipe) -> list[str]:
    """Names of the stages of ``recipe``, in order."""
    names = ["prepare", "baseline"]
    if needs_neurons(recipe):
        assert recipe.select is not None
        names += finding_names(recipe) if recipe.select.needs_scores else []
        names.append("select")
    names += ["train", "evaluate"]
    return names if recipe.analysis is None else [*names, "analysis"]


def finding_names(recipe: Recipe) -> list[str]:
    """Names of the stages that find neurons for ``recipe``, in order."""
    warms_up = recipe.warmup is not None and recipe.warmup.has_length
    return ["warmup", "score"] if warms_up and recipe.score.method == "cosine" else ["score"]


def finding_stages(recipe: Recipe) -> list[Stage]:
    """The stages that find neurons for ``recipe``, in order; errors as in ``stages_of``."""
    content = _Content(recipe)
    return [_made(name, recipe, content) for name in finding_names(recipe)]


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages of ``recipe``, in order.

    Raises:
        DataError: a data file that is missing or cannot be read.
        CheckpointError: a file of the base model that cannot be read.
        NeuronError: a file of a neuron set that is missing or cannot be read.
    """
    content = _Content(recipe)
    return [_made(name, recipe, content) for name in stage_names(recipe)]


def training_stage(recipe: Recipe, neurons: Path | None) -> Stage:
    """Training alone, with the neurons of a file or an adapter.

    Raises:
        UsageError: the method needs neurons and none are given, or the other way round.
    """
    method = f"train.method {recipe.train.method!r}"
    if neurons is None and needs_neurons(recipe):
        raise UsageError(
            f"{method} trains chosen neurons: name them with --neurons, a file that neft select wrote or "
            "an adapter."
        )
    if neurons is not None and not needs_neurons(recipe):
        raise UsageError(f"{method} trains no chosen neurons: leave out --neurons {neurons}.")
    content = _Content(recipe)
    ingredients = content.training
    if neurons is not None:
        ingredients["neurons"] = load_neurons(neurons).to_dict()["projections"]

    def run(working: Path, _inputs: _Folders) -> None:
        carry_out(Task("train", recipe, working, neurons))

    # Whatever the folder is called: it may be renamed.
    stage = Stage("train", 1, ingredients, (), run, _OF_TRAINING)
    return replace(stage, on_shortage=partial(_explain, recipe, "train"))


def evaluation_stage(recipe: Recipe, adapter: Path | None) -> Stage:
    """Evaluation alone, of the recipe's model with or without an adapter."""
    content = _Content(recipe)
    ingredients = content.model | content.testing
    if adapter is not None:
        read_config(adapter)
        ingredients["adapter"] = folder_identity(adapter)

    def run(working: Path, _inputs: _Folders) -> None:
        model = load_model(recipe.model)
        evaluate(model if adapter is None else load_adapter(model, adapter), recipe, working)

    stage = Stage("evaluate", 1, ingredients, (), run)
    return replace(stage, on_shortage=partial(_explain, recipe, "evaluate"))


def analysis_stage(recipe: Recipe) -> Stage:
    """The stage ``analysis`` of a recipe that has that section."""
    return _analysis(recipe, _Content(recipe))


def needs_neurons(recipe: Recipe) -> bool:
    """Whether the recipe's method trains chosen neurons."""
    return find_method(recipe.train.method).needs_neurons


class _Content:
    """A recipe's fields and what the files in it hold, as ingredients of stages."""

    _SOURCES = ("train", "dev", "test")
    # What the examples of the test split do not depend on.
    _TRAINING_ONLY = ("max_length", "overlong", "train_limit", "dev_limit")
    # Fields of a training section on which its result does not depend.
    _NO_INGREDIENTS = ("report_to",)

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._fields = recipe.model_dump(mode="json")
        self._model = model_identity(recipe.model)

    def section(self, name: str, without: Collection[str] = ()) -> dict[str, Any]:
        """Fields of a section by their place in the recipe."""
        fields: Mapping[str, Any] = self._fields[name]
        return {f"{name}.{key}": value for key, value in fields.items() if key not in without}

    @property
    def model(self) -> dict[str, Any]:
        """The base model."""
        elsewhere = ("path", "revision", "config")
        # Without quantization, a run is the same as before there was any.
        absent = () if self._recipe.model.quantization else ("quantization",)
        return {"model": self._model} | self.section("model", without=(*elsewhere, *absent))

    @property
    def warmup(self) -> dict[str, Any]:
        """What the warm-up depends on."""
        options = self._recipe.warmup
        assert options is not None
        elsewhere = ("train", "dev", "train_limit", "seed", "checkpoint")
        fields = self.section("warmup", without=(*self._NO_INGREDIENTS, *elsewhere))
        if not options.trains:
            fields["score.modules"] = self._fields["score"]["modules"]
        data = options.data_of(self._recipe.data)
        return self._learning(data, options.seed_of(self._recipe.seed)) | fields

    @property
    def scoring(self) -> dict[str, Any]:
        """What the scores depend on, beside the warm-up."""
        fields = self.model | self.section("score")
        warmup = self._recipe.warmup
        if not self._recipe.score.needs_warmup:
            data = self.section("data", without=(*self._SOURCES, "dev_limit", "test_limit"))
            return (
                fields | data | {"data.train": data_identity(self._recipe.data.train, "data.train")}
            )
        assert warmup is not None
        if warmup.checkpoint is not None:
            fields["warmup.checkpoint"] = checkpoint_identity(warmup.checkpoint)
        return fields | {"warmup.method": warmup.method}

    @property
    def training(self) -> dict[str, Any]:
        """What training depends on, beside the neurons."""
        fields = self.section("train", without=self._NO_INGREDIENTS)
        lora = resolved_lora(self._recipe)
        if lora is not None:
            fields["train.lora"] = lora.model_dump()
        return self._learning(self._recipe.data, self._recipe.seed) | fields

    def _learning(self, data: DataSection, seed: int) -> dict[str, Any]:
        fields = self.section("data", without=(*self._SOURCES, "test_limit"))
        sources = {
            "data.train": data_identity(data.train, "data.train"),
            "data.dev": data_identity(data.dev, "data.dev"),
        }
        return self.model | fields | sources | {"data.train_limit": data.train_limit, "seed": seed}

    @property
    def selection(self) -> dict[str, Any]:
        """What the choice of neurons depends on, beside their scores."""
        options = self._recipe.select
        assert options is not None
        sets = {
            "select.union": _neuron_sets(options.union),
            "select.intersection": _neuron_sets(options.intersection),
            "select.neurons": options.neurons and _neuron_sets([options.neurons]),
        }
        fields = self.section("select") | sets
        if options.needs_scores:
            return fields
        return self.model | {"score.modules": self._fields["score"]["modules"]} | fields

    @property
    def testing(self) -> dict[str, Any]:
        """What evaluation depends on, beside the model."""
        data, general = self._recipe.data, self._recipe.evaluate.general
        fields = self.section("data", without=(*self._SOURCES, *self._TRAINING_ONLY))
        fields |= self.section("evaluate")
        fields["data.test"] = data_identity(data.test, "data.test")
        if general is not None:
            text = data_identity(general.text, "evaluate.general.text")
            fields["evaluate.general"] = fields["evaluate.general"] | {"text": text}
        return fields

    @property
    def analysis(self) -> dict[str, Any]:
        """What the analysis depends on, beside the stages it reads."""
        options = self._recipe.analysis
        assert options is not None
        fields = self.section("data", without=(*self._SOURCES, "train_limit"))
        fields |= self.model | self.testing | self.section("analysis")
        fields["data.dev"] = data_identity(self._recipe.data.dev, "data.dev")
        fields["analysis.overlap_with"] = {
            name: data_identity(file, f"analysis.overlap_with.{name}")
            for name, file in options.overlap_with.items()
        }
        return fields

    @property
    def everything(self) -> dict[str, Any]:
        """The whole recipe, and the content of all files."""
        files = self.training | self.testing
        if self._recipe.warmup is not None:
            files["warmup"] = self.warmup
        if needs_neurons(self._recipe):
            files["selection"] = self.selection
        if self._recipe.analysis is not None:
            files["analysis"] = self.analysis
        return {"recipe": self._fields, "files": files}


def _neuron_sets(files: Sequence[str]) -> list[Any]:
    return [NeuronSet.load(Path(file).expanduser()).to_dict()["projections"] for file in files]


def _prepare(recipe: Recipe, content: _Content) -> Stage:
    def run(working: Path, _inputs: _Folders) -> None:
        prepare(recipe, working)

    return Stage("prepare", 1, content.everything, (), run, derived=True)


def _baseline(recipe: Recipe, content: _Content) -> Stage:
    def run(working: Path, _inputs: _Folders) -> None:
        evaluate(load_model(recipe.model), recipe, working)

    return Stage("baseline", 1, content.model | content.testing, (), run)


def _warmup(recipe: Recipe, content: _Content) -> Stage:
    options = recipe.warmup
    assert options is not None

    def run(working: Path, _inputs: _Folders) -> None:
        if options.trains:
            carry_out(Task("warmup", recipe, working))
        else:
            measure(recipe, options, working)

    progress = _OF_TRAINING if options.trains else (MEASURED,)
    return Stage("warmup", 1, content.warmup, (), run, progress)


def _score(recipe: Recipe, content: _Content) -> Stage:
    reads = tuple(finding_names(recipe)[:-1])

    def run(working: Path, inputs: _Folders) -> None:
        score(recipe, inputs.get("warmup"), working)

    # Without a warm-up, it is the score that reads data.
    return Stage("score", 1, content.scoring, reads, run, derived=True)


def _select(recipe: Recipe, content: _Content) -> Stage:
    options = recipe.select
    assert options is not None

    def run(working: Path, inputs: _Folders) -> None:
        if options.needs_scores:
            scores = NeuronScores.load(inputs["score"] / SCORES)
        else:
            network = open_weights(recipe.model.path, recipe.model.revision).network
            scores = unscored(network, recipe)
        chosen = choose(scores, options, model_identity(recipe.model))
        chosen.save(working / NEURONS)

    reads = ("score",) if options.needs_scores else ()
    return Stage("select", 1, content.selection, reads, run, derived=True)


def _train(recipe: Recipe, content: _Content) -> Stage:
    with_neurons = needs_neurons(recipe)

    def run(working: Path, inputs: _Folders) -> None:
        neurons = inputs["select"] / NEURONS if with_neurons else None
        carry_out(Task("train", recipe, working, neurons))

    reads = ("select",) if with_neurons else ()
    return Stage("train", 1, content.training, reads, run, _OF_TRAINING)


def _evaluate(recipe: Recipe, content: _Content) -> Stage:
    def run(working: Path, inputs: _Folders) -> None:
        evaluate(load_trained(recipe, inputs["train"]), recipe, working)
        collect_results(recipe.train.method, inputs["baseline"], inputs["train"], working)

    return Stage("evaluate", 1, content.testing, ("baseline", "train"), run)


def _analysis(recipe: Recipe, content: _Content) -> Stage:
    def run(working: Path, inputs: _Folders) -> None:
        from neft.pipeline.analyze import analyze

        analyze(recipe, inputs, working)

    earlier = ("score", "select", "baseline", "train", "evaluate")
    reads = tuple(name for name in earlier if name in stage_names(recipe))
    return Stage("analysis", 1, content.analysis, reads, run, ("*",), derived=True)


_MAKERS: dict[str, Callable[[Recipe, _Content], Stage]] = {
    "prepare": _prepare,
    "baseline": _baseline,
    "warmup": _warmup,
    "score": _score,
    "select": _select,
    "train": _train,
    "evaluate": _evaluate,
    "analysis": _analysis,
}


def _made(name: str, recipe: Recipe, content: _Content) -> Stage:
    stage = _MAKERS[name](recipe, content)
    return replace(stage, on_shortage=partial(_explain, recipe, name))


def _explain(recipe: Recipe, name: str) -> str:
    from neft.pipeline.shortage import explain_shortage

    return explain_shortage(recipe, name)
