"""From any fine-tuned checkpoint to a NeFT adapter with the neurons that changed most: no training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from neft.analysis.weight_pairs import (
    Pairing,
    SquaredSums,
    WeightPair,
    pair_weights,
    squared_sums,
)
from neft.checkpoints import WeightSource, open_weights
from neft.errors import CheckpointError, NeuronError, UsageError
from neft.evaluation import Score
from neft.files import replaced_atomically, write_json
from neft.models import load_model
from neft.neurons import NeuronScores, NeuronSet
from neft.pipeline.adapter import CONFIG, WEIGHTS, load_adapter
from neft.pipeline.evaluate import Evaluation, evaluate
from neft.pipeline.identity import MODEL_IDENTITY, model_identity
from neft.pipeline.store import new_folder
from neft.recipe import ModelSection, Recipe
from neft.scoring import score_neurons
from neft.scoring.distance import scoring_threads
from neft.scoring.weights import check_weights
from neft.sft.data import load_examples

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

EXTRACTION = "extraction.json"
EVALUATION = "evaluation"


@dataclass(frozen=True)
class KeptScore:
    """One metric on the test split."""

    base: Score
    finetuned: Score
    adapter: Score

    @property
    def share(self) -> float | None:
        """Of what fine-tuning gained, how much the adapter does; ``None`` where nothing was gained."""
        gain = self.finetuned.score - self.base.score
        return (self.adapter.score - self.base.score) / gain if gain > 0 else None


@dataclass(frozen=True)
class Extraction:
    """What an extracted adapter holds, and how much of the fine-tune that is."""

    num_neurons: int
    num_changed: int
    """Of these, how many differ at all between the two checkpoints."""
    num_parameters: int
    percent: float
    """Of all parameters of the model."""
    num_bytes: int
    """Size of the adapter."""
    share_of_projections: float
    """Of the squared change of the projections that neurons were chosen from, 0..1."""
    share_of_model: float
    """Of the squared change of all weights, 0..1."""
    left_out: Mapping[str, str]
    """Weights of the model that cannot be compared -> why; not part of ``share_of_model``."""
    scores: Mapping[str, KeptScore]
    """By metric; empty without test data."""
    num_examples: int | None = None
    """Of the test split."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        kept = {
            metric: asdict(score) | {"share_kept": score.share}
            for metric, score in self.scores.items()
        }
        return asdict(self) | {"scores": kept}


def extract(
    base: str,
    finetuned: str,
    output: Path,
    *,
    percent: float | None = None,
    count: int | None = None,
    modules: Sequence[str] | None = None,
    scores: Path | None = None,
    recipe: Recipe | None = None,
    say: Callable[[str], None],
) -> Extraction:
    """Write an adapter that carries the most changed neurons of a fine-tuned checkpoint as they are.

    Checkpoints are read one weight at a time; memory is bounded by the adapter, and a pair of the largest
    weights. Only an evaluation loads whole models, one after the other.

    Args:
        base: the original checkpoint: a folder or Hub id.
        finetuned: the same model after fine-tuning; needs a ``config.json`` only with ``recipe``.
        output: folder of the adapter; must not exist, or be empty. Beside the adapter it gets
            ``extraction.json``, and with ``recipe`` a folder ``evaluation``.
        percent: budget in percent of all parameters; give this or ``count``.
        count: budget in neurons.
        modules: projections to choose from, as for ``score_neurons``; default: up and down.
        scores: a file of scores to choose by, instead of scoring.
        recipe: evaluate base, fine-tuned model and adapter on its test split, with its model section's
            options.
        say: is told what happens.

    Raises:
        UsageError: ``output`` holds something; ``modules`` besides ``scores``; or what ``score_neurons``,
            ``NeuronScores.select`` and ``load_examples`` refuse.
        CheckpointError: no neuron differs between the two checkpoints.
    """
    if scores is not None and modules is not None:
        raise UsageError(
            f"{scores}: scores tell the projections; leave modules out, or the scores."
        )
    with new_folder(output.expanduser().resolve()) as folder:
        if recipe is not None:
            load_examples(recipe.data, "test")  # whether they can be read at all, before all else
        sources = open_weights(base), open_weights(finetuned)
        known = score_neurons(*sources, modules) if scores is None else _loaded(scores, sources)
        neurons = known.select(percent=percent, count=count)
        neurons.provenance[MODEL_IDENTITY] = model_identity(ModelSection(path=base))
        found = _read(pair_weights(*sources), neurons)
        _check_changed(found, neurons, sources)
        _write_adapter(folder, neurons, found.vectors, base)
        evaluations = _evaluations(base, finetuned, folder, recipe, say)
        extraction = Extraction(
            num_neurons=len(neurons),
            num_changed=found.num_changed,
            num_parameters=neurons.num_parameters,
            percent=neurons.percent_of(known.total_parameters),
            num_bytes=sum((folder / name).stat().st_size for name in (CONFIG, WEIGHTS)),
            share_of_projections=found.captured / found.projections.change,
            share_of_model=found.captured / found.model.change,
            left_out=found.left_out,
            scores=_kept(evaluations),
            num_examples=evaluations["base"].num_examples if evaluations else None,
        )
        write_json(folder / EXTRACTION, extraction.to_dict())
    return extraction


def _loaded(file: Path, sources: tuple[WeightSource, WeightSource]) -> NeuronScores:
    scores = NeuronScores.load(file)
    for source in sources:
        check_weights(source, scores.projections.values())
    return scores


@dataclass
class _Found:
    """What one pass over all weights gathers."""

    left_out: Mapping[str, str]
    vectors: dict[str, Tensor]
    """Module -> its chosen neurons after fine-tuning, ``[K, L]``."""
    captured: float = 0.0
    """Squared change of the chosen neurons."""
    num_changed: int = 0
    projections: SquaredSums = field(default_factory=SquaredSums)
    model: SquaredSums = field(default_factory=SquaredSums)


def _read(pairing: Pairing, neurons: NeuronSet) -> _Found:
    modules = {pair.parameter.removesuffix(".weight"): pair for pair in pairing.pairs}
    for module in neurons.modules():
        if module not in modules:
            raise NeuronError(
                f"{module}: its weight is tied to another module's, which would change with it. Choose "
                "other modules."
            )
    found = _Found(pairing.left_out, {})
    console = Console(stderr=True)
    with scoring_threads() as pool:
        for module, pair in track(
            modules.items(),
            "Extracting",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ):
            _add(found, module, pair, neurons, pool)
    return found


def _add(found: _Found, module: str, pair: WeightPair, neurons: NeuronSet, pool: Executor) -> None:
    before, after = pair.read()
    sums = squared_sums(pair, before, after, pool)
    found.model += sums
    if module in neurons.projections:
        found.projections += sums
    if module in neurons:
        old, new = (_vectors(weight, neurons, module) for weight in (before, after))
        moved = (new.double() - old.double()).square().sum(1)
        found.captured += float(moved.sum())
        found.num_changed += int((moved > 0).sum())
        found.vectors[module] = new


def _vectors(weight: Tensor, neurons: NeuronSet, module: str) -> Tensor:
    """The chosen neurons ``[K, L]``, as wide as an adapter holds them."""
    import torch

    from neft.tuner.functional import Selection

    projection = neurons.projections[module]
    indices = torch.from_numpy(neurons[module])
    chosen = Selection(projection.axis, projection.neuron_dim, indices).read(weight)
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32))


def _check_changed(
    found: _Found, neurons: NeuronSet, sources: tuple[WeightSource, WeightSource]
) -> None:
    base, finetuned = (source.label for source in sources)
    if not found.num_changed:
        raise CheckpointError(
            f"{base} and {finetuned}: none of the {len(neurons):,} chosen neurons differs between the "
            "two, so there is nothing to extract. Give the checkpoint after fine-tuning, or other "
            "modules."
        )
    if num_same := len(neurons) - found.num_changed:
        _log.warning(
            "%s: only %s of the %s chosen neurons differ from %s; the other %s take room in the adapter "
            "for nothing. Lower the budget.",
            finetuned,
            f"{found.num_changed:,}",
            f"{len(neurons):,}",
            base,
            f"{num_same:,}",
        )


def _write_adapter(
    folder: Path, neurons: NeuronSet, vectors: Mapping[str, Tensor], base: str
) -> None:
    """The two files that PEFT writes for a trained adapter."""
    from safetensors.torch import save_file

    from neft.tuner import NeftConfig

    config = NeftConfig(
        neurons=neurons,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {
        f"base_model.model.{module}.neft_vectors.weight": values
        for module, values in vectors.items()
    }
    with replaced_atomically(folder / WEIGHTS) as part:
        save_file(tensors, part, metadata={"format": "pt"})


def _evaluations(
    base: str,
    finetuned: str,
    folder: Path,
    recipe: Recipe | None,
    say: Callable[[str], None],
) -> dict[str, Evaluation]:
    """Of the three models by name; each is gone before the next is loaded."""
    if recipe is None:
        return {}
    original, tuned = (
        recipe.model.model_copy(update={"path": path, "revision": None})
        for path in (base, finetuned)
    )
    on_base = recipe.model_copy(update={"model": original})
    # First the one of which only the weights were read so far: the rest of it may be unusable.
    subjects: dict[str, Callable[[], Any]] = {
        "finetuned": lambda: load_model(tuned),
        "base": lambda: load_model(original),
        "adapter": lambda: load_adapter(load_model(original), folder),
    }
    evaluations = {}
    for name, load in subjects.items():
        say(f"evaluating: {name}")
        place = folder / EVALUATION / name
        place.mkdir(parents=True)
        evaluations[name] = evaluate(load(), on_base, place)
    return evaluations


def _kept(evaluations: Mapping[str, Evaluation]) -> dict[str, KeptScore]:
    if not evaluations:
        return {}
    scores = {name: evaluation.scores for name, evaluation in evaluations.items()}
    return {
        metric: KeptScore(**{name: found[metric] for name, found in scores.items()})
        for metric in scores["base"]
    }
