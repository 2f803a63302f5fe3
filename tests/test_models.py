"""Models and tokenizers that load, and errors for those that do not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from neft.errors import CheckpointError
from neft.models import load_model, load_tokenizer
from neft.recipe import ModelSection

if TYPE_CHECKING:
    from conftest import TinyModel, TinyTokenizer


@pytest.fixture
def folder(tiny_model: TinyModel, tiny_tokenizer: TinyTokenizer, tmp_path: Path) -> Path:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def section(folder: Path | str, **fields: object) -> ModelSection:
    return ModelSection(path=str(folder), **fields)


def test_weights_and_dtypes(folder: Path, tiny_model: TinyModel) -> None:
    expected = tiny_model("llama", tie_word_embeddings=True).state_dict()
    loaded = load_model(section(folder))
    assert not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name])
    halved = load_model(section(folder, dtype="bfloat16"))
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.bfloat16}
    masters = load_model(section(folder, dtype="bfloat16"), torch.float32)
    assert {parameter.dtype for parameter in masters.parameters()} == {torch.float32}


def test_nothing_on_the_terminal(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(section(folder))
    load_tokenizer(section(folder))
    assert capfd.readouterr() == ("", "")


def test_padding(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_tokenizer(section(folder)).padding_side == "right"
    tokenizer = load_tokenizer(section(folder), padding_side="left")
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<pad>")

    def without(*names: str) -> ModelSection:
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in config.items() if k not in names}))
        return section(folder)

    with caplog.at_level(logging.INFO, "neft"):
        assert load_tokenizer(without("pad_token")).pad_token == "</s>"
        assert "'</s>' stands in" in caplog.text
    assert load_tokenizer(without("eos_token")).pad_token == "<unk>"
    with pytest.raises(CheckpointError, match="no pad, EOS or unknown token"):
        load_tokenizer(without("unk_token"))


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/model", "a/b/c"])
def test_missing_folder(path: str) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(CheckpointError, match=f"{path}: no such folder"):
            load(section(path))


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_model, load_tokenizer):
        with pytest.raises(
            CheckpointError, match=r"nobody/nothing: no such folder here, and no .*Hub"
        ):
            load(section("nobody/nothing"))


def test_not_a_checkpoint(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(CheckpointError, match="is an adapter, not a model"):
        load_model(section(folder))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_model(section(folder))
    with pytest.raises(CheckpointError, match="is a file"):
        load_model(section(folder / "tokenizer.json"))


def test_no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        load_tokenizer(section(folder))


def test_not_a_causal_language_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(CheckpointError, match="model cannot be loaded: Unrecognized configuration"):
        load_model(section(folder))


def test_pickles_are_never_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        load_model(section(folder))


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model cannot be loaded"):
        load_model(section(folder))


def test_missing_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"1 tensors .* missing, e\.g\. model\.layers\.1\.mlp\.up"
    ):
        load_model(section(folder))


def test_torn_weights(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="model cannot be loaded"):
        load_model(section(folder))


def test_wrong_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(31)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[31\], .* \[32\]"):
        load_model(section(folder))


def test_code_of_the_checkpoint_does_not_run(folder: Path) -> None:
    ran = folder / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="ships Python code of its own"):
        load_model(section(folder))
    assert not ran.exists()
