"""What training did to the neurons of a run: the tables of the stage ``analysis``.

Every table is a file of its own, written when it is whole, so that an attempt that was cut off goes on
with the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neft.analysis import files
from neft.analysis.activity import ActivityCollector, UnitActivity, activity_table
from neft.analysis.causal import causal, groups
from neft.analysis.changes import neuron_changes
from neft.analysis.contexts import ContextCollector, TopTokens, contexts
from neft.analysis.hidden_states import HiddenStates, mean_hidden_states
from neft.analysis.lens import lens
from neft.analysis.neuron_columns import by_module, canonical, concatenated, neuron_columns
from neft.analysis.overlap import overlap_table
from neft.analysis.ranks import affected_neurons, rank_buckets, rank_changes
from neft.analysis.table import Table
from neft.analysis.utilization import neuron_utilization
from neft.checkpoints import WeightSource, open_weights
from neft.evaluation import target_loss, text_loss
from neft.models import load_model, load_tokenizer
from neft.neurons import NeuronScores, NeuronSet, Projection
from neft.pipeline.adapter import load_merged
from neft.pipeline.evaluate import PREDICTIONS, device, read_predictions
from neft.pipeline.selection import NEURONS, SCORES, load_selection
from neft.projections import find_projections
from neft.recipe import Recipe
from neft.sft.data import Example, load_examples, load_texts
from neft.sft.prompts import encode, encode_all
from neft.streaming import stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OWN = "this run"
# Roles whose neuron n belongs to unit n of a feed-forward network.
_ROLES_OF_UNITS = ("up", "gate", "gate_up", "down")


def analyze(recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """Fill ``folder`` with what the recipe's analysis section asks for.

    Args:
        recipe: of the run.
        inputs: the finished folders of its stages.
        folder: gets the tables; those that are there already are left as they are.

    Raises:
        NeuronError: projections outside the stack of layers, or sets of another model to compare with.
        DataError: a data file that has changed or cannot be read.
        RunError: too little memory on the device, or values that are not finite.
    """
    subject = _Subject(recipe, inputs)
    for names, make in _PARTS.items():
        if not all((folder / name).exists() for name in names):
            for name, table in make(subject).items():
                table.save(folder / name)


@dataclass(frozen=True)
class _Observed:
    """What one model did with the texts."""

    hidden: HiddenStates
    activity: UnitActivity
    tops: TopTokens


class _Subject:
    """The run that is looked at: what its parts have in common, made when it is first needed."""

    def __init__(self, recipe: Recipe, inputs: Mapping[str, Path]) -> None:
        assert recipe.analysis is not None
        self.recipe = recipe
        self.options = recipe.analysis
        self.inputs = inputs

    # --- texts ------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.recipe.model)

    @cached_property
    def examples(self) -> list[Example]:
        return load_examples(self.recipe.data, "test")[: self.options.limit]

    def tokens(self, examples: Sequence[Example]) -> list[list[int]]:
        """Prompt and target of each, cut off."""
        return [
            encode(example, self.tokenizer, self.recipe.data)[0][: self.options.max_length]
            for example in examples
        ]

    def generated(self, stage: str) -> list[list[int]]:
        """The prompts, each with what a model wrote."""
        predictions = read_predictions(self.inputs[stage] / PREDICTIONS)
        return self.tokens(
            [
                replace(example, target=found.prediction)
                for example, found in zip(self.examples, predictions, strict=False)
            ]
        )

    # --- models -----------------------------------------------------------------------------------

    @cached_property
    def original(self) -> WeightSource:
        return open_weights(self.recipe.model.path, self.recipe.model.revision)

    @cached_property
    def trained_model(self) -> PreTrainedModel:
        model: Any = load_merged(self.recipe, self.inputs["train"])
        return model.to(device())

    @cached_property
    def trained_weights(self) -> WeightSource:
        return open_weights(self.trained_model)

    @cached_property
    def before(self) -> _Observed:
        model: Any = load_model(self.recipe.model)
        return self._observe(model.to(device()), "baseline", None)

    @cached_property
    def after(self) -> _Observed:
        # By the same thresholds, so that shares of active tokens can be compared.
        thresholds = self.before.activity.thresholds
        return self._observe(self.trained_model, "evaluate", thresholds)

    def _observe(
        self, model: PreTrainedModel, stage: str, thresholds: Mapping[str, float] | None
    ) -> _Observed:
        # As in the paper, each model on what it wrote itself.
        batch_size = self.recipe.evaluate.batch_size
        hidden = mean_hidden_states(model, self.generated(stage), batch_size=batch_size)
        # Both on the same texts: what differs then is the model alone.
        texts = self.tokens(self.examples)
        activity = ActivityCollector(thresholds)
        tops = ContextCollector(texts, max(1, self.options.contexts))
        stream(model, texts, [activity, tops], batch_size=batch_size, title="Activity")
        return _Observed(hidden, activity.result, tops.result)

    # --- neurons ----------------------------------------------------------------------------------

    @cached_property
    def scores(self) -> NeuronScores | None:
        return NeuronScores.load(self.inputs["score"] / SCORES) if "score" in self.inputs else None

    @cached_property
    def chosen(self) -> NeuronSet | None:
        """``None`` for methods that choose no neurons."""
        return NeuronSet.load(self.inputs["select"] / NEURONS) if "select" in self.inputs else None

    @cached_property
    def projections(self) -> Mapping[str, Projection]:
        known = self.scores or self.chosen
        if known is not None:
            return known.projections
        return canonical(find_projections(self.original.network, self.recipe.score.modules))

    @cached_property
    def changes(self) -> dict[str, NDArray[np.float64]]:
        return neuron_changes(self.original, self.trained_weights, self.projections.values())

    @cached_property
    def trained(self) -> NeuronSet:
        """The chosen neurons; of a method that chooses none, those that have changed."""
        if self.chosen is not None:
            return self.chosen
        moved = by_module(self.projections.values(), self.changes["change"])
        indices = {name: np.flatnonzero(change) for name, change in moved.items()}
        return NeuronSet(self.projections.values(), indices)

    def most_changed(self, roles: Sequence[str], count: int) -> NeuronSet:
        """The neurons of some roles that training changed most, of those that it changed."""
        projections = [p for p in self.projections.values() if p.role in roles]
        by_name = by_module(self.projections.values(), self.changes["change"])
        change = np.concatenate([np.empty(0), *(by_name[p.name] for p in projections)])
        most = np.argsort(-change, kind="stable")[: min(count, np.count_nonzero(change))]
        is_most = np.zeros(len(change), dtype=bool)
        is_most[most] = True
        flags = by_module(projections, is_most)
        return NeuronSet(projections, {name: np.flatnonzero(flag) for name, flag in flags.items()})

    # --- measures ---------------------------------------------------------------------------------

    def task_loss(self, model: Any) -> float:
        """Mean loss of a target token of development examples, in nats."""
        input_ids, labels = self._development
        return target_loss(
            model, input_ids, labels, batch_size=self.recipe.evaluate.batch_size
        ).loss

    @cached_property
    def _development(self) -> tuple[list[list[int]], list[list[int]]]:
        examples = load_examples(self.recipe.data, "dev")[: self.options.limit]
        encoded = encode_all(examples, self.tokenizer, self.recipe.data)
        return encoded.input_ids, encoded.labels

    def general_loss(self, model: Any) -> float:
        """Mean loss of a token of the first of the recipe's general texts, in nats."""
        general = self.recipe.evaluate.general
        assert general is not None
        return text_loss(
            model,
            self.tokenizer,
            self._general_texts,
            max_length=general.max_length,
            batch_size=self.recipe.evaluate.batch_size,
        ).loss

    @cached_property
    def _general_texts(self) -> list[str]:
        general = self.recipe.evaluate.general
        assert general is not None
        return load_texts(general)[: self.options.limit]


def _neurons(subject: _Subject) -> dict[str, Table]:
    """Every neuron before and after, and Figure 3."""
    projections = subject.projections.values()
    before = neuron_utilization(subject.original, subject.before.hidden, projections)
    after = neuron_utilization(subject.trained_weights, subject.after.hidden, projections)
    ranks = rank_changes(before, after)
    affected = affected_neurons(ranks, subject.trained)
    trained = {
        name: np.isin(np.arange(projection.num_neurons), subject.trained[name])
        for name, projection in subject.projections.items()
    }
    arrays: dict[str, Mapping[str, NDArray[Any]]] = {
        "trained": trained,
        "utilization_before": before.values,
        "utilization_after": after.values,
        "peak_before": before.peaks,
        "peak_after": after.peaks,
        "rank_before": ranks.before,
        "rank_after": ranks.after,
        "rank_change": ranks.changes,
        "strong": affected.strong,
        "suppressed": affected.suppressed,
        "indirect": affected.indirect,
    }
    if subject.scores is not None:
        arrays["distance"] = subject.scores.distances
    columns = {name: concatenated(projections, values) for name, values in arrays.items()}
    about = {
        "before": before.provenance,
        "after": {**after.provenance, "weights": subject.recipe.train.method},
        "average_rank_change": {"all": ranks.average} | ranks.average_by_role,
        "threshold": affected.threshold,
        "counts": affected.counts,
    }
    return {
        files.NEURONS: Table(neuron_columns(projections) | subject.changes | columns, about),
        files.BUCKETS: rank_buckets(ranks),
    }


def _activity(subject: _Subject) -> dict[str, Table]:
    found = {files.ACTIVITY: activity_table(subject.before.activity, subject.after.activity)}
    units = subject.most_changed(_ROLES_OF_UNITS, subject.options.context_units)
    if subject.options.contexts and len(units):
        tops = {"before": subject.before.tops, "after": subject.after.tops}
        found[files.CONTEXTS] = contexts(tops, units, subject.tokenizer)
    return found


def _lens(subject: _Subject) -> dict[str, Table]:
    neurons = subject.most_changed(["down"], subject.options.lens_limit)
    if not len(neurons):
        return {}
    table = lens(
        subject.original,
        subject.trained_weights,
        neurons,
        subject.tokenizer,
        k=subject.options.lens_tokens,
    )
    return {files.LENS: table}


def _causal(subject: _Subject) -> dict[str, Table]:
    if subject.chosen is None or not subject.options.causal:
        return {}
    measures = {"task": subject.task_loss}
    if subject.recipe.evaluate.general is not None:
        measures["general"] = subject.general_loss
    restored = groups(subject.trained, subject.scores)
    return {files.CAUSAL: causal(subject.trained_model, subject.original, restored, measures)}


def _overlap(subject: _Subject) -> dict[str, Table]:
    others = subject.options.overlap_with
    if subject.chosen is None or not others:
        return {}
    sets = {name: load_selection(Path(file).expanduser()) for name, file in others.items()}
    # As many of each as this run has chosen.
    alike = {
        name: found if isinstance(found, NeuronSet) else found.select(count=len(subject.chosen))
        for name, found in sets.items()
    }
    return {files.OVERLAP: overlap_table({_OWN: subject.chosen} | alike)}


_PARTS: Mapping[tuple[str, ...], Callable[[_Subject], Mapping[str, Table]]] = {
    (files.NEURONS, files.BUCKETS): _neurons,
    (files.ACTIVITY, files.CONTEXTS): _activity,
    (files.LENS,): _lens,
    (files.OVERLAP,): _overlap,
    (files.CAUSAL,): _causal,
}
"""Files -> what makes them, or those of them that apply to the run."""
