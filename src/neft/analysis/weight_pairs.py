"""Every weight of a model in two checkpoints of it: matched by name, read one pair at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neft.checkpoints import Matrix, WeightSource, find_matrix
from neft.errors import CheckpointError
from neft.neurons import Projection
from neft.projections import find_projections
from neft.scoring.weights import check_dtype

if TYPE_CHECKING:
    from torch import nn

# Elements that one thread takes at once: their float64 copies fit the cache of one core.
_BLOCK = 2**16


@dataclass(frozen=True)
class WeightPair:
    """One weight of the model, in both checkpoints."""

    parameter: str
    """As in ``model.named_parameters()``; of experts, the name of their projection."""
    sides: tuple[Matrix, Matrix]
    """Where it is in the two checkpoints."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The same on both sides."""
        return self.sides[0].shape

    def read(self) -> tuple[Tensor, Tensor]:
        """Before and after, on the CPU, as stored; treat them as read-only."""
        before, after = (side.read() for side in self.sides)
        return before, after


@dataclass(frozen=True)
class Pairing:
    """What can be compared, and what cannot."""

    pairs: Sequence[WeightPair]
    """In the model's order; weights that share memory (a tied head) once."""
    left_out: Mapping[str, str]
    """Parameter -> why it is not compared: it is in one checkpoint alone, or has two shapes."""


def pair_weights(before: WeightSource, after: WeightSource) -> Pairing:
    """Match the weights of two checkpoints of one model; only headers are read, but for copies.

    A head that is tied to the embeddings is the same weight, whether or not a checkpoint holds a copy of
    it; one that fine-tuning untied counts as a weight of its own, which was the embeddings before.

    Args:
        before: a folder or Hub id with ``config.json``, or a module without adapters.
        after: the same model after fine-tuning.

    Raises:
        CheckpointError: a weight that is quantized, or whose name could mean several.
    """
    pairs: list[WeightPair] = []
    left_out: dict[str, str] = {}
    experts = _experts(before.network)
    for names in _parameters(before.network):
        for old, new in _sides(before, after, names, experts.get(names[0])):
            if not old or not new:
                lacking = after if old else before
                left_out[next(iter(old or new), names[0])] = f"is not in {lacking.label}"
                continue
            for parameter, matrix in new.items():
                pair = WeightPair(parameter, (old.get(parameter, next(iter(old.values()))), matrix))
                shapes = [side.shape for side in pair.sides]
                if shapes[0] == shapes[1]:
                    pairs.append(pair)
                else:
                    left_out[parameter] = f"has the shapes {list(shapes[0])} and {list(shapes[1])}"
    for pair in pairs:
        for side in pair.sides:
            for tensor in side.tensors:
                check_dtype(side.source, tensor)
    return Pairing(pairs, left_out)


def _experts(network: nn.Module) -> dict[str, list[Projection]]:
    """Parameter -> the matrices of the experts that are stacked in it."""
    table: dict[str, list[Projection]] = {}
    for projection in find_projections(network, ["*"]):
        if projection.expert is not None:
            table.setdefault(projection.parameter, []).append(projection)
    return table


def _sides(
    before: WeightSource,
    after: WeightSource,
    names: Sequence[str],
    experts: Sequence[Projection] | None,
) -> Iterator[tuple[dict[str, Matrix], dict[str, Matrix]]]:
    """What the two checkpoints have of one parameter, by name; experts one by one."""
    if experts is None:
        yield _distinct(before, names), _distinct(after, names)
        return
    for projection in experts:
        found = (find_matrix(source, projection) for source in (before, after))
        old, new = ({} if side is None else {projection.name: side} for side in found)
        yield old, new


def _parameters(network: nn.Module) -> list[list[str]]:
    """The names of each parameter: more than one where it is tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _distinct(source: WeightSource, names: Sequence[str]) -> dict[str, Matrix]:
    """Parameter -> where it is, of those names whose tensors are no copies of the first one."""
    found = {name: tensor for name in names if (tensor := source.find(name)) is not None}
    first = next(iter(found.values()), None)
    return {
        name: Matrix(source, (tensor,), None)
        for name, tensor in found.items()
        if tensor == first or (first is not None and _differ(source, first, tensor))
    }


def _differ(source: WeightSource, a: str, b: str) -> bool:
    return not torch.equal(source.read(a), source.read(b))


@dataclass(frozen=True)
class SquaredSums:
    """Of one weight, or of several, in float64."""

    change: float = 0.0
    """``|after - before|²``."""
    norm: float = 0.0
    """``|before|²``."""

    def __add__(self, other: SquaredSums) -> SquaredSums:
        """Of both together."""
        return SquaredSums(self.change + other.change, self.norm + other.norm)

    @property
    def relative_change(self) -> float | None:
        """``|after - before| / |before|``; ``None`` for what was zero and is not."""
        if self.change == 0:
            return 0.0
        return math.sqrt(self.change / self.norm) if self.norm else None


def squared_sums(pair: WeightPair, before: Tensor, after: Tensor, pool: Executor) -> SquaredSums:
    """How far a weight moved, and how long it was.

    Args:
        pair: names the tensors in errors.
        before: from ``pair.read()``.
        after: likewise.
        pool: from ``neft.scoring.distance.scoring_threads``.

    Raises:
        CheckpointError: a value that is not finite.
    """
    sums = list(pool.map(_block_sums, _blocks(before), _blocks(after)))
    total = SquaredSums(math.fsum(c for c, _ in sums), math.fsum(n for _, n in sums))
    if not math.isfinite(total.change):
        for side, tensor in zip(pair.sides, (before, after), strict=True):
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"{side.source.label}: {side.name} holds a value that is not finite. The training "
                    "run that wrote it broke down; give an earlier checkpoint."
                )
    return total


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    return iter(tensor.reshape(-1).split(_BLOCK))


def _block_sums(before: Tensor, after: Tensor) -> tuple[float, float]:
    a = before.double()
    d = after.double() - a
    return float(d @ d), float(a @ a)
