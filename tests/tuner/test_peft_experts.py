"""Neurons of experts as a PEFT method: what a pass computes, what a file holds, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import MethodType

import pytest
import torch
from adapters import IDS, adapted, base_state, choose, logits, same_bits, vectors, with_second
from peft import (
    PeftConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from neft import NeftConfig, NeuronSet, find_projections
from neft.errors import ArchitectureError, NeuronError, UsageError
from neft.tuner import NeftExperts

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
every_mixture = pytest.mark.parametrize("model_type", MIXTURES)


def replaced_by_hand(model: nn.Module, wrapped: PeftModel, adapter: str = "default") -> nn.Module:
    """A copy of the plain ``model`` with the adapter's neurons put into it one by one."""
    twin = copy.deepcopy(model)
    neurons = wrapped.peft_config[adapter].neurons
    with torch.no_grad():
        for name, values in vectors(wrapped, adapter).items():
            name = name.removeprefix("base_model.model.").partition(".neft_vectors.")[0]
            if ".experts." in name:
                stack, _, expert = name.rpartition(".")
                weight = twin.get_parameter(stack)[int(expert)]
            else:
                weight = twin.get_submodule(name).weight
            rows = weight if neurons.projections[name].neuron_dim == 0 else weight.T
            for value, index in zip(values, neurons[name].tolist(), strict=True):
                rows[index] = value
    return twin


@every_mixture
@pytest.mark.parametrize("engine", ["eager", "grouped_mm", "batched_mm"])
def test_a_pass_is_that_of_the_replaced_weights(tiny_model, model_type, engine):
    model = tiny_model(model_type)
    model.set_experts_implementation(engine)
    plain = copy.deepcopy(model)
    wrapped = adapted(model)
    assert any(isinstance(module, NeftExperts) for module in wrapped.modules())
    expected = logits(replaced_by_hand(plain, wrapped))
    assert not torch.equal(expected, logits(plain))
    assert torch.equal(logits(wrapped), expected)
    # With gradients each expert is run by itself.
    torch.testing.assert_close(wrapped(input_ids=IDS).logits.detach(), expected)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(plain))
    assert torch.equal(logits(wrapped), expected)
    assert same_bits(base_state(wrapped), dict(plain.state_dict()))


@every_mixture
def test_eager_training_pass_has_the_same_bits(tiny_model, model_type):
    model = tiny_model(model_type)
    model.set_experts_implementation("eager")
    wrapped = adapted(model)
    assert torch.equal(wrapped(input_ids=IDS).logits.detach(), logits(wrapped))


@every_mixture
def test_merging_and_unmerging(tiny_model, model_type):
    plain = tiny_model(model_type)
    wrapped = adapted(copy.deepcopy(plain))
    expected = replaced_by_hand(plain, wrapped)
    before = logits(wrapped)
    wrapped.merge_adapter()
    assert same_bits(base_state(wrapped), dict(expected.state_dict()))
    assert torch.equal(logits(wrapped), before)
    assert wrapped(input_ids=IDS).logits.requires_grad is False
    wrapped.unmerge_adapter()
    assert same_bits(base_state(wrapped), dict(plain.state_dict()))
    merged = copy.deepcopy(wrapped).merge_and_unload(safe_merge=True)
    assert type(merged) is type(plain)
    assert same_bits(dict(merged.state_dict()), dict(expected.state_dict()))
    assert same_bits(dict(wrapped.unload().state_dict()), dict(plain.state_dict()))


def test_safe_merge_changes_no_layer_if_the_last_is_broken(tiny_model):
    plain = tiny_model("mixtral")
    wrapped = adapted(copy.deepcopy(plain))
    list(vectors(wrapped).values())[-1].data[0, 0] = torch.nan
    for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
        with pytest.raises(NeuronError, match=r"experts\.down_proj\.3: NaNs detected"):
            merge(safe_merge=True)
        assert same_bits(base_state(wrapped), dict(plain.state_dict()))


@every_mixture
def test_the_adapter_is_self_contained(tiny_model, model_type, tmp_path):
    plain = tiny_model(model_type)
    wrapped = adapted(copy.deepcopy(plain))
    wrapped.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} - {"README.md"} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert loaded.peft_config["default"].neurons == wrapped.peft_config["default"].neurons
    assert torch.equal(logits(loaded.eval()), logits(wrapped))
    low = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(low.eval()), logits(wrapped))


def test_transformers_and_injection_load_it_too(tiny_model, tmp_path):
    plain = tiny_model("qwen2_moe")
    wrapped = adapted(copy.deepcopy(plain))
    wrapped.save_pretrained(tmp_path)
    loaded = copy.deepcopy(plain)
    loaded.load_adapter(tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(wrapped))

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    injected = copy.deepcopy(plain)
    config = PeftConfig.from_pretrained(tmp_path)
    inject_adapter_in_model(config, injected, state_dict=state)
    set_peft_model_state_dict(injected, state)
    assert torch.equal(logits(injected.eval()), logits(wrapped))


def test_several_adapters(tiny_model):
    plain = tiny_model("mixtral")
    wrapped = with_second(
        adapted(copy.deepcopy(plain)), choose(plain, modules=["*.experts.*.1", "q"], every=2)
    )
    first, second = (replaced_by_hand(plain, wrapped, name) for name in ("default", "other"))
    for name, expected in (("default", first), ("other", second), ("default", first)):
        wrapped.set_adapter(name)
        assert torch.equal(logits(wrapped), logits(expected))
    wrapped.set_adapter("other")
    wrapped.delete_adapter("default")
    assert torch.equal(logits(wrapped), logits(second))
    wrapped.add_adapter("third", NeftConfig(neurons=wrapped.peft_config["other"].neurons))
    wrapped.base_model.set_adapter(["other", "third"])
    with pytest.raises(NeuronError, match="train some of the same neurons"):
        logits(wrapped)


def loss(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS, labels=IDS).loss
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in vectors(model).items() if p.grad is not None}


def test_backward_after_others_have_used_the_weights(tiny_model):
    """DPO's reference, evaluation and a second pass come between a forward and its backward pass."""
    wrapped = adapted(tiny_model("qwen3_moe")).train()
    loss(wrapped).backward()
    expected = gradients(wrapped)
    wrapped.zero_grad()
    first, second = loss(wrapped), loss(wrapped)
    with wrapped.disable_adapter():
        logits(wrapped)
        third = loss(wrapped)
    first.backward()
    assert third.requires_grad is False
    actual = gradients(wrapped)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient)
    second.backward()


@every_mixture
def test_experts_without_a_token_have_a_gradient_of_zero(tiny_model, model_type):
    """As the whole stack has in full fine-tuning: momentum goes on."""
    wrapped = adapted(tiny_model(model_type)).train()
    one = torch.tensor([[7]])
    wrapped(input_ids=one, labels=one, logits_to_keep=0).logits.sum().backward()
    found = {name: grad for name, grad in gradients(wrapped).items() if ".experts." in name}
    assert len(found) == sum(".experts." in name for name in vectors(wrapped))
    silent = [name for name, gradient in found.items() if not gradient.any()]
    num_layers = 1 if model_type == "qwen2_moe" else 2
    # Two of four experts, two matrices each.
    assert len(silent) == num_layers * 2 * 2


def test_vectors_are_all_that_gradients_are_computed_for(tiny_model):
    """The graph of a loss ends in them: nothing of the size of a matrix, let alone of a stack."""
    wrapped = adapted(tiny_model("mixtral")).train()
    shapes = set()
    total = loss(wrapped)
    seen, stack = set(), [total.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            shapes.add(tuple(node.variable.shape))
        stack += [inner for inner, _ in node.next_functions]
    assert shapes == {tuple(p.shape) for p in vectors(wrapped).values()}


@every_mixture
def test_gradients_pass_experts_without_a_chosen_neuron(tiny_model, model_type):
    plain = tiny_model(model_type)
    neurons = choose(plain, modules=["*.experts.*.1", "q"])
    wrapped = adapted(copy.deepcopy(plain), neurons).train()
    twin = replaced_by_hand(plain, wrapped).train()
    loss(twin).backward()
    loss(wrapped).backward()
    for name, gradient in gradients(wrapped).items():
        module = name.removeprefix("base_model.model.").partition(".neft_vectors.")[0]
        projection = neurons.projections[module]
        whole = projection.weight_in(twin.get_parameter(projection.parameter).grad)
        expected = whole.index_select(projection.neuron_dim, torch.from_numpy(neurons[module]))
        by_neuron = expected if projection.neuron_dim == 0 else expected.T
        torch.testing.assert_close(gradient, by_neuron, rtol=1e-4, atol=1e-6)


def test_training_beside_a_merged_adapter(tiny_model):
    """Its experts share their stack with those that are written to."""
    plain = tiny_model("mixtral")
    wrapped = with_second(
        adapted(copy.deepcopy(plain), choose(plain, modules=["*.experts.*.0"])),
        choose(plain, modules=["*.experts.*.1"]),
    ).train()
    wrapped.base_model.set_adapter(["default", "other"])
    loss(wrapped).backward()
    expected = {name: p.grad.clone() for name, p in vectors(wrapped, "other").items()}
    wrapped.zero_grad()
    wrapped.merge_adapter(["default"])
    loss(wrapped).backward()
    for name, parameter in vectors(wrapped, "other").items():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_loading_base_weights_after_the_adapter(tiny_model):
    """The old values, kept while vectors are resident, must not come back over the new ones."""
    wrapped = adapted(tiny_model("mixtral"))
    logits(wrapped)
    other = tiny_model("mixtral", seed=5)
    state = {f"base_model.model.{name}": tensor for name, tensor in other.state_dict().items()}
    renamed = {
        name.replace(".experts.", ".experts.base_layer.") if ".experts." in name else name: tensor
        for name, tensor in state.items()
    }
    wrapped.load_state_dict(renamed, strict=False)
    assert same_bits(base_state(wrapped), dict(other.state_dict()))
    assert torch.equal(logits(wrapped), logits(replaced_by_hand(other, wrapped)))


def test_compiled_models_run_experts_outside_the_graph(tiny_model):
    wrapped = adapted(tiny_model("mixtral"))
    expected = logits(wrapped)
    compiled = torch.compile(wrapped, backend="eager")
    torch.testing.assert_close(logits(compiled), expected)
    torch._dynamo.reset()


def experts_of(model: nn.Module, layer: int = 0) -> nn.Module:
    found: nn.Module = model.model.layers[layer].mlp.experts
    return found


def test_experts_that_are_not_frozen(tiny_model):
    wrapped = adapted(tiny_model("mixtral"))
    experts_of(wrapped.get_base_model()).base_layer.down_proj.requires_grad_(True)
    with pytest.raises(UsageError, match=r"0\.mlp\.experts\.down_proj: requires a gradient"):
        loss(wrapped)


def test_offloaded_experts(tiny_model):
    wrapped = adapted(tiny_model("mixtral"))
    experts = experts_of(wrapped.get_base_model()).base_layer
    experts.down_proj = nn.Parameter(experts.down_proj.to("meta"), requires_grad=False)
    with pytest.raises(UsageError, match="offloaded to the meta device"):
        logits(wrapped)


def quantized(experts: nn.Module) -> None:
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)


def spread(experts: nn.Module) -> None:
    experts._is_expert_parallel = True


def unmarked(experts: nn.Module) -> None:
    experts.is_transposed = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantized, r"down_proj: is held as Parameter of torch\.float8_e4m3fn; .*not quantized"),
        (spread, "expert parallelism"),
        (unmarked, r"experts as transformers stacks them, these are a .*MixtralExperts"),
    ],
)
def test_experts_that_cannot_be_trained(tiny_model, change, message):
    model = tiny_model("mixtral")
    neurons = choose(model)
    change(experts_of(model))
    before = dict(model.named_modules())
    with pytest.raises(ArchitectureError, match=message):
        get_peft_model(model, NeftConfig(neurons=neurons))
    assert dict(model.named_modules()) == before


def test_a_kernel_that_stands_in_for_the_block(tiny_model):
    model = tiny_model("gpt_oss")
    block = model.model.layers[0].mlp
    block.forward = MethodType(type(block).forward, block)  # as kernels puts its own there
    with pytest.raises(ArchitectureError, match=r"a kernel .* use_kernels=False"):
        get_peft_model(model, NeftConfig(neurons=choose(model)))


def test_another_number_of_experts(tiny_model):
    neurons = choose(tiny_model("mixtral"))
    fewer = tiny_model("mixtral", num_experts=3, num_local_experts=3)
    with pytest.raises(NeuronError, match=r"gate_up_proj\.3: the weight has shape \(3, 48, 32\)"):
        get_peft_model(fewer, NeftConfig(neurons=neurons))


def test_neurons_of_experts_by_name(tiny_model, tmp_path):
    name = "model.layers.1.mlp.experts.down_proj.3"
    wrapped = get_peft_model(tiny_model("mixtral"), NeftConfig(neurons={name: [4, 7]}))
    assert [tuple(p.shape) for p in vectors(wrapped).values()] == [(2, 32)]
    wrapped.save_pretrained(tmp_path)
    saved = json.loads((Path(tmp_path) / "adapter_config.json").read_text())
    projections = find_projections(tiny_model("mixtral"), [name])
    assert NeuronSet.from_dict(saved["neurons"]) == NeuronSet(projections, {name: [4, 7]})


def test_lora_has_no_layer_for_experts(tiny_model):
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(adapted(tiny_model("mixtral")), rank=2)
