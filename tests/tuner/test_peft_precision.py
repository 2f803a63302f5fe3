"""The trained vectors stay in float32, whatever happens to the model around them."""

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
    same_bits,
    vectors,
)
from peft import PeftModel, get_peft_model
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from neft import NeftConfig

HALF = (torch.float16, torch.bfloat16)


def dtypes(model: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in vectors(model).values()}


def train(model: torch.nn.Module, steps: int = 3, lr: float = 1e-3) -> list[float]:
    """AdamW; the loss before each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_float32_over_a_half_precision_base(tiny_model, tmp_path, dtype, autocast_adapter_dtype):
    """On purpose against PEFT's autocast_adapter_dtype=False: 16-bit vectors would not learn."""
    options = {"autocast_adapter_dtype": autocast_adapter_dtype}
    model = tiny_model().to(dtype)
    neurons = choose(model)
    wrapped = get_peft_model(model, NeftConfig(neurons=neurons), **options)
    wrapped.add_adapter("other", NeftConfig(neurons=neurons), **options)
    assert dtypes(wrapped) == {torch.float32}
    assert {p.dtype for p in vectors(wrapped, "other").values()} == {torch.float32}
    wrapped.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            tiny_model().to(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, **options
        )
        loaded.load_adapter(
            tmp_path / "other", "other", low_cpu_mem_usage=low_cpu_mem_usage, **options
        )
        assert dtypes(loaded) == {torch.float32}
        assert {p.dtype for p in vectors(loaded, "other").values()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", HALF)
def test_training_over_a_half_precision_base(tiny_model, family, dtype):
    model = tiny_model(family).to(dtype)
    before = copy.deepcopy(model.state_dict())
    wrapped = get_peft_model(model, NeftConfig(neurons=choose(model)))
    losses = train(wrapped, lr=1e-2)
    assert losses[-1] < losses[0]
    assert dtypes(wrapped) == {torch.float32}
    assert same_bits(base_state(wrapped), before)


def test_updates_too_small_for_16_bits_add_up(tiny_model):
    model = tiny_model().to(torch.bfloat16)
    wrapped = get_peft_model(model, NeftConfig(neurons=choose(model)))
    start = {name: p.detach().clone() for name, p in vectors(wrapped).items()}
    for _ in range(8):
        for parameter in vectors(wrapped).values():
            parameter.data.mul_(1 + 2**-10)  # a quarter of a unit in the last place of bfloat16
    for name, parameter in vectors(wrapped).items():
        assert not torch.equal(parameter.bfloat16(), start[name].bfloat16())


@pytest.mark.parametrize(
    ("cast", "expected"),
    [
        (lambda model: model.half(), torch.float32),
        (lambda model: model.bfloat16(), torch.float32),
        (lambda model: model.to(torch.bfloat16), torch.float32),
        (lambda model: model.to("cpu", torch.float16), torch.float32),
        (lambda model: model.double(), torch.float64),
        (lambda model: model.double().float(), torch.float32),
    ],
    ids=["half", "bfloat16", "to dtype", "to device and dtype", "double", "double and back"],
)
def test_casting_the_model(tiny_model, cast, expected):
    """While the vectors are resident: what is put back follows the weight."""
    wrapped = adapted(tiny_model())
    values = {name: p.detach().clone() for name, p in vectors(wrapped).items()}
    logits(wrapped)
    wrapped = cast(wrapped)
    plain = cast(tiny_model())
    for name, parameter in vectors(wrapped).items():
        assert parameter.dtype == expected
        assert torch.equal(parameter, values[name].to(expected))
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(plain))
    plain.load_state_dict(merged_by_hand(plain.state_dict(), wrapped))
    assert torch.equal(logits(wrapped), logits(plain))


@pytest.mark.parametrize("dtype", HALF)
def test_adapter_on_a_base_of_another_precision(tiny_model, tmp_path, dtype):
    """The vectors themselves survive bit for bit; the base rounds them only where it holds them."""
    wrapped = adapted(tiny_model())
    output = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "first")
    narrow = PeftModel.from_pretrained(tiny_model().to(dtype), tmp_path / "first")
    rounded = adapted(tiny_model()).merge_and_unload().to(dtype)
    assert torch.equal(logits(narrow), logits(rounded))
    narrow.save_pretrained(tmp_path / "second")
    back = PeftModel.from_pretrained(tiny_model(), tmp_path / "second")
    assert torch.equal(logits(back), output)


def test_a_trainer_that_casts_trainable_parameters_behind_our_back(tiny_model):
    """As TRL does over a quantized base."""
    model = tiny_model().to(torch.bfloat16)
    wrapped = get_peft_model(model, NeftConfig(neurons=choose(model)))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    with pytest.warns(UserWarning, match="adapter 'default': something cast the trained vectors"):
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert dtypes(wrapped) == {torch.float32}
    wrapped(input_ids=IDS, labels=IDS).loss.backward()  # warns no more


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_such_a_trainer_that_goes_on_with_ddp(tiny_model, process_group):
    model = tiny_model().to(torch.bfloat16)
    wrapped = get_peft_model(model, NeftConfig(neurons=choose(model)))
    for parameter in vectors(wrapped).values():
        parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="adapter 'default': something cast the trained vectors"):
        parallel = DistributedDataParallel(wrapped)
    assert dtypes(wrapped) == {torch.float32}, "before the first pass: DDP's buffers have it too"
    start = {name: p.detach().clone() for name, p in vectors(wrapped).items()}
    train(parallel, lr=1e-6)
    assert dtypes(wrapped) == {torch.float32}
    for name, parameter in vectors(wrapped).items():
        assert not torch.equal(parameter, start[name])


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_vectors_that_fsdp_gathers_in_16_bits_are_left_to_it(
    tiny_model, process_group, reshard_after_forward
):
    wrapped = adapted(tiny_model())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(wrapped, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    logits(wrapped)
    gathered = dtypes(wrapped)
    assert gathered == {torch.float32 if reshard_after_forward else torch.bfloat16}
    wrapped.train()
    assert dtypes(wrapped) == gathered
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    assert dtypes(wrapped) == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_over_a_float32_base(tiny_model, family):
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    wrapped = get_peft_model(model, NeftConfig(neurons=choose(model)))
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(wrapped, lr=1e-2)
        assert wrapped(input_ids=IDS).logits.dtype is torch.bfloat16
    assert losses[-1] < losses[0]
    assert dtypes(wrapped) == {torch.float32}
    assert same_bits(base_state(wrapped), before)


def test_gradients_under_autocast_are_near_those_without(tiny_model):
    def gradients(enabled: bool) -> list[torch.Tensor]:
        wrapped = adapted(tiny_model())
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = wrapped(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return [parameter.grad for parameter in vectors(wrapped).values()]

    for exact, rounded in zip(gradients(False), gradients(True), strict=True):
        assert rounded.dtype is torch.float32
        assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_base_weights_that_require_gradients_are_refused(tiny_model):
    wrapped = adapted(tiny_model())
    next(wrapped.base_model.model.model.layers.children()).requires_grad_(True)
    logits(wrapped)  # inference is fine
    with pytest.raises(ValueError, match="up_proj: the base weight requires a gradient"):
        wrapped(input_ids=IDS)
