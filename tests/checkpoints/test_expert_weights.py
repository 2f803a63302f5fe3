"""The matrices of experts, wherever a module or the files of a checkpoint keep them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from neft.checkpoints import WeightSource, open_weights
from neft.errors import CheckpointError
from neft.projections import find_projections
from test_experts import every_mixture

if TYPE_CHECKING:
    from conftest import TinyConfig, TinyModel

GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


def check_matrices(source: WeightSource, model: nn.Module) -> None:
    """Every projection of ``model`` is in ``source``, bit for bit."""
    projections = find_projections(model, ["*"])
    assert sum(projection.expert is not None for projection in projections) >= 8
    for projection in projections:
        weight = projection.weight_in(model.get_parameter(projection.parameter)).detach()
        matrix = source.matrix(projection)
        assert matrix.shape == projection.weight_shape
        assert matrix.dtype == str(weight.dtype).removeprefix("torch.")
        assert torch.equal(matrix.read(), weight)


@every_mixture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_and_files_of_every_layout(
    model_type: str, dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model(model_type, seed=3).to(dtype)
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    check_matrices(open_weights(model), model)
    for name in ("single", "sharded", "stacked"):
        source = open_weights(tmp_path / name)
        check_matrices(source, model)
        assert source.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    stacked = {name for name in open_weights(tmp_path / "stacked").tensors if ".experts." in name}
    assert GATE_UP.replace(".0.", ".1.") in stacked
    if model_type != "gpt_oss":  # whose files were never otherwise
        assert stacked.isdisjoint(open_weights(tmp_path / "single").tensors)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_files_of_a_model_without_head(
    model_type: str, tiny_model: TinyModel, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    model = tiny_model(model_type)
    bare = AutoModel.from_config(tiny_config(model_type))
    bare.load_state_dict(model.model.state_dict())
    for name, original in {"single": True, "stacked": False}.items():
        bare.save_pretrained(tmp_path / name, save_original_format=original)
        source = open_weights(tmp_path / name)
        assert not any(tensor.startswith("model.") for tensor in source.tensors)
        check_matrices(source, model)


def test_one_expert_is_read_not_the_stack(tmp_path: Path) -> None:
    num_bytes = 4 * 512 * 512
    stack = torch.randn(64, 512, 512)
    save_file({"experts.down_proj": stack}, tmp_path / "model.safetensors")
    source, process = open_weights(tmp_path), psutil.Process()
    before = process.memory_info().rss
    expert = source.read("experts.down_proj", 40)
    assert torch.equal(expert, stack[40])
    assert process.memory_info().rss - before < 8 * num_bytes


@pytest.fixture
def folder(tiny_model: TinyModel, tmp_path: Path) -> Path:
    tiny_model("mixtral").save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: dict[str, Tensor | None]) -> None:
    """Replace tensors of a checkpoint; ``None`` takes one out."""
    tensors = load_file(folder / "model.safetensors") | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


PART = "model.layers.0.block_sparse_moe.experts.1.{}.weight"


@pytest.mark.parametrize("part", ["w1", "w3"])
def test_a_part_that_is_missing(part: str, folder: Path) -> None:
    projection = find_projections(folder)[1]
    rewrite(folder, {PART.format(part): None})
    with pytest.raises(CheckpointError, match=f"has no tensor {re.escape(GATE_UP)}"):
        open_weights(folder).matrix(projection)


@pytest.mark.parametrize(
    "odd", [torch.zeros(24, 32, dtype=torch.int8), torch.zeros(24, 16)], ids=["dtype", "shape"]
)
def test_parts_that_do_not_fit_together(odd: Tensor, folder: Path) -> None:
    projection = find_projections(folder)[1]
    rewrite(folder, {PART.format("w3"): odd})
    stored = str(odd.dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=rf"w1\.weight \+ .*w3.*, {stored} \[24, \d+\]"):
        open_weights(folder).matrix(projection)


def test_fewer_experts_than_the_model_has(tiny_model: TinyModel, tmp_path: Path) -> None:
    projections = find_projections(tiny_model("gpt_oss"))
    tiny_model("gpt_oss", num_experts=3, num_local_experts=3).save_pretrained(tmp_path)
    source = open_weights(tmp_path)
    assert source.matrix(projections[2]).shape == (32, 48)
    with pytest.raises(CheckpointError, match=r"shape \[3, 32, 48\], .* no matrix of expert 3"):
        source.matrix(projections[3])


def test_blocks_of_four_bits(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("gpt_oss")
    model.save_pretrained(tmp_path)
    blocks = torch.zeros(4, 48, 1, 16, dtype=torch.uint8)
    rewrite(tmp_path, {GATE_UP: None, f"{GATE_UP}_blocks": blocks})
    with pytest.raises(CheckpointError, match=r"MXFP4 blocks\. Load .*dequantize=True"):
        open_weights(tmp_path).matrix(find_projections(model)[0])
