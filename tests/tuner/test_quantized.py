"""Neurons of quantized layers: by bitsandbytes and torchao, as far as they run on a CPU.

What they are compared with is a plain float32 model of the values that the quantized weights stand for.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import (
    IDS,
    base_state,
    choose,
    logits,
    merged_by_hand,
    move,
    same_bits,
    vectors,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.pytorch_utils import Conv1D

from neft import NeftConfig
from neft.errors import NeuronError, UsageError
from neft.quantized import keep_format
from neft.reference.masked import mask_gradients
from neft.tuner.functional import Selection

bnb = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")

KINDS: dict[str, Callable[[], Any]] = {
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4 twice": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "llm.int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao int4": lambda: TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
}
# Torchao leaves a Conv1D as it is.
CASES = [
    *(("llama", kind) for kind in KINDS),
    *((model_type, kind) for model_type in ("gpt2", "opt") for kind in ("nf4", "llm.int8")),
]
NO_DROPOUT: dict[str, dict[str, float]] = {
    "llama": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0},
}
# The kernel of LLM.int8 rounds the activations too.
ROUNDED = 3e-2
repacks = pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks for AVX512-BF16 alone"
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """bitsandbytes tells of every cast."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def quantized(
    model: PreTrainedModel, folder: Path, kind: str, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """``model``, quantized as it is loaded."""
    model.save_pretrained(folder / "model")
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder / "model", quantization_config=KINDS[kind](), dtype=dtype
    )
    return loaded


def values_of(layer: Any) -> Tensor:
    """What a layer's weight stands for, ``[O, I]``."""
    weight = layer.weight
    match type(weight).__name__:
        case "Params4bit":
            return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        case "Int8Params":
            scales = weight.SCB if weight.SCB is not None else layer.state.SCB
            return weight.data.float() * scales[:, None] / 127
        case _:
            return weight.dequantize() if hasattr(weight, "dequantize") else weight.data


def plain(model: PreTrainedModel, like: PreTrainedModel) -> PreTrainedModel:
    """A float32 model of the values that ``model``'s weights stand for; ``like`` gives its form."""
    result = copy.deepcopy(like)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            module, _, last = name.rpartition(".")
            layer = model.get_submodule(module)
            values = values_of(layer) if last == "weight" else getattr(layer, last)
            # A Conv1D becomes a Linear when it is quantized.
            transposed = isinstance(result.get_submodule(module), Conv1D) and last == "weight"
            parameter.copy_(values.T if transposed else values)
    return result


def untrained(model: PreTrainedModel, like: PreTrainedModel) -> PeftModel:
    """An adapter of neurons that were chosen in the model before it was quantized."""
    return get_peft_model(model, NeftConfig(neurons=choose(like)))


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """All bits of the quantized base."""
    state: dict[str, Tensor] = {}
    for name, tensor in base_state(model).items():
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        state |= {f"{name}.{part}": getattr(tensor, part).clone() for part in parts} or {
            name: tensor.clone()
        }
    return state


@pytest.mark.parametrize(("model_type", "kind"), CASES)
def test_untrained_vectors_change_nothing_but_rounding(tiny_model, tmp_path, model_type, kind):
    model = tiny_model(model_type, **NO_DROPOUT[model_type])
    wrapped = untrained(quantized(model, tmp_path, kind), model)
    assert {vector.dtype for vector in vectors(wrapped).values()} == {torch.float32}
    values = plain(wrapped.get_base_model(), model)
    for training in (False, True):
        wrapped.train(training)
        with wrapped.disable_adapter():
            base = wrapped(input_ids=IDS).logits
        if kind == "llm.int8" and not training:
            # Its kernel rounds the activations too, which the vectors do not.
            expected = values(input_ids=IDS).logits
            rounding = (base - expected).abs().max().item()
            assert rounding > 1e-4
            tolerance = 2 * rounding
        else:
            expected, tolerance = base, 1e-6
        found = [logits(wrapped), wrapped(input_ids=IDS).logits]
        for output in found:
            torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("model_type", "kind"), CASES)
def test_trained_vectors_take_the_places_of_their_neurons(tiny_model, tmp_path, model_type, kind):
    model = tiny_model(model_type, **NO_DROPOUT[model_type])
    wrapped = untrained(quantized(model, tmp_path, kind), model)
    reference = plain(wrapped.get_base_model(), model)
    before = logits(reference)
    move(wrapped)
    reference.load_state_dict(merged_by_hand(reference.state_dict(), wrapped))
    expected = logits(reference)
    assert (expected - before).abs().max() > 0.1
    training = wrapped.train()(input_ids=IDS).logits
    torch.testing.assert_close(training, expected, rtol=0, atol=2e-5)
    tolerance = ROUNDED if kind == "llm.int8" else 2e-5
    torch.testing.assert_close(logits(wrapped.eval()), expected, rtol=0, atol=tolerance)


def trained(model: nn.Module, weights: Callable[[], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Steps of AdamW with clipping, evaluations between them; the weights after each step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    history = []
    for step in range(4):
        logits(model.eval())
        ids = IDS.roll(step, dims=1)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        assert nn.utils.clip_grad_norm_(parameters, 1e-2) > 1e-2
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: weight.detach().clone() for name, weight in weights().items()})
    return history


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_masked_training_of_the_dequantized_model(
    tiny_model, tmp_path, kind, checkpointing
):
    model = tiny_model()
    base = quantized(model, tmp_path, kind)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = untrained(base, model)
    masked = plain(wrapped.get_base_model(), model)
    neurons = wrapped.peft_config["default"].neurons
    before, bits = masked.state_dict(), frozen(wrapped)
    start = {name: tensor.clone() for name, tensor in before.items()}

    actual = trained(wrapped, lambda: merged_by_hand(start, wrapped))
    mask_gradients(masked, neurons)
    expected = trained(masked, masked.state_dict)

    for after, reference in zip(actual, expected, strict=True):
        for name, weight in reference.items():
            torch.testing.assert_close(after[name], weight, rtol=0, atol=2e-5)
    moved = {name for name, weight in actual[-1].items() if not torch.equal(weight, start[name])}
    assert moved == {f"{name}.weight" for name in neurons.modules()}
    assert same_bits(frozen(wrapped), bits)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_below_a_quantized_layer_after_evaluation(tiny_model, tmp_path, kind):
    """As for LoRA: an evaluation must not cut the gradient off."""
    model = tiny_model()
    wrapped = untrained(quantized(model, tmp_path, kind), model)
    found = []
    for _ in range(2):
        wrapped.train()(input_ids=IDS, labels=IDS).loss.backward()
        found.append({name: vector.grad.clone() for name, vector in vectors(wrapped).items()})
        wrapped.zero_grad()
        logits(wrapped.eval())
    assert same_bits(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_over_a_model_in_16_bits(tiny_model, tmp_path, kind, dtype):
    model = tiny_model()
    wrapped = untrained(quantized(model, tmp_path, kind, dtype), model)
    assert {vector.dtype for vector in vectors(wrapped).values()} == {torch.float32}
    wrapped.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(vector.grad.dtype == torch.float32 for vector in vectors(wrapped).values())
    move(wrapped)
    training = wrapped(input_ids=IDS).logits
    assert training.dtype == dtype
    torch.testing.assert_close(logits(wrapped.eval()), training, rtol=0, atol=5e-2)


def test_computes_in_the_dtype_of_a_4_bit_layer(tiny_model, tmp_path):
    """Inputs in float32, as ``prepare_model_for_kbit_training`` makes them, products in bfloat16."""
    model = tiny_model()
    wrapped = untrained(quantized(model, tmp_path, "nf4"), model)
    layer = wrapped.get_base_model().model.layers[0].mlp.up_proj
    layer.get_base_layer().compute_dtype = torch.bfloat16
    layer.get_base_layer().compute_type_is_set = True
    x = torch.randn(3, 32)
    base = layer.get_base_layer()(x)
    exact = x @ values_of(layer.get_base_layer()).T
    assert not torch.allclose(base, exact, rtol=0, atol=1e-4)
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_file_for_every_base(tiny_model, tmp_path, kind):
    """Saved over one quantized base, loaded over another and over the model itself."""
    model = tiny_model()
    wrapped = untrained(quantized(model, tmp_path, kind), model)
    move(wrapped)
    wrapped.eval().save_pretrained(tmp_path / "adapter")

    again = PeftModel.from_pretrained(quantized(model, tmp_path, kind), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(wrapped))

    whole = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    other = PeftModel.from_pretrained(quantized(model, tmp_path, "nf4"), tmp_path / "adapter")
    assert same_bits(vectors(whole), vectors(wrapped))
    assert same_bits(vectors(other), vectors(wrapped))

    expected = tiny_model()
    expected.load_state_dict(merged_by_hand(expected.state_dict(), whole))
    assert torch.equal(logits(whole.merge_and_unload()), logits(expected))


@pytest.mark.parametrize(("model_type", "kind"), CASES)
def test_merging_dequantizes_the_merged_layers(tiny_model, tmp_path, model_type, kind):
    model = tiny_model(model_type)
    wrapped = get_peft_model(
        quantized(model, tmp_path, kind), NeftConfig(neurons=choose(model, modules=["up"]))
    )
    move(wrapped)
    with pytest.raises(UsageError, match=r"up_proj|fc1|c_fc.*cannot hold the vectors"):
        wrapped.merge_adapter()
    before = logits(wrapped.eval())
    names = wrapped.peft_config["default"].neurons.modules()
    by_name = {name.partition(".neft_")[0]: vector for name, vector in vectors(wrapped).items()}

    merged = wrapped.merge_and_unload(safe_merge=True)

    tolerance = ROUNDED if kind == "llm.int8" else 1e-5
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=tolerance)
    kinds = {name: type(merged.get_submodule(name)) for name in names}
    assert set(kinds.values()) == {nn.Linear}
    for name, vector in by_name.items():
        chosen = torch.from_numpy(
            choose(model, modules=["up"])[name.removeprefix("base_model.model.")]
        )
        weight = merged.get_submodule(name.removeprefix("base_model.model.")).weight
        assert torch.equal(weight[chosen], vector)


@pytest.mark.parametrize("kind", ["nf4", "llm.int8"])
def test_a_merged_model_is_saved_and_loaded(tiny_model, tmp_path, kind):
    model = tiny_model()
    wrapped = untrained(quantized(model, tmp_path, kind), model)
    move(wrapped)
    merged = wrapped.eval().merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    keep_format(loaded)
    assert type(loaded.lm_head) is nn.Linear
    assert torch.equal(logits(loaded), logits(merged))


def test_without_an_adapter_the_base_itself_runs(tiny_model, tmp_path):
    model = tiny_model()
    base = quantized(model, tmp_path, "llm.int8")
    expected = logits(base.eval())
    wrapped = untrained(base, model)
    move(wrapped)
    assert not torch.equal(logits(wrapped), expected)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), expected)
    assert torch.equal(logits(wrapped.unload()), expected)


def test_two_adapters_together(tiny_model, tmp_path):
    model = tiny_model()
    wrapped = untrained(quantized(model, tmp_path, "nf4"), model)
    wrapped.add_adapter("other", NeftConfig(neurons=choose(model, start=1)))
    reference = plain(wrapped.get_base_model(), model).state_dict()
    for number, name in enumerate(("default", "other")):
        move(wrapped, name, seed=number)
        reference = merged_by_hand(reference, wrapped, name)
    wrapped.base_model.set_adapter(["default", "other"])
    expected = copy.deepcopy(model)
    expected.load_state_dict(reference)
    for output in (logits(wrapped), wrapped(input_ids=IDS).logits):
        torch.testing.assert_close(output, logits(expected), rtol=0, atol=2e-5)


def test_becomes_lora(tiny_model, tmp_path):
    """The difference from the dequantized weights, which PEFT decomposes."""
    model = tiny_model()
    wrapped = untrained(quantized(model, tmp_path, "nf4"), model)
    values = plain(wrapped.get_base_model(), model)
    move(wrapped)
    layer = wrapped.get_base_model().model.layers[1].mlp.down_proj
    name = "model.layers.1.mlp.down_proj.weight"
    expected = merged_by_hand(values.state_dict(), wrapped)[name] - values.state_dict()[name]
    torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=0, atol=1e-6)


@repacks
def test_repacked_weights_are_refused(tiny_model, tmp_path):
    model = tiny_model(hidden_size=64, intermediate_size=64, num_key_value_heads=4, head_dim=16)
    base = quantized(model, tmp_path, "nf4").eval()
    logits(base)
    with pytest.raises(UsageError, match="repack its 4-bit weights"):
        untrained(base, model)


def test_activations_quantized_too(tiny_model, tmp_path):
    """Not for training, where the gradient would be cut off silently; an adapter loads all the same."""
    model = tiny_model()
    untrained(quantized(model, tmp_path, "nf4"), model).save_pretrained(tmp_path / "adapter")
    config = TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig())

    def base() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", quantization_config=config, dtype=torch.float32
        )

    with pytest.raises(UsageError, match=r"q_proj: no gradient passes .* Int8WeightOnlyConfig"):
        untrained(base(), model)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    expected = logits(model)
    assert (logits(loaded) - expected).abs().max() < 0.2 * expected.abs().max()


def test_a_layer_that_is_not_quantized_yet(tiny_model):
    model = nn.Sequential(bnb.nn.Linear4bit(32, 16, bias=False))
    with pytest.raises(UsageError, match=r"Linear4bit holds a weight that is not quantized yet"):
        get_peft_model(model, NeftConfig(neurons={"0": [1, 2]}))


def test_neurons_of_another_shape(tiny_model, tmp_path):
    wrapped_for = tiny_model(intermediate_size=96)
    with pytest.raises(
        NeuronError, match=r"up_proj: the weight has shape \(64, 32\), .* in one of \(96, 32\)"
    ):
        untrained(quantized(tiny_model(), tmp_path, "nf4"), wrapped_for)


def test_lora_over_the_same_base_keeps_its_gradient(tiny_model, tmp_path):
    """A NeFT adapter that came first keeps bitsandbytes from repacking for the others too."""
    model = tiny_model(hidden_size=64, intermediate_size=64)
    wrapped = untrained(quantized(model, tmp_path, "nf4"), model)
    logits(wrapped.eval())
    tuned = get_peft_model(wrapped.unload(), LoraConfig(target_modules=["q_proj"]))
    tuned.train()(input_ids=IDS, labels=IDS).loss.backward()
    grads = [p.grad for n, p in tuned.named_parameters() if "lora_B" in n]
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("resident", [True, False])
def test_quantizing_under_an_adapter(tiny_model, resident, enabled):
    wrapped = get_peft_model(tiny_model(), NeftConfig(neurons=choose(tiny_model())))
    if resident:
        logits(wrapped)
    torchao.quantize_(wrapped, torchao.Int8WeightOnlyConfig())
    with (
        torch.set_grad_enabled(enabled),
        pytest.raises(UsageError, match=r"up_proj: .* a Int8Tensor .*Quantize first, then add"),
    ):
        wrapped(input_ids=IDS)


@torch.no_grad()
def test_what_a_weight_cannot_do_is_not_laid_to_quantization(tiny_model, monkeypatch):
    wrapped = get_peft_model(tiny_model(), NeftConfig(neurons=choose(tiny_model())))

    def write(*_: Any) -> None:
        raise NotImplementedError("of another library")

    monkeypatch.setattr(Selection, "write", write)
    with pytest.raises(NotImplementedError, match="of another library"):
        wrapped(input_ids=IDS)
