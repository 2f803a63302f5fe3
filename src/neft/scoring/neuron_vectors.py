"""Neurons as rows, some at a time, wherever they lie in a weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from neft.checkpoints import WeightSource
from neft.neurons import Projection
from neft.scoring.weights import not_finite, read_weight

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-30
"""Stands for the squared length of a neuron that is zero, by which nothing can be divided."""

# Neurons at a time: their float64 copies stay far below the size of their matrix.
_AT_ONCE = 512


def neuron_vectors(source: WeightSource, projection: Projection) -> Iterator[tuple[int, Tensor]]:
    """The vectors of a projection's neurons, a slab at a time.

    Yields:
        Index of the first neuron, and float64 ``[some neurons, vector_length]``.

    Raises:
        CheckpointError: the weight is missing, cannot be read, or is not finite.
    """
    weight = read_weight(source, projection)
    dim = projection.neuron_dim
    for start in range(0, projection.num_neurons, _AT_ONCE):
        slab = weight.narrow(dim, start, min(_AT_ONCE, projection.num_neurons - start)).double()
        vectors = slab if dim == 0 else slab.T
        if len(bad := torch.nonzero(~vectors.isfinite().all(1))):
            raise not_finite(source, projection, start + int(bad[0]))
        yield start, vectors
