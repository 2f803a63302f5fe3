"""Contract: training the chosen vectors alone equals the paper's masked training, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from neft import NeftConfig, NeuronSet, find_projections
from neft.reference.masked import mask_gradients

STEPS = 4
ACCUMULATION = 2
MODULES = {
    "llama": ("up", "gate", "down", "q", "o"),
    "gpt2": ("up", "down", "qkv", "o"),  # transposed storage, biases
    "opt": ("up", "down", "k"),
    # Experts, some of them without tokens in a batch of 24; biases and transposed storage in gpt-oss.
    "mixtral": ("gate_up", "down", "q"),
    "qwen3_moe": ("gate_up", "down", "o"),
    "qwen2_moe": ("up", "gate_up", "down"),
    "gpt_oss": ("gate_up", "down", "q"),
}

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0),
}


def choose(model: nn.Module, modules: tuple[str, ...], seed: int = 0) -> NeuronSet:
    """A third of the neurons, at random; one projection without any."""
    generator = np.random.default_rng(seed)
    projections = find_projections(model, modules=modules)
    indices = {
        p.name: generator.choice(p.num_neurons, p.num_neurons // 3, replace=False)
        for p in projections[1:]
    }
    return NeuronSet(projections, indices)


def batches(vocab_size: int = 128) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(vocab_size, (2, 12), generator=generator) for _ in range(STEPS * ACCUMULATION)
    ]


def trained(
    model: nn.Module,
    optimizer: Optimizer,
    max_norm: float,
    weights: Callable[[], dict[str, Tensor]],
) -> list[dict[str, Tensor]]:
    """Train with accumulation and clipping; the weights after each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = optimizer(parameters)
    model.train()
    torch.manual_seed(0)  # GPT-2 and OPT have dropout
    history = []
    for number, ids in enumerate(batches(), start=1):
        (model(input_ids=ids, labels=ids).loss / ACCUMULATION).backward()
        if number % ACCUMULATION == 0:
            norm = nn.utils.clip_grad_norm_(parameters, max_norm)
            assert norm > max_norm, "clipping must take part"
            steps.step()
            steps.zero_grad()
            history.append({name: weight.clone() for name, weight in weights().items()})
    return history


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model_type", MODULES)
def test_compact_training_equals_masked_training(tiny_model, model_type, optimizer, checkpointing):
    model = tiny_model(model_type).double()
    model.set_experts_implementation("eager")  # the others have no float64
    neurons = choose(model, MODULES[model_type])
    masked, compact = copy.deepcopy(model), copy.deepcopy(model)

    mask_gradients(masked, neurons)
    expected = trained(masked, OPTIMIZERS[optimizer], 1e-3, masked.state_dict)

    if checkpointing:
        compact.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    adapted = get_peft_model(compact, NeftConfig(neurons=neurons))

    def merged() -> dict[str, Tensor]:
        state = copy.deepcopy(adapted).merge_and_unload().state_dict()
        return {name: weight for name, weight in state.items() if name in expected[0]}

    actual = trained(adapted, OPTIMIZERS[optimizer], 1e-3, merged)

    before = model.state_dict()
    for step in range(STEPS):
        assert expected[step].keys() == actual[step].keys()
        for name, weight in expected[step].items():
            torch.testing.assert_close(actual[step][name], weight, rtol=1e-9, atol=1e-12)
    moved = [n for n, weight in actual[-1].items() if not torch.equal(weight, before[n])]
    assert set(moved) == {neurons.projections[name].parameter for name in neurons.modules()}


@pytest.mark.parametrize("model_type", MODULES)
def test_frozen_means_frozen_under_weight_decay(tiny_model, model_type):
    """Every scalar outside the set is bit-identical after training, whatever the optimizer does."""
    model = tiny_model(model_type)
    before = copy.deepcopy(model.state_dict())
    neurons = choose(model, MODULES[model_type])
    adapted = get_peft_model(model, NeftConfig(neurons=neurons))
    optimizer = torch.optim.AdamW(
        [p for p in adapted.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    for ids in batches():
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = adapted.merge_and_unload().state_dict()
    for name, weight in before.items():
        outside = torch.ones_like(weight, dtype=torch.bool)
        for projection in neurons.projections.values():
            if projection.parameter == name:
                dimension = projection.neuron_dim
                inside = torch.from_numpy(neurons[projection.name])
                projection.weight_in(outside).index_fill_(dimension, inside, False)
                changed = projection.weight_in(after[name] != weight).any(1 - dimension)
                assert changed[inside].all(), f"{name}: a chosen neuron was not trained"
        same = after[name].view(torch.int32) == weight.view(torch.int32)
        assert same[outside].all(), f"{name}: a frozen scalar moved"
