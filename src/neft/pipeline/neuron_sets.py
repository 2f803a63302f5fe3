"""Neuron sets as a library: joined, intersected and subtracted, if they are of one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import combinations
from operator import and_, or_, sub
from pathlib import Path
from typing import Any

from neft.errors import NeuronError
from neft.neurons import NeuronSet
from neft.pipeline.identity import MODEL_IDENTITY
from neft.pipeline.selection import load_selection

OPERATIONS: Mapping[str, Callable[[NeuronSet, NeuronSet], NeuronSet]] = {
    "union": or_,
    "intersect": and_,
    "subtract": sub,
}
"""Name on the command line -> what it does with two sets."""


def load_neurons(path: Path) -> NeuronSet:
    """The neurons of a file or of an adapter's folder.

    Raises:
        NeuronError: it holds scores, or cannot be read.
        AdapterError: the adapter is incomplete.
    """
    if not path.exists():
        raise NeuronError(f"{path}: no such file or folder.")
    found = load_selection(path)
    if isinstance(found, NeuronSet):
        return found
    raise NeuronError(
        f"{path}: holds scores of all neurons, from which none is chosen yet. Choose some first: neft "
        f"select {path} --percent 9 -o neurons.json"
    )


def combine(operation: str, files: Sequence[Path]) -> NeuronSet:
    """Combine sets from left to right.

    Args:
        operation: one of ``OPERATIONS``.
        files: two or more, of one model; files or adapters.

    Raises:
        NeuronError: fewer than two, sets of different models, or a result without neurons.
        AdapterError: an adapter is incomplete.
    """
    if len(files) < 2:
        raise NeuronError(f"There are {len(files)} sets to combine; give two or more.")
    sets = [load_neurons(file) for file in files]
    for (file, chosen), (other_file, other) in combinations(zip(files, sets, strict=True), 2):
        _check_one_model(file, chosen, other_file, other)
    result = reduce(OPERATIONS[operation], sets)
    if not len(result):
        raise NeuronError(
            f"{operation} of {', '.join(map(str, files))}: no neuron is left, and an empty set can train "
            "nothing."
        )
    result.provenance = _provenance(operation, files, sets)
    return result


def _provenance(operation: str, files: Sequence[Path], sets: Sequence[NeuronSet]) -> dict[str, Any]:
    operands = {str(file): chosen.provenance for file, chosen in zip(files, sets, strict=True)}
    models = [
        chosen.provenance[MODEL_IDENTITY] for chosen in sets if MODEL_IDENTITY in chosen.provenance
    ]
    known = {MODEL_IDENTITY: models[0]} if models else {}
    return {"operation": operation, "operands": operands} | known


def _check_one_model(file: Path, a: NeuronSet, other_file: Path, b: NeuronSet) -> None:
    """Refuse two sets that are of different models, as far as sets can tell."""
    remedy = "Combine sets of one base model."
    both = f"{file} and {other_file}"
    models = [chosen.provenance.get(MODEL_IDENTITY) for chosen in (a, b)]
    if None not in models and models[0] != models[1]:
        raise NeuronError(
            f"{both}: were chosen in different base models ({models[0]} and {models[1]}). {remedy}"
        )
    for name, projection in a.projections.items():
        other = b.projections.get(name, projection)
        if other != projection:
            raise NeuronError(
                f"{both}: {name} has {projection.num_neurons} {projection.axis} neurons of length "
                f"{projection.vector_length} in one, and {other.num_neurons} {other.axis} neurons of "
                f"length {other.vector_length} in the other. {remedy}"
            )
    stacks = [_stacks(a), _stacks(b)]
    if all(stacks) and not stacks[0] & stacks[1]:
        raise NeuronError(
            f"{both}: the layers are {', '.join(sorted(stacks[0]))} in one, and "
            f"{', '.join(sorted(stacks[1]))} in the other. {remedy}"
        )


def _stacks(neurons: NeuronSet) -> set[str]:
    """What the stacks of layers are called, e.g. ``model.layers``."""
    return {
        name.partition(f".{projection.layer}.")[0]
        for name, projection in neurons.projections.items()
        if projection.layer is not None
    }
