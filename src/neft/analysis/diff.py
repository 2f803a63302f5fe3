"""Which layers and projections fine-tuning moved: two checkpoints, weight by weight."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import track

from neft.analysis.table import Table
from neft.analysis.weight_pairs import SquaredSums, WeightPair, pair_weights, squared_sums
from neft.checkpoints import WeightSource
from neft.neurons import ROLE_ORDER, Projection
from neft.projections import find_projections
from neft.scoring.distance import cosine_distances, scoring_threads
from neft.scoring.weights import check_weights

if TYPE_CHECKING:
    from torch import nn

# What has no neurons comes after the projections, in this order.
_OTHER_ROLES = ("norm", "bias", "embedding", "head", "other")


def diff_table(before: WeightSource, after: WeightSource, *, progress: bool = True) -> Table:
    """How far every weight of a model moved between two checkpoints.

    Both sides are read one weight at a time; sums are float64, and small changes are not lost to
    cancellation.

    Args:
        before: a folder or Hub id with ``config.json``, or a module; an adapter counts, on either side,
            as far as it is merged.
        after: the same model after fine-tuning.
        progress: whether to show a progress bar on stderr, if that is a terminal.

    Returns:
        A row a weight: ``weight`` (as in ``model.named_parameters()``), ``layer`` (``None`` outside the
        layers), ``role`` (of a projection; ``norm``, ``bias``, ``embedding``, ``head`` or ``other`` for
        what has no neurons), ``num_parameters``, ``change`` (``|after - before| / |before|``; ``None``
        for what was zero and is not), ``share`` of the model's squared change (``None`` if there is
        none), ``num_neurons``, and the mean and largest ``1 - cos`` of the neurons: ``mean_turn`` and
        ``max_turn`` (``None`` without neurons). ``about`` names the sides, the squared change, and in
        ``left_out`` the weights that cannot be compared, with the reason.

    Raises:
        ArchitectureError: a model without linear layers.
        CheckpointError: projections that are missing or of another shape, or weights that are quantized
            or not finite.
    """
    projections = {p.name: p for p in find_projections(before.network, ["*"])}
    for source in (before, after):
        check_weights(source, projections.values())
    pairing = pair_weights(before, after)
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    rows: list[dict[str, Any]] = []
    sums: list[SquaredSums] = []
    with scoring_threads() as pool:
        for pair in track(
            pairing.pairs, "Comparing", console=console, transient=True, disable=hidden
        ):
            projection = projections.get(pair.parameter.removesuffix(".weight"))
            row, found = _compared(pair, projection, before.network, pool)
            rows.append(row)
            sums.append(found)
    total = sum(sums, SquaredSums())
    for row, found in zip(rows, sums, strict=True):
        row |= {"squared_change": found.change, "squared_norm": found.norm}
        row["share"] = found.change / total.change if total.change else None
    columns = {name: [row[name] for row in rows] for name in _COLUMNS}
    about = {
        "before": before.label,
        "after": after.label,
        "change": total.relative_change,
        "left_out": dict(pairing.left_out),
    }
    return Table(columns, about)


_COLUMNS = (
    "weight",
    "layer",
    "role",
    "num_parameters",
    "change",
    "share",
    "num_neurons",
    "mean_turn",
    "max_turn",
    "squared_change",
    "squared_norm",
)


def _compared(
    pair: WeightPair, projection: Projection | None, network: nn.Module, pool: Executor
) -> tuple[dict[str, Any], SquaredSums]:
    before, after = pair.read()
    sums = squared_sums(pair, before, after, pool)
    row: dict[str, Any] = {
        "weight": pair.parameter,
        "layer": _layer(pair.parameter) if projection is None else projection.layer,
        "role": _role(network, pair.parameter) if projection is None else projection.role,
        "num_parameters": before.numel(),
        "change": sums.relative_change,
        "num_neurons": 0,
        "mean_turn": None,
        "max_turn": None,
    }
    if projection is not None:
        turns = cosine_distances(before, after, projection.neuron_dim, pool)
        row |= {"num_neurons": projection.num_neurons}
        row |= {"mean_turn": float(turns.mean()), "max_turn": float(turns.max())}
    return row, sums


def _layer(parameter: str) -> int | None:
    return next((int(part) for part in parameter.split(".") if part.isdigit()), None)


def _role(network: nn.Module, parameter: str) -> str:
    """What a weight without neurons is for."""
    from torch import nn

    name, _, attribute = parameter.rpartition(".")
    module = network.get_submodule(name)
    if "norm" in type(module).__name__.lower():
        return "norm"
    if attribute == "bias":
        return "bias"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "head" if isinstance(module, nn.Linear) else "other"


def summarized(table: Table, by: Literal["role", "layer"]) -> list[dict[str, Any]]:
    """Rows of ``diff_table`` added up by role, or by layer.

    Returns:
        A row a group, in the order of roles or layers: ``role`` or ``layer``, ``num_parameters``,
        ``change``, ``share``, ``mean_turn`` and ``max_turn``, as there.
    """
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in table.rows():
        groups.setdefault(row[by], []).append(row)
    order = _role_order if by == "role" else _layer_order
    return [{by: key} | _added_up(groups[key]) for key in sorted(groups, key=order)]


def _added_up(rows: list[dict[str, Any]]) -> dict[str, Any]:
    turning = [row for row in rows if row["num_neurons"]]
    num_neurons = sum(row["num_neurons"] for row in turning)
    turned = sum(row["mean_turn"] * row["num_neurons"] for row in turning)
    sums = (SquaredSums(row["squared_change"], row["squared_norm"]) for row in rows)
    shares = [row["share"] for row in rows]
    return {
        "num_parameters": sum(row["num_parameters"] for row in rows),
        "change": sum(sums, SquaredSums()).relative_change,
        "share": None if None in shares else sum(shares),
        "mean_turn": turned / num_neurons if num_neurons else None,
        "max_turn": max((row["max_turn"] for row in turning), default=None),
    }


def _role_order(role: str) -> tuple[int, str]:
    known = (*ROLE_ORDER, None, *_OTHER_ROLES)  # a projection that no table knows comes between
    return known.index(role if role in known else None), role


def _layer_order(layer: int | None) -> tuple[bool, int]:
    return layer is None, layer or 0


def change_by_layer(table: Table) -> Iterator[dict[str, Any]]:
    """The relative change of each layer's projections.

    Yields:
        A row a layer that has projections: ``layer``, and a column a role, ``None`` where the layer
        lacks it.
    """
    of_projections = [row for row in table.rows() if row["num_neurons"]]
    roles = sorted({row["role"] for row in of_projections}, key=_role_order)
    layers = sorted({row["layer"] for row in of_projections}, key=_layer_order)
    for layer in layers:
        cells: dict[str, Any] = {"layer": layer}
        for role in roles:
            own = [row for row in of_projections if (row["layer"], row["role"]) == (layer, role)]
            cells[role] = _added_up(own)["change"] if own else None
        yield cells
