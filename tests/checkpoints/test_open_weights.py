"""Weights from folders and modules: the same, one at a time, or an error that says what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from neft import NeftConfig
from neft.checkpoints import TensorInfo, WeightSource, open_weights
from neft.errors import CheckpointError

if TYPE_CHECKING:
    from conftest import TinyModel

UP = "model.layers.0.mlp.up_proj"


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def check_same(source: WeightSource, expected: dict[str, Tensor]) -> None:
    assert set(source.tensors) == set(expected)
    for name, tensor in expected.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        assert source.tensors[name] == TensorInfo(tuple(tensor.shape), dtype)
        assert torch.equal(source.read(name), tensor)
        assert source.read(name).dtype == tensor.dtype
        assert source.read(name).device.type == "cpu"


@pytest.fixture
def single(tiny_model: TinyModel, tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "single")
    return tmp_path / "single"


@pytest.fixture
def sharded(tiny_model: TinyModel, tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    return tmp_path / "sharded"


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def test_folders_and_module_are_the_same(
    single: Path, sharded: Path, tiny_model: TinyModel
) -> None:
    expected = parameters_of(tiny_model())
    sources = [open_weights(source) for source in (single, str(sharded), tiny_model())]
    for source in sources:
        check_same(source, expected)
        assert source.num_parameters == sum(tensor.numel() for tensor in expected.values())
    assert [source.label for source in sources] == [str(single), str(sharded), "LlamaForCausalLM"]
    assert [source.config_path for source in sources] == [
        single / "config.json",
        sharded / "config.json",
        None,
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path)
    for source in (open_weights(tmp_path), open_weights(model)):
        check_same(source, parameters_of(model))


def test_tied_weights_count_once(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    unique = sum(parameter.numel() for parameter in model.parameters())
    assert open_weights(model).num_parameters == unique
    model.save_pretrained(tmp_path)
    assert open_weights(tmp_path).num_parameters == unique
    # Some writers store them twice.
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert open_weights(tmp_path).num_parameters == unique
    untied = tiny_model(tie_word_embeddings=False)
    assert open_weights(untied).num_parameters > unique


def test_stored_buffers_are_no_parameters(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert open_weights(tmp_path).num_parameters == expected


def test_lora_and_modules_to_save(tiny_model: TinyModel) -> None:
    config = LoraConfig(target_modules=["up_proj", "q_proj"], modules_to_save=["lm_head"])
    wrapped = get_peft_model(tiny_model(), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.fill_(7.0)
    for model in (wrapped, wrapped.get_base_model()):
        source = open_weights(model)
        check_same(source, parameters_of(tiny_model()))
        assert source.num_parameters == sum(p.numel() for p in tiny_model().parameters())
    merged = wrapped.merge_and_unload()
    original = tiny_model().get_parameter(f"{UP}.weight")
    assert not torch.equal(open_weights(merged).read(f"{UP}.weight"), original)


def test_neft_vectors_are_taken_out(tiny_model: TinyModel) -> None:
    wrapped = get_peft_model(tiny_model(), NeftConfig(neurons={UP: [1, 2]}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "neft_vectors" in name:
                parameter.fill_(7.0)
        wrapped(torch.tensor([[1, 2, 3]]))
    assert (wrapped.get_submodule(f"base_model.model.{UP}").base_layer.weight[1] == 7).all()
    check_same(open_weights(wrapped), parameters_of(tiny_model()))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory map from /proc")
def test_one_shard_open_at_a_time(sharded: Path) -> None:
    def mapped() -> set[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line.split("/")[-1] for line in lines if str(sharded) in line}

    source = open_weights(sharded)
    assert mapped() == set()
    shards: set[str] = set()
    for name in source.tensors:
        tensor = source.read(name)
        assert len(mapped()) == 1
        shards |= mapped()
        del tensor
        assert mapped() == set()
    assert len(shards) > 3


def test_a_tensor_outlives_its_source(single: Path, tiny_model: TinyModel) -> None:
    tensor = open_weights(single).read(f"{UP}.weight")
    assert torch.equal(tensor, tiny_model().get_parameter(f"{UP}.weight"))


def rename_tensors(folder: Path, old: str, new: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name.replace(old, new, 1): tensor for name, tensor in tensors.items()}, file)


def test_names_without_and_with_a_prefix(tiny_model: TinyModel, tmp_path: Path) -> None:
    name = "transformer.h.1.mlp.c_fc"
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    assert open_weights(tmp_path).weight_name(name) == f"{name}.weight"
    rename_tensors(tmp_path, "transformer.h.", "h.")
    source = open_weights(tmp_path)
    assert source.weight_name(name) == "h.1.mlp.c_fc.weight"
    assert torch.equal(source.read(source.weight_name(name)), model.get_submodule(name).weight)
    assert source.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert open_weights(model).weight_name("h.1.mlp.c_fc") == f"{name}.weight"


def test_a_name_that_could_be_two(single: Path) -> None:
    rename_tensors(single, "model.layers.1.", "other.layers.0.")
    source = open_weights(single)
    assert source.weight_name(UP) == f"{UP}.weight"
    with pytest.raises(CheckpointError, match=r"several that end alike: model\.\S+, other\.\S+\."):
        source.weight_name("layers.0.mlp.up_proj")


def test_a_missing_tensor(single: Path, tiny_model: TinyModel) -> None:
    for source in (open_weights(single), open_weights(tiny_model())):
        with pytest.raises(CheckpointError) as error:
            source.weight_name("model.layers.7.mlp.up_proj")
        assert f"{source.label}: has no tensor model.layers.7.mlp.up_proj.weight." in str(
            error.value
        )
        assert "Near it: model.layers." in str(error.value)
        with pytest.raises(CheckpointError, match=r"has no tensor nothing\. It has 21 others"):
            source.read("nothing")


@pytest.mark.parametrize("stored", ["fc.weight", "c_fc.weight"])
def test_a_part_of_a_name_is_no_match(stored: str, tmp_path: Path) -> None:
    # It may end alike, but it could belong to any layer.
    save_file({stored: torch.ones(2, 2)}, tmp_path / "model.safetensors")
    for module in ("h.0.mlp.c_fc", "my_c_fc"):
        with pytest.raises(CheckpointError, match="has no tensor"):
            open_weights(tmp_path).weight_name(module)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/model", "a/b/c", Path("nobody/nothing")])
def test_missing_folder(path: str | Path) -> None:
    with pytest.raises(CheckpointError, match=f"{path}: no such folder"):
        open_weights(path)


def test_a_file_is_no_checkpoint(single: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file"):
        open_weights(single / "model.safetensors")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"nobody/nothing: no such folder here, and no .*Hub"):
        open_weights("nobody/nothing")
    with pytest.raises(CheckpointError, match=r"nobody/nothing@v2: no such folder here"):
        open_weights("nobody/nothing", revision="v2")


def test_pickles_are_never_loaded(single: Path) -> None:
    (single / "model.safetensors").unlink()
    (single / "pytorch_model.bin").write_bytes(b"boom")
    with pytest.raises(CheckpointError) as error:
        open_weights(single)
    assert f"{single}: has only pickled weights (pytorch_model.bin)" in str(error.value)
    assert ".save_pretrained(folder, safe_serialization=True)" in str(error.value)


def test_folders_of_something_else(single: Path, sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty: has neither model\.safetensors nor"):
        open_weights(tmp_path / "empty")
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"has model-00001-of-\d+\.safetensors, but neither"):
        open_weights(sharded)
    (single / "model.safetensors").rename(single / "adapter_model.safetensors")
    (single / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an adapter, not a model"):
        open_weights(single)


def test_a_missing_shard(sharded: Path) -> None:
    first_shard(sharded).unlink()
    with pytest.raises(
        CheckpointError, match=r"1 of \d+ shards missing: model-00001-of-\d+\.safetensors\."
    ):
        open_weights(sharded)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_shard(sharded: Path, kept: int) -> None:
    shard = first_shard(sharded)
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"{shard}: cannot be read as safetensors"):
        open_weights(sharded)


def test_a_corrupt_file(single: Path) -> None:
    file = single / "model.safetensors"
    file.write_bytes(b"\xff" * 1000)
    with pytest.raises(CheckpointError, match=f"{file}: cannot be read as safetensors"):
        open_weights(single)


def test_a_file_that_is_damaged_after_opening(single: Path) -> None:
    source = open_weights(single)
    (single / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        source.read(f"{UP}.weight")


def test_an_index_that_does_not_fit(sharded: Path) -> None:
    shard = first_shard(sharded)
    tensors = load_file(shard)
    lost = min(tensors)
    del tensors[lost]
    save_file(tensors | {"other": torch.ones(1)}, shard)
    with pytest.raises(CheckpointError, match=f"{shard}: has no tensor {lost}, which .* says"):
        open_weights(sharded)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}']
)
def test_an_unreadable_index(sharded: Path, content: str) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(CheckpointError, match=f"{index}: not a readable index"):
        open_weights(sharded)


def test_tensors_that_the_index_leaves_out(sharded: Path) -> None:
    shard = first_shard(sharded)
    save_file(load_file(shard) | {"other": torch.ones(1)}, shard)
    assert "other" not in open_weights(sharded).tensors


def test_without_a_config(single: Path) -> None:
    (single / "config.json").unlink()
    source = open_weights(single)
    assert source.config_path is None
    assert source.read(f"{UP}.weight").shape == (64, 32)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        source.num_parameters  # noqa: B018


def test_quantized_dtypes_are_told(tmp_path: Path) -> None:
    weights = {"a.weight": torch.ones(2, 2, dtype=torch.int8), "b.weight": torch.ones(2)}
    weights["c.weight"] = torch.ones(2, 2).to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / "model.safetensors")
    dtypes = {name: tensor.dtype for name, tensor in open_weights(tmp_path).tensors.items()}
    assert dtypes == {"a.weight": "int8", "b.weight": "float32", "c.weight": "float8_e4m3fn"}


def test_weights_without_data(tiny_model: TinyModel) -> None:
    source = open_weights(tiny_model().to("meta"))
    with pytest.raises(CheckpointError, match=f"{UP}.weight is on the meta device"):
        source.read(f"{UP}.weight")


def test_a_module_that_is_no_transformer() -> None:
    source = open_weights(nn.Sequential(nn.Linear(3, 2, bias=False)))
    assert source.tensors == {"0.weight": TensorInfo((2, 3), "float32")}
    assert (source.label, source.num_parameters) == ("Sequential", 6)


def test_where_a_module_came_from_is_in_its_label(single: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(single)
    assert open_weights(model).label == f"LlamaForCausalLM ({single})"
