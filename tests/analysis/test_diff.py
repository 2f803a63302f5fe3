"""Weight by weight against numpy on two plain loads."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from neft.analysis.diff import change_by_layer, diff_table, summarized
from neft.analysis.table import Table
from neft.checkpoints import open_weights
from neft.errors import CheckpointError
from reference.cosine import cosine_distance

UP_1 = "model.layers.1.mlp.up_proj.weight"
FILE = "model.safetensors"


def moved(model, step: float = 1e-3):
    after = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * step)
    return after


@pytest.fixture
def folders(tiny_model, tmp_path):
    """``folders("llama", tie_word_embeddings=True)``: a model, and the same moved, on disk."""

    def make(*architecture: str, **overrides) -> tuple[Path, Path]:
        model = tiny_model(*architecture, **overrides)
        model.save_pretrained(tmp_path / "a")
        moved(model).save_pretrained(tmp_path / "b")
        return tmp_path / "a", tmp_path / "b"

    return make


def diff(a, b) -> Table:
    return diff_table(open_weights(a), open_weights(b), progress=False)


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """All parameters, tied ones once."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: p.detach().double().numpy() for name, p in model.named_parameters()}


def change(before: list[np.ndarray], after: list[np.ndarray]) -> float:
    squares = sum(((b - a) ** 2).sum() for a, b in zip(before, after, strict=True))
    return (squares / sum((a**2).sum() for a in before)) ** 0.5


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_weight(folders, architecture) -> None:
    a, b = folders(architecture)
    before, after = arrays(a), arrays(b)
    rows = {row["weight"]: row for row in diff(a, b).rows()}
    assert list(rows) == list(before)
    total = sum(((after[name] - before[name]) ** 2).sum() for name in before)
    for name, row in rows.items():
        squares = ((after[name] - before[name]) ** 2).sum()
        assert row["num_parameters"] == before[name].size
        assert row["share"] == pytest.approx(squares / total, rel=1e-12)
        # GPT-2's biases start at zero, of which nothing is a multiple.
        expected = change([before[name]], [after[name]]) if before[name].any() else None
        assert row["change"] == (pytest.approx(expected, rel=1e-12) if expected else None)


@pytest.mark.parametrize(
    ("architecture", "weight", "transposed", "layer", "role"),
    [
        ("llama", "model.layers.1.mlp.down_proj.weight", True, 1, "down"),
        ("llama", "model.layers.0.self_attn.k_proj.weight", False, 0, "k"),
        ("llama", "model.layers.0.self_attn.o_proj.weight", True, 0, "o"),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", True, 1, "up"),
        ("gpt2", "transformer.h.0.mlp.c_proj.weight", False, 0, "down"),
    ],
)
def test_turn_of_neurons(folders, architecture, weight, transposed, layer, role) -> None:
    a, b = folders(architecture)
    matrices = [arrays(folder)[weight] for folder in (a, b)]
    before, after = (matrix.T if transposed else matrix for matrix in matrices)
    turns = [cosine_distance(u.tolist(), v.tolist()) for u, v in zip(before, after, strict=True)]
    (row,) = (row for row in diff(a, b).rows() if row["weight"] == weight)
    assert (row["layer"], row["role"], row["num_neurons"]) == (layer, role, len(turns))
    assert row["mean_turn"] == pytest.approx(sum(turns) / len(turns), rel=1e-9)
    assert row["max_turn"] == pytest.approx(max(turns), rel=1e-9)


def test_what_has_no_neurons(folders) -> None:
    for architecture, expected in {
        "llama": {"model.norm.weight": "norm", "lm_head.weight": "head"},
        "gpt2": {
            "transformer.wpe.weight": "embedding",
            "transformer.h.0.ln_1.bias": "norm",
            "transformer.h.1.mlp.c_fc.bias": "bias",
        },
    }.items():
        rows = {row["weight"]: row for row in diff(*folders(architecture)).rows()}
        for weight, role in expected.items():
            assert rows[weight]["role"] == role
            assert rows[weight]["num_neurons"] == 0
            assert rows[weight]["mean_turn"] is rows[weight]["max_turn"] is None


def test_summaries(folders) -> None:
    a, b = folders()
    table, before, after = diff(a, b), arrays(a), arrays(b)
    roles = {row["role"]: row for row in summarized(table, "role")}
    assert list(roles) == [
        *("up", "gate", "down", "q", "k", "v", "o"),
        *("norm", "embedding", "head"),
    ]
    names = [name for name in before if "up_proj" in name]
    own = [[weights[name] for name in names] for weights in (before, after)]
    assert roles["up"]["change"] == pytest.approx(change(*own), rel=1e-12)
    turns = [row["mean_turn"] for row in table.rows() if row["role"] == "up"]
    assert roles["up"]["mean_turn"] == pytest.approx(sum(turns) / 2, rel=1e-12)
    assert roles["norm"]["mean_turn"] is None
    assert sum(role["share"] for role in roles.values()) == pytest.approx(1)

    layers = summarized(table, "layer")
    assert [row["layer"] for row in layers] == [0, 1, None]
    names = [name for name in before if ".layers.1." in name]
    own = [[weights[name] for name in names] for weights in (before, after)]
    assert layers[1]["change"] == pytest.approx(change(*own), rel=1e-12)
    assert layers[1]["num_parameters"] == sum(before[name].size for name in names)

    cells = list(change_by_layer(table))
    assert [list(row) for row in cells] == [["layer", "up", "gate", "down", "q", "k", "v", "o"]] * 2
    (row,) = (row for row in table.rows() if row["weight"] == UP_1)
    assert cells[1]["up"] == pytest.approx(row["change"], rel=1e-12)


def test_nothing_moved(tiny_model) -> None:
    table = diff(tiny_model(), tiny_model())
    assert {row["change"] for row in table.rows()} == {0.0}
    assert {row["share"] for row in table.rows()} == {None}
    assert {row["share"] for row in summarized(table, "role")} == {None}


def edited(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or drop tensors of a checkpoint."""
    tensors = load_file(folder / FILE) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / FILE, {"format": "pt"})


EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("copies", ["", "a", "b", "ab"])
def test_a_tied_head_counts_once(folders, copies) -> None:
    a, b = folders("llama", tie_word_embeddings=True)
    expected = diff(a, b).rows()
    assert HEAD not in {row["weight"] for row in expected}
    for folder in (a, b):
        if folder.name in copies:
            edited(folder, **{HEAD: load_file(folder / FILE)[EMBEDDINGS].clone()})
    assert diff(a, b).rows() == expected


def test_a_head_that_fine_tuning_untied_moved_away_from_the_embeddings(folders) -> None:
    a, b = folders("llama", tie_word_embeddings=True)
    embeddings = load_file(a / FILE)[EMBEDDINGS]
    edited(b, **{HEAD: embeddings * 1.5})
    rows = {row["weight"]: row for row in diff(a, b).rows()}
    assert rows[HEAD]["change"] == pytest.approx(0.5)
    assert rows[HEAD]["role"] == "head"
    assert rows[EMBEDDINGS]["change"] < 0.1


def test_weights_that_cannot_be_compared(folders) -> None:
    a, b = folders()
    edited(b, **{HEAD: torch.ones(130, 32), "model.norm.weight": None})
    table = diff(a, b)
    assert table.about["left_out"] == {
        HEAD: "has the shapes [128, 32] and [130, 32]",
        "model.norm.weight": f"is not in {b}",
    }
    assert not {HEAD, "model.norm.weight"} & {row["weight"] for row in table.rows()}
    assert sum(row["share"] for row in table.rows()) == pytest.approx(1)


def test_names_without_the_prefix_of_the_head_model(folders) -> None:
    a, b = folders("gpt2")
    expected = diff(a, b).rows()
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(b / FILE).items()}
    save_file(tensors, b / FILE, {"format": "pt"})
    assert diff(a, b).rows() == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (UP_1, None, f"has no tensor {UP_1}"),
        (UP_1, torch.ones(48, 32), f"{UP_1} has shape [48, 32]"),
        (UP_1, torch.ones(64, 32, dtype=torch.int8), f"{UP_1} is stored as int8"),
        ("model.norm.weight", torch.ones(32, dtype=torch.int8), "norm.weight is stored as int8"),
        ("model.norm.weight", torch.full((32,), float("nan")), "norm.weight holds a value that is"),
    ],
)
def test_wrong_checkpoints(folders, name, value, message) -> None:
    a, b = folders()
    edited(b, **{name: value})
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        diff(a, b)
    assert str(b) in str(caught.value)
