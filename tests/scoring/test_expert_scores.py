"""Scores of experts' neurons against their definitions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from test_cosine import fine_tuned
from transformers import PreTrainedModel

from neft.errors import ArchitectureError, CheckpointError
from neft.neurons import NeuronScores, Projection
from neft.projections import find_projections
from neft.scoring import score_by_activation, score_by_gradient, score_by_norm, score_neurons
from neft.scoring.probe import Probes, score_by_probe
from reference.cosine import cosine_distances
from test_experts import every_mixture

if TYPE_CHECKING:
    from conftest import TinyModel

ROLES = ["up", "gate_up", "down", "q", "o"]


def roles_of(model_type: str) -> list[str]:
    return ROLES if model_type == "qwen2_moe" else ROLES[1:]


def weight(model: PreTrainedModel, projection: Projection) -> torch.Tensor:
    """``[neurons, length]``, cut out by hand."""
    if projection.expert is None:
        matrix = model.get_submodule(projection.name).weight.detach()
    else:
        stack, _, expert = projection.name.rpartition(".")
        matrix = model.get_parameter(stack).detach()[int(expert)]
    return matrix if projection.neuron_dim == 0 else matrix.T


@every_mixture
def test_cosine_is_the_definition(model_type: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    before = tiny_model(model_type)
    after = fine_tuned(before)
    before.save_pretrained(tmp_path / "before", max_shard_size="10KB")
    after.save_pretrained(tmp_path / "after", save_original_format=False)
    live = score_neurons(before, after, roles_of(model_type))
    assert live.total_parameters == sum(parameter.numel() for parameter in before.parameters())
    assert sum(projection.expert is not None for projection in live.projections.values()) >= 8
    for name, projection in live.projections.items():
        expected = cosine_distances(weight(before, projection), weight(after, projection), 0)
        np.testing.assert_allclose(live.distances[name], expected, rtol=1e-11)
    folders = score_neurons(tmp_path / "before", tmp_path / "after", roles_of(model_type))
    assert folders.projections == live.projections
    for name, distances in live.distances.items():
        assert np.array_equal(folders.distances[name], distances)


@every_mixture
def test_norm_is_the_definition(model_type: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    scores = score_by_norm(tmp_path)
    for name, projection in scores.projections.items():
        squares = weight(model, projection).double().square().sum(1).numpy()
        np.testing.assert_allclose(scores.distances[name], 0.5 / squares, rtol=1e-12)


@every_mixture
def test_gradient_is_the_definition(model_type: str, tiny_model: TinyModel) -> None:
    model = tiny_model(model_type)
    generator = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(3):
        ids = torch.randint(128, (2, 16), generator=generator)
        batches.append({"input_ids": ids, "labels": ids})
    scores = score_by_gradient(model, batches, roles_of(model_type))

    plain = copy.deepcopy(model).requires_grad_(True)
    signs: dict[str, torch.Tensor] = {}
    for batch in batches:
        plain.zero_grad()
        plain(**batch).loss.backward()
        for projection in scores.projections.values():
            twin = copy.deepcopy(plain)
            for parameter, other in zip(twin.parameters(), plain.parameters(), strict=True):
                parameter.data = other.grad
            step = weight(twin, projection).double().sign()
            signs[projection.name] = signs.get(projection.name, 0) + step
    for name, projection in scores.projections.items():
        w, u = weight(model, projection).double(), signs[name] / 3
        v = u - (u * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
        expected = v.square().sum(1) / (2 * w.square().sum(1))
        np.testing.assert_allclose(scores.distances[name], expected, rtol=1e-9, atol=1e-12)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_activation_is_refused(tiny_model: TinyModel) -> None:
    ids = torch.arange(5, 25).view(2, 10)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    model = tiny_model("qwen2_moe")
    with pytest.raises(ArchitectureError, match=r"experts\.gate_up_proj\.0: .*cannot be watched"):
        score_by_activation(model, batches)
    scores = score_by_activation(model, batches, ["*.shared_expert.*", "*.layers.0.mlp.*"])
    assert len(scores.projections) == 3 + 3


def test_the_expert_with_a_faulty_weight_is_named(tiny_model: TinyModel) -> None:
    before = tiny_model("mixtral")
    after = copy.deepcopy(before)
    after.model.layers[1].mlp.experts.down_proj.data[2, 7, 5] = torch.nan
    with pytest.raises(CheckpointError, match=r"1\.mlp\.experts\.down_proj\[2\]\[7, 5\] is nan"):
        score_neurons(before, after)
    with pytest.raises(
        CheckpointError, match=r"experts\.down_proj\.2: a weight of neuron 5 is nan"
    ):
        score_by_norm(after)


def test_the_moved_neuron_is_found(tiny_model: TinyModel) -> None:
    before = tiny_model("gpt_oss")
    after = copy.deepcopy(before)
    experts = after.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.gate_up_proj[3, :, 9] += 0.01 * torch.randn(32)
        experts.down_proj[0, 5] += 0.01 * torch.randn(32)
    scores: NeuronScores = score_neurons(before, after)
    assert {name: indices.tolist() for name, indices in scores.lowest(2).items()} == {
        "model.layers.1.mlp.experts.gate_up_proj.3": [9],
        "model.layers.1.mlp.experts.down_proj.0": [5],
    }
    assert len(find_projections(before)) == len(scores.projections)


def test_probes_are_compared_with_every_expert(tiny_model: TinyModel) -> None:
    model = tiny_model("gpt_oss")
    directions = np.random.default_rng(0).standard_normal((2, 3, 32))
    probes = Probes((0, 1), directions, (0.5, 0.5), 0.4, ("a", "b", "c"), 9, 3)
    scores = score_by_probe(model, probes)
    units = directions.reshape(6, 32) / np.linalg.norm(directions.reshape(6, 32), axis=1)[:, None]
    for name, projection in scores.projections.items():
        vectors = weight(model, projection).double().numpy()
        cosines = np.abs(vectors @ units.T).max(1) / np.linalg.norm(vectors, axis=1)
        np.testing.assert_allclose(scores.distances[name], cosines, rtol=1e-9)
