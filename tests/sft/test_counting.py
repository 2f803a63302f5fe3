"""How much methods train, by shapes alone, against the paper's numbers and against real models."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from peft import get_peft_model_state_dict
from torch import nn
from transformers import LlamaConfig

from neft.errors import ArchitectureError
from neft.projections import as_module
from neft.recipe import LoraSection
from neft.sft.counting import matching_rank
from neft.sft.footprint import trained_tensors
from neft.sft.methods import prepare

if TYPE_CHECKING:
    from conftest import TinyConfig, TinyModel

# The paper's Table 6 gives them in millions: 20.0, 40.0, 159.9, 319.8, 639.6.
LORA_OF_LLAMA_7B = {
    8: 19_988_480,
    16: 39_976_960,
    64: 159_907_840,
    128: 319_815_680,
    256: 639_631_360,
}


def num_trainable(network: nn.Module, method: str, rank: int | None = None) -> int:
    lora = None if rank is None else LoraSection(rank=rank)
    return sum(map(math.prod, trained_tensors(network, method, None, lora)))


@pytest.fixture(scope="module")
def llama_7b() -> nn.Module:
    """Of Llama-2's 7 billion parameters, names and shapes."""
    return as_module(LlamaConfig())  # its defaults are this model


def test_paper(llama_7b: nn.Module) -> None:
    for rank, count in LORA_OF_LLAMA_7B.items():
        assert num_trainable(llama_7b, "lora", rank) == count
    counts = {method: num_trainable(llama_7b, method) for method in ("full", "embed", "in_out")}
    assert counts == {
        "full": 6_738_415_616,
        "embed": 32_000 * 4096,
        "in_out": 32 * 2 * 11_008 * 4096,
    }


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma3"])
def test_lora_counts_what_peft_makes(
    model_type: str, tiny_config: TinyConfig, tiny_model: TinyModel
) -> None:
    tuned = prepare(tiny_model(model_type), "lora", lora=LoraSection(rank=3))
    made = sum(tensor.numel() for tensor in get_peft_model_state_dict(tuned).values())
    assert num_trainable(as_module(tiny_config(model_type)), "lora", 3) == made


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_count_once(tied: bool, tiny_config: TinyConfig) -> None:
    network = as_module(tiny_config(tie_word_embeddings=tied))
    tables = num_trainable(network, "full") - num_trainable(
        as_module(tiny_config(tie_word_embeddings=True)), "full"
    )
    assert tables == (0 if tied else 128 * 32)
    assert num_trainable(network, "embed") == 128 * 32


def test_matching_rank_is_the_nearest(tiny_config: TinyConfig) -> None:
    network = as_module(tiny_config())
    counts = {rank: num_trainable(network, "lora", rank) for rank in range(1, 6)}
    for budget in range(0, counts[4], 7):
        # min takes the first, that is the lowest rank, of equals.
        nearest = min(counts, key=lambda rank: abs(counts[rank] - budget))
        assert matching_rank(network, budget) == nearest, budget
    halfway = (counts[2] + counts[3]) // 2
    assert counts[3] - halfway == halfway - counts[2]
    assert [matching_rank(network, halfway + by) for by in (-1, 0, 1)] == [2, 2, 3]


def test_matching_rank_without_linear_layers() -> None:
    with pytest.raises(ArchitectureError, match="no linear layers"):
        matching_rank(nn.Sequential(nn.Embedding(4, 4)), 10)
