"""NeFT layers under every way in which a model is shared out, without the package's own trainer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import layers
import pytest
from training import launch

if TYPE_CHECKING:
    from conftest import TinyModel


@pytest.fixture(scope="module")
def distances(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("layers")
    tiny_model().save_pretrained(folder / "model")
    told = folder / "told.json"
    launch(2, [layers.__file__, str(folder / "model"), str(told)]).check_returncode()
    return json.loads(told.read_text())


@pytest.mark.parametrize("way", layers.WAYS)
def test_as_in_one_process(distances: dict[str, Any], way: str) -> None:
    found = distances[way]
    is_rounded = way == "16 bits"
    assert found["frozen"] == found["narrow"] == 0
    # Of the way that they moved.
    assert found["vectors"] < (5e-2 if is_rounded else 1e-4)
    assert found["untouched"] < (5e-2 if is_rounded else 1e-5)


@pytest.mark.parametrize("way", layers.LIVE)
def test_a_sharded_model_is_scored_as_it_is(distances: dict[str, Any], way: str) -> None:
    assert distances["live scores"][way] < 1e-3


@pytest.mark.parametrize("use", layers.REFUSED)
def test_what_divided_weights_cannot_do(distances: dict[str, Any], use: str) -> None:
    assert "its weight is divided among processes" in distances["refusals"][use]


def test_vectors_that_zero3_would_divide_with_the_base(distances: dict[str, Any]) -> None:
    message = distances["refusals"]["pass before"]
    assert "its weight held the vectors of ['default'] when it was sharded" in message
