"""Which neurons a recipe's choice holds, against sets put together by hand."""

from __future__ import annotations

import numpy as np
import pytest

from neft.errors import NeuronError
from neft.neurons import Axis, NeuronScores, NeuronSet, Projection
from neft.pipeline.selection import choose
from neft.recipe import SelectSection

UP = Projection("up", 0, "up", Axis.ROW, 4, 2)
DOWN = Projection("down", 0, "down", Axis.COLUMN, 4, 2)


@pytest.fixture
def scores() -> NeuronScores:
    distances = {"up": np.array([0.1, 0.8, 0.3, 0.4]), "down": np.array([0.5, 0.2, 0.7, 0.6])}
    return NeuronScores([UP, DOWN], distances, total_parameters=100)


def indices(chosen: NeuronSet) -> dict[str, list[int]]:
    return {name: list(map(int, found)) for name, found in chosen.items()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"count": 2}, {"up": [1], "down": [2]}),
        ({"count": 2, "which": "highest"}, {"up": [0], "down": [1]}),
        ({"count": 2, "reversed_count": 1}, {"up": [0, 1], "down": [2]}),
        ({"percent": 4, "reversed_percent": 2}, {"up": [0, 1], "down": [2]}),
    ],
)
def test_choice_by_scores(scores, options, expected) -> None:
    assert indices(choose(scores, SelectSection(**options))) == expected


@pytest.fixture
def file(tmp_path):
    """``file("a", model, up=[1])``: a file of a neuron set."""

    def make(name: str, model: str | None = None, **chosen: list[int]) -> str:
        provenance = {} if model is None else {"model_identity": model}
        path = tmp_path / f"{name}.json"
        NeuronSet([UP, DOWN], chosen, provenance).save(path)
        return str(path)

    return make


def test_sets_of_files(scores, file) -> None:
    a, b = file("a", up=[0, 1]), file("b", up=[1, 2], down=[2])
    assert indices(choose(scores, SelectSection(neurons=a))) == {"up": [0, 1]}
    union = SelectSection(count=1, union=(b,))
    assert indices(choose(scores, union)) == {"up": [1, 2], "down": [2]}
    assert indices(choose(scores, SelectSection(count=2, intersection=(a, b)))) == {"up": [1]}
    both = SelectSection(count=1, union=(a,), intersection=(b,))
    assert indices(choose(scores, both)) == {"up": [1]}


def test_an_empty_intersection_is_refused(scores, file) -> None:
    with pytest.raises(NeuronError, match="the intersection holds no neuron"):
        choose(scores, SelectSection(count=1, intersection=(file("a", up=[0]),)))


def test_a_set_of_a_model_of_another_shape_is_refused(scores, tmp_path) -> None:
    wider = Projection("up", 0, "up", Axis.ROW, 8, 2)
    NeuronSet([wider], {"up": [1]}).save(tmp_path / "wide.json")
    with pytest.raises(
        NeuronError, match=r"wide\.json: has neurons of up, which are no candidates"
    ):
        choose(scores, SelectSection(count=1, union=(str(tmp_path / "wide.json"),)))


def test_a_set_of_another_model_of_the_same_shape_is_refused(scores, file) -> None:
    select = SelectSection(count=1, union=(file("a", "theirs", up=[0]),))
    with pytest.raises(NeuronError, match=r"a\.json: was chosen in another base model \(theirs\)"):
        choose(scores, select, "ours")
    assert choose(scores, select, "theirs").provenance["model_identity"] == "theirs"
    # A set that does not say where it comes from is taken.
    choose(scores, SelectSection(count=1, union=(file("b", up=[0]),)), "ours")
