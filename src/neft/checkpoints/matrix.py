"""Where a source of weights keeps the matrix of a projection.

That of one expert of a mixture is part of a tensor ``[experts, ...]``, as in the model; or, in files of
the layout that most mixtures were published in, a tensor of its own, or one for gate and one for up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neft.errors import CheckpointError
from neft.neurons import Projection

if TYPE_CHECKING:
    from torch import Tensor

    from neft.checkpoints.source import WeightSource

# What files call the layers of an expert whose outputs, in this order, a stacked parameter holds.
_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}


@dataclass(frozen=True)
class Matrix:
    """The weight of one projection in a source, or any one tensor, not read yet."""

    source: WeightSource
    tensors: tuple[str, ...]
    """Whose rows, in this order, are the matrix."""
    expert: int | None
    """Which matrix of a tensor of three dimensions it is."""

    @property
    def name(self) -> str:
        """For messages."""
        if self.expert is not None:
            return f"{self.tensors[0]}[{self.expert}]"
        return " + ".join(self.tensors)

    @property
    def shape(self) -> tuple[int, ...]:
        """``[rows, columns]``, if it is a matrix."""
        shapes = [self.source.tensors[name].shape for name in self.tensors]
        if self.expert is not None:
            return shapes[0][1:]
        if len(shapes) == 1:
            return shapes[0]
        return sum(shape[0] for shape in shapes), *shapes[0][1:]

    @property
    def dtype(self) -> str:
        """As stored."""
        return self.source.tensors[self.tensors[0]].dtype

    def read(self) -> Tensor:
        """The matrix, on the CPU, in the dtype in which it is stored; treat it as read-only.

        Raises:
            CheckpointError: it cannot be read.
        """
        import torch

        parts = [self.source.read(name, self.expert) for name in self.tensors]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def find_matrix(source: WeightSource, projection: Projection) -> Matrix | None:
    """Where the weight of a projection is; see ``WeightSource.matrix``.

    Raises:
        CheckpointError: more than one tensor could be meant, or they do not fit together.
    """
    if projection.expert is None:
        found = source.find(projection.parameter)
        return None if found is None else Matrix(source, (found,), None)
    layouts: list[tuple[tuple[str, ...], int | None]] = [
        ((projection.parameter,), projection.expert)
    ]
    if not projection.transposed:  # the layers of these files are not
        layouts += [(names, None) for names in _names_on_disk(projection)]
    # By their exact names first: the search for others looks at every tensor.
    for find in (source.find_exact, source.find):
        for wanted, expert in layouts:
            names = tuple(name for each in wanted if (name := find(each)) is not None)
            if len(names) == len(wanted):
                return _checked(Matrix(source, names, expert))
    return None


def _names_on_disk(projection: Projection) -> Iterator[tuple[str, ...]]:
    """What files may call the layers that make up an expert's matrix."""
    module, _, attribute = projection.parameter.rpartition(".")
    for parts in _PARTS[attribute]:
        yield tuple(f"{module}.{projection.expert}.{part}.weight" for part in parts)


def _checked(matrix: Matrix) -> Matrix:
    label, infos = matrix.source.label, [matrix.source.tensors[name] for name in matrix.tensors]
    if matrix.expert is not None:
        shape = infos[0].shape
        if len(shape) != 3 or shape[0] <= matrix.expert:
            raise CheckpointError(
                f"{label}: {matrix.tensors[0]} has shape {list(shape)}, in which there is no matrix of "
                f"expert {matrix.expert}. Is it a checkpoint of the same model?"
            )
    elif len({(info.dtype, info.shape[1:]) for info in infos}) > 1:
        described = ", ".join(f"{info.dtype} {list(info.shape)}" for info in infos)
        raise CheckpointError(
            f"{label}: {matrix.name} make up one matrix, but are stored as {described}. The checkpoint "
            "mixes two, or is partly quantized."
        )
    return matrix
