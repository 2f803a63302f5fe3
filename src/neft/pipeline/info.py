"""What is in a file or folder that this package made, as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from neft.errors import UsageError
from neft.neurons import NeuronScores, NeuronSet
from neft.pipeline.adapter import read_config

_NUM_SHOWN = 8
_QUANTILES = (0, 10, 50, 90, 99, 100)


def describe(path: Path) -> dict[str, Any]:
    """Describe an adapter folder, a neuron set, or scores.

    Raises:
        UsageError: it is none of these, or cannot be read.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder.")
    if path.is_dir():
        return _adapter(path)
    if path.suffix == ".safetensors":
        return describe_scores(NeuronScores.load(path))
    return describe_neurons(NeuronSet.load(path))


def describe_neurons(neurons: NeuronSet) -> dict[str, Any]:
    """Counts of a neuron set, in all and by layer and role."""
    return {
        "kind": "neuron set",
        "num_neurons": len(neurons),
        "num_candidates": neurons.num_candidates,
        "num_parameters": neurons.num_parameters,
        "provenance": neurons.provenance,
        "neurons": _counts(neurons),
    }


def _counts(neurons: NeuronSet) -> list[dict[str, Any]]:
    """One row a layer, one column a role."""
    roles = list(neurons.counts_by_role())
    rows: dict[int | None, dict[str, Any]] = {}
    for name, projection in neurons.projections.items():
        layer = projection.layer
        row = rows.setdefault(
            layer, {"layer": "-" if layer is None else layer} | dict.fromkeys(roles, 0)
        )
        row[projection.role] += int(neurons[name].size)
    return list(rows.values())


def describe_indices(neurons: NeuronSet) -> list[dict[str, Any]]:
    """One row a projection: how many neurons, and the first of them."""
    with_experts = any(projection.expert is not None for projection in neurons.projections.values())
    return [
        {
            "layer": projection.layer,
            "role": projection.role,
            **({"expert": projection.expert} if with_experts else {}),
            "neurons": int(neurons[name].size),
            "of": projection.num_neurons,
            "first": _first(neurons[name].tolist()),
        }
        for name, projection in neurons.projections.items()
    ]


def _first(indices: list[int]) -> str:
    more = " ..." if len(indices) > _NUM_SHOWN else ""
    return " ".join(map(str, indices[:_NUM_SHOWN])) + more


def describe_scores(scores: NeuronScores) -> dict[str, Any]:
    """Quantiles of the distances, by role and over all neurons."""
    parts: dict[str, list[np.ndarray]] = {}
    for name, projection in scores.projections.items():
        parts.setdefault(projection.role, []).append(scores.distances[name])
    columns = {role: np.concatenate(arrays) for role, arrays in parts.items()}
    columns["all"] = np.concatenate([*columns.values()])
    return {
        "kind": "scores",
        "num_neurons": len(scores),
        "num_parameters": scores.total_parameters,
        "largest_percent": round(scores.max_percent, 4),
        "provenance": scores.provenance,
        f"quantiles of {scores.quantity}": [
            {"quantile": f"{percent}%"}
            | {role: float(np.percentile(column, percent)) for role, column in columns.items()}
            for percent in _QUANTILES
        ],
    }


def _adapter(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    num_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    info = {
        "kind": "adapter",
        "method": config.get("peft_type"),
        "base_model": config.get("base_model_name_or_path"),
        "num_bytes": num_bytes,
    }
    neurons = config.get("neurons")
    if not isinstance(neurons, Mapping):
        return info
    return (
        info
        | describe_neurons(NeuronSet.from_dict(neurons, where=str(folder)))
        | {"kind": "adapter"}
    )
