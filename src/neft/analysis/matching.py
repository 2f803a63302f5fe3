"""Whether two results are of one model, as far as projections tell."""

from __future__ import annotations

from collections.abc import Mapping

from neft.errors import NeuronError
from neft.neurons import Projection


def check_same_projections(
    a: Mapping[str, Projection], b: Mapping[str, Projection], names: tuple[str, str]
) -> None:
    """Refuse to compare neurons of different projections.

    Args:
        a: projections by module name.
        b: the others.
        names: what to call the two in the message.

    Raises:
        NeuronError: a module that only one side has, or that differs; the message shows the first.
    """
    remedy = "Compare the same projections of models of one shape."
    for mine, other, (holder, lacker) in ((a, b, names), (b, a, names[::-1])):
        if lacking := [name for name in mine if name not in other]:
            raise NeuronError(
                f"{holder} and {lacker}: {len(lacking)} of the {len(mine)} projections of {holder} are "
                f"not among the {len(other)} of {lacker}, e.g. {lacking[0]}. {remedy}"
            )
    for name, projection in a.items():
        if b[name] != projection:
            raise NeuronError(
                f"{names[0]} and {names[1]}: {name} is {_described(projection)} in {names[0]} and "
                f"{_described(b[name])} in {names[1]}. {remedy}"
            )


def _described(projection: Projection) -> str:
    place = "outside the layers" if projection.layer is None else f"layer {projection.layer}"
    return (
        f"{projection.num_neurons} {projection.axis} neurons of length {projection.vector_length} "
        f"({projection.role}, {place}{', transposed' if projection.transposed else ''})"
    )
