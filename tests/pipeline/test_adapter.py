"""Adapters put on their base, merged into it, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from neft.errors import AdapterError, CheckpointError, UsageError
from neft.models import load_model
from neft.pipeline.adapter import load_adapter, merge_adapter
from neft.recipe import ModelSection

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture
def base(tiny_model, tiny_tokenizer, tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A saved adapter that changes two in-neurons and one out-neuron."""
    from peft import get_peft_model

    from neft import NeftConfig

    model = load_model(ModelSection(path=str(base)))
    config = NeftConfig(neurons={UP: [3, 5], DOWN: [7]}, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def expected(base: Path) -> PreTrainedModel:
    """What the adapter means, written by hand."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_submodule(UP).weight[[3, 5]] += 1
        model.get_submodule(DOWN).weight[:, 7] += 1
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 30)[None]).logits


def test_load(base, adapter) -> None:
    model = load_adapter(load_model(ModelSection(path=str(base))), adapter)
    assert torch.equal(logits(model), logits(expected(base)))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_merged_checkpoint_needs_transformers_alone(base, adapter, tmp_path) -> None:
    merge_adapter(adapter, tmp_path / "merged")
    merged, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, weight in expected(base).state_dict().items():
        assert torch.equal(merged.state_dict()[name], weight), name
    text = AutoTokenizer.from_pretrained(tmp_path / "merged")("abc").input_ids
    assert text == AutoTokenizer.from_pretrained(base)("abc").input_ids


@pytest.mark.parametrize(
    ("dtype", "stored"), [("auto", torch.bfloat16), ("float32", torch.float32)]
)
def test_dtype_of_merged_checkpoint(base, adapter, tmp_path, dtype, stored) -> None:
    load_model(ModelSection(path=str(base), dtype="bfloat16")).save_pretrained(base)
    merge_adapter(adapter, tmp_path / "merged", dtype=dtype)
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {stored}


def test_merge_into_another_copy_of_the_base(base, adapter, tmp_path) -> None:
    base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="base"):
        merge_adapter(adapter, tmp_path / "merged")
    merge_adapter(adapter, tmp_path / "merged", base=str(tmp_path / "moved"))
    assert (tmp_path / "merged" / "config.json").is_file()


def test_merge_keeps_what_is_there(adapter, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="mine: exists already"):
        merge_adapter(adapter, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)


def shorten_tensor(path: Path) -> None:
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:1].clone()}, path)


def forget_base(path: Path) -> None:
    config = json.loads(path.read_text()) | {"base_model_name_or_path": None}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("adapter_config.json", Path.unlink, "has no adapter_config.json"),
        ("adapter_model.safetensors", Path.unlink, "has no adapter_model.safetensors"),
        ("adapter_config.json", tear, "adapter_config.json: cannot be read"),
        ("adapter_config.json", lambda path: path.write_text("[]"), "expected a JSON object"),
        ("adapter_config.json", lambda path: path.write_text("{}"), "adapter"),
        ("adapter_config.json", forget_base, "names no base model"),
        ("adapter_model.safetensors", tear, "adapter"),
        ("adapter_model.safetensors", drop_tensor, "adapter"),
        ("adapter_model.safetensors", shorten_tensor, "adapter"),
    ],
)
def test_incomplete_adapter(adapter, tmp_path, name, spoil, message) -> None:
    spoil(adapter / name)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AdapterError, match=message):
        merge_adapter(adapter, tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before


def test_missing_adapter(tmp_path) -> None:
    with pytest.raises(AdapterError, match="nowhere: no such folder"):
        merge_adapter(tmp_path / "nowhere", tmp_path / "merged")


def test_adapter_of_another_model(adapter, tiny_model, tmp_path) -> None:
    tiny_model(intermediate_size=48).save_pretrained(tmp_path / "other")
    other = load_model(ModelSection(path=str(tmp_path / "other")))
    with pytest.raises(UsageError, match="up_proj"):
        load_adapter(other, adapter)
