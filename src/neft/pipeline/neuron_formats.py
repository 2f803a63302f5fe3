"""Neuron sets in other formats: the JSON of the paper's research code, and tables as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from neft.errors import NeuronError
from neft.files import write_text
from neft.neurons import NEURONS_FORMAT, ROLE_ORDER, NeuronSet, Projection
from neft.pipeline.identity import MODEL_IDENTITY, model_identity
from neft.pipeline.neuron_sets import load_neurons
from neft.projections import find_projections
from neft.recipe import ModelSection

NeuronFormat: TypeAlias = Literal["neft", "authors", "csv"]

_COLUMNS = ("module", "layer", "role", "index")


def output_format(path: Path, wanted: NeuronFormat | None) -> NeuronFormat:
    """The format to write: the wanted one, else by suffix, ``.csv`` or ``.json``.

    Raises:
        NeuronError: the suffix belongs to neither.
    """
    if wanted is not None:
        return wanted
    by_suffix: Mapping[str, NeuronFormat] = {".csv": "csv", ".json": "neft"}
    if path.suffix.lower() not in by_suffix:
        raise NeuronError(
            f"{path}: ends in neither .json nor .csv; say with --to which format it gets: "
            f"{', '.join(get_args(NeuronFormat))}."
        )
    return by_suffix[path.suffix.lower()]


def write_neurons(neurons: NeuronSet, path: Path, to: NeuronFormat) -> None:
    """Write a set, atomically.

    Raises:
        NeuronError: the authors' format has no place for some of its projections.
    """
    match to:
        case "neft":
            neurons.save(path)
        case "authors":
            write_text(path, json.dumps(neurons.to_authors_json()) + "\n")
        case "csv":
            write_text(path, _to_csv(neurons))


def _to_csv(neurons: NeuronSet) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for name, indices in neurons.items():
        projection = neurons.projections[name]
        for index in indices.tolist():
            writer.writerow((name, projection.layer, projection.role, index))
    return text.getvalue()


def read_neurons(path: Path, model: str | None = None) -> NeuronSet:
    """Read a set in any of the formats, or the one of an adapter.

    Args:
        path: a CSV file by its suffix; a JSON file of this package or of the research code; an adapter.
        model: checkpoint folder or Hub id, whose configuration tells the projections; for formats that
            do not.

    Raises:
        NeuronError: nothing readable, neurons that the model does not have, or a model that is missing
            or that nothing needs.
        AdapterError: the adapter is incomplete.
    """
    if path.is_file() and path.suffix.lower() == ".csv":
        return _from_csv(path, _needed(model, path))
    if path.is_file() and _is_authors(path):
        model = _needed(model, path)
        neurons = NeuronSet.from_authors_json(path, find_projections(model))
        return _imported(neurons, model)
    neurons = load_neurons(path)
    if model is not None:
        raise NeuronError(f"{path}: tells its projections itself; leave out --model {model}.")
    return neurons


def _needed(model: str | None, path: Path) -> str:
    if model is None:
        raise NeuronError(
            f"{path}: tells indices, but not which projections they are of. Name the model with --model."
        )
    return model


def _imported(neurons: NeuronSet, model: str) -> NeuronSet:
    neurons.provenance[MODEL_IDENTITY] = model_identity(ModelSection(path=model))
    return neurons


def _is_authors(path: Path) -> bool:
    """Whether it is a JSON object of lists; all else is for the reader of this package to refuse."""
    if path.suffix.lower() == ".safetensors":
        return False
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(fields, dict)
        and bool(fields)
        and fields.get("format") != NEURONS_FORMAT
        and all(isinstance(value, list) for value in fields.values())
    )


def _from_csv(path: Path, model: str) -> NeuronSet:
    rows = list(_rows(path))
    if not rows:
        raise NeuronError(f"{path}: holds no neurons.")
    roles = (row["role"] if row["role"] in ROLE_ORDER else row["module"] for _, row in rows)
    projections = {p.name: p for p in find_projections(model, list(dict.fromkeys(roles)))}
    indices: dict[str, list[int]] = {}
    for place, row in rows:
        projection = _projection(place, row, projections)
        indices.setdefault(projection.name, []).append(_index(place, row, projection))
    chosen = {name: np.array(values) for name, values in indices.items()}
    provenance = {"method": "imported", "source": str(path)}
    return _imported(NeuronSet(projections.values(), chosen, provenance), model)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, fields) of each row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise NeuronError(f"{path}: cannot be read: {error}.") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    header = reader.fieldnames or []
    if missing := [name for name in _COLUMNS if name not in header]:
        raise NeuronError(
            f"{path}, line 1: the columns are {_listed(header)}; {missing[0]} is missing of "
            f"{_listed(_COLUMNS)}."
        )
    for row in reader:
        yield f"{path}, line {reader.line_num}", row


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _projection(
    place: str, row: Mapping[str, Any], projections: Mapping[str, Projection]
) -> Projection:
    projection = projections.get(row["module"])
    if projection is None:
        raise NeuronError(
            f"{place}: {row['module']!r} is no {row['role']} projection of this model."
        )
    layer = "" if projection.layer is None else str(projection.layer)
    if (row["layer"], row["role"]) != (layer, projection.role):
        raise NeuronError(
            f"{place}: says layer {row['layer'] or 'none'}, role {row['role']}, but in this model "
            f"{projection.name} is layer {layer or 'none'}, role {projection.role}."
        )
    return projection


def _index(place: str, row: Mapping[str, Any], projection: Projection) -> int:
    text = row["index"] or ""
    index = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= index < projection.num_neurons:
        raise NeuronError(
            f"{place}: index is {text!r}; {projection.name} has the neurons 0 to "
            f"{projection.num_neurons - 1}."
        )
    return index
