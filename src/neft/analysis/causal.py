"""What trained neurons do for the loss: put some back to what they were, and look (beyond the paper)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from neft.analysis.table import Table
from neft.checkpoints import WeightSource
from neft.errors import NeuronError
from neft.neurons import Indices, NeuronScores, NeuronSet, Projection
from neft.projections import check_plain
from neft.scoring.weights import check_weights, read_weight

if TYPE_CHECKING:
    from torch import Tensor

Kind: TypeAlias = Literal["all", "lowest", "highest", "random", "layer"]

NOTHING = "nothing restored"

# More bands of layers than these make a long table of small differences.
_MOST_BANDS = 10


@dataclass(frozen=True)
class Group:
    """Neurons that are restored together."""

    name: str
    kind: Kind
    neurons: NeuronSet


def groups(
    neurons: NeuronSet,
    scores: NeuronScores | None = None,
    *,
    share: float = 0.25,
    layers_per_band: int | None = None,
    seed: int = 0,
) -> list[Group]:
    """Groups of trained neurons that tell where what was learned lies.

    All of them; the ``share`` of lowest and that of highest cosine, or of what was scored instead; as
    many drawn at random; each band of layers. The three groups that are compared have one size, so what
    differs is the choice. They are quarters rather than halves: half of the neurons holds most of what
    was learned whichever half it is, and two halves differ least where they meet, in the middle.

    Args:
        neurons: the trained ones; of a full fine-tune those to look at, such as all of its projections.
        scores: of these neurons; without them there is no lowest and no highest.
        share: of the trained neurons, above 0 and up to 1; at least one neuron.
        layers_per_band: layers that are restored together; default: as few as make at most ten bands.
            Neurons outside the stack of layers are in none.
        seed: of the random group, in 0..2**32 - 1.

    Raises:
        NeuronError: no neurons, scores of other projections, or a share, band or seed out of range.
    """
    if not len(neurons):
        raise NeuronError("The neuron set is empty: there is nothing to restore.")
    if not 0 < share <= 1:
        raise NeuronError(f"share is {share}; it must be above 0 and at most 1.")
    if not 0 <= seed < 2**32:
        raise NeuronError(f"seed is {seed}; it must be in 0..2**32 - 1.")
    size = max(1, int(share * len(neurons)))
    made = [Group("all trained neurons", "all", neurons)]
    if scores is not None:
        # A low cosine is a large distance; a stable sort keeps the canonical order among equals.
        ranking = np.argsort(-_distances(neurons, scores), kind="stable")
        method = scores.provenance.get("method", "cosine")
        first, last = ("lowest", "highest") if method == "cosine" else ("first", "last")
        made += [
            Group(f"{first} {share:.0%} by {method}", "lowest", _some(neurons, ranking[:size])),
            Group(
                f"{last} {share:.0%} by {method}", "highest", _some(neurons, ranking[::-1][:size])
            ),
        ]
    # RandomState's stream is frozen by numpy's compatibility policy (NEP 19).
    drawn = np.random.RandomState(seed).permutation(len(neurons))[:size]
    made.append(Group(f"random {share:.0%}", "random", _some(neurons, drawn)))
    return [*made, *_bands(neurons, layers_per_band)]


def causal(
    model: Any,
    original: WeightSource,
    groups: Sequence[Group],
    measures: Mapping[str, Callable[[Any], float]],
    *,
    progress: bool = True,
) -> Table:
    """Losses of a trained model after each group of neurons got its original vectors back.

    By how much a loss rises is what the training of these neurons buys, given that of the others; rises
    of groups need not add up. The model's weights are written to, and are afterwards what they were, bit
    for bit, also if a measure fails or the user stops it.

    Args:
        model: the trained model, plain: an adapter must be merged into it.
        original: weights of the model before training.
        groups: what to restore, each against the trained model.
        measures: name -> what to measure, such as ``target_loss`` on a development set; lower is better.
        progress: whether to show a progress bar on stderr, if that is a terminal.

    Returns:
        One row a group, and before them one with nothing restored (kind ``none``): ``group``, ``kind``,
        ``num_neurons``, and of each measure ``NAME_loss`` and ``NAME_rise``, the difference from the
        first row.

    Raises:
        AdapterError: the model has an adapter that is not merged.
        NeuronError: a group of another model's neurons.
        CheckpointError: original weights that are missing, of another shape, or quantized.
    """
    from rich.console import Console
    from rich.progress import track

    for group in groups:
        _check_fits(group.neurons, model, original)
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    trained = {name: measure(model) for name, measure in measures.items()}
    rows: list[dict[str, Any]] = [_row(NOTHING, "none", 0, trained, trained)]
    for group in track(
        groups, "Restoring neurons", console=console, transient=True, disable=hidden
    ):
        with restored(model, original, group.neurons):
            found = {name: measure(model) for name, measure in measures.items()}
        rows.append(_row(group.name, group.kind, len(group.neurons), found, trained))
    return Table(
        {column: [row[column] for row in rows] for column in rows[0]}, {"original": original.label}
    )


@contextmanager
def restored(model: Any, original: WeightSource, neurons: NeuronSet) -> Iterator[None]:
    """Inside, ``neurons`` of a plain ``model`` hold the vectors of ``original``; then what they held.

    Raises:
        AdapterError, NeuronError, CheckpointError: as ``causal``.
    """
    import torch

    _check_fits(neurons, model, original)
    trained: list[tuple[_Place, Tensor]] = []
    try:
        for name, indices in neurons.items():
            projection = neurons.projections[name]
            place = _Place.find(model, projection, indices)
            stored = read_weight(original, projection)
            vectors = stored.index_select(place.dim, torch.from_numpy(indices))
            trained.append((place, place.read()))
            place.write(vectors)
        yield
    finally:
        for place, vectors in trained:
            place.write(vectors)


@dataclass(frozen=True)
class _Place:
    """Where some neurons of a live model are."""

    weight: Tensor
    dim: int
    indices: Tensor

    @classmethod
    def find(cls, model: Any, projection: Projection, indices: Indices) -> _Place:
        import torch

        weight = projection.weight_in(model.get_parameter(projection.parameter).detach())
        return cls(weight, projection.neuron_dim, torch.from_numpy(indices).to(weight.device))

    def read(self) -> Tensor:
        return self.weight.index_select(self.dim, self.indices)

    def write(self, vectors: Tensor) -> None:
        self.weight.index_copy_(self.dim, self.indices, vectors.to(self.weight))


def _check_fits(neurons: NeuronSet, model: Any, original: WeightSource) -> None:
    check_plain(model, "whose vectors would take the place of the restored ones")
    if not len(neurons):
        raise NeuronError("The neuron set is empty: there is nothing to restore.")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in neurons.modules():
        projection = neurons.projections[name]
        weight = parameters.get(projection.parameter)
        if weight is None or not projection.fits(weight.shape):
            found = "no such weight" if weight is None else f"a weight of {list(weight.shape)}"
            raise NeuronError(
                f"{name}: this {type(model).__name__} has {found}, and the neurons are of one of "
                f"{list(projection.weight_shape)}. They were chosen in another model."
            )
    check_weights(original, [neurons.projections[name] for name in neurons.modules()])


def _row(
    group: str,
    kind: str,
    num_neurons: int,
    found: Mapping[str, float],
    trained: Mapping[str, float],
) -> dict[str, Any]:
    losses = {f"{name}_loss": loss for name, loss in found.items()}
    rises = {f"{name}_rise": loss - trained[name] for name, loss in found.items()}
    return {"group": group, "kind": kind, "num_neurons": num_neurons, **losses, **rises}


def _distances(neurons: NeuronSet, scores: NeuronScores) -> NDArray[np.float64]:
    """``1 - cos`` of each neuron of the set, in canonical order."""
    for name in neurons.modules():
        if scores.projections.get(name) != neurons.projections[name]:
            raise NeuronError(
                f"{name}: {'differs from' if name in scores.projections else 'is not among'} the "
                "projections that were scored. Give the scores of the model that the neurons are of."
            )
    return np.concatenate([scores.distances[name][indices] for name, indices in neurons.items()])


def _some(neurons: NeuronSet, positions: Indices) -> NeuronSet:
    """The neurons at some positions of the set's canonical order."""
    chosen = np.zeros(len(neurons), dtype=bool)
    chosen[positions] = True
    parts = np.split(chosen, np.cumsum([len(indices) for _, indices in neurons.items()])[:-1])
    return NeuronSet(
        neurons.projections.values(),
        {name: indices[part] for (name, indices), part in zip(neurons.items(), parts, strict=True)},
        neurons.provenance,
    )


def _bands(neurons: NeuronSet, layers_per_band: int | None) -> list[Group]:
    """Bands of the layers that have candidates; those without a chosen neuron are left out."""
    by_layer: dict[int, list[str]] = {}
    for name, projection in neurons.projections.items():
        if projection.layer is not None:
            by_layer.setdefault(projection.layer, []).append(name)
    layers = sorted(by_layer)
    if layers_per_band is None:
        layers_per_band = max(1, -(-len(layers) // _MOST_BANDS))
    if layers_per_band < 1:
        raise NeuronError(f"layers_per_band is {layers_per_band}; it must be at least 1.")
    bands = []
    for start in range(0, len(layers), layers_per_band):
        band = layers[start : start + layers_per_band]
        inside = NeuronSet(
            neurons.projections.values(),
            {name: neurons[name] for layer in band for name in by_layer[layer]},
            neurons.provenance,
        )
        if len(inside):
            title = f"layer {band[0]}" if len(band) == 1 else f"layers {band[0]}-{band[-1]}"
            bands.append(Group(title, "layer", inside))
    return bands
