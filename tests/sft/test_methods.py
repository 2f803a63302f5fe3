"""Each method end to end: exactly what it names is trained, and nothing else."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from training_runs import Run, assert_same, plain_weights, run_until, weights_in

from neft.checkpoints import open_weights
from neft.errors import ArchitectureError, NeuronError, UsageError
from neft.models import load_model
from neft.neurons import NeuronSet
from neft.projections import as_module, find_projections
from neft.recipe import DataSection, LoraSection, ModelSection, TrainingSection, TrainSection
from neft.sft.footprint import Trained, trained_tensors
from neft.sft.methods import METHODS, check_inputs, prepare
from neft.sft.train import train

if TYPE_CHECKING:
    from conftest import TinyConfig, TinyModel, TinyTokenizer

# Fields of the configuration, beside the model's type.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gpt2": {},
    "opt": {"tie_word_embeddings": False},
}
# Weights that a method changes, as patterns of their names: (input embeddings, in and out projections,
# all linear layers).
TRAINED = {
    "llama": (r"embed_tokens", r"(up|down)_proj", r"_proj"),
    "llama, tied": (r"embed_tokens|lm_head", r"(up|down)_proj", r"_proj"),
    "gpt2": (r"wte|lm_head", r"c_fc|mlp\.c_proj", r"c_attn|c_fc|c_proj"),
    "opt": (r"embed_tokens", r"fc1|fc2", r"_proj|fc1|fc2"),
}


@pytest.fixture(scope="module")
def models(
    tiny_model: TinyModel, tiny_tokenizer: TinyTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], ModelSection]:
    """The base models in ``MODELS``, each saved once."""
    made: dict[str, ModelSection] = {}

    def get(name: str) -> ModelSection:
        if name not in made:
            folder = tmp_path_factory.mktemp("model")
            tiny_model(name.partition(",")[0], **MODELS[name]).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            made[name] = ModelSection(path=str(folder))
        return made[name]

    return get


def trained_names(model: str, method: str, names: set[str]) -> set[str]:
    if method == "full":
        return names
    embeddings, in_out, linear = TRAINED[model]
    pattern = {"embed": embeddings, "lora": linear}.get(method, in_out)
    return {name for name in names if re.search(rf"({pattern})\.weight$", name)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_only_what_the_method_names_is_trained(
    model: str, method: str, models: Callable[[str], ModelSection], run: Run, tmp_path: Path
) -> None:
    base = models(model)
    decay = 0.0 if method == "mask" else 0.1
    result = run(tmp_path, method, model=base, steps=3, weight_decay=decay)
    before, after = plain_weights(Path(base.path), base), plain_weights(result.path, base)
    assert before.keys() == after.keys()
    is_changed = {
        name: tensor.view(torch.int32) != after[name].view(torch.int32)
        for name, tensor in before.items()
        if tensor.is_floating_point()
    }
    changed = {name for name, where in is_changed.items() if where.any()}
    assert changed == trained_names(model, method, set(is_changed))
    if METHODS[method].needs_neurons:
        for projection in find_projections(base.path):
            where = is_changed[f"{projection.name}.weight"]
            neurons = where.any(1 - projection.neuron_dim)
            chosen = torch.arange(projection.num_neurons) % 3 == 0
            assert torch.equal(neurons, chosen), projection.name

    # What is counted from the configuration alone is what was trained.
    lora = LoraSection(rank=4) if method == "lora" else None
    section = TrainSection(learning_rate=1, steps=1, method=method, lora=lora)
    network = open_weights(base.path).network
    projections = find_projections(base.path)
    thirds = NeuronSet(projections, {p.name: range(0, p.num_neurons, 3) for p in projections})
    neurons = thirds if METHODS[method].needs_neurons else None
    tensors = trained_tensors(network, method, neurons, lora)
    counted = Trained(method, "float32", section, tensors, neurons, lora)
    assert result.num_trainable == counted.num_trainable
    if METHODS[method].makes_adapter:
        assert result.num_trainable == sum(t.numel() for t in weights_in(result.path).values())


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.1},
        {"gradient_accumulation": 2, "batch_size": 2},
        {"gradient_checkpointing": True},
    ],
    ids=["clipping", "accumulation", "checkpointing"],
)
def test_masked_training_is_compact_training(
    options: dict[str, Any], calm: ModelSection, run: Run, tmp_path: Path
) -> None:
    results = {
        method: run(tmp_path / method, method, model=calm, learning_rate=1e-3, **options)
        for method in ("mask", "neft")
    }
    mask, neft = (results[method].history["train"] for method in ("mask", "neft"))
    for ours, theirs in zip(mask, neft, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    if limit := options.get("max_grad_norm"):
        assert all(step["grad_norm"] > limit for step in mask), "clipping must take part"
    assert results["mask"].num_trainable == results["neft"].num_trainable
    masked, compact = (plain_weights(result.path, calm) for result in results.values())
    for name, tensor in masked.items():
        # Of seven steps of 1e-3 at most; the methods sum the same products in another order.
        torch.testing.assert_close(compact[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["embed", "in_out", "lora", "mask"])
def test_interrupted_run_continues(method: str, run: Run, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", method)
    run_until(5, run, tmp_path / "broken", method)
    assert_same(run(tmp_path / "broken", method), whole)


# ------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gpt_neox", "phi3", "gemma3"])
def test_lora_adapts_what_peft_calls_all_linear(model_type: str, tiny_config: TinyConfig) -> None:
    network: Any = as_module(tiny_config(model_type))
    theirs = LoraConfig(
        target_modules="all-linear", fan_in_fan_out=model_type == "gpt2", task_type="CAUSAL_LM"
    )
    expected = adapted_modules(get_peft_model(copy.deepcopy(network), theirs))
    assert adapted_modules(prepare(network, "lora", lora=LoraSection(rank=2))) == expected


def adapted_modules(tuned: nn.Module) -> set[str]:
    return {name.partition(".lora_A")[0] for name, _ in tuned.named_modules() if ".lora_A" in name}


def test_lora_settings(tiny_model: TinyModel) -> None:
    scaling = {}
    for alpha in (None, 2.0):
        lora = LoraSection(rank=8, alpha=alpha, dropout=0.25)
        tuned: Any = prepare(tiny_model(), "lora", lora=lora)
        layer = tuned.base_model.model.model.layers[0].mlp.up_proj
        assert layer.lora_A.default.weight.shape[0] == 8
        assert layer.lora_dropout.default.p == 0.25
        scaling[alpha] = layer.scaling["default"]
    assert scaling == {None: 1.0, 2.0: 0.25}


def test_lora_settings_are_part_of_a_run(run: Run, tmp_path: Path) -> None:
    first = run(tmp_path, "lora", steps=1, lora=LoraSection(rank=4))
    # The default of alpha, written out.
    assert run(tmp_path, "lora", steps=1, lora=LoraSection(rank=4, alpha=4)) == first
    for lora, difference in (
        (LoraSection(rank=8, alpha=4), "lora.rank was 4 there and is 8 here"),
        (LoraSection(rank=4, alpha=8), "lora.alpha was 4 there and is 8.0 here"),
        (LoraSection(rank=4, dropout=0.5), "lora.dropout was 0.0 there and is 0.5 here"),
    ):
        with pytest.raises(UsageError, match=difference):
            run(tmp_path, "lora", steps=1, lora=lora)


def test_run_is_the_same_under_either_section(
    base: ModelSection, data: DataSection, tmp_path: Path
) -> None:
    """What a recipe's section has beside the plain options is no part of the identity twice."""
    options = {"learning_rate": 1e-2, "steps": 1}
    plain = train(base, data, TrainingSection(**options), method="full", folder=tmp_path)
    section = TrainSection(**options, method="full")
    assert train(base, data, section, method="full", folder=tmp_path) == plain
    identity = json.loads((tmp_path / "training.json").read_text())["run"]
    assert identity["training"].keys() == TrainingSection.model_fields.keys() - {"report_to"}


# --------------------------------------------------------------------------------- what goes wrong


class NoEmbeddings(nn.Module):
    """Like models whose input is no text."""

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


class PackedEmbeddings(nn.Module):
    """Quantized: integers, and no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Module()
        self.table.register_buffer("weight", torch.zeros(4, 4, dtype=torch.uint8))

    def get_input_embeddings(self) -> nn.Module:
        return self.table


@pytest.mark.parametrize("network", [nn.Linear(2, 2), NoEmbeddings(), PackedEmbeddings()])
def test_embed_needs_embeddings(network: Any) -> None:
    fault = f"trains the input embeddings, but {type(network).__name__} has .* that can be trained"
    with pytest.raises(UsageError, match=fault):
        prepare(network, "embed")
    with pytest.raises(UsageError, match=fault):
        trained_tensors(network, "embed", None, None)


def test_unknown_architecture_has_no_in_out() -> None:
    with pytest.raises(ArchitectureError, match="this architecture is not in the table"):
        prepare(nn.Sequential(nn.Linear(2, 2)), "in_out")  # type: ignore[arg-type]


def test_inputs_must_fit_the_method(neurons: NeuronSet) -> None:
    lora = LoraSection(rank=4)
    for method in METHODS.keys() - {"neft", "mask"}:
        with pytest.raises(NeuronError, match=f"{method!r} takes no neurons"):
            check_inputs(method, neurons, None)
    for method in ("neft", "mask"):
        check_inputs(method, neurons, None)
        for none in (None, neurons - neurons):
            with pytest.raises(NeuronError, match=f"{method!r} trains chosen neurons"):
                check_inputs(method, none, None)
        with pytest.raises(UsageError, match="LoRA settings go together"):
            check_inputs(method, neurons, lora)
    check_inputs("lora", None, lora)
    with pytest.raises(UsageError, match="with method 'lora', none were given"):
        check_inputs("lora", None, None)
    with pytest.raises(UsageError, match="with method 'embed', some were given"):
        check_inputs("embed", None, lora)


@pytest.mark.parametrize("overrides", [{"intermediate_size": 96}, {"num_hidden_layers": 3}])
def test_mask_for_another_model(
    overrides: dict[str, int],
    base: ModelSection,
    data: DataSection,
    tiny_config: TinyConfig,
    tmp_path: Path,
) -> None:
    other = find_projections(tiny_config("llama", **overrides))
    neurons = NeuronSet(other, {p.name: [0, 60] for p in other})
    options = TrainingSection(learning_rate=1e-3, steps=1)
    with pytest.raises(NeuronError, match=r"mlp\.up_proj: the neurons were chosen in a weight"):
        train(base, data, options, method="mask", neurons=neurons, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_mask_and_weight_decay(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"needs weight_decay 0, not 0\.1: decay moves"):
        run(tmp_path / "run", "mask", weight_decay=0.1)
    assert not (tmp_path / "run").exists()


def test_frozen_weights_get_no_gradient(base: ModelSection) -> None:
    for method in ("embed", "in_out"):
        model = load_model(base)
        prepare(model, method)
        ids = torch.arange(3, 15)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
