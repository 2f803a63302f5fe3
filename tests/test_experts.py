"""Neurons of mixtures of experts: what is found in a model, chosen, and written to files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from neft.errors import ArchitectureError, NeuronError
from neft.neurons import Axis, NeuronScores, NeuronSet, Projection
from neft.projections import find_projections

if TYPE_CHECKING:
    from conftest import TinyConfig, TinyModel

ROW, COLUMN = Axis.ROW, Axis.COLUMN
NUM_EXPERTS = 4

# Written by hand: model type -> role -> (name inside layer 1, axis, shape of the stored weight). In names
# {} stands for the number of an expert.
Matrices = dict[str, list[tuple[str, Axis, tuple[int, int]]]]
ATTENTION: Matrices = {
    "q": [("self_attn.q_proj", ROW, (32, 32))],
    "k": [("self_attn.k_proj", ROW, (16, 32))],
    "v": [("self_attn.v_proj", ROW, (16, 32))],
    "o": [("self_attn.o_proj", COLUMN, (32, 32))],
}
GATE_UP = ("mlp.experts.gate_up_proj.{}", ROW, (48, 32))
DOWN = ("mlp.experts.down_proj.{}", COLUMN, (32, 24))
EXPERTS: Matrices = {"gate_up": [GATE_UP], "down": [DOWN]}
MATRICES: dict[str, Matrices] = {
    "mixtral": EXPERTS | ATTENTION,
    "olmoe": EXPERTS | ATTENTION,
    "qwen3_moe": EXPERTS | ATTENTION,
    "qwen2_moe": {
        "up": [("mlp.shared_expert.up_proj", ROW, (40, 32))],
        "gate": [("mlp.shared_expert.gate_proj", ROW, (40, 32))],
        "gate_up": [GATE_UP],
        "down": [DOWN, ("mlp.shared_expert.down_proj", COLUMN, (32, 40))],
    }
    | ATTENTION,
    "gpt_oss": {
        "gate_up": [("mlp.experts.gate_up_proj.{}", ROW, (32, 48))],
        "down": [("mlp.experts.down_proj.{}", COLUMN, (24, 32))],
    }
    | ATTENTION,
}

every_mixture = pytest.mark.parametrize("model_type", sorted(MATRICES))


def of_layer_1(projections: list[Projection]) -> list[tuple[str, str, Axis, tuple[int, int]]]:
    return [
        (p.role, p.name.removeprefix("model.layers.1."), p.axis, p.weight_shape)
        for p in projections
        if p.layer == 1
    ]


def expected(model_type: str) -> list[tuple[str, str, Axis, tuple[int, int]]]:
    return [
        (role, name.format(expert), axis, shape)
        for role, places in MATRICES[model_type].items()
        for name, axis, shape in places
        for expert in range(NUM_EXPERTS if "{}" in name else 1)
    ]


@every_mixture
def test_every_role(model_type: str, tiny_model: TinyModel) -> None:
    model = tiny_model(model_type)
    roles = list(MATRICES[model_type])
    found = find_projections(model, roles)
    assert of_layer_1(found) == expected(model_type)
    assert find_projections(model.config, roles) == found
    parameters = dict(model.named_parameters())
    for projection in found:
        weight = projection.weight_in(parameters[projection.parameter])
        assert tuple(weight.shape) == projection.weight_shape
        assert projection.fits(parameters[projection.parameter].shape)
        assert projection.vector_length == 32, "a neuron is a vector of the residual stream"
        assert isinstance(model.get_submodule(projection.module), torch.nn.Module)


@every_mixture
def test_default_is_where_units_read_and_write(model_type: str, tiny_model: TinyModel) -> None:
    found = find_projections(tiny_model(model_type))
    roles = ("up", "gate_up", "down") if model_type == "qwen2_moe" else ("gate_up", "down")
    assert of_layer_1(found) == [row for row in expected(model_type) if row[0] in roles]


@every_mixture
def test_neurons_are_the_units_of_one_expert(model_type: str, tiny_model: TinyModel) -> None:
    """Silencing unit 3 of expert 2 where it reads and where it writes does the same to the model."""
    model = tiny_model(model_type)
    found = {p.name: p for p in find_projections(model, ["gate_up", "down"])}
    gate_up = found["model.layers.1.mlp.experts.gate_up_proj.2"]
    down = found["model.layers.1.mlp.experts.down_proj.2"]
    gate, up = (6, 7) if model_type == "gpt_oss" else (3, 24 + 3)
    assert gate_up.interleaved is (model_type == "gpt_oss")

    @torch.no_grad()
    def logits_without(projection: Projection, neuron: int) -> torch.Tensor:
        parameter = model.get_parameter(projection.parameter)
        kept = parameter.clone()
        projection.weight_in(parameter).select(projection.neuron_dim, neuron).zero_()
        logits = model(input_ids=torch.arange(5, 65).reshape(2, 30)).logits
        parameter.copy_(kept)
        return logits

    silent = logits_without(down, 3)
    # gpt-oss multiplies by up + 1, so only a gate of zero silences a unit there.
    torch.testing.assert_close(logits_without(gate_up, gate), silent)
    if model_type != "gpt_oss":
        torch.testing.assert_close(logits_without(gate_up, up), silent)
    assert not torch.allclose(silent, logits_without(down, 4), rtol=0, atol=1e-7)


def test_experts_sort_by_number_after_layer_and_role(tiny_config: TinyConfig) -> None:
    found = find_projections(tiny_config("mixtral", num_experts=11, num_local_experts=11))
    assert [(p.layer, p.role, p.expert) for p in found] == [
        (layer, role, expert)
        for layer in range(2)
        for role in ("gate_up", "down")
        for expert in range(11)
    ]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("model.layers.0.mlp.experts.down_proj.3", ["0.mlp.experts.down_proj.3"]),
        ("*.0.mlp.experts.*.3", ["0.mlp.experts.gate_up_proj.3", "0.mlp.experts.down_proj.3"]),
        (
            "model.layers.1.mlp.experts.down_proj",
            [f"1.mlp.experts.down_proj.{e}" for e in range(4)],
        ),
        ("*.1.*.down_proj", [f"1.mlp.experts.down_proj.{e}" for e in range(4)]),
    ],
)
def test_experts_by_name_and_pattern(
    pattern: str, names: list[str], tiny_config: TinyConfig
) -> None:
    found = find_projections(tiny_config("mixtral"), [pattern])
    assert [p.name.removeprefix("model.layers.") for p in found] == names


def test_experts_of_an_architecture_that_no_table_knows(tiny_model: TinyModel) -> None:
    model = tiny_model("mixtral")
    model.config.model_type = "mixtral-like"
    down = "*.experts.down_proj"
    found = find_projections(model, ["*.1.mlp.experts.*"], {down: COLUMN})
    assert [(p.layer, p.role, p.axis, p.expert) for p in found] == [
        (1, role, axis, expert)
        for role, axis in (("down_proj", COLUMN), ("gate_up_proj", ROW))
        for expert in range(4)
    ]
    with pytest.raises(ArchitectureError, match=r"experts\.down_proj\.\*  32 x 24 \(8\)"):
        find_projections(model)


def test_a_role_that_experts_have_fused(tiny_config: TinyConfig) -> None:
    with pytest.raises(ArchitectureError, match=r"fused into 'mlp\.experts\.gate_up_proj' here"):
        find_projections(tiny_config("mixtral"), ["up"])


def scores(config: Any) -> NeuronScores:
    projections = find_projections(config)
    generator = np.random.default_rng(0)
    distances = {p.name: generator.random(p.num_neurons) for p in projections}
    return NeuronScores(projections, distances, 100_000)


def test_one_ranking_and_ties_by_layer_projection_expert_index(tiny_config: TinyConfig) -> None:
    projections = find_projections(tiny_config("mixtral", num_experts=11, num_local_experts=11))
    equal = NeuronScores(projections, {p.name: np.ones(p.num_neurons) for p in projections}, 10**6)
    chosen = equal.select(count=10 * 48 + 5)
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    assert {name: len(indices) for name, indices in chosen.items()} == {
        **{f"{stack}.{expert}": 48 for expert in range(10)},
        f"{stack}.10": 5,
    }
    assert chosen[f"{stack}.10"].tolist() == [0, 1, 2, 3, 4]


@every_mixture
def test_files_keep_experts(model_type: str, tiny_config: TinyConfig, tmp_path: Path) -> None:
    found = scores(tiny_config(model_type))
    found.save(tmp_path / "scores.safetensors")
    assert NeuronScores.load(tmp_path / "scores.safetensors").projections == found.projections
    neurons = found.select(count=100)
    neurons.save(tmp_path / "neurons.json")
    again = NeuronSet.load(tmp_path / "neurons.json")
    assert again == neurons
    assert again.projections == neurons.projections


def test_file_with_an_expert_that_its_name_lacks(tiny_config: TinyConfig) -> None:
    fields = scores(tiny_config("mixtral")).select(count=3).to_dict()
    fields["projections"][1]["expert"] = 2
    with pytest.raises(NeuronError, match=re.escape("gate_up_proj.1 is said to be of expert 2")):
        NeuronSet.from_dict(fields)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_units_are_chosen_whole_within_their_expert(
    model_type: str, tiny_config: TinyConfig
) -> None:
    config = tiny_config(model_type)
    modules = ["up", "gate", "gate_up", "down"] if model_type == "qwen2_moe" else None
    projections = find_projections(config, modules)
    distances = {p.name: np.zeros(p.num_neurons) for p in projections}
    best = "model.layers.1.mlp.experts.{}.2"
    gate, up = (10, 11) if model_type == "gpt_oss" else (5, 24 + 5)
    # Each of the unit's neurons has a share of its mean; the next unit would win by its down alone.
    distances[best.format("gate_up_proj")][[gate, up]] = 1.0
    distances[best.format("down_proj")][5] = 1.0
    distances[best.format("down_proj")][6] = 2.0
    chosen = NeuronScores(projections, distances, 10**6).select(count=3, rule="units")
    assert {name: indices.tolist() for name, indices in chosen.items()} == {
        best.format("gate_up_proj"): [gate, up],
        best.format("down_proj"): [5],
    }


def test_the_authors_format_has_no_experts(tiny_config: TinyConfig) -> None:
    neurons = scores(tiny_config("mixtral")).select(count=3)
    with pytest.raises(NeuronError, match=r"this one is '\w+' of expert \d"):
        neurons.to_authors_json()
