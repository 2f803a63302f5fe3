"""``nn.DataParallel``, into which transformers' trainer falls where one process sees several GPUs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adapters import FAMILIES, IDS, adapted, base_state, logits, merged_by_hand, same_bits, vectors
from torch import Tensor, nn

from neft.errors import UsageError


class _Broadcast(torch.autograd.Function):
    """Tensors for two devices, as torch's own hands them out: of the first it makes no copy."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        copies = tuple(tensor.clone() for tensor in tensors)
        frozen = [
            output
            for tensor, *outputs in zip(tensors, tensors, copies, strict=True)
            for output in outputs
            if not tensor.requires_grad
        ]
        ctx.mark_non_differentiable(*frozen)
        return (*tensors, *copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        half = len(gradients) // 2
        return tuple(map(torch.add, gradients[:half], gradients[half:]))


def replicas(network: nn.Module) -> list[nn.Module]:
    """As ``torch.nn.parallel.replicate`` makes them for two devices, which must be GPUs there."""
    parameters = list(network.parameters())
    broadcast = _Broadcast.apply(*parameters)
    modules = list(network.modules())
    made = []
    for start in (0, len(parameters)):
        tensors = dict(zip(map(id, parameters), broadcast[start:], strict=False))
        replica = {module: module._replicate_for_data_parallel() for module in modules}
        for module in modules:
            for name, child in module._modules.items():
                replica[module]._modules[name] = None if child is None else replica[child]
            for name, parameter in module._parameters.items():
                if parameter is None:
                    replica[module]._parameters[name] = None
                else:
                    setattr(replica[module], name, tensors[id(parameter)])
        made.append(replica[network])
    return made


def parallel_loss(network: nn.Module) -> Tensor:
    halves = zip(replicas(network), IDS.chunk(2), strict=True)
    return sum(replica(input_ids=ids, labels=ids).loss for replica, ids in halves) / 2


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_training(tiny_model, family, resident):
    before = tiny_model(family).state_dict()
    wrapped, alone = (adapted(tiny_model(family)) for _ in range(2))
    if resident:  # when the first replicas are made
        logits(wrapped)
    for _ in range(2):
        losses = parallel_loss(wrapped), alone(input_ids=IDS, labels=IDS).loss
        torch.testing.assert_close(*losses)
        for model, loss in zip((wrapped, alone), losses, strict=True):
            loss.backward()
            torch.optim.SGD(vectors(model).values(), lr=0.1).step()
            model.zero_grad()
    for name, parameter in vectors(wrapped).items():
        torch.testing.assert_close(parameter, vectors(alone)[name])
    assert same_bits(base_state(wrapped), before)


@pytest.mark.parametrize("resident", [False, True])
def test_evaluation(tiny_model, resident):
    before = tiny_model().state_dict()
    wrapped = adapted(tiny_model())
    expected = logits(wrapped if resident else adapted(tiny_model()))
    for _ in range(2):
        assert all(torch.equal(logits(replica), expected) for replica in replicas(wrapped))
        if resident:
            assert torch.equal(logits(wrapped), expected)
    plain = logits(tiny_model())
    with wrapped.disable_adapter():
        assert all(torch.equal(logits(replica), plain) for replica in replicas(wrapped))
    assert same_bits(base_state(wrapped), before)


def test_merged_adapters(tiny_model):
    plain = tiny_model()
    before = copy.deepcopy(plain.state_dict())
    wrapped = adapted(tiny_model())
    wrapped.merge_adapter()
    expected = logits(wrapped)
    assert all(torch.equal(logits(replica), expected) for replica in replicas(wrapped))
    assert same_bits(base_state(wrapped), merged_by_hand(before, wrapped))
    with wrapped.disable_adapter():
        assert all(torch.equal(logits(replica), logits(plain)) for replica in replicas(wrapped))
    assert same_bits(base_state(wrapped), before)


def test_experts_are_refused(tiny_model):
    wrapped = adapted(tiny_model("mixtral"))
    with pytest.raises(UsageError, match=r"experts: nn\.DataParallel .* torchrun"):
        replicas(wrapped)[0](input_ids=IDS)
