"""Arrays by module and columns over all neurons: from one to the other and back.

The canonical order of neurons, as everywhere in this package: by layer, then projection, then index.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from neft.analysis.table import Column
from neft.errors import NeuronError
from neft.neurons import Projection

Value = TypeVar("Value", bound=np.generic)


def canonical(projections: Iterable[Projection]) -> dict[str, Projection]:
    """Projections by module name, in canonical order."""
    return {p.name: p for p in sorted(projections, key=lambda projection: projection.order)}


def neuron_columns(projections: Iterable[Projection]) -> dict[str, Column]:
    """Which neuron a row is: one row a neuron of ``projections``, in canonical order.

    Returns:
        ``module`` and ``role`` (strings), ``layer`` and ``index`` (whole numbers). Where a projection
        lies outside the stack of layers, ``layer`` is a list, with ``None`` for its neurons.
    """
    ordered = canonical(projections).values()
    counts = [projection.num_neurons for projection in ordered]
    layers = [projection.layer for projection in ordered]
    layer = np.repeat(np.array(layers), counts)
    return {
        "module": _repeated([projection.name for projection in ordered], counts),
        "layer": layer.tolist() if None in layers else layer,
        "role": _repeated([projection.role for projection in ordered], counts),
        "index": np.concatenate([np.arange(count) for count in (0, *counts)]),
    }


def concatenated(
    projections: Iterable[Projection], arrays: Mapping[str, NDArray[Value]]
) -> NDArray[Value]:
    """One column over all neurons of ``projections``, in canonical order.

    Args:
        projections: at least one.
        arrays: module name -> array ``[num_neurons]``; other modules than these are left out.

    Raises:
        NeuronError: a projection without an array, or with one of another length.
    """
    parts = []
    for name, projection in canonical(projections).items():
        if name not in arrays:
            raise NeuronError(f"{name}: has no values; there are values of {_some(arrays)}.")
        if arrays[name].shape != (projection.num_neurons,):
            raise NeuronError(
                f"{name}: values of shape {arrays[name].shape}, expected ({projection.num_neurons},)."
            )
        parts.append(arrays[name])
    return np.concatenate(parts)


def by_module(
    projections: Iterable[Projection], column: NDArray[Value]
) -> dict[str, NDArray[Value]]:
    """The inverse of ``concatenated``: module name -> its part of ``column``."""
    parts: dict[str, NDArray[Value]] = {}
    start = 0
    for name, projection in canonical(projections).items():
        parts[name] = column[start : start + projection.num_neurons]
        start += projection.num_neurons
    assert start == len(column), f"{len(column)} values for {start} neurons"
    return parts


def _repeated(values: list[str], counts: list[int]) -> NDArray[Any]:
    # Arrays of strings would hold every letter of every name once a neuron; these hold references.
    return np.repeat(np.array(values, dtype=object), counts)


def _some(arrays: Mapping[str, object]) -> str:
    return f"{len(arrays)} others, e.g. {next(iter(arrays))}" if arrays else "no module"
