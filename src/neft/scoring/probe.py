"""The probe way (paper, section 3): neurons that lie along what tells the labels of texts apart.

For each layer, a ridge classifier learns to tell a text's label from its mean hidden state. A neuron's
score is the largest ``|cos|`` between its vector and the weights of any layer's classifier.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from neft import __version__
from neft.checkpoints import WeightSource, open_weights
from neft.errors import ArchitectureError, DataError, UsageError
from neft.neurons import Axis, NeuronScores, PathLike, Projection
from neft.projections import as_module, find_candidates
from neft.scoring.neuron_vectors import neuron_vectors
from neft.scoring.weights import check_weights
from neft.streaming import Batch, check_texts, layers_of, stream, text_means

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

_log = logging.getLogger(__name__)

T = TypeVar("T")

# Strengths of the penalty to choose from, for inputs with variance 1: from hardly any to one that leaves
# little but the direction between the means of the labels.
_PENALTIES = np.logspace(0, 6, 7)


@dataclass(frozen=True)
class Probes:
    """A ridge classifier for each layer, of mean hidden states."""

    layers: tuple[int, ...]
    weights: npt.NDArray[np.float64]
    """``[num_layers, num_labels, hidden_size]``: what a hidden state is multiplied with for each label;
    of two labels only for the second."""
    accuracies: tuple[float, ...]
    """Of each layer: share of the texts whose label it tells, cross-validated, in 0..1."""
    chance: float
    """Share of the texts with the most frequent label."""
    labels: tuple[str, ...]
    """In the order of ``weights``."""
    num_texts: int
    folds: int


def check_inputs(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    labels: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    folds: int,
) -> None:
    """Check what ``fit_probes`` is given, before the model reads anything.

    Args:
        model: its weights may be on the meta device.
        texts: token ids; these and the others as for ``fit_probes``.
        labels: of each text.
        layers: to probe.
        folds: of the cross-validation.

    Raises:
        DataError: not one label a text, no texts, one without tokens or longer than the model's context,
            fewer than two labels, or a label with fewer texts than folds.
        UsageError: fewer than two folds.
        ArchitectureError: the model's layers cannot be found, or it has none with such an index.
    """
    _chosen_layers(model, layers)
    if len(texts) != len(labels):
        raise DataError(
            f"There are {len(texts)} texts and {len(labels)} labels; give one for each."
        )
    check_texts(model, texts)
    counts = Counter(labels)
    if len(counts) < 2:
        raise DataError(
            f"A probe needs texts with two labels or more, but all have {next(iter(counts))!r}."
        )
    if folds < 2:
        raise UsageError(f"folds is {folds}; a cross-validation needs 2 or more.")
    rarest, count = counts.most_common()[-1]
    if count < folds:
        raise DataError(
            f"Label {rarest!r} has {count} of the {len(texts)} texts, fewer than the {folds} folds of "
            "the cross-validation. Give more texts (score.probe.limit), or lower score.probe.folds."
        )


def _chosen_layers(model: nn.Module, layers: Sequence[int] | None) -> dict[int, nn.Module]:
    there = layers_of(model)
    wanted = sorted(there if layers is None else set(layers))
    if not wanted or not set(wanted) <= set(there):
        raise ArchitectureError(
            f"layers is {wanted}; choose from the model's {min(there)} to {max(there)}, or leave it out "
            "to probe all."
        )
    return {layer: there[layer] for layer in wanted}


def fit_probes(
    model: Any,
    texts: Sequence[Sequence[int]],
    labels: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    folds: int = 5,
    batch_size: int = 16,
    seed: int = 0,
) -> Probes:
    """Train a ridge classifier for each layer on the mean hidden states of labelled texts.

    Its inputs are standardised, coordinate by coordinate, and its penalty is the one of 1, 10, ..., 10**6
    with the least leave-one-out error on all texts. Its weights are then divided by the scales, so that
    they apply to the hidden states themselves, and their cosine with a neuron's vector has a meaning.

    The texts are read once. What is kept of them takes num_texts x num_layers x hidden_size x 4 bytes:
    2,000 texts and 32 layers of width 4,096 take 1.05 GB. Fitting takes a few float64 copies of one
    layer's share.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        texts: token ids, without the label.
        labels: of each text.
        layers: indices from 0; default: all.
        folds: of the cross-validation that measures accuracy, stratified by label.
        batch_size: texts at once; changes nothing but rounding.
        seed: of the folds; the weights do not depend on it.

    Raises:
        DataError, UsageError, ArchitectureError: see ``check_inputs`` and ``stream``.
        RunError: a hidden state that is not finite, or too little memory on the device.
    """
    check_inputs(as_module(model), texts, labels, layers=layers, folds=folds)
    states = mean_states(model, texts, layers=layers, batch_size=batch_size)
    names = np.asarray(labels)
    classes, counts = np.unique(names, return_counts=True)
    fitted = [_fit(of_layer, names, folds, seed) for of_layer in _track(states.values(), "Probes")]
    probes = Probes(
        layers=tuple(states),
        weights=np.stack([weights for weights, _ in fitted]),
        accuracies=tuple(accuracy for _, accuracy in fitted),
        chance=float(counts.max() / counts.sum()),
        labels=tuple(map(str, classes)),
        num_texts=len(texts),
        folds=folds,
    )
    if max(probes.accuracies) <= probes.chance:
        _log.warning(
            "No layer's probe tells the labels better than always naming the most frequent one (%.1f%% "
            "of %d texts): neurons chosen by them are a matter of chance. Give more texts.",
            100 * probes.chance,
            probes.num_texts,
        )
    return probes


def mean_states(
    model: Any,
    texts: Sequence[Sequence[int]],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int,
) -> dict[int, npt.NDArray[np.float32]]:
    """The hidden state after each layer, averaged over the tokens of each text.

    Args:
        model: this and the others as for ``fit_probes``.
        texts: token ids.
        layers: indices from 0; default: all.
        batch_size: texts at once.

    Returns:
        Layer -> float32 ``[num_texts, hidden_size]``; the last layer's is that before the final norm.

    Raises:
        DataError, UsageError: see ``stream``.
        ArchitectureError: the model's layers cannot be found, or it has none with such an index.
        RunError: a hidden state that is not finite, or too little memory on the device.
    """
    collector = _MeanStates(_chosen_layers(as_module(model), layers), len(texts))
    stream(model, texts, [collector], batch_size=batch_size, title="Hidden states")
    return collector.states


class _MeanStates:
    """Collects the mean hidden states of each text; see ``stream``."""

    def __init__(self, layers: Mapping[int, nn.Module], num_texts: int) -> None:
        self._layers = layers
        self._num_texts = num_texts
        self._batch: Batch
        self.states: dict[int, npt.NDArray[np.float32]] = {}

    def watch(self, _model: nn.Module) -> Sequence[RemovableHandle]:
        return [
            module.register_forward_hook(partial(self._keep, layer))
            for layer, module in self._layers.items()
        ]

    def begin(self, batch: Batch) -> None:
        self._batch = batch

    def _keep(self, layer: int, _module: nn.Module, _inputs: object, hidden: Tensor) -> None:
        if layer not in self.states:
            self.states[layer] = np.empty((self._num_texts, hidden.shape[-1]), np.float32)
        self.states[layer][self._batch.texts] = text_means(layer, hidden, self._batch).numpy()


def _fit(
    states: npt.NDArray[np.float32], labels: npt.NDArray[np.str_], folds: int, seed: int
) -> tuple[npt.NDArray[np.float64], float]:
    """Weights ``[num_labels, hidden_size]`` of a classifier of all texts, and its accuracy on others."""
    from sklearn.linear_model import RidgeClassifier, RidgeClassifierCV
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    inputs = states.astype(np.float64)
    scaler, of_all = StandardScaler(), RidgeClassifierCV(_PENALTIES)
    of_all.fit(scaler.fit_transform(inputs), labels)
    # w . (h - mean) / scale = (w / scale) . h - a constant
    weights: npt.NDArray[np.float64] = np.atleast_2d(of_all.coef_ / scaler.scale_)
    told = cross_val_predict(
        make_pipeline(StandardScaler(), RidgeClassifier(of_all.alpha_)),
        inputs,
        labels,
        cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
    )
    return weights, float(np.mean(told == labels))


def score_by_probe(
    weights: PathLike | nn.Module | WeightSource,
    probes: Probes,
    modules: Sequence[str] | None = None,
    *,
    axes: Mapping[str, Axis] | None = None,
) -> NeuronScores:
    """How far neurons lie along the weights of probes: any layer's neurons, any layer's probe.

    One matrix is in memory at a time; sums are float64.

    Args:
        weights: of the model that was probed: a checkpoint folder, a Hub id, a module, or what
            ``open_weights`` returned.
        probes: from ``fit_probes``.
        modules: projections to score, by role, module name or pattern (see ``find_projections``);
            default: up and down.
        axes: pattern of module names -> axis, for modules that the architecture table does not know.

    Returns:
        For each neuron the largest ``|cos|`` with a row of the probes' weights, in 0..1, as its distance:
        the larger, the sooner it is chosen. A neuron that is zero has 0.

    Raises:
        ArchitectureError: projections that the model does not have, or that neither read from the
            residual stream nor write to it.
        NeuronError: the weight of one is tied to another's.
        CheckpointError: weights that are missing, torn, quantized, not finite or of another model.
    """
    source = weights if isinstance(weights, WeightSource) else open_weights(weights)
    projections = find_candidates(source.network, modules, axes)
    _check_lengths_of_neurons(projections, probes)
    check_weights(source, projections)
    rows = torch.from_numpy(probes.weights).flatten(0, 1)
    directions = rows / _norms(rows)[:, None]
    cosines = {
        projection.name: _largest_cosines(source, projection, directions).numpy()
        for projection in _track(projections, "Scoring")
    }
    provenance = {
        "method": "probe",
        "before": source.label,
        "labels": list(probes.labels),
        "num_texts": probes.num_texts,
        "folds": probes.folds,
        "layers": list(probes.layers),
        "accuracies": list(probes.accuracies),
        "chance": probes.chance,
        "neft": __version__,
    }
    return NeuronScores(projections, cosines, source.num_parameters, provenance)


def _largest_cosines(source: WeightSource, projection: Projection, directions: Tensor) -> Tensor:
    """Largest ``|cos|`` of each neuron with any of ``directions``, which are unit rows."""
    found = []
    for _, vectors in neuron_vectors(source, projection):
        products = (vectors @ directions.T).abs().amax(1)
        found.append((products / _norms(vectors)).clamp(max=1.0))
    return torch.cat(found)


def _norms(rows: Tensor) -> Tensor:
    """Euclidean norm of each row; 1 of one that is zero, which no division then changes."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.masked_fill_(norms == 0, 1.0)


def _track(items: Collection[T], title: str) -> Iterable[T]:
    """``items``, with a progress bar on stderr if that is a terminal."""
    console = Console(stderr=True)
    return track(items, title, console=console, transient=True, disable=not console.is_terminal)


def _check_lengths_of_neurons(projections: Iterable[Projection], probes: Probes) -> None:
    hidden_size = probes.weights.shape[-1]
    for projection in projections:
        if projection.vector_length != hidden_size:
            raise ArchitectureError(
                f"{projection.name}: its neurons have length {projection.vector_length}, the model's "
                f"hidden states {hidden_size}: they neither read from the residual stream nor write to "
                "it. Leave it out of modules, or give its axis."
            )
