"""Base models that are not simply in memory: offloaded, empty on the meta device, sharded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights
from adapters import (
    IDS,
    adapted,
    base_state,
    choose,
    logits,
    move,
    plain_name,
    same_bits,
    vectors,
    with_second,
)
from peft import PeftModel, get_peft_model
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from neft import NeftConfig
from neft.errors import UsageError
from neft.tuner.layer import NeftLinear


@pytest.fixture(params=["cpu", "disk"])
def offload(request, tmp_path):
    """How accelerate takes the weights away between passes."""
    if request.param == "cpu":
        return cpu_offload
    return partial(disk_offload, offload_dir=tmp_path / "offloaded")


def test_adapter_on_an_offloaded_base(tiny_model, offload, tmp_path):
    base = offload(tiny_model())
    assert {parameter.device.type for parameter in base.parameters()} == {"meta"}
    wrapped = adapted(base, choose(tiny_model()))
    twin = adapted(tiny_model())
    assert {parameter.device.type for parameter in vectors(wrapped).values()} == {"cpu"}
    torch.testing.assert_close(logits(wrapped), logits(twin))
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(tiny_model()))

    for model in (wrapped, twin):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in vectors(wrapped).items():
        torch.testing.assert_close(parameter.grad, vectors(twin)[name].grad)

    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(twin))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_onto_an_offloaded_base(tiny_model, offload, tmp_path, low_cpu_mem_usage):
    twin = adapted(tiny_model())
    twin.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        offload(tiny_model()), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert {parameter.device.type for parameter in vectors(loaded).values()} == {"cpu"}
    torch.testing.assert_close(logits(loaded), logits(twin))


def test_merging_into_an_offloaded_base(tiny_model):
    wrapped = adapted(cpu_offload(tiny_model()), choose(tiny_model()))
    output = logits(adapted(tiny_model()))
    wrapped.merge_adapter()
    assert torch.equal(logits(wrapped), output)
    wrapped.unmerge_adapter()
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(tiny_model()))
    assert torch.equal(logits(wrapped.merge_and_unload()), output)


def test_offloading_after_the_adapter_is_refused(tiny_model, offload):
    wrapped = adapted(tiny_model())
    logits(wrapped)
    wrapped = offload(wrapped)
    with pytest.raises(UsageError, match=r"up_proj: the trained vectors are offloaded .* Dispatch"):
        logits(wrapped)


def test_offloaded_bias_of_trained_rows_is_refused(tiny_model):
    wrapped = adapted(cpu_offload(tiny_model("gpt2")), choose(tiny_model("gpt2")))
    with pytest.raises(UsageError, match=r"c_fc: the bias of trained rows is offloaded"):
        logits(wrapped)


class Layers(nn.Module):
    """Nothing but weights that a checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def test_weights_that_come_after_the_adapter():
    """Made empty, filled from a checkpoint: as large models are."""
    config = partial(
        NeftConfig, neurons={"up": [1, 5, 11], "down": [0, 7]}, axes={"down": "column"}
    )
    full = get_peft_model(Layers(), config())
    move(full)
    with init_empty_weights():
        model = Layers()
    empty = get_peft_model(model, config())
    empty.to_empty(device="cpu").load_state_dict(full.state_dict())
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert torch.equal(empty(x), full(x))
        with empty.disable_adapter(), full.disable_adapter():
            assert torch.equal(empty(x), full(x))
    assert same_bits(base_state(empty), base_state(full))


def test_emptying_the_model(tiny_model):
    """What is to be put back moves along with the weight."""
    wrapped = adapted(tiny_model())
    wrapped.merge_adapter()
    wrapped.to("meta")
    layers = [module for module in wrapped.modules() if isinstance(module, NeftLinear)]
    put_back = [originals for layer in layers for originals in layer._resident.values()]
    assert len(put_back) == len(layers)
    assert {originals.device.type for originals in put_back} == {"meta"}
    wrapped.unmerge_adapter()
    assert {tensor.device.type for tensor in wrapped.state_dict().values()} == {"meta"}


@pytest.fixture
def mesh() -> Iterator[distributed.DeviceMesh]:
    """One process that shards its weights as many would."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_sharded_base(tiny_model, mesh, reshard_after_forward):
    """Gathered weights are fresh copies, maybe at an address that was used before."""
    base = tiny_model()
    before = copy.deepcopy(base.state_dict())
    sharded = with_second(adapted(base), choose(base, every=2))
    twin = with_second(adapted(tiny_model()), choose(tiny_model(), every=2))
    for module in (*base.model.layers, sharded):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward)

    # Before the first pass: the parameters are the shards.
    optimizers = [torch.optim.SGD(vectors(model).values(), lr=0.1) for model in (sharded, twin)]

    def check() -> None:
        for adapter in ("default", "other", None, "default"):
            for model in (sharded, twin):
                model.set_adapter(adapter or "other")
            for _ in range(2):
                if adapter is None:
                    with sharded.disable_adapter(), twin.disable_adapter():
                        assert torch.equal(logits(sharded), logits(twin))
                else:
                    assert torch.equal(logits(sharded), logits(twin))

    check()
    for model in (sharded, twin):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    check()
    state = {
        plain_name(name): tensor.full_tensor()
        for name, tensor in sharded.state_dict().items()
        if ".neft_" not in name
    }
    assert same_bits(state, before)
    check()


def sharded(model: PeftModel, mesh: distributed.DeviceMesh) -> PeftModel:
    for module in (*model.get_base_model().model.layers, model):
        fully_shard(module, mesh=mesh)
    return model


def add_another(model: PeftModel) -> None:
    neurons = model.peft_config["default"].neurons
    model.add_adapter("other", NeftConfig(neurons=neurons))


def first_layer(model: PeftModel) -> NeftLinear:
    return next(module for module in model.modules() if isinstance(module, NeftLinear))


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.merge_and_unload(),
        add_another,
        lambda model: first_layer(model).weight,
    ],
    ids=["merge_adapter", "merge_and_unload", "add_adapter", "weight"],
)
def test_what_shards_cannot_do(tiny_model, mesh, use):
    wrapped = sharded(adapted(tiny_model()), mesh)
    expected = logits(wrapped)
    with pytest.raises(UsageError, match=r"up_proj: its weight is divided among .*\(neft merge"):
        use(wrapped)
    assert torch.equal(logits(wrapped), expected)


@pytest.fixture
def resident(tiny_model) -> PeftModel:
    """After a pass while there was no process group."""
    wrapped = adapted(tiny_model())
    logits(wrapped)
    return wrapped


@pytest.mark.parametrize("use", [logits, nn.Module.state_dict, lambda model: model(input_ids=IDS)])
def test_vectors_that_were_sharded_with_the_base(resident, mesh, use):
    wrapped = sharded(resident, mesh)
    for _ in range(2):
        with pytest.raises(
            UsageError, match=r"held the vectors of \['default'\] when it was sharded"
        ):
            use(wrapped)


def test_merged_vectors_that_were_sharded_cannot_be_taken_out(resident, mesh):
    expected = logits(resident)
    resident.merge_adapter()
    wrapped = sharded(resident, mesh)
    assert torch.equal(logits(wrapped), expected)
    with wrapped.disable_adapter(), pytest.raises(UsageError, match="unmerge_adapter"):
        logits(wrapped)


def test_vectors_that_were_taken_out_before_sharding(tiny_model, resident, mesh):
    expected = logits(resident)
    resident.state_dict()
    wrapped = sharded(resident, mesh)
    assert torch.equal(logits(wrapped), expected)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(tiny_model()))
