"""Scores that no training is needed for, against the definition, vector by vector."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from neft.errors import (
    AdapterError,
    ArchitectureError,
    CheckpointError,
    DataError,
    DivergenceError,
    NeuronError,
    RunError,
)
from neft.neurons import Axis, NeuronScores, Projection
from neft.scoring import score_by_activation, score_by_gradient, score_by_norm
from neft.scoring.gradient import GradientSigns

if TYPE_CHECKING:
    from conftest import TinyModel

MODULES = [None, ["up", "gate", "down", "q", "k", "v", "o"]]
MODEL_TYPES = ["llama", "gpt2", "phi3"]


def batches(num: int = 3) -> list[dict[str, Tensor]]:
    """Batches with padding, of which prompts do not count."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(num):
        ids = torch.randint(1, 100, (2, 7), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def vectors_of(weight: Tensor, projection: Projection) -> list[list[float]]:
    rows = weight.detach().double()
    return (rows if projection.neuron_dim == 0 else rows.T).tolist()


def modules_for(model: nn.Module, wanted: list[str] | None) -> list[str] | None:
    """Roles that the architecture has, fused ones for others."""
    if wanted is None or type(model).__name__ == "LlamaForCausalLM":
        return wanted
    return {"GPT2LMHeadModel": ["up", "down", "qkv", "o"]}.get(
        type(model).__name__, ["gate_up", "down", "qkv", "o"]
    )


def signs_by_hand(model: nn.Module, projections: dict[str, Projection]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for batch in batches():
        other = copy.deepcopy(model)
        other(**batch).loss.backward()
        for name in projections:
            sign = other.get_submodule(name).weight.grad.sign()
            total[name] = total.get(name, 0) + sign
    return total


def turn(move: list[float], vector: list[float]) -> float:
    """``1 - cos`` of a small move: half the square of its part across the vector."""
    squared = sum(w * w for w in vector)
    along = sum(u * w for u, w in zip(move, vector, strict=True)) / squared
    across = [u - along * w for u, w in zip(move, vector, strict=True)]
    return sum(v * v for v in across) / (2 * squared)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("wanted", MODULES, ids=["up and down", "all"])
def test_gradient(model_type: str, wanted: list[str] | None, tiny_model: TinyModel) -> None:
    model = tiny_model(model_type).eval()
    before = copy.deepcopy(model.state_dict())
    scores = score_by_gradient(model, batches(), modules_for(model, wanted))
    signs = signs_by_hand(model, scores.projections)
    for name, projection in scores.projections.items():
        weight = model.get_submodule(name).weight
        moves = vectors_of(signs[name].double() / 3, projection)
        expected = [turn(m, w) for m, w in zip(moves, vectors_of(weight, projection), strict=True)]
        np.testing.assert_allclose(scores.distances[name], expected, rtol=1e-9)
        assert len(set(expected)) > 1
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert scores.provenance["method"] == "gradient"
    assert scores.provenance["num_batches"] == 3


def test_gradient_foretells_small_runs(tiny_model: TinyModel) -> None:
    """Signs of one batch are Adam's first step, whose turn is measured from the weights."""
    from neft.scoring import score_neurons

    model = tiny_model().double().eval()
    scores = score_by_gradient(model, batches(1))
    after = copy.deepcopy(model)
    optimizer = torch.optim.Adam(after.parameters(), lr=1e-6, eps=1e-30)
    after(**batches(1)[0]).loss.backward()
    optimizer.step()
    measured = score_neurons(model, after)
    for name, distances in scores.distances.items():
        np.testing.assert_allclose(measured.distances[name], 1e-12 * distances, rtol=1e-3)


def test_gradients_are_freed_one_by_one(tiny_model: TinyModel) -> None:
    model = tiny_model()
    alive = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    score_by_gradient(model, batches(1))
    assert alive == [1] * 4


@pytest.mark.parametrize(("num_batches", "dtype"), [(32_767, torch.int16), (32_768, torch.int32)])
def test_sums_of_very_many_batches(
    num_batches: int, dtype: torch.dtype, tiny_model: TinyModel
) -> None:
    model = tiny_model()
    signs = GradientSigns.nothing_yet(score_by_norm(model).projections.values(), num_batches)
    for total in signs.sums.values():
        assert total.dtype == dtype
        total.fill_(num_batches - 1)  # as if all batches before the last had agreed
    signs.add(model, batches(1))
    assert max(int(total.max()) for total in signs.sums.values()) == num_batches
    assert min(int(total.min()) for total in signs.sums.values()) == num_batches - 2


@pytest.mark.parametrize(("num_batches", "dtype"), [(127, torch.int8), (128, torch.int16)])
def test_sums_hold_every_batch(num_batches: int, dtype: torch.dtype, tiny_model: TinyModel) -> None:
    model = tiny_model()
    scores = score_by_norm(model)
    signs = GradientSigns.nothing_yet(scores.projections.values(), num_batches)
    signs.add(model, batches(1) * num_batches)
    one = GradientSigns.nothing_yet(scores.projections.values(), 1)
    one.add(model, batches(1))
    for name, total in signs.sums.items():
        assert total.dtype == dtype
        assert torch.equal(total.int(), num_batches * one.sums[name].int())


def test_gradient_with_a_loss_of_ones_own(tiny_model: TinyModel) -> None:
    model = tiny_model()
    doubled = score_by_gradient(model, batches(), loss=lambda model, batch: 2 * model(**batch).loss)
    turned = score_by_gradient(model, batches(), loss=lambda model, batch: -model(**batch).loss)
    for name, distances in score_by_gradient(model, batches()).distances.items():
        assert np.array_equal(distances, doubled.distances[name])
        assert np.array_equal(distances, turned.distances[name])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("wanted", MODULES, ids=["up and down", "all"])
def test_activation(model_type: str, wanted: list[str] | None, tiny_model: TinyModel) -> None:
    model = tiny_model(model_type).train()
    scores = score_by_activation(model, batches(), modules_for(model, wanted))
    assert model.training
    seen: dict[str, list[Tensor]] = {name: [] for name in scores.projections}

    def see(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        is_column = scores.projections[name].axis is Axis.COLUMN
        seen[name].append((inputs[0] if is_column else output).detach().double())

    for name in seen:
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: see(name, inputs, output)
        )
    model.eval()
    for batch in batches():
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            model(row[: mask.sum()][None])  # one text alone, without padding
    for name, values in seen.items():
        expected = torch.cat([text[0] for text in values]).abs().mean(0)
        np.testing.assert_allclose(scores.distances[name], expected, rtol=1e-5)
    assert scores.provenance["num_tokens"] == 3 * (7 + 5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_norm(model_type: str, tiny_model: TinyModel) -> None:
    model = tiny_model(model_type)
    scores = score_by_norm(model)
    for name, projection in scores.projections.items():
        vectors = vectors_of(model.get_submodule(name).weight, projection)
        expected = [0.5 / sum(w * w for w in vector) for vector in vectors]
        np.testing.assert_allclose(scores.distances[name], expected, rtol=1e-9)


def test_norm_of_a_folder_takes_the_shortest(tiny_model: TinyModel, tmp_path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    chosen = score_by_norm(tmp_path, ["down"]).lowest(5)
    lengths = {
        (name, i): module.weight[:, i].norm().item()
        for name, module in model.named_modules()
        if name.endswith("down_proj")
        for i in range(module.weight.shape[1])
    }
    expected = sorted(lengths, key=lengths.__getitem__)[:5]
    assert sorted(expected) == [(name, int(i)) for name, found in chosen.items() for i in found]


def test_zero_neurons(tiny_model: TinyModel) -> None:
    """What has no length has no finite turn, but comes first among the short ones."""
    model = tiny_model()
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[3] = 0
    for scores in (score_by_norm(model), score_by_gradient(model, batches())):
        assert scores.lowest(1)[name].tolist() == [3]


def broken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[3, 2] = float("nan")
    return model


def test_broken_weights(tiny_model: TinyModel) -> None:
    model = broken(tiny_model())
    with pytest.raises(DivergenceError, match="Batch 1: the loss is nan"):
        score_by_gradient(model, batches())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with pytest.raises(RunError, match=r"layers\.1\.mlp\.up_proj: an activation is not finite"):
        score_by_activation(model, batches())
    with pytest.raises(CheckpointError, match="a weight of neuron 3 is nan"):
        score_by_norm(model)


def test_gradient_that_is_not_finite(tiny_model: TinyModel) -> None:
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    with pytest.raises(DivergenceError, match=r"the gradient of .*layers.1.* is not finite"):
        score_by_gradient(
            tiny_model(), batches(), loss=lambda m, batch: Overflow.apply(m(**batch).loss)
        )


WAYS = [
    lambda model, **options: score_by_gradient(model, batches(), **options),
    lambda model, **options: score_by_activation(model, batches(), **options),
    score_by_norm,
]


@pytest.mark.parametrize("way", WAYS, ids=["gradient", "activation", "norm"])
def test_axes_of_unknown_modules(way, tiny_model: TinyModel) -> None:
    model = tiny_model()
    known = way(model, modules=["up", "down"])
    model.config.model_type = "llamalike"
    modules = ["*.up_proj", "*.down_proj"]
    found = way(model, modules=modules, axes={"*.down_proj": Axis.COLUMN})
    for name, projection in known.projections.items():
        assert found.projections[name].axis is projection.axis
        assert np.array_equal(found.distances[name], known.distances[name])


@pytest.mark.parametrize("way", WAYS, ids=["gradient", "activation", "norm"])
def test_a_tied_head(way, tiny_model: TinyModel, tmp_path) -> None:
    tied = tiny_model(tie_word_embeddings=True)
    with pytest.raises(
        NeuronError, match=r"lm_head: its weight is tied to model\.embed_tokens\.weight"
    ):
        way(tied, modules=["up", "lm_head"])
    assert "lm_head" in way(tiny_model(tie_word_embeddings=False), modules=["lm_head"]).projections
    tied.save_pretrained(tmp_path)
    with pytest.raises(NeuronError, match="its weight is tied"):
        score_by_norm(tmp_path, ["lm_head"])


@pytest.mark.parametrize("way", WAYS[:2], ids=["gradient", "activation"])
def test_a_model_with_an_adapter(way, tiny_model: TinyModel) -> None:
    wrapped = get_peft_model(tiny_model(), LoraConfig(target_modules=["up_proj"]))
    inside = tiny_model()
    inside.add_adapter(LoraConfig(target_modules=["up_proj"]))
    for model in (wrapped, inside):
        with pytest.raises(AdapterError, match=r"has an adapter, .* or give the base model"):
            way(model)
    assert len(way(wrapped.merge_and_unload()))


def test_gradient_without_labels(tiny_model: TinyModel) -> None:
    model = tiny_model()
    bare = [{n: rows for n, rows in batch.items() if n != "labels"} for batch in batches()]
    with pytest.raises(DataError, match=r"input_ids, attention_mask: add labels .*loss="):
        score_by_gradient(model, bare)
    assert all(parameter.requires_grad for parameter in model.parameters())
    given = score_by_gradient(
        model, bare, loss=lambda model, batch: model(**batch, labels=batch["input_ids"]).loss
    )
    assert len(given)


@pytest.mark.parametrize("score", [score_by_gradient, score_by_activation])
def test_refuses(score, tiny_model: TinyModel) -> None:
    with pytest.raises(DataError, match="no batches"):
        score(tiny_model(), [])
    with pytest.raises(ArchitectureError, match="moe"):
        score(tiny_model(), batches(), ["moe"])


def test_saved(tiny_model: TinyModel, tmp_path) -> None:
    scores = score_by_gradient(tiny_model(), batches())
    scores.save(tmp_path / "s.safetensors")
    loaded = NeuronScores.load(tmp_path / "s.safetensors")
    assert loaded.provenance == scores.provenance
    assert loaded.lowest(7) == scores.lowest(7)
