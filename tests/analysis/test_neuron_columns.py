"""Columns over all neurons, and arrays by module."""

from __future__ import annotations

import numpy as np
import pytest

from neft.analysis.neuron_columns import by_module, concatenated, neuron_columns
from neft.errors import NeuronError
from neft.neurons import Axis, NeuronSet, Projection

UP_1 = Projection("layers.1.up", 1, "up", Axis.ROW, 3, 8)
DOWN_0 = Projection("layers.0.down", 0, "down", Axis.COLUMN, 2, 8)
HEAD = Projection("lm_head", None, "lm_head", Axis.ROW, 2, 8)


def test_rows_are_in_canonical_order() -> None:
    columns = neuron_columns([UP_1, DOWN_0])
    assert {name: list(column) for name, column in columns.items()} == {
        "module": ["layers.0.down"] * 2 + ["layers.1.up"] * 3,
        "layer": [0, 0, 1, 1, 1],
        "role": ["down"] * 2 + ["up"] * 3,
        "index": [0, 1, 0, 1, 2],
    }
    assert list(NeuronSet([UP_1, DOWN_0], {}).projections) == ["layers.0.down", "layers.1.up"]


def test_a_projection_outside_the_layers_has_none() -> None:
    columns = neuron_columns([HEAD, DOWN_0])
    assert columns["layer"] == [0, 0, None, None]
    assert all(type(layer) is int for layer in columns["layer"][:2])


def test_there_and_back() -> None:
    arrays = {"layers.1.up": np.array([3, 4, 5]), "layers.0.down": np.array([1, 2])}
    column = concatenated([UP_1, DOWN_0], arrays)
    assert column.tolist() == [1, 2, 3, 4, 5]
    parts = by_module([UP_1, DOWN_0], column)
    assert {name: part.tolist() for name, part in parts.items()} == {
        "layers.0.down": [1, 2],
        "layers.1.up": [3, 4, 5],
    }
    assert concatenated([UP_1], arrays).tolist() == [3, 4, 5]


def test_arrays_that_do_not_fit() -> None:
    with pytest.raises(
        NeuronError, match=r"layers\.1\.up: has no values; .* e\.g\. layers\.0\.down"
    ):
        concatenated([UP_1], {"layers.0.down": np.zeros(2)})
    with pytest.raises(
        NeuronError, match=r"layers\.1\.up: values of shape \(2,\), expected \(3,\)"
    ):
        concatenated([UP_1], {"layers.1.up": np.zeros(2)})
