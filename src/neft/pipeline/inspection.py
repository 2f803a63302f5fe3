"""What the analysis of a run found, condensed to tables that fit a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from neft.analysis import files
from neft.analysis.table import Table
from neft.errors import UsageError

_SIDES = ("before", "after")


def utilization(folder: Path, _limit: int) -> dict[str, Any]:
    """Mean utilization by layer and role."""
    table = _load(folder, files.NEURONS)
    layers, roles = np.asarray(table["layer"]), np.asarray(table["role"])
    values = {side: np.asarray(table[f"utilization_{side}"]) for side in _SIDES}
    rows = []
    for layer in np.unique(layers):
        row: dict[str, Any] = {"layer": int(layer)}
        for role in dict.fromkeys(roles):
            own = (layers == layer) & (roles == role)
            row |= {f"{role} {side}": float(values[side][own].mean()) for side in _SIDES}
        rows.append(row)
    return _texts(table) | {"mean utilization": rows}


def ranks(folder: Path, _limit: int) -> dict[str, Any]:
    """Average rank change, the paper's three types, and Figure 3."""
    table, buckets = _load(folder, files.NEURONS), _load(folder, files.BUCKETS)
    return _texts(table) | {
        "average rank change": table.about["average_rank_change"],
        "strongly affected": f"moved by more than {100 * table.about['threshold']:.1f}% of the list",
        "neurons": table.about["counts"],
        "rank change by percentile of rank before": buckets.rows(),
    }


def activity(folder: Path, limit: int) -> dict[str, Any]:
    """The units whose mean activation changed most, relative to what it was."""
    table = _load(folder, files.ACTIVITY)
    before, after = (np.asarray(table[f"mean_{side}"]) for side in _SIDES)
    change = np.abs(after - before) / np.maximum(before, np.finfo(np.float64).tiny)
    most = np.argsort(-change, kind="stable")[:limit]
    return dict(table.about) | {"units whose activation changed most": _rows(table, most)}


def lens(folder: Path, limit: int) -> dict[str, Any]:
    """What the out neurons that moved most promote and suppress."""
    table = _load(folder, files.LENS)
    rows = [
        {
            name: " ".join(map(repr, cell)) if isinstance(cell, list) else cell
            for name, cell in row.items()
        }
        for row in _rows(table, range(min(limit, len(table))))
    ]
    return dict(table.about) | {"out neurons": rows}


def causal(folder: Path, _limit: int) -> dict[str, Any]:
    """The losses with groups of neurons put back."""
    table = _load(folder, files.CAUSAL)
    return dict(table.about) | {"restored groups": table.rows()}


INSPECTIONS: Mapping[str, Callable[[Path, int], dict[str, Any]]] = {
    "utilization": utilization,
    "ranks": ranks,
    "activity": activity,
    "lens": lens,
    "causal": causal,
}
"""Name on the command line -> (folder of the analysis, rows to show) -> plain values."""


def _load(folder: Path, name: str) -> Table:
    if not (folder / name).exists():
        raise UsageError(
            f"{folder / name}: is not there: the run's method chooses no neurons, or its section "
            "analysis leaves this part out."
        )
    return Table.load(folder / name)


def _texts(table: Table) -> dict[str, Any]:
    return {
        "texts": {side: table.about[side]["num_texts"] for side in _SIDES},
        "tokens": {side: table.about[side]["num_tokens"] for side in _SIDES},
    }


def _rows(table: Table, places: Iterable[int]) -> list[dict[str, Any]]:
    chosen = list(places)
    return [
        {name: _plain(column[place]) for name, column in table.columns.items()} for place in chosen
    ]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
