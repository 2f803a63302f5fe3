"""Rules of selection and budgets on tiny models: what is chosen is what trains."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.numpy import load_file
from torch import Tensor, nn

from neft import Axis, NeftConfig, NeuronScores, NeuronSet, score_neurons
from neft.pipeline.run import run
from neft.pipeline.selection import choose, unscored
from neft.recipe import Recipe, SelectSection, load_recipe

ALL_ROLES = ["up", "gate", "down", "q", "k", "v", "o"]
IDS = torch.arange(5, 25).reshape(2, 10)


def moved(model: nn.Module) -> nn.Module:
    """A model of the same shape whose weights have all changed."""
    after = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return after


@torch.no_grad()
def logits_without(model: nn.Module, chosen: NeuronSet, roles: set[str]) -> Tensor:
    """Logits with the chosen neurons of some roles silenced."""
    silenced = copy.deepcopy(model)
    for name, indices in chosen.items():
        projection = chosen.projections[name]
        if projection.role in roles:
            weight = silenced.get_submodule(name).weight
            weight.index_fill_(projection.neuron_dim, torch.from_numpy(indices), 0.0)
    logits: Tensor = silenced(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("llama", ["up", "gate", "down"]),
        ("phi3", ["gate_up", "down"]),  # fused
        ("gpt2", ["up", "down"]),  # stored transposed
        ("opt", ["up", "down"]),
    ],
)
def test_units_are_those_of_the_mlp(tiny_model, family: str, modules: list[str]) -> None:
    """Silencing the chosen units where they read and where they write does the same to the model."""
    model = tiny_model(family)
    size = 3 if len(modules) == 3 or "gate_up" in modules else 2
    scores = score_neurons(model, moved(model), modules)
    chosen = scores.select(count=20 * size, rule="units")
    reads, writes = logits_without(model, chosen, {*modules} - {"down"}), {"down"}
    # Biases are zero in a fresh model.
    torch.testing.assert_close(reads, logits_without(model, chosen, writes))
    assert not torch.allclose(reads, model(input_ids=IDS).logits, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rule", ["paper", "even", "floor"])
@pytest.mark.parametrize("axes", [None, {"*.o_proj": Axis.ROW, "*.down_proj": Axis.ROW}])
def test_all_projections_of_a_layer_train(tiny_model, rule: Any, axes: Any) -> None:
    """Grouped-query attention, and vectors of different lengths in one budget."""
    model = tiny_model(num_key_value_heads=1)
    scores = score_neurons(model, moved(model), ALL_ROLES, axes=axes)
    shapes = {(p.role, p.num_neurons, p.vector_length) for p in scores.projections.values()}
    assert {("q", 32, 32), ("k", 8, 32), ("v", 8, 32)} < shapes
    chosen = scores.select(percent=30, rule=rule)
    assert all(chosen.counts_by_role().values())
    assert chosen.num_parameters == pytest.approx(0.3 * scores.total_parameters, abs=64)

    before = copy.deepcopy(model.state_dict())
    adapted = get_peft_model(model, NeftConfig(neurons=chosen))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    after = adapted.merge_and_unload().state_dict()
    changed = {name: (after[name] != weight) for name, weight in before.items()}
    for name, where in changed.items():
        module = name.removesuffix(".weight")
        if module not in chosen:
            assert not where.any()
            continue
        lines = where.any(1 - chosen.projections[module].neuron_dim)
        assert torch.nonzero(lines).squeeze(1).tolist() == chosen[module].tolist()


@pytest.mark.parametrize("budget", [{"percent": 9}, {"count": 60}, {"megabytes": 0.01}])
@pytest.mark.parametrize("rule", ["paper", "even", "floor", "units"])
@pytest.mark.parametrize("which", ["lowest", "random"])
def test_a_plan_shows_what_the_scores_will_choose(
    tiny_model, tiny_recipe, tmp_path, budget: dict[str, Any], rule: str, which: str
) -> None:
    modules = ["up", "gate", "down"]
    fields = load_recipe(tiny_recipe(tmp_path)).model_dump(exclude_unset=True)
    select = {"rule": rule, "which": which, **budget}
    recipe = Recipe.model_validate(fields | {"select": select, "score": {"modules": modules}})
    model = tiny_model()
    planned = choose(unscored(model, recipe), SelectSection(**select))
    chosen = choose(score_neurons(model, moved(model), modules), SelectSection(**select))
    assert planned.num_parameters == chosen.num_parameters
    assert len(planned) == len(chosen)
    if which == "random":
        assert planned == chosen


def test_a_run_by_megabytes(tiny_recipe, tmp_path) -> None:
    settings: dict[str, Any] = {
        "score": {"modules": ALL_ROLES},
        "select": {"megabytes": 0.01, "rule": "even"},
    }
    recipe = load_recipe(tiny_recipe(tmp_path, **settings))
    run(recipe, say=lambda _: None)
    chosen = NeuronSet.load(tmp_path / "run" / "select" / "neurons.json")
    assert {*chosen.counts_by_layer().values()} == {39}  # 78 vectors of 128 bytes
    scores = NeuronScores.load(tmp_path / "run" / "score" / "scores.safetensors")
    assert chosen == scores.select(megabytes=0.01, rule="even")
    adapter = load_file(tmp_path / "run" / "train" / "adapter" / "adapter_model.safetensors")
    assert sum(vectors.nbytes for vectors in adapter.values()) == 78 * 128
    config = json.loads(
        (tmp_path / "run" / "train" / "adapter" / "adapter_config.json").read_text()
    )
    assert NeuronSet.from_dict(config["neurons"]) == chosen
