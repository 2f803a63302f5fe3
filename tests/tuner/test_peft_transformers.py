"""transformers' own adapter methods, without a PeftModel around the model."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from adapters import (
    FAMILIES,
    IDS,
    adapted,
    base_state,
    choose,
    logits,
    move,
    same_bits,
    vectors,
)
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from neft import NeftConfig


@pytest.fixture
def base(tiny_model, tmp_path):
    """A checkpoint of a tiny model."""
    tiny_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_life_of_adapters(tiny_model, family):
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    without = logits(model)
    model.add_adapter(NeftConfig(neurons=choose(model)), "first")
    move(model, "first")
    first = logits(model)
    assert torch.equal(first, logits(adapted(tiny_model(family))))
    model.add_adapter(NeftConfig(neurons=choose(model, every=2)), "second")
    move(model, "second", seed=2)
    second = logits(model)

    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    model.disable_adapters()
    assert torch.equal(logits(model), without)
    model.enable_adapters()
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    assert model.active_adapters() == ["second"]
    assert same_bits(base_state(model), before)
    with pytest.warns(UserWarning, match="Setting active adapter to first"):
        model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    model.delete_adapter("first")
    assert torch.equal(logits(model), without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_load_adapter(tiny_model, tmp_path, family, low_cpu_mem_usage, is_trainable, dtype):
    wrapped = adapted(tiny_model(family))
    wrapped.save_pretrained(tmp_path)
    model = tiny_model(family).to(dtype)
    before = copy.deepcopy(model.state_dict())
    model.load_adapter(
        tmp_path, "mine", low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=is_trainable
    )
    for name, parameter in vectors(model, "mine").items():
        expected = wrapped.get_parameter(f"base_model.model.{name.replace('mine', 'default')}")
        assert parameter.dtype is torch.float32
        assert torch.equal(parameter, expected)
        assert parameter.requires_grad is is_trainable
    assert same_bits(base_state(model), before)
    same = adapted(tiny_model(family)).merge_and_unload().to(dtype)
    assert torch.equal(logits(model.eval()), logits(same))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny_model(family).to(dtype)))


def test_saving_from_transformers(tiny_model, tmp_path):
    model = tiny_model()
    model.add_adapter(NeftConfig(neurons=choose(model)), "mine")
    move(model, "mine")
    output = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(loaded), output)


def test_training_from_transformers(tiny_model):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    model.add_adapter(NeftConfig(neurons=choose(model)))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == vectors(model).keys()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in vectors(model).values())
    assert same_bits(base_state(model), before)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoPeftModelForCausalLM])
def test_from_pretrained_of_an_adapter_folder(base, tmp_path, auto):
    """The folder names its base model, as any PEFT adapter's does."""
    wrapped = adapted(AutoModelForCausalLM.from_pretrained(base))
    wrapped.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "adapter").eval()), logits(wrapped))


def test_merged_model_is_an_ordinary_checkpoint(base, tmp_path):
    wrapped = adapted(AutoModelForCausalLM.from_pretrained(base))
    output = logits(wrapped)
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), output)


def test_base_model_saved_under_an_adapter(base, tmp_path):
    """What transformers writes then is the adapter; the state dict has the untouched base."""
    model = AutoModelForCausalLM.from_pretrained(base)
    before = copy.deepcopy(model.state_dict())
    wrapped = adapted(model)
    logits(wrapped)
    twin = AutoModelForCausalLM.from_pretrained(base)
    twin.load_state_dict(base_state(wrapped))
    assert same_bits(twin.state_dict(), before)


def test_classification_head_comes_along(tiny_config, tmp_path):
    config = tiny_config("llama", num_labels=3)

    def classifier() -> torch.nn.Module:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config).eval()

    model = classifier()
    wrapped = get_peft_model(model, NeftConfig(neurons=choose(model), task_type="SEQ_CLS")).eval()
    move(wrapped)
    with torch.no_grad():
        wrapped.base_model.model.score.modules_to_save["default"].weight.mul_(3)
    output = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(classifier(), tmp_path)), output)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_injecting_without_a_peft_model(tiny_model, low_cpu_mem_usage):
    model = inject_adapter_in_model(NeftConfig(neurons=choose(tiny_model())), tiny_model())
    move(model)
    tensors = get_peft_model_state_dict(model)
    twin = inject_adapter_in_model(
        NeftConfig(neurons=choose(tiny_model())), tiny_model(), low_cpu_mem_usage=low_cpu_mem_usage
    )
    devices = {parameter.device.type for parameter in vectors(twin).values()}
    assert devices == {"meta" if low_cpu_mem_usage else "cpu"}
    set_peft_model_state_dict(twin, tensors, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(twin), logits(model))


def test_injecting_by_the_names_in_a_state_dict(tiny_model):
    neurons = choose(tiny_model())
    tensors = get_peft_model_state_dict(
        inject_adapter_in_model(NeftConfig(neurons=neurons), tiny_model())
    )
    model = inject_adapter_in_model(NeftConfig(neurons=neurons), tiny_model(), state_dict=tensors)
    assert len(vectors(model)) == len(neurons.modules())
    fewer = NeftConfig(neurons=dict(list(neurons.items())[1:]))
    with pytest.raises(ValueError, match="up_proj: the state dict has vectors for this module"):
        inject_adapter_in_model(fewer, tiny_model(), state_dict=tensors)
