"""Which neurons a recipe trains: from scores, by chance, or from sets that are there already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from neft.checkpoints import open_weights
from neft.errors import NeuronError
from neft.neurons import NeuronScores, NeuronSet
from neft.pipeline.adapter import read_config
from neft.pipeline.identity import MODEL_IDENTITY
from neft.recipe import LoraSection, Recipe, SelectSection
from neft.sft.counting import matching_rank

if TYPE_CHECKING:
    from torch import nn


SCORES = "scores.safetensors"
NEURONS = "neurons.json"


def unscored(network: nn.Module, recipe: Recipe) -> NeuronScores:
    """The candidates of a recipe with made-up scores: enough to spend a budget or to draw at random.

    Args:
        network: the model's modules; their parameters may be on the meta device.
        recipe: its score section says which projections count.
    """
    from neft.projections import find_candidates

    projections = find_candidates(network, recipe.score.modules)
    # All different, so that the lowest and the highest are not the same neurons.
    ramp = np.linspace(0, 1, sum(projection.num_neurons for projection in projections))
    ends = np.cumsum([projection.num_neurons for projection in projections])[:-1]
    made_up = {
        projection.name: part
        for projection, part in zip(projections, np.split(ramp, ends), strict=True)
    }
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    return NeuronScores(projections, made_up, num_parameters)


def choose(scores: NeuronScores, options: SelectSection, model: str | None = None) -> NeuronSet:
    """Choose neurons as a recipe says (Algorithm 1, step 3; the ablations of section 5).

    Args:
        scores: of all candidates.
        options: budget, choice, and files of other sets.
        model: identity of the base model; sets that are known to be of another are refused.

    Raises:
        NeuronError: a budget that the scored projections cannot hold, a rule that does not fit them, a
            file that is no neuron set or is of another model, or nothing is left.
    """
    if options.neurons is not None:
        chosen = _load(options.neurons, scores, model)
    else:
        chosen = scores.select(
            percent=options.percent,
            count=options.count,
            megabytes=options.megabytes,
            which=options.which,
            seed=options.seed,
            rule=options.rule,
            floor=options.floor,
            above_rounding=options.above_rounding,
        )
    if options.takes_reversed:
        chosen |= scores.select(
            percent=options.reversed_percent, count=options.reversed_count, which="highest"
        )
    for file in options.union:
        chosen |= _load(file, scores, model)
    for file in options.intersection:
        chosen &= _load(file, scores, model)
    if not len(chosen):
        raise NeuronError("select: the intersection holds no neuron; nothing would be trained.")
    if model is not None:
        chosen.provenance[MODEL_IDENTITY] = model
    return chosen


def _load(file: str, scores: NeuronScores, model: str | None) -> NeuronSet:
    chosen = NeuronSet.load(Path(file).expanduser())
    theirs = chosen.provenance.get(MODEL_IDENTITY)
    if None not in (theirs, model) and theirs != model:
        raise NeuronError(
            f"{file}: was chosen in another base model ({theirs}) than this one ({model}). Neurons of "
            "one mean nothing in the other; choose them anew."
        )
    for name, projection in chosen.projections.items():
        if len(chosen[name]) and scores.projections.get(name) != projection:
            raise NeuronError(
                f"{file}: has neurons of {name}, which are no candidates here: the set is of another "
                "model, or score.modules leaves them out."
            )
    return chosen


def load_selection(path: Path) -> NeuronSet | NeuronScores:
    """Neurons that were chosen, or scores to choose by: a file of either, or an adapter's folder.

    Raises:
        NeuronError: it is none of these, or cannot be read.
        AdapterError: the adapter is incomplete.
    """
    if path.is_dir():
        neurons = read_config(path).get("neurons")
        if not isinstance(neurons, Mapping):
            raise NeuronError(f"{path}: is an adapter without neurons; give one that NeFT trained.")
        return NeuronSet.from_dict(neurons, where=str(path))
    if path.suffix == ".safetensors":
        return NeuronScores.load(path)
    return NeuronSet.load(path)


def resolved_lora(recipe: Recipe) -> LoraSection | None:
    """The recipe's LoRA settings with the rank that ``match`` stands for; ``None`` for other methods.

    Raises:
        NeuronError: a budget that the candidate projections cannot hold.
        CheckpointError: the base model's configuration cannot be read.
    """
    lora = recipe.train.lora
    if lora is None or lora.match is None:
        return lora
    network = open_weights(recipe.model.path, recipe.model.revision).network
    return with_rank(lora, network, recipe)


def with_rank(lora: LoraSection, network: nn.Module, recipe: Recipe) -> LoraSection:
    """``lora`` with the rank that ``match`` stands for on ``network``."""
    if lora.match is None:
        return lora
    assert recipe.select is not None
    budget = choose(unscored(network, recipe), recipe.select).num_parameters
    return lora.model_copy(update={"rank": matching_rank(network, budget), "match": None})
