"""What fine-tuning did to the vectors of neurons: their length and their direction."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from neft.analysis.neuron_columns import canonical
from neft.checkpoints import WeightSource
from neft.neurons import Projection
from neft.scoring.distance import cosine_distances, scoring_threads
from neft.scoring.weights import check_weights, not_finite, read_weight

# Neurons whose lengths one thread takes at once. Column neurons are read in runs of that many elements.
_SLAB = 64


def neuron_changes(
    before: WeightSource,
    after: WeightSource,
    projections: Iterable[Projection],
    *,
    progress: bool = True,
) -> dict[str, NDArray[np.float64]]:
    """Length and direction of every neuron's vector before and after fine-tuning.

    Both sides are read one matrix at a time; sums are float64, and small changes are not lost to
    cancellation.

    Args:
        before: the base model.
        after: the same model, trained, adapter merged.
        projections: whose neurons; see ``find_projections``.
        progress: whether to show a progress bar on stderr, if that is a terminal.

    Returns:
        Columns over all neurons, in canonical order: ``norm_before``, ``norm_after``; ``change``, which
        is ``|after - before| / |before|``, 0 for a neuron that stayed and infinite for one that was zero
        and is not; ``turn``, which is ``1 - cos(before, after)`` in 0..2, 1 if one side is zero.

    Raises:
        CheckpointError: weights that are missing, of another shape, quantized or not finite.
    """
    ordered = canonical(projections).values()
    for source in (before, after):
        check_weights(source, ordered)
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    parts: dict[str, list[Tensor]] = {}
    with scoring_threads() as pool:
        for projection in track(
            ordered, "Changes", console=console, transient=True, disable=hidden
        ):
            for name, values in _changes(before, after, projection, pool).items():
                parts.setdefault(name, []).append(values)
    return {name: torch.cat(values).numpy() for name, values in parts.items()}


def _changes(
    before: WeightSource, after: WeightSource, projection: Projection, pool: Executor
) -> dict[str, Tensor]:
    a, b = read_weight(before, projection), read_weight(after, projection)
    dim = projection.neuron_dim
    slabs = zip(a.split(_SLAB, dim), b.split(_SLAB, dim), strict=True)
    norms = list(pool.map(lambda slab: _norms(slab[0], slab[1], 1 - dim), slabs))
    norm_before, norm_after, moved = (torch.cat(values) for values in zip(*norms, strict=True))
    for source, norm in ((before, norm_before), (after, norm_after)):
        if len(bad := torch.nonzero(~norm.isfinite())):
            raise not_finite(source, projection, int(bad[0]))
    return {
        "norm_before": norm_before,
        "norm_after": norm_after,
        "change": torch.where(moved == 0, 0.0, moved / norm_before),
        "turn": cosine_distances(a, b, dim, pool),
    }


def _norms(before: Tensor, after: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths of each vector before, after, and of the difference."""
    a, b = before.double(), after.double()
    norm_a, norm_b, moved = (torch.linalg.vector_norm(x, dim=dim) for x in (a, b, b - a))
    return norm_a, norm_b, moved
