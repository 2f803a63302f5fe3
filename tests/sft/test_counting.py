"""What methods cost, by shapes alone, against the paper's numbers and against real training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from training_runs import Run
from transformers import LlamaConfig, TrainerCallback

from neft.errors import ArchitectureError
from neft.projections import as_module
from neft.recipe import LoraSection, ModelSection, TrainSection
from neft.sft import train as training
from neft.sft.counting import matching_rank, memory_bytes, num_trainable
from neft.sft.methods import METHODS, prepare
from neft.sft.trainer import TargetTrainer
from neft.tuner.layer import neft_layers

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


def section(method: str, rank: int | None = None) -> TrainSection:
    lora = None if rank is None else LoraSection(rank=rank)
    return TrainSection(learning_rate=1, steps=1, method=method, lora=lora)


@pytest.fixture(scope="module")
def llama_7b() -> nn.Module:
    """Of Llama-2's 7 billion parameters, names and shapes."""
    return as_module(LlamaConfig())  # its defaults are this model


def test_paper(llama_7b: nn.Module) -> None:
    for rank, count in LORA_OF_LLAMA_7B.items():
        assert num_trainable(llama_7b, section("lora", rank)) == count
    counts = {
        method: num_trainable(llama_7b, section(method)) for method in ("full", "embed", "in_out")
    }
    assert counts == {
        "full": 6_738_415_616,
        "embed": 32_000 * 4096,
        "in_out": 32 * 2 * 11_008 * 4096,
    }
    for method in ("neft", "mask"):
        assert num_trainable(llama_7b, section(method), 409_600_000) == 409_600_000


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma3"])
def test_lora_counts_what_peft_makes(
    model_type: str, tiny_config: TinyConfig, tiny_model: TinyModel
) -> None:
    tuned = prepare(tiny_model(model_type), "lora", lora=LoraSection(rank=3))
    made = sum(tensor.numel() for tensor in get_peft_model_state_dict(tuned).values())
    assert num_trainable(as_module(tiny_config(model_type)), section("lora", 3)) == made


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_count_once(tied: bool, tiny_config: TinyConfig) -> None:
    network = as_module(tiny_config(tie_word_embeddings=tied))
    tables = num_trainable(network, section("full")) - num_trainable(
        as_module(tiny_config(tie_word_embeddings=True)), section("full")
    )
    assert tables == (0 if tied else 128 * 32)
    assert num_trainable(network, section("embed")) == 128 * 32


def test_matching_rank_is_the_nearest(tiny_config: TinyConfig) -> None:
    network = as_module(tiny_config())
    counts = {rank: num_trainable(network, section("lora", rank)) for rank in range(1, 6)}
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


# ------------------------------------------------------------------------------------------ memory


class Weigh(TrainerCallback):
    """Sums up what training holds while gradients are there."""

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any
    ) -> None:
        parameters = list(model.parameters())
        moments = [
            tensor
            for held in optimizer.state.values()
            for name, tensor in held.items()
            if name != "step"
        ]
        masks = [
            hook._mask
            for parameter in parameters
            for hook in (parameter._backward_hooks or {}).values()
        ]
        displaced = [
            tensor for _, layer in neft_layers(model) for tensor in layer._resident.values()
        ]
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.num_bytes = sum(map(size, (parameters, moments, masks, displaced, gradients)))


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_what_training_holds(
    method: str,
    dtype: Any,
    base: ModelSection,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weigh = Weigh()
    make = training._trainer

    def weighed(*args: Any) -> TargetTrainer:
        trainer = make(*args)
        trainer.add_callback(weigh)
        return trainer

    monkeypatch.setattr(training, "_trainer", weighed)
    model = base.model_copy(update={"dtype": dtype})
    result = run(tmp_path, method, model=model, steps=2)
    network = as_module(base.path)
    train = section(method, rank=4 if method == "lora" else None)
    expected = memory_bytes(network, train, result.num_trainable, dtype)
    # Autocast's copies of the weights are gone when the optimizer steps.
    is_cast = dtype == "bfloat16" and not METHODS[method].makes_adapter
    copies = 2 * result.num_parameters if is_cast else 0
    assert weigh.num_bytes == expected - copies


def test_memory_of_a_large_model(llama_7b: nn.Module) -> None:
    """In bfloat16, at the paper's size."""
    whole, chosen = 6_738_415_616, 409_600_000
    assert memory_bytes(llama_7b, section("full"), whole, "bfloat16") == 18 * whole
    assert memory_bytes(llama_7b, section("mask"), chosen, "bfloat16") == 19 * whole
    assert memory_bytes(llama_7b, section("neft"), chosen, "bfloat16") == 2 * whole + 18 * chosen
    lora = section("lora", 64)
    assert memory_bytes(llama_7b, lora, chosen, "bfloat16") == 2 * whole + 16 * chosen


def test_memory_over_a_quantized_base(llama_7b: nn.Module) -> None:
    """Embeddings, head and norms stay in bfloat16; nothing is displaced."""
    chosen, linear = 614_400_000, 6_476_005_376
    rest = 6_738_415_616 - linear
    in_4_bits = linear / 2 + linear / 64 + 4 * linear / (64 * 256)
    neft, lora = section("neft"), section("lora", 64)
    for train in (neft, lora):
        found = memory_bytes(llama_7b, train, chosen, "bfloat16", "4bit")
        assert found == pytest.approx(2 * rest + in_4_bits + 16 * chosen, rel=1e-9)
    assert (
        memory_bytes(llama_7b, neft, chosen, "bfloat16", "8bit") == 2 * rest + linear + 16 * chosen
    )
