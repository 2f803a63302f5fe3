"""Evaluation passes after one that left everything as the next needs it, and after any change since."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from neft import NeftConfig
from neft.tuner.layer import NeftLinear

ROWS = {"default": [0, 2, 5], "other": [2, 3]}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


@pytest.fixture
def base() -> Network:
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def model(base: Network) -> Any:
    """Two adapters with vectors of ones and of twos; ``default`` was used in an evaluation pass."""
    model = get_peft_model(base, NeftConfig(neurons={"up": ROWS["default"]}))
    model.add_adapter("other", NeftConfig(neurons={"up": ROWS["other"]}))
    for value, name in enumerate(ROWS, start=1):
        nn.init.constant_(vectors(model, name), float(value))
    model.eval()
    run(model)
    return model


def layer(model: Any) -> NeftLinear:
    return model.base_model.model.up


def vectors(model: Any, name: str) -> nn.Parameter:
    return layer(model).neft_vectors[name].weight


@torch.no_grad()
def run(model: Any) -> Tensor:
    x = torch.arange(8.0, dtype=layer(model).base_layer.weight.dtype).reshape(2, 4)
    return model(x)


@torch.no_grad()
def expected(weight: Tensor, bias: Tensor, rows: list[int], value: float) -> Tensor:
    """By the definition: the weight with these rows of one value."""
    weight = weight.clone()
    weight[rows] = value
    return torch.arange(8.0, dtype=weight.dtype).reshape(2, 4) @ weight.T + bias


def add_one(model: Any) -> None:
    with torch.no_grad():
        vectors(model, "default").add_(1)


def replace_vectors(model: Any) -> None:
    layer(model).neft_vectors["default"].weight = nn.Parameter(torch.full((3, 4), 2.0))


def replace_data(model: Any) -> None:
    vectors(model, "default").data = torch.full((3, 4), 2.0)


def write_data(model: Any) -> None:
    vectors(model, "default").data.fill_(2)
    model.eval()


def take_a_step(model: Any) -> None:
    optimizer = torch.optim.SGD([vectors(model, "default")], lr=1.0)
    model.train()
    # The gradient of each scalar is 1 with this input.
    model(-torch.ones(1, 4))[:, ROWS["default"]].sum().backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize(
    "change", [add_one, replace_vectors, replace_data, write_data, take_a_step]
)
def test_other_vectors_are_written(
    model: Any, base: Network, change: Callable[[Any], None]
) -> None:
    weight = base.up.state_dict()["base_layer.weight"].clone()
    run(model)
    change(model)
    assert torch.equal(run(model), expected(weight, layer(model).bias, ROWS["default"], 2.0))


def test_each_adapter_in_turn(model: Any) -> None:
    weight = layer(model).state_dict()["base_layer.weight"].clone()
    for _ in range(2):
        for value, name in enumerate(ROWS, start=1):
            model.set_adapter(name)
            for _ in range(2):
                found = run(model)
                assert torch.equal(found, expected(weight, layer(model).bias, ROWS[name], value))


def test_disabled_and_enabled(model: Any) -> None:
    weight = layer(model).state_dict()["base_layer.weight"].clone()
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(run(model), expected(weight, layer(model).bias, [], 0.0))
        found = run(model)
        assert torch.equal(found, expected(weight, layer(model).bias, ROWS["default"], 1.0))


def test_merged_and_unmerged(model: Any) -> None:
    weight = layer(model).state_dict()["base_layer.weight"].clone()
    run(model)
    model.merge_adapter()
    add_one(model)  # merged vectors stay as they were
    assert torch.equal(run(model), expected(weight, layer(model).bias, ROWS["default"], 1.0))
    model.unmerge_adapter()
    model.set_adapter("other")
    assert torch.equal(run(model), expected(weight, layer(model).bias, ROWS["other"], 2.0))


def replace_base(model: Any, weight: Tensor) -> None:
    layer(model).base_layer.weight = nn.Parameter(weight.clone(), requires_grad=False)


@torch.no_grad()
def overwrite_base(model: Any, weight: Tensor) -> None:
    layer(model).base_layer.weight.copy_(weight)
    model.eval()


every_write = pytest.mark.parametrize("write", [replace_base, overwrite_base])


@every_write
def test_another_base_weight_receives_the_vectors(
    model: Any, write: Callable[[Any, Tensor], None]
) -> None:
    """But gets the old values in their places when they leave, as the layer's documentation says."""
    old = layer(model).state_dict()["base_layer.weight"].clone()
    run(model)
    weight = torch.full((6, 4), 7.0)
    write(model, weight)
    assert torch.equal(run(model), expected(weight, layer(model).bias, ROWS["default"], 1.0))
    with model.disable_adapter():
        weight[ROWS["default"]] = old[ROWS["default"]]
        assert torch.equal(run(model), expected(weight, layer(model).bias, [], 0.0))


@every_write
def test_another_base_weight_that_comes_while_no_vectors_are_resident(
    model: Any, write: Callable[[Any, Tensor], None]
) -> None:
    run(model)
    weight = torch.full((6, 4), 7.0)
    with model.disable_adapter():
        run(model)
        write(model, weight)
        assert torch.equal(run(model), expected(weight, layer(model).bias, [], 0.0))
    assert torch.equal(run(model), expected(weight, layer(model).bias, ROWS["default"], 1.0))
    with model.disable_adapter():
        assert torch.equal(run(model), expected(weight, layer(model).bias, [], 0.0))


def test_cast_base_weight(model: Any) -> None:
    run(model)
    weight = layer(model).state_dict()["base_layer.weight"].double()
    model.double()
    found = run(model)
    assert torch.equal(found, expected(weight, layer(model).bias, ROWS["default"], 1.0))


def test_nothing_is_looked_up_when_nothing_changed(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(model)

    def loads(*_: object) -> Tensor:
        raise AssertionError("a pass after which nothing changed loads the vectors")

    monkeypatch.setattr(NeftLinear, "_load", loads)
    assert torch.equal(run(model), first)


def test_replaced_weights_are_not_kept_in_memory(model: Any) -> None:
    run(model)
    old = weakref.ref(layer(model).base_layer.weight)
    layer(model).base_layer.weight = nn.Parameter(torch.zeros(6, 4), requires_grad=False)
    assert old() is None
