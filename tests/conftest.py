"""Shared fixtures: tiny random models, built from a config and never downloaded."""

from __future__ import annotations

import json
import os
import string
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import Mock

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from neft import products

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; threads that wait for one another take several times as long.
    torch.set_num_threads(1)

# Two layers; in each, 64 in-neurons and 64 out-neurons of length 32.
_TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Four experts of 24 units, of which each token goes to two; their number has two names, and the width of
# models whose layers are all mixtures is simply called that of the intermediate layer.
_MIXTURE = _TINY | {
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
# What an architecture calls differently, or has beside.
_OWN: dict[str, dict[str, Any]] = {
    "gpt2": _TINY | {"n_inner": 64},
    "opt": _TINY | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "mixtral": _MIXTURE,
    "olmoe": _MIXTURE,
    "gpt_oss": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "qwen2_moe": _MIXTURE | {"mlp_only_layers": [0], "shared_expert_intermediate_size": 40},
    "gemma3": {
        "text_config": _TINY,
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 120,
        "boi_token_index": 121,
        "eoi_token_index": 122,
    },
}


class TinyConfig(Protocol):
    def __call__(self, model_type: str = "llama", **overrides: Any) -> PreTrainedConfig: ...


class TinyModel(Protocol):
    def __call__(
        self, model_type: str = "llama", *, seed: int = 0, **overrides: Any
    ) -> PreTrainedModel: ...


@pytest.fixture(scope="session")
def tiny_config() -> TinyConfig:
    """``tiny_config("llama", num_hidden_layers=3)``: a config; keywords replace its fields."""

    def make(model_type: str = "llama", **overrides: Any) -> PreTrainedConfig:
        return AutoConfig.for_model(model_type, **(_OWN.get(model_type, _TINY) | overrides))

    return make


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Products of all sizes run as on a processor on which oneDNN is ahead; holds its calls."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    calls = Mock(wraps=products._onednn)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_WORTHWHILE", 1)
    monkeypatch.setattr(products, "_onednn", calls)
    return calls


@pytest.fixture(scope="session")
def tiny_model(tiny_config: TinyConfig) -> TinyModel:
    """``tiny_model("gpt2", seed=1)``: a fresh float32 model in eval mode; a seed names its weights."""

    def make(model_type: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)).eval()

    return make


_CHAT_TEMPLATE = (
    "{% for turn in messages %}<s>{{ turn.role }}:{{ turn.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


class TinyTokenizer(Protocol):
    def __call__(self, *, chat: bool = False) -> PreTrainedTokenizerFast: ...


@pytest.fixture(scope="session")
def tiny_tokenizer() -> TinyTokenizer:
    """``tiny_tokenizer(chat=True)``: one token a printable ASCII character, except the pair ``th``.

    The special tokens are those of the tiny models; decoding gives the text back.
    """
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *string.printable[:95], "\n", "th"]
    vocabulary = {token: number for number, token in enumerate(tokens)}

    def make(*, chat: bool = False) -> PreTrainedTokenizerFast:
        core = Tokenizer(BPE(vocabulary, [("t", "h")], unk_token="<unk>"))
        core.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            chat_template=_CHAT_TEMPLATE if chat else None,
        )

    return make


class TinyRecipe(Protocol):
    def __call__(self, folder: Path, **changes: Any) -> Path: ...


@pytest.fixture(scope="session")
def tiny_recipe(tiny_model: TinyModel, tiny_tokenizer: TinyTokenizer) -> TinyRecipe:
    """``tiny_recipe(tmp_path, **{"train.steps": 3})``: a recipe file, with a model and data beside it.

    Its output is ``folder / "run"``.
    """

    def make(folder: Path, **changes: Any) -> Path:
        tiny_model().save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        for split, count in {"train": 16, "dev": 4, "test": 5}.items():
            words = (f"{split} {number}" for number in range(count))
            rows = (json.dumps({"source": word, "target": word.upper()}) for word in words)
            (folder / f"{split}.jsonl").write_text("".join(f"{row}\n" for row in rows))
        training = {"steps": 4, "batch_size": 4, "evaluate_every": 2, "warmup_steps": 0}
        fields: dict[str, Any] = {
            "output": str(folder / "run"),
            "model": {"path": str(folder / "model")},
            "data": {
                "task": "translation",
                "source_language": "lower case",
                "target_language": "upper case",
                **{split: str(folder / f"{split}.jsonl") for split in ("train", "dev", "test")},
            },
            "warmup": training | {"learning_rate": 1e-2},
            "select": {"percent": 9},
            "train": training | {"learning_rate": 1e-1},
            "evaluate": {"max_new_tokens": 8, "batch_size": 2},
        }
        for place, value in changes.items():
            *sections, key = place.split(".")
            section = fields
            for name in sections:
                section = section[name]
            section[key] = value
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(fields))
        return recipe

    return make
