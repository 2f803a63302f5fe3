"""Models of a Llama shape with random weights, plain or with an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """What decides how large a Llama model is; embeddings and head are tied."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    vocab_size: int

    @property
    def config(self) -> Any:
        """As transformers has it."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            vocab_size=self.vocab_size,
            tie_word_embeddings=True,
            architectures=["LlamaForCausalLM"],
        )


SMOLLM2 = Shape(576, 1536, 30, 9, 3, 49152)
"""SmolLM2-135M."""
TINY = Shape(64, 128, 2, 4, 2, 256)


def random_llama(shape: Shape) -> Any:
    """The same float32 model every time, in evaluation mode."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(shape.config).eval()


def random_neurons(
    model: Any, percent: float, seed: int = 0, modules: Sequence[str] = ("up", "down")
) -> Any:
    """A random choice of neurons: which ones makes no difference to the speed."""
    import numpy as np

    from neft import NeuronScores, find_projections

    projections = find_projections(model, modules=modules)
    scores = NeuronScores(
        projections,
        {p.name: np.zeros(p.num_neurons) for p in projections},
        total_parameters=sum(p.numel() for p in model.parameters()),
    )
    return scores.select(percent=percent, which="random", seed=seed)


def equal_rank(model: Any, budget: int) -> int:
    """The rank on all linear layers but the head that comes nearest to ``budget`` parameters."""
    from torch import nn

    per_rank = sum(
        module.in_features + module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    )
    return max(1, round(budget / per_rank))


def with_adapters(method: str, model: Any, percent: float, names: Sequence[str]) -> Any:
    """A ``PeftModel`` with adapters that change the model's output; the first is active.

    Args:
        method: ``neft``, in up and down projections, or ``lora``, on all linear layers but the head.
        model: is changed.
        percent: size of an adapter, of the model's parameters; LoRA takes the nearest rank.
        names: of the adapters. Each NeFT adapter has random neurons of its own.
    """
    import torch
    from peft import get_peft_model

    first, *others = names
    configs = {name: _config(method, model, percent, seed) for seed, name in enumerate(names)}
    adapted = get_peft_model(model, configs[first], adapter_name=first)
    for name in others:
        adapted.add_adapter(name, configs[name])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if f"{method}_" in name:
                # New adapters leave the model as it is.
                parameter.add_(0.01 * torch.randn_like(parameter))
    return adapted.eval()


def _config(method: str, model: Any, percent: float, seed: int) -> Any:
    from peft import LoraConfig

    from neft import NeftConfig

    neurons = random_neurons(model, percent, seed)
    if method == "neft":
        return NeftConfig(neurons=neurons)
    rank = equal_rank(model, neurons.num_parameters)
    return LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
