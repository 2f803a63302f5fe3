"""Utilization: how much a neuron's vector resembles what the model holds (paper, section 6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from neft import __version__
from neft.analysis.hidden_states import HiddenStates
from neft.analysis.neuron_columns import by_module, canonical, concatenated, neuron_columns
from neft.analysis.table import Table
from neft.checkpoints import WeightSource
from neft.errors import DataError, NeuronError
from neft.neurons import Indices, Projection
from neft.scoring.distance import scoring_threads
from neft.scoring.weights import check_weights, not_finite, read_weight
from neft.streaming import layers_of

UTILIZATION_FORMAT = "neft-utilization"
_VERSION = 1

# Elements of a matrix that one thread works on at once: their float64 copies fit the cache of one core.
_BLOCK = 2**18


@dataclass(frozen=True)
class Utilization:
    """How much each neuron is used, by its vector's resemblance to hidden states."""

    projections: Mapping[str, Projection]
    """By module name, in canonical order."""
    values: Mapping[str, NDArray[np.float64]]
    """Module name -> ``[num_neurons]``, in 0..1."""
    peaks: Mapping[str, Indices]
    """Module name -> ``[num_neurons]``: the layer whose hidden state each neuron resembles most."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values."""

    def __len__(self) -> int:
        """Number of neurons."""
        return sum(projection.num_neurons for projection in self.projections.values())

    def table(self) -> Table:
        """One row a neuron: ``module, layer, role, index, utilization, peak``."""
        projections = self.projections.values()
        return Table(
            {
                **neuron_columns(projections),
                "utilization": concatenated(projections, self.values),
                "peak": concatenated(projections, self.peaks),
            },
            {
                "format": UTILIZATION_FORMAT,
                "version": _VERSION,
                "projections": [projection.to_dict() for projection in projections],
                "provenance": dict(self.provenance),
            },
        )

    def save(self, path: Path) -> None:
        """Write ``table`` as one Parquet file, atomically."""
        self.table().save(path)

    @classmethod
    def load(cls, path: Path) -> Utilization:
        """Read a file that ``save`` wrote.

        Raises:
            DataError: it is missing, torn, or something else.
        """
        table = Table.load(path)
        if table.about.get("format") != UTILIZATION_FORMAT:
            raise DataError(f"{path}: a table of neft, but not one of utilization.")
        if table.about["version"] != _VERSION:
            raise DataError(
                f"{path}: version {table.about['version']!r} of the utilization format is unknown to "
                f"this release, which reads version {_VERSION}. Upgrade neft."
            )
        projections = canonical(map(Projection.from_dict, table.about["projections"]))
        values, peaks = (
            by_module(projections.values(), np.asarray(table[name]))
            for name in ("utilization", "peak")
        )
        return cls(projections, values, peaks, table.about["provenance"])


def neuron_utilization(
    weights: WeightSource,
    hidden: HiddenStates,
    projections: Iterable[Projection],
    *,
    progress: bool = True,
) -> Utilization:
    """The largest ``|r|`` of each neuron with a hidden state of its own layer or above (section 6).

    r is Pearson's correlation, over the coordinates of the residual stream, of a neuron's vector with a
    mean hidden state. A neuron without variance, such as one that is zero, correlates with nothing: its
    utilization is 0, and its peak its own layer. So does a hidden state without variance.

    Weights are read one matrix at a time; sums are float64.

    Args:
        weights: of the model that ``hidden`` was taken from, adapter merged.
        hidden: from ``mean_hidden_states``.
        projections: whose neurons, all inside the stack of layers; see ``find_projections``.
        progress: whether to show a progress bar on stderr, if that is a terminal.

    Raises:
        NeuronError: a projection outside the layers or whose vectors are not as long as the hidden
            states, or hidden states of another number of layers than the model's.
        CheckpointError: weights that are missing, of another shape, quantized or not finite.
    """
    ordered = canonical(projections)
    _check(weights, hidden, ordered.values())
    directions = _directions(torch.from_numpy(hidden.means))
    console = Console(stderr=True)
    hidden_bar = not (progress and console.is_terminal)
    values: dict[str, NDArray[np.float64]] = {}
    peaks: dict[str, Indices] = {}
    with scoring_threads() as pool:
        for name, projection in track(
            ordered.items(), "Utilization", console=console, transient=True, disable=hidden_bar
        ):
            strongest, place = _strongest(weights, projection, directions, pool)
            values[name], peaks[name] = strongest.numpy(), place.numpy()
    return Utilization(
        ordered,
        values,
        peaks,
        {
            "weights": weights.label,
            "num_texts": hidden.num_texts,
            "num_tokens": hidden.num_tokens,
            "neft": __version__,
        },
    )


def _check(weights: WeightSource, hidden: HiddenStates, projections: Iterable[Projection]) -> None:
    num_layers = len(layers_of(weights.network))
    if hidden.num_layers != num_layers:
        raise NeuronError(
            f"{weights.label} has {num_layers} layers, and the hidden states are of "
            f"{hidden.num_layers}. Take them from the same model."
        )
    for projection in projections:
        if projection.layer is None:
            raise NeuronError(
                f"{projection.name}: lies outside the stack of layers, so no hidden state is above it. "
                "Leave it out of the analysis."
            )
        if projection.vector_length != hidden.hidden_size:
            raise NeuronError(
                f"{projection.name}: its neurons have length {projection.vector_length}, and hidden "
                f"states {hidden.hidden_size}: they neither read nor write the residual stream. Leave "
                "it out of the analysis, or give its other axis."
            )
    check_weights(weights, projections)


def _directions(vectors: Tensor) -> Tensor:
    """Rows less their mean, at unit length; zero where a row has no variance."""
    centred, norms = _centred(vectors)
    return torch.where(norms > 0, centred / norms, 0.0)


def _centred(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Rows less their mean, and their lengths ``[rows, 1]``: exactly 0 for a row of equal values."""
    # Less their first value before their mean, whose rounding would leave equal values as mere noise.
    shifted = vectors - vectors[:, :1]
    centred = shifted - shifted.mean(1, keepdim=True)
    return centred, torch.linalg.vector_norm(centred, dim=1, keepdim=True)


def _strongest(
    source: WeightSource, projection: Projection, directions: Tensor, pool: Executor
) -> tuple[Tensor, Tensor]:
    """Largest ``|r|`` of each neuron and the layer where: ``[num_neurons]`` each."""
    assert projection.layer is not None
    own_and_above = directions[projection.layer :]
    neuron_dim = projection.neuron_dim
    slabs = read_weight(source, projection).split(
        max(1, _BLOCK // projection.vector_length), neuron_dim
    )
    found = pool.map(lambda slab: _strongest_of_slab(slab, neuron_dim, own_and_above), slabs)
    values, peaks = (torch.cat(parts) for parts in zip(*found, strict=True))
    if len(bad := torch.nonzero(values.isnan())):
        raise not_finite(source, projection, int(bad[0]))
    return values, peaks + projection.layer


def _strongest_of_slab(slab: Tensor, neuron_dim: int, directions: Tensor) -> tuple[Tensor, Tensor]:
    vectors = slab.double()
    centred, norms = _centred(vectors if neuron_dim == 0 else vectors.T)
    # Directions sum to zero, so centring changes nothing here but the rounding.
    correlations = (centred @ directions.T).abs() / norms
    correlations.masked_fill_(norms == 0, 0.0)
    # Squares beyond float64 would make it 0.
    correlations.masked_fill_(~norms.isfinite(), torch.nan)
    values, peaks = correlations.max(1)
    return values.clamp(max=1.0), peaks
