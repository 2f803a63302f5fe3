"""Memory by formula, against the tensors that torch really saves and training really holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from training_runs import Run
from transformers import LlamaConfig, TrainerCallback

from neft.neurons import NeuronSet
from neft.projections import as_module, find_projections
from neft.recipe import LoraSection, ModelSection, TrainingSection
from neft.sft import train as training
from neft.sft.footprint import (
    Batch,
    Shape,
    Trained,
    activations,
    footprint,
    held_bytes,
    trained_tensors,
)
from neft.sft.loss import target_loss
from neft.sft.methods import METHODS, prepare
from neft.sft.trainer import TargetTrainer
from neft.tuner.layer import neft_layers

if TYPE_CHECKING:
    from conftest import TinyConfig, TinyModel

NUM_TEXTS, LENGTH, PROMPT = 4, 24, 10


def neurons_of(model: nn.Module, method: str, modules: list[str] | None = None) -> NeuronSet | None:
    if not METHODS[method].needs_neurons:
        return None
    projections = find_projections(model, modules)
    return NeuronSet(projections, {p.name: range(0, p.num_neurons, 5) for p in projections})


def what_trains(
    network: nn.Module,
    method: str,
    dtype: Any = "float32",
    *,
    dropout: float = 0.0,
    attention: str | None = None,
    modules: list[str] | None = None,
    **options: Any,
) -> Trained:
    neurons = neurons_of(network, method, modules)
    lora = LoraSection(rank=4, dropout=dropout) if method == "lora" else None
    section = TrainingSection(**{"learning_rate": 1e-2, "steps": 3} | options)
    tensors = trained_tensors(network, method, neurons, lora)
    return Trained(method, dtype, section, tensors, neurons, lora, attention)


def batch_of(is_padded: bool) -> tuple[dict[str, Tensor], Batch]:
    torch.manual_seed(0)
    input_ids = torch.randint(3, 128, (NUM_TEXTS, LENGTH))
    mask = torch.ones_like(input_ids)
    if is_padded:
        mask[0, -3:] = 0
    labels = input_ids.clone()
    labels[:, :PROMPT] = -100
    num_targets = NUM_TEXTS * (LENGTH - PROMPT)
    batch = Batch(NUM_TEXTS, LENGTH, num_targets, is_padded)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}, batch


@contextlib.contextmanager
def counting_saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd saves and that is no weight, by its address."""
    own = {
        tensor.untyped_storage().data_ptr() for tensor in chain(model.parameters(), model.buffers())
    }
    # Held, so that no address is used twice.
    storages: dict[int, Any] = {}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def saved_by(base: Any, trained: Trained, is_padded: bool) -> int:
    """Bytes that one forward pass saves, but for log-probabilities and 16-bit copies of weights."""
    model: Any = prepare(base, trained.method, trained.neurons, trained.lora).train()
    inputs, batch = batch_of(is_padded)
    autocast = trained.dtype == "bfloat16" and not trained.makes_adapter
    with (
        counting_saved(model) as sizes,
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        target_loss(model, inputs, base.get_output_embeddings())
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    # Below what is trained lowest, products keep no copies.
    copies = 2 * sum(weight.numel() for weight in matrices) if autocast else 0
    return sum(sizes.values()) - copies - 4 * batch.num_targets * base.config.vocab_size


CASES = [
    *({"method": method} for method in METHODS),
    *({"method": method, "is_padded": False} for method in METHODS),
    *({"method": method, "attention": "eager"} for method in METHODS),
    *({"method": method, "dtype": "bfloat16"} for method in METHODS if method != "in_out"),
    {"method": "neft", "modules": ["q", "k", "gate", "up", "down", "o"]},
    {"method": "lora", "dropout": 0.1},
    {"method": "lora", "dropout": 0.1, "dtype": "bfloat16"},
    {"method": "neft", "attention": "eager", "dtype": "bfloat16"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_activations_are_what_autograd_saves(case: dict[str, Any], tiny_model: TinyModel) -> None:
    settings = dict(case)
    is_padded = settings.pop("is_padded", True)
    base: Any = tiny_model(num_hidden_layers=4, intermediate_size=80)
    base.set_attn_implementation(settings.get("attention") or "sdpa")
    trained = what_trains(base, **settings)
    if trained.makes_adapter:
        base = base.to(getattr(torch, trained.dtype))
    shape, batch = Shape.of(base), batch_of(is_padded)[1]
    estimated = activations(shape, trained, batch)
    assert estimated == pytest.approx(saved_by(base, trained, is_padded), rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_keeps_one_layer_and_the_inputs_of_all(
    method: str, tiny_model: TinyModel
) -> None:
    def saved(num_layers: int, **options: Any) -> int:
        base: Any = tiny_model(num_hidden_layers=num_layers, intermediate_size=80)
        if options:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        return saved_by(base, what_trains(base, method, **options), is_padded=True)

    one_layer = saved(6) - saved(5)
    network = tiny_model(num_hidden_layers=6, intermediate_size=80)
    trained = what_trains(network, method, gradient_checkpointing=True)
    estimated = activations(Shape.of(network), trained, batch_of(True)[1])
    counted = saved(6, gradient_checkpointing=True) + one_layer
    assert estimated == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("model_type", ["opt", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("method", ["full", "lora", "neft"])
def test_other_families_are_near(method: str, model_type: str, tiny_model: TinyModel) -> None:
    base: Any = tiny_model(model_type, num_hidden_layers=4)
    trained = what_trains(base, method)
    shape, batch = Shape.of(base), batch_of(True)[1]
    estimated = activations(shape, trained, batch)
    assert estimated == pytest.approx(saved_by(base, trained, True), rel=0.3)


# ----------------------------------------------------------------------- what is held from step to step


class Weigh(TrainerCallback):
    """Sums up what training holds while gradients are there."""

    def on_optimizer_step(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
        parameters = list(model.parameters())
        base = [p for name, p in model.named_parameters() if "lora_" not in name]
        base = [p for p in base if id(p) not in {id(v) for v in vectors_of(model)}]
        states = [
            tensor
            for held in optimizer.state.values()
            for name, tensor in held.items()
            if name != "step" and isinstance(tensor, Tensor) and tensor.dim()
        ]
        displaced = [
            tensor for _, layer in neft_layers(model) for tensor in layer._resident.values()
        ]
        adapter = [p for p in parameters if id(p) not in {id(b) for b in base}]
        self.weights = size(base)
        self.vectors = size(adapter) + size(displaced)
        self.gradients = size(p.grad for p in parameters if p.grad is not None)
        self.states = size(states)


def vectors_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for _, layer in neft_layers(model) for p in layer.neft_vectors.parameters()]


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [("float32", "adamw"), ("float32", "adafactor"), ("bfloat16", "adamw")],
)
@pytest.mark.parametrize("method", METHODS)
def test_parts_are_what_training_holds(
    method: str,
    dtype: Any,
    optimizer: str,
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
    result = run(tmp_path, method, model=model, steps=3, optimizer=optimizer)
    network = as_module(base.path)
    trained = what_trains(network, method, dtype, optimizer=optimizer)
    if trained.neurons is not None:  # the run trains every third
        projections = find_projections(network)
        thirds = NeuronSet(projections, {p.name: range(0, p.num_neurons, 3) for p in projections})
        tensors = trained_tensors(network, method, thirds, None)
        trained = Trained(method, dtype, trained.options, tensors, thirds)
    assert trained.num_trainable == result.num_trainable
    shape = Shape.of(network)
    found = footprint(shape, trained, batch_of(True)[1], on_cpu=False)
    masks = shape.num_parameters if method == "mask" else 0
    # Autocast's copies of the weights are gone when the optimizer steps.
    is_cast = dtype == "bfloat16" and not METHODS[method].makes_adapter
    copies = 2 * shape.num_parameters if is_cast else 0
    assert (found.weights - masks - copies, found.vectors) == (weigh.weights, weigh.vectors)
    assert (found.gradients, trained.optimizer_states) == (weigh.gradients, weigh.states)
    parts = (found.weights, found.vectors, found.gradients, trained.optimizer_states)
    assert held_bytes(shape, trained) == sum(parts)


def test_a_large_model() -> None:
    """In bfloat16, at the paper's size; optimizer and freed gradients count too."""
    network = as_module(LlamaConfig())  # its defaults are Llama-2-7B
    shape, options = Shape.of(network), TrainingSection(learning_rate=1, steps=1)
    whole, chosen = 6_738_415_616, 409_600_000
    every = trained_tensors(network, "full", None, None)
    of_lora = trained_tensors(network, "lora", None, LoraSection(rank=64))

    def held(method: str, tensors: Any, **changes: Any) -> int:
        section = options.model_copy(update=changes)
        return held_bytes(shape, Trained(method, "bfloat16", section, tensors))

    assert held("full", every) == 18 * whole
    assert held("mask", every) == 19 * whole
    assert held("neft", [(100_000, 4096)]) == 2 * whole + 18 * chosen
    assert held("lora", of_lora) == 2 * whole + 16 * 159_907_840
    head = 32_000 * 4096
    assert held("full", every, in_backward=True) == 14 * whole + 8 * head
    # A number for each row and column, of which there are few.
    lean = held("full", every, in_backward=True, optimizer="adafactor")
    assert 6 * whole + 8 * head < lean < 1.01 * (6 * whole + 8 * head)


def test_the_worst_moment(tiny_config: TinyConfig) -> None:
    """The peak is between what is held all the time and all parts together."""
    network = as_module(tiny_config())
    shape, batch = Shape.of(network), batch_of(True)[1]
    for method in METHODS:
        found = footprint(shape, what_trains(network, method), batch, on_cpu=False)
        held = found.weights + found.vectors + found.optimizer
        assert held < found.peak
        assert found.peak <= held + found.gradients + found.activations + found.loss
        process = footprint(shape, what_trains(network, method), batch, on_cpu=True)
        assert process.peak == found.peak + process.kept_back
        assert process.kept_back > 0


def test_more_is_kept_back_where_onednn_multiplies(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = as_module(tiny_config())
    shape, batch = Shape.of(network), batch_of(True)[1]

    def kept_back(method: str, dtype: str, *, by_onednn: bool) -> int:
        monkeypatch.setattr("neft.products.onednn_is_faster", lambda: by_onednn)
        trained = what_trains(network, method, dtype)
        return footprint(shape, trained, batch, on_cpu=True).kept_back

    for method, dtype, factor in (
        ("neft", "float32", 0.65 / 0.3),
        ("neft", "bfloat16", 1),
        ("full", "float32", 1),
    ):
        by_onednn = kept_back(method, dtype, by_onednn=True)
        assert by_onednn == pytest.approx(factor * kept_back(method, dtype, by_onednn=False), abs=1)


def test_in_backward_holds_hardly_two_gradients(tiny_config: TinyConfig) -> None:
    network = as_module(tiny_config(tie_word_embeddings=False))
    shape, batch = Shape.of(network), batch_of(True)[1]
    lean = what_trains(network, "full", in_backward=True, optimizer="adafactor")
    found = footprint(shape, lean, batch, on_cpu=False)
    assert found.gradients == 2 * 4 * shape.largest
    # docs/discovery.md: 4 P + 4 W, and what an update takes.
    assert found.weights + found.gradients == 4 * shape.num_parameters + 8 * shape.largest


@pytest.mark.parametrize("method", ["neft", "lora"])
def test_over_a_quantized_base(tiny_config: TinyConfig, method: str) -> None:
    """Linear layers in their bits, one of them dequantized, and no originals of the vectors."""
    network = as_module(tiny_config())
    shape, plain = Shape.of(network), what_trains(network, method, "bfloat16")
    layers = [p.num_neurons * p.vector_length for p in find_projections(network, ["*"])]
    batch = batch_of(is_padded=False)[1]
    for quantization, width in (("4bit", 0.5 + (1 + 4 / 256) / 64), ("8bit", 1)):
        trained = replace(plain, quantization=quantization)
        found = footprint(shape, trained, batch, on_cpu=False)
        rest = shape.num_parameters - sum(layers)
        assert found.weights == round(2 * rest + width * sum(layers)) + 2 * max(layers)
        assert found.vectors == 4 * trained.num_scalars
        # One is dequantized at a time, for moments.
        held = found.weights - 2 * max(layers) + found.vectors
        assert held_bytes(shape, trained) == held + (4 + 8) * trained.num_scalars
        assert found.peak < footprint(shape, plain, batch, on_cpu=False).peak
