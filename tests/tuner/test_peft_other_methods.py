"""Where NeFT meets other PEFT methods: conversion to LoRA, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters import (
    FAMILIES,
    IDS,
    adapted,
    base_state,
    choose,
    logits,
    merged_by_hand,
    move,
    same_bits,
    with_second,
)
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.conversion import convert_to_lora, save_as_lora
from peft.utils.hotswap import hotswap_adapter

from neft import NeftConfig, NeuronSet
from neft.errors import UsageError


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_delta_weight(tiny_model, family, resident):
    """In the stored orientation, which Conv1D transposes."""
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    wrapped = with_second(adapted(model), choose(model, every=2))
    if resident:
        logits(wrapped)
    for adapter in ("default", "other"):
        expected = merged_by_hand(before, wrapped, adapter)
        for name in choose(tiny_model(family)).modules():
            delta = model.get_submodule(name).get_delta_weight(adapter)
            assert torch.equal(delta, expected[f"{name}.weight"] - before[f"{name}.weight"])
    assert same_bits(base_state(wrapped), before)


# PEFT says so of every LoRA over Conv1D.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_conversion_to_lora_at_full_rank(tiny_model, tmp_path, family):
    wrapped = adapted(tiny_model(family))
    assert wrapped.supports_lora_conversion()
    output = logits(wrapped)
    config, tensors = convert_to_lora(wrapped, rank=32)
    converted = get_peft_model(tiny_model(family), config).eval()
    assert not set_peft_model_state_dict(converted, tensors).unexpected_keys
    torch.testing.assert_close(logits(converted), output)

    save_as_lora(tmp_path, wrapped, rank=32)
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path)
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    torch.testing.assert_close(logits(loaded), output)
    assert torch.equal(logits(wrapped), output), "converting changes nothing"


def test_conversion_finds_the_rank_by_itself(tiny_model):
    """A few neurons make a delta of as low a rank."""
    model = tiny_model()
    few = NeuronSet(
        choose(model).projections.values(), {n: [1, 5] for n in choose(model).modules()}
    )
    wrapped = adapted(model, few)
    config, tensors = convert_to_lora(wrapped, rank=0.999999)
    assert set(config.rank_pattern.values()) == {2}
    converted = get_peft_model(tiny_model(), config).eval()
    set_peft_model_state_dict(converted, tensors)
    torch.testing.assert_close(logits(converted), logits(wrapped), rtol=1e-3, atol=1e-4)


def test_conversion_of_one_of_two_adapters_in_different_layers(tiny_model):
    model = tiny_model()
    everything = choose(model)
    first, second = (
        NeuronSet(everything.projections.values(), {name: everything[name]})
        for name in everything.modules()[:2]
    )
    wrapped = with_second(adapted(model, first), second)
    wrapped.set_adapter("other")
    output = logits(wrapped)
    config, tensors = convert_to_lora(wrapped, rank=32, adapter_name="other")
    converted = get_peft_model(tiny_model(), config).eval()
    set_peft_model_state_dict(converted, tensors)
    torch.testing.assert_close(logits(converted), output)


def test_mixing_adapters_in_a_batch_is_refused(tiny_model):
    wrapped = with_second(adapted(tiny_model()), choose(tiny_model(), start=1))
    names = ["default", "other"]
    with pytest.raises(UsageError, match="cannot mix adapters in one batch"):
        wrapped(input_ids=IDS, adapter_names=names)
    with pytest.raises(UsageError, match="cannot mix adapters in one batch"):
        wrapped.generate(IDS, adapter_names=names, max_new_tokens=1)


def test_other_methods_beside_it_are_refused(tiny_model):
    lora = LoraConfig(target_modules=["q_proj"])
    neft = NeftConfig(neurons=choose(tiny_model()))
    wrapped = get_peft_model(tiny_model(), neft)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        wrapped.add_adapter("other", lora)
    wrapped = get_peft_model(tiny_model(), lora)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        wrapped.add_adapter("other", neft)
    with pytest.raises(ValueError, match="'NEFT' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_model(), neft, mixed=True)


def test_neft_after_lora_was_merged(tiny_model):
    """Its neurons are those of the merged weights."""
    lora = LoraConfig(target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    merged = get_peft_model(tiny_model(), lora).merge_and_unload().eval()
    output = logits(merged)
    wrapped = get_peft_model(merged, NeftConfig(neurons=choose(merged)))
    assert torch.equal(logits(wrapped), output)
    move(wrapped)
    assert not torch.equal(logits(wrapped), output)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), output)


def test_hot_swapping_is_refused(tiny_model, tmp_path):
    wrapped = adapted(tiny_model())
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but NEFT was passed"):
        hotswap_adapter(wrapped, str(tmp_path), adapter_name="default")


def test_there_are_no_weighted_combinations(tiny_model):
    """Vectors are values, not differences; PEFT has no such method for them."""
    assert not hasattr(adapted(tiny_model()), "add_weighted_adapter")
