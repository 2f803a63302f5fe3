"""Cosine distances by their definition, in eighty decimal digits: slow and plainly right."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, localcontext

import numpy as np
import numpy.typing as npt
from torch import Tensor


def cosine_distance(a: Sequence[float], b: Sequence[float]) -> float:
    """``1 - a·b / (|a| |b|)``; 0 if both are zero, 1 if one is."""
    with localcontext(prec=80):
        x, y = [Decimal(value) for value in a], [Decimal(value) for value in b]
        norms = [sum(value * value for value in vector).sqrt() for vector in (x, y)]
        if not all(norms):
            return float(any(norms))
        dot = sum(p * q for p, q in zip(x, y, strict=True))
        return float(1 - dot / (norms[0] * norms[1]))


def cosine_distances(before: Tensor, after: Tensor, neuron_dim: int) -> npt.NDArray[np.float64]:
    """Of each neuron of two matrices of any dtype; neurons are their rows (0) or columns (1)."""
    if neuron_dim == 1:
        before, after = before.T, after.T
    # Every 16- and 32-bit float is a float64.
    pairs = zip(before.double().tolist(), after.double().tolist(), strict=True)
    return np.array([cosine_distance(a, b) for a, b in pairs])
