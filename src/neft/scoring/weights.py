"""Weights to be analysed: one matrix at a time, checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from neft.checkpoints import WeightSource
from neft.errors import CheckpointError
from neft.neurons import Projection
from neft.scoring.distance import LARGEST

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = ("float64", "float32", "bfloat16", "float16")


def check_weights(source: WeightSource, projections: Iterable[Projection]) -> None:
    """Check names, shapes and dtypes before anything is read.

    Raises:
        CheckpointError: a weight that is missing, of another shape, or quantized.
    """
    for projection in projections:
        matrix = source.matrix(projection)
        if matrix.shape != projection.weight_shape:
            raise CheckpointError(
                f"{source.label}: {matrix.name} has shape {list(matrix.shape)}, but these neurons need "
                f"{list(projection.weight_shape)}. Give a checkpoint of the model they belong to."
            )
        for name in matrix.tensors:
            check_dtype(source, name)


def check_dtype(source: WeightSource, tensor: str) -> None:
    """Check that a tensor holds plain numbers.

    Raises:
        CheckpointError: it is quantized.
    """
    dtype = source.tensors[tensor].dtype
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"{source.label}: {tensor} is stored as {dtype}; neurons can be compared in "
            f"{', '.join(_DTYPES)}. Give the checkpoint that was not quantized."
        )


def read_weight(source: WeightSource, projection: Projection) -> Tensor:
    """The stored weight, ``weight_shape`` of ``projection``, on the CPU; treat it as read-only."""
    return source.matrix(projection).read()


def not_finite(source: WeightSource, projection: Projection, neuron: int) -> CheckpointError:
    """The error that names a neuron with a weight that is not finite, or too large to be squared."""
    vector = read_weight(source, projection).select(projection.neuron_dim, neuron).double()
    bad = vector[~(vector.abs() <= LARGEST)]
    value = bad[0].item() if len(bad) else "too large"
    return CheckpointError(
        f"{source.label}: {projection.name}: a weight of neuron {neuron} is {value}. The training run "
        "that wrote it broke down; give an earlier checkpoint."
    )
