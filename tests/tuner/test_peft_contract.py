"""NeFT behaves as a PEFT method: adapters come and go, and the base model keeps every bit."""

from __future__ import annotations

import copy
import io
import pickle

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
    plain_name,
    same_bits,
    vectors,
    with_second,
)
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    set_base_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer

from neft import NeftConfig, NeuronSet
from neft.errors import NeuronError
from neft.tuner.layer import NeftLinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapter_changes_nothing(tiny_model, family):
    model = tiny_model(family)
    before = logits(model)
    wrapped = get_peft_model(model, NeftConfig(neurons=choose(model))).eval()
    assert torch.equal(logits(wrapped), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_equals_the_weights_written_by_hand(tiny_model, family):
    model = tiny_model(family)
    reference = copy.deepcopy(model)
    wrapped = adapted(model)
    reference.load_state_dict(merged_by_hand(reference.state_dict(), wrapped))
    assert torch.equal(logits(wrapped), logits(reference))
    with torch.enable_grad():
        trainable = wrapped(input_ids=IDS).logits
    assert torch.equal(trainable, logits(reference))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(tiny_model, tmp_path, family, low_cpu_mem_usage):
    wrapped = adapted(tiny_model(family))
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_model(family), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits(loaded), logits(wrapped))
    assert same_bits(loaded.state_dict(), wrapped.state_dict())
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_merge_and_unmerge(tiny_model, family, dtype, safe_merge):
    model = tiny_model(family).to(dtype)
    before = copy.deepcopy(model.state_dict())
    wrapped = adapted(model)
    output = logits(wrapped)
    for _ in range(2):
        wrapped.merge_adapter(safe_merge=safe_merge)
        assert torch.equal(logits(wrapped), output)
        assert same_bits(base_state(wrapped), merged_by_hand(before, wrapped))
        wrapped.unmerge_adapter()
        assert same_bits(base_state(wrapped), before)
        assert torch.equal(logits(wrapped), output)


@pytest.mark.parametrize("resident", [False, True], ids=["fresh", "after a forward pass"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unloading(tiny_model, family, resident):
    before = tiny_model(family).state_dict()
    for merge in (True, False):
        wrapped = adapted(tiny_model(family))
        if resident:
            logits(wrapped)
        expected = merged_by_hand(before, wrapped) if merge else before
        plain = wrapped.merge_and_unload() if merge else wrapped.unload()
        assert type(plain) is type(tiny_model(family))
        assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
        assert not hasattr(plain, "peft_config")
        assert same_bits(plain.state_dict(), expected)


def test_merging_twice_warns_and_changes_nothing(tiny_model):
    wrapped = adapted(tiny_model())
    wrapped.merge_adapter()
    merged = copy.deepcopy(base_state(wrapped))
    with pytest.warns(UserWarning, match="already merged"):
        wrapped.merge_adapter()
    assert same_bits(base_state(wrapped), merged)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_safe_merge_refuses_broken_vectors(tiny_model, value):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    wrapped = adapted(model)
    last = list(vectors(wrapped).values())[-1]
    last.data[1, 2] = value
    for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
        # PEFT's own words, for whoever looks for them.
        with pytest.raises(
            NeuronError,
            match=r"down_proj: NaNs detected in the merged weights\. The adapter default seem",
        ):
            merge(safe_merge=True)
        assert same_bits(base_state(wrapped), before)
    last.data[1, 2] = 0.0
    wrapped.merge_adapter(safe_merge=True)
    assert same_bits(base_state(wrapped), merged_by_hand(before, wrapped))


def test_adapters_that_overlap_in_the_last_layer_only_are_not_merged(tiny_model):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    first, apart = choose(model), choose(model, start=1)
    last = first.modules()[-1]
    second = NeuronSet(
        first.projections.values(),
        {name: (first if name == last else apart)[name] for name in first.modules()},
    )
    wrapped = with_second(adapted(model, first), second)
    for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
        with pytest.raises(
            NeuronError, match=rf"{last}: adapters 'default' and 'other' train some"
        ):
            merge(adapter_names=["default", "other"])
        assert same_bits(base_state(wrapped), before)


def test_merging_one_of_two_adapters_that_live_in_different_layers(tiny_model):
    """The layers that the merged adapter does not touch must not keep what is resident in them."""
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    everything = choose(model)
    first, second = (
        NeuronSet(everything.projections.values(), {name: everything[name]})
        for name in everything.modules()[:2]
    )
    wrapped = with_second(adapted(model, first), second)
    logits(wrapped)
    expected = merged_by_hand(before, wrapped, "other")
    assert same_bits(
        wrapped.merge_and_unload(adapter_names=["other"]).state_dict(),
        expected,
    )


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_disable_adapter(tiny_model, family, merged):
    model = tiny_model(family)
    without = logits(model)
    wrapped = adapted(model)
    output = logits(wrapped)
    if merged:
        wrapped.merge_adapter()
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), without)
        with wrapped.disable_adapter():
            assert torch.equal(logits(wrapped), without)
        assert torch.equal(logits(wrapped), without)
    assert torch.equal(logits(wrapped), output)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_adapters_over_overlapping_neurons(tiny_model, family):
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    wrapped = adapted(model, choose(model, every=2))
    first = logits(wrapped)  # "default" is resident while "other" is made
    with_second(wrapped, choose(model, every=3))
    assert torch.equal(logits(wrapped), first), "a new adapter must not become active"
    wrapped.set_adapter("other")
    second = logits(wrapped)
    reference = tiny_model(family)
    reference.load_state_dict(merged_by_hand(before, wrapped, "other"))
    assert torch.equal(second, logits(reference))

    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped), first)
    wrapped.set_adapter("other")
    assert torch.equal(logits(wrapped), second)
    assert same_bits(base_state(wrapped), before)

    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        wrapped.delete_adapter("other")
    assert torch.equal(logits(wrapped), first)
    wrapped.delete_adapter("default")
    reference.load_state_dict(before)
    # PEFT itself runs no forward pass without an adapter; the model inside does.
    assert torch.equal(logits(wrapped.base_model.model), logits(reference))


def test_deleting_an_adapter_leaves_no_trace_of_it(tiny_model):
    wrapped = with_second(adapted(tiny_model()), choose(tiny_model(), start=1))
    output = logits(wrapped)
    wrapped.delete_adapter("other")
    assert "other" not in wrapped.peft_config
    assert not any("other" in name for name, _ in wrapped.named_parameters())
    assert not any("other" in name for name, _ in wrapped.named_buffers())
    assert torch.equal(logits(wrapped), output)
    with pytest.raises(ValueError, match="other does not exist"):
        wrapped.delete_adapter("other")


def test_merged_adapter_cannot_be_deleted(tiny_model):
    wrapped = adapted(tiny_model())
    wrapped.merge_adapter()
    output = logits(wrapped)
    with pytest.raises(ValueError, match="while they are merged"):
        wrapped.delete_adapter("default")
    assert torch.equal(logits(wrapped), output)


def test_adding_an_adapter_to_a_merged_model_unmerges_it(tiny_model):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    wrapped = adapted(model)
    wrapped.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        wrapped.add_adapter("other", NeftConfig(neurons=choose(model)))
    assert same_bits(base_state(wrapped), before)
    wrapped.set_adapter("other")
    reference = tiny_model()
    assert torch.equal(logits(wrapped), logits(reference)), "it starts as the base, not as merged"


def test_disjoint_adapters_work_together(tiny_model):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    wrapped = with_second(adapted(model, choose(model)), choose(model, start=1))
    wrapped.base_model.set_adapter(["default", "other"])
    both = merged_by_hand(merged_by_hand(before, wrapped), wrapped, "other")
    reference = tiny_model()
    reference.load_state_dict(both)
    assert torch.equal(logits(wrapped), logits(reference))
    wrapped.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        wrapped.merge_adapter(["other"])
    assert same_bits(base_state(wrapped), both)
    wrapped.unmerge_adapter()
    assert same_bits(base_state(wrapped), before)


def test_overlapping_adapters_refuse_to_be_active_or_merged_together(tiny_model):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    wrapped = with_second(adapted(model), choose(model, every=2))
    output = logits(wrapped)
    with pytest.raises(NeuronError, match=r"up_proj: adapters 'default' and 'other' train some"):
        wrapped.merge_adapter(["default", "other"])
    wrapped.base_model.set_adapter(["default", "other"])
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled), pytest.raises(NeuronError, match="cannot be active"):
            wrapped(input_ids=IDS)
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped), output)
    assert same_bits(base_state(wrapped), before)


def test_a_name_may_be_used_again_for_other_neurons(tiny_model):
    model = tiny_model()
    wrapped = with_second(adapted(model), choose(model))
    wrapped.delete_adapter("other")
    with_second(wrapped, choose(model, start=1))
    wrapped.base_model.set_adapter(["default", "other"])
    logits(wrapped)  # they do not overlap any more
    wrapped.set_adapter("default")
    wrapped.delete_adapter("other")
    with_second(wrapped, choose(model, every=2))
    wrapped.base_model.set_adapter(["other", "default"])
    with pytest.raises(NeuronError, match="adapters 'other' and 'default' train some"):
        logits(wrapped)


OTHERS = {
    "same counts": {"start": 1},
    "other counts": {"every": 4},
    "fewer modules": {"modules": ["*.0.*"]},
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_wrapping_the_model_again_replaces_the_adapter(
    tiny_model, tmp_path, family, other, merged, recwarn
):
    model = tiny_model(family)
    plain, before = logits(model), copy.deepcopy(model.state_dict())
    neurons = choose(model, **OTHERS[other])
    first = adapted(model)
    logits(first)  # the vectors are resident
    if merged:
        first.merge_adapter()
    again = get_peft_model(model, NeftConfig(neurons=neurons)).eval()
    assert any("Already found a `peft_config`" in str(found.message) for found in recwarn)
    assert len(vectors(again)) == len(neurons.modules())
    assert torch.equal(logits(again), plain)
    move(again, seed=2)
    output = logits(again)
    assert same_bits(base_state(again), before)
    again.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path)
    assert torch.equal(logits(loaded), output)


def test_rows_and_columns_of_one_weight_always_overlap(tiny_model):
    model = tiny_model()
    name = choose(model).modules()[0]
    rows = NeftConfig(neurons={name: [0]})
    columns = NeftConfig(neurons={name: [1]}, axes={name: "column"})
    wrapped = get_peft_model(model, rows)
    wrapped.add_adapter("other", columns)
    wrapped.base_model.set_adapter(["default", "other"])
    with pytest.raises(NeuronError, match="train some of the same neurons"):
        logits(wrapped)


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_holds_the_original_weights(tiny_model, family):
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    wrapped = adapted(model)
    output = logits(wrapped)
    assert same_bits(base_state(wrapped), before)
    assert same_bits(get_base_model_state_dict(wrapped), before)
    assert torch.equal(logits(wrapped), output)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_base_weights_under_an_adapter(tiny_model, assign):
    wrapped = adapted(tiny_model(seed=0))
    new = tiny_model(seed=5).state_dict()
    state = {
        name: new[plain].clone() if (plain := plain_name(name)) in new else tensor
        for name, tensor in wrapped.state_dict().items()
    }
    logits(wrapped)  # the vectors are resident
    wrapped.load_state_dict(state, assign=assign)
    reference = tiny_model(seed=5)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(reference))
    reference.load_state_dict(merged_by_hand(new, wrapped))
    assert torch.equal(logits(wrapped), logits(reference))


def test_setting_the_base_state_dict(tiny_model):
    wrapped = adapted(tiny_model(seed=0))
    logits(wrapped)
    new = tiny_model(seed=5).state_dict()
    set_base_model_state_dict(wrapped, new)
    assert same_bits(get_base_model_state_dict(wrapped), new)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(tiny_model(seed=5)))


def through_pickle(model: PeftModel) -> PeftModel:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: PeftModel) -> PeftModel:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch])
def test_copies_are_equal_and_independent(tiny_model, copied):
    model = tiny_model()
    without = logits(model)
    wrapped = adapted(model)
    output = logits(wrapped)
    twin = copied(wrapped)
    assert torch.equal(logits(twin), output)
    with twin.disable_adapter():
        assert torch.equal(logits(twin), without)
    logits(twin)
    assert same_bits(base_state(twin), base_state(wrapped))
    move(twin, seed=9)
    assert not torch.equal(logits(twin), output)
    assert torch.equal(logits(wrapped), output)


def test_modules_to_save(tiny_model, tmp_path):
    model = tiny_model()
    config = NeftConfig(neurons=choose(model), modules_to_save=["lm_head"])
    wrapped = get_peft_model(model, config).eval()
    move(wrapped)
    head = wrapped.base_model.model.lm_head.modules_to_save["default"].weight
    assert head.requires_grad
    with torch.no_grad():
        head.mul_(2)
    output = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(loaded), output)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(tiny_model()))
    assert torch.equal(logits(loaded.merge_and_unload()), output)


def test_what_is_trainable(tiny_model, capsys):
    model = tiny_model()
    total = model.num_parameters()
    neurons = choose(model)
    wrapped = get_peft_model(model, NeftConfig(neurons=neurons))
    trainable = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trainable == vectors(wrapped).keys()
    assert wrapped.get_nb_trainable_parameters() == (
        neurons.num_parameters,
        total + neurons.num_parameters,
    )
    wrapped.print_trainable_parameters()
    assert f"trainable params: {neurons.num_parameters:,} ||" in capsys.readouterr().out


def test_requires_grad_follows_the_active_adapter(tiny_model):
    wrapped = with_second(adapted(tiny_model()), choose(tiny_model(), start=1))

    def trainable(adapter: str) -> set[bool]:
        return {parameter.requires_grad for parameter in vectors(wrapped, adapter).values()}

    assert (trainable("default"), trainable("other")) == ({True}, {False})
    wrapped.set_adapter("other")
    assert (trainable("default"), trainable("other")) == ({False}, {True})
    wrapped.set_requires_grad("default")
    assert (trainable("default"), trainable("other")) == ({True}, {True})
    wrapped.set_requires_grad(["default", "other"], requires_grad=False)
    assert (trainable("default"), trainable("other")) == ({False}, {False})
    assert not any(p.requires_grad for n, p in wrapped.named_parameters() if "neft_" not in n)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loaded_adapters_are_trainable_on_request(tiny_model, tmp_path, is_trainable):
    adapted(tiny_model()).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=is_trainable)
    loaded.load_adapter(tmp_path, "other", is_trainable=not is_trainable)
    for adapter, expected in (("default", is_trainable), ("other", not is_trainable)):
        assert {p.requires_grad for p in vectors(loaded, adapter).values()} == {expected}


def test_status(tiny_model):
    wrapped = with_second(adapted(tiny_model()), choose(tiny_model(), start=1))
    layers = wrapped.get_layer_status()
    assert [layer.name.removeprefix("model.") for layer in layers] == choose(tiny_model()).modules()
    assert {layer.module_type for layer in layers} == {"neft.NeftLinear"}
    status = wrapped.get_model_status()
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.adapter_model_type == "NeftModel"
    assert status.peft_types == {"default": "NEFT", "other": "NEFT"}
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert status.num_adapter_layers == len(layers)
    assert status.enabled
    assert status.merged_adapters == []
    wrapped.merge_adapter()
    assert wrapped.get_model_status().merged_adapters == ["default"]
    with wrapped.disable_adapter():
        assert not wrapped.get_model_status().enabled


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_look_like_what_they_wrap(tiny_model, family):
    model = tiny_model(family)
    neurons = choose(model)
    shapes = {name: model.get_submodule(name).weight.shape for name in neurons.modules()}
    wrapped = adapted(model, neurons)
    for name, shape in shapes.items():
        layer = model.get_submodule(name)
        transposed = neurons.projections[name].transposed
        features = (layer.out_features, layer.in_features)
        assert features == (shape[::-1] if transposed else shape)
        assert layer.weight.shape == shape
        assert layer.bias is layer.base_layer.bias
    assert "neft.NeftLinear(" in repr(wrapped)
    assert f"({neurons[name].size} neurons of length" in repr(wrapped)


def test_a_model_that_reads_the_weight_gets_the_active_one(tiny_model):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    wrapped = adapted(model)
    name = choose(tiny_model()).modules()[0]
    layer = model.get_submodule(name)
    assert torch.equal(layer.weight, merged_by_hand(before, wrapped)[f"{name}.weight"])
    with wrapped.disable_adapter():
        assert torch.equal(layer.weight, before[f"{name}.weight"])


def test_hooks_of_the_base_layer_fire(tiny_model):
    model = tiny_model()
    wrapped = adapted(model)
    seen: list[tuple[int, ...]] = []
    layer = next(module for module in wrapped.modules() if isinstance(module, NeftLinear))
    layer.base_layer.register_forward_hook(lambda *call: seen.append(tuple(call[2].shape)))
    logits(wrapped)
    wrapped(input_ids=IDS).logits.sum().backward()
    assert seen == [(2, 12, 64), (2, 12, 64)]


def test_generation(tiny_model):
    model = tiny_model()
    reference = tiny_model()
    wrapped = adapted(model)
    reference.load_state_dict(merged_by_hand(reference.state_dict(), wrapped))
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(wrapped.generate(IDS, **options), reference.generate(IDS, **options))


def test_inference_mode_all_the_way(tiny_model):
    """Tensors made there have no version counter."""
    with torch.inference_mode():
        wrapped = adapted(tiny_model())
        output = wrapped(input_ids=IDS).logits
        move(wrapped, seed=3)
        assert not torch.equal(wrapped(input_ids=IDS).logits, output)
        with wrapped.disable_adapter():
            assert torch.equal(wrapped(input_ids=IDS).logits, tiny_model()(input_ids=IDS).logits)


def test_adapter_names_that_contain_each_other(tiny_model, tmp_path):
    wrapped = adapted(tiny_model())
    for number, name in enumerate(("default2", "my_default", "defaul")):
        wrapped.add_adapter(name, NeftConfig(neurons=choose(tiny_model(), start=number)))
    output = logits(wrapped)
    wrapped.save_pretrained(tmp_path, selected_adapters=["default"])
    assert not (tmp_path / "default2").exists()
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), output)
