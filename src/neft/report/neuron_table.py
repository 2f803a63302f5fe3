"""The neurons that a page lists, with all that is known of each, packed for the page's script."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neft.analysis.table import Column, Table
from neft.report.run_data import RunData, has_columns

MAX_ROWS = 30_000
"""Neurons in one page: more than the 21,017 of SmolLM2-135M at 9%, and still a page of a few MB."""

LENS = ("promoted_before", "promoted_after", "suppressed_before", "suppressed_after")
CATEGORIES = (
    "not strongly affected",
    "strongly affected, risen",
    "suppressed",
    "indirectly affected, risen",
    "indirectly affected, suppressed",
)
"""Of Figure 6; "indirectly affected" are neurons that were strongly affected without being trained."""

FFN_ROLES = ("up", "gate", "down")
"""Projections whose neuron n belongs to unit n of the feed-forward network, and so to its activity."""

_KEYS = ("layer", "role", "index")
_FLAGS = ("strong", "suppressed", "indirect")
# Significant digits that survive packing; the tables on disk have all.
_DIGITS = 4


@dataclass(frozen=True)
class NeuronTable:
    """Rows of neurons in canonical order, as columns."""

    columns: Mapping[str, Column]
    """``layer``, ``role``, ``index``, and whatever numbers are known."""
    num_trained: int
    """Neurons that were trained, listed or not."""
    num_known: int
    """Neurons among which the listed ones were chosen."""
    order: str
    """Why these, where not all are listed; else empty."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.columns["layer"])


def neuron_table(run: RunData) -> NeuronTable | None:
    """The trained neurons, or the most moved ones where none was chosen; ``None`` without any."""
    columns = known_neurons(run)
    if columns is None or not len(columns["layer"]):
        return None
    trained = np.asarray(columns.pop("trained"), dtype=bool)
    listed = np.flatnonzero(trained) if trained.any() else np.arange(len(trained))
    order = ""
    if len(listed) > MAX_ROWS or not trained.any():
        name, words = _movement(columns)
        largest = np.argsort(-np.asarray(columns[name])[listed], kind="stable")[:MAX_ROWS]
        order = words if len(listed) > MAX_ROWS else ""
        listed = np.sort(listed[largest])
    chosen = {name: _taken(column, listed) for name, column in columns.items()}
    return NeuronTable(chosen, int(trained.sum()), len(trained), order)


def _taken(column: Column, positions: NDArray[np.int64]) -> Column:
    if isinstance(column, np.ndarray):
        return column[positions]
    return [column[position] for position in positions]


def _movement(columns: Mapping[str, Column]) -> tuple[str, str]:
    """The column by which neurons are kept where there are too many, and what it means."""
    for name, words in {
        "turn": "those whose direction changed most in training",
        "change": "those that changed most in training",
        "distance": "those that the warm-up turned most",
    }.items():
        if name in columns:
            return name, words
    return "index", "those of the highest index"


def known_neurons(run: RunData) -> dict[str, Column] | None:
    """Columns of all neurons: of the analysis, else of the selection and the scores alone.

    Always with ``layer``, ``role``, ``index`` and ``trained``; with ``expert`` where the model has any,
    and ``distance`` where there are scores.
    """
    analysed = run.tables.get("neurons")
    if analysed is not None and has_columns(analysed, (*_KEYS, "trained")):
        columns = dict(analysed.columns)
        columns.pop("module", None)
        if all(name in columns for name in _FLAGS):
            columns["category"] = _categories(*(columns.pop(name) for name in _FLAGS))
        return columns
    if run.neurons is None:
        return None
    return _of_selection(run)


def _of_selection(run: RunData) -> dict[str, Column]:
    assert run.neurons is not None
    projections = run.neurons.projections.values()
    trained = [np.zeros(projection.num_neurons, dtype=bool) for projection in projections]
    for mask, projection in zip(trained, projections, strict=True):
        mask[run.neurons[projection.name]] = True
    sizes = [projection.num_neurons for projection in projections]
    columns: dict[str, Column] = {
        "layer": [p.layer for p in projections for _ in range(p.num_neurons)],
        "role": [p.role for p in projections for _ in range(p.num_neurons)],
        "index": np.concatenate([np.arange(size) for size in sizes]),
        "trained": np.concatenate(trained),
    }
    if any(projection.expert is not None for projection in projections):
        columns["expert"] = [p.expert for p in projections for _ in range(p.num_neurons)]
    scores = run.scores
    if scores is not None and all(p.name in scores.distances for p in projections):
        columns["distance"] = np.concatenate([scores.distances[p.name] for p in projections])
    return columns


def _categories(strong: Column, suppressed: Column, indirect: Column) -> NDArray[np.int64]:
    """Positions in ``CATEGORIES``."""
    flags = (np.asarray(column, dtype=bool) for column in (strong, suppressed, indirect))
    is_strong, is_suppressed, is_indirect = flags
    positions: NDArray[np.int64] = np.where(is_strong, 1 + 1 * is_suppressed + 2 * is_indirect, 0)
    return positions


def packed(table: NeuronTable, run: RunData) -> str:
    """All that the page's script needs, as base64 of gzip of JSON.

    ``columns``: name -> values, a missing one ``null``; ``lens``: name -> tokens of each row, as
    positions in ``tokens``; ``activity`` and ``contexts``: by unit, ``layer.index``.
    """
    tokens: dict[str, int] = {}
    content = {
        "columns": {name: _plain(column) for name, column in table.columns.items()},
        "categories": CATEGORIES,
        "unitRoles": FFN_ROLES,
        "lens": _lens(table, run.tables.get("lens"), tokens),
        "activity": _activity(table, run.tables.get("activity")),
        "contexts": _contexts(table, run.tables.get("contexts")),
        "tokens": list(tokens),
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Without a time, the same run gives the same page.
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=9, mtime=0)).decode("ascii")


def _plain(column: Column) -> list[Any]:
    if isinstance(column, np.ndarray) and np.issubdtype(column.dtype, np.floating):
        return [_rounded(value) for value in column.tolist()]
    if isinstance(column, np.ndarray):
        values: list[Any] = column.tolist()
        return values
    return [_rounded(value) if isinstance(value, float) else value for value in column]


def _rounded(value: float) -> float | None:
    if not np.isfinite(value):
        return None
    short = float(f"{value:.{_DIGITS - 1}e}")
    return int(short) if short.is_integer() and abs(short) < 2**53 else short


def _lens(
    table: NeuronTable, lens: Table | None, tokens: dict[str, int]
) -> dict[str, list[list[int]]]:
    """Token lists of each row of ``table``, empty for neurons that were not looked at."""
    if lens is None or not has_columns(lens, ("layer", "index", *LENS)):
        return {}
    places = {
        unit: row
        for row, unit in enumerate(zip(_list(lens["layer"]), _list(lens["index"]), strict=True))
    }
    # A lens row is of an out neuron of the feed-forward network.
    rows = [
        places.get((layer, index)) if role == "down" else None
        for layer, role, index in zip(*(_list(table.columns[key]) for key in _KEYS), strict=True)
    ]
    return {
        name: [
            [] if row is None else [tokens.setdefault(t, len(tokens)) for t in lens[name][row]]
            for row in rows
        ]
        for name in LENS
    }


def _activity(table: NeuronTable, activity: Table | None) -> dict[str, Any]:
    """Numbers of the units to which listed neurons belong."""
    if activity is None or not has_columns(activity, ("layer", "index")):
        return {}
    units = _units(table)
    keys = list(zip(_list(activity["layer"]), _list(activity["index"]), strict=True))
    rows = [row for row, key in enumerate(keys) if key in units]
    names = [name for name in activity.columns if name not in ("layer", "index", "module")]
    return {
        "units": [f"{layer}.{index}" for layer, index in (keys[row] for row in rows)],
        "columns": {
            name: _plain(_taken(activity[name], np.array(rows, dtype=np.int64))) for name in names
        },
    }


def _contexts(table: NeuronTable, contexts: Table | None) -> dict[str, Any]:
    """``layer.index`` -> model -> ``[activation, left, token, right]``, strongest first."""
    if contexts is None or not has_columns(contexts, ("layer", "index", "model", "token")):
        return {}
    units = _units(table)
    found: dict[str, dict[str, list[list[Any]]]] = {}
    for row in sorted(contexts.rows(), key=lambda row: row["rank"]):
        if (row["layer"], row["index"]) in units:
            of_unit = found.setdefault(f"{row['layer']}.{row['index']}", {})
            of_unit.setdefault(row["model"], []).append(
                [_rounded(row["activation"]), row["left"], row["token"], row["right"]]
            )
    return found


def _units(table: NeuronTable) -> set[tuple[int, int]]:
    keys = zip(*(_list(table.columns[key]) for key in _KEYS), strict=True)
    return {(layer, index) for layer, role, index in keys if role in FFN_ROLES}


def _list(column: Column) -> Sequence[Any]:
    values: Sequence[Any] = column.tolist() if isinstance(column, np.ndarray) else column
    return values
