"""One base weight serves every adapter: passes that interleave must not see each other's vectors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

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
    vectors,
    with_second,
)
from peft import PeftModel
from torch import Tensor, nn

from neft.errors import UsageError


def two_adapters(model: nn.Module) -> PeftModel:
    """Adapters "default" and "other" over overlapping neurons; both may be trained."""
    wrapped = with_second(adapted(model), choose(model, every=2, start=1))
    wrapped.set_requires_grad(["default", "other"])
    return wrapped


@contextmanager
def active(model: PeftModel, adapter: str | None) -> Iterator[None]:
    """With ``adapter`` active, or with none."""
    if adapter is None:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(adapter)
        model.set_requires_grad(["default", "other"])
        yield


def loss(model: PeftModel, adapter: str | None, x: Tensor) -> Tensor:
    with active(model, adapter):
        return model(inputs_embeds=x, labels=IDS).loss


def embedded(model: PeftModel) -> Tensor:
    return model.get_input_embeddings()(IDS).detach().requires_grad_()


def gradients(model: PeftModel, x: Tensor) -> dict[str, Tensor]:
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return named | {"x": x.grad}


@pytest.mark.parametrize(
    "order",
    [
        ("default", None, "other"),
        (None, "default", "other", None),
        ("other", "default", "other"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_several_forward_passes_before_one_backward_pass(tiny_model, family, order):
    """DPO and contrastive losses: the sum's gradient is the sum of the gradients."""
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    wrapped = two_adapters(model)
    expected: dict[str, Tensor] = {}
    for adapter in order:
        alone = copy.deepcopy(wrapped)
        x = embedded(alone)
        loss(alone, adapter, x).backward()
        for name, gradient in gradients(alone, x).items():
            expected[name] = expected.get(name, 0) + gradient
    x = embedded(wrapped)
    total = torch.stack([loss(wrapped, adapter, x) for adapter in order]).sum()
    wrapped.set_requires_grad(["default", "other"])  # PEFT freezes what is not active
    total.backward()
    actual = gradients(wrapped, x)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)
    assert same_bits(base_state(wrapped), before)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(tiny_model, family, use_reentrant):
    """Recomputed passes come after others have used the weight, too."""

    def trained(checkpointing: bool) -> dict[str, Tensor]:
        wrapped = two_adapters(tiny_model(family)).train()
        torch.manual_seed(0)  # dropout
        if checkpointing:
            wrapped.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        x = embedded(wrapped)
        for adapter in ("other", "default"):
            loss(wrapped, adapter, x).backward()
        return gradients(wrapped, x)

    expected, actual = trained(False), trained(True)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        # A recomputed pass may lie elsewhere in memory, where kernels round otherwise in the last bit.
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7)


def test_backward_after_the_vectors_changed_is_refused(tiny_model):
    """A gradient at values that are gone would be wrong; autograd says so, as for any parameter."""
    wrapped = adapted(tiny_model())
    stale = wrapped(input_ids=IDS, labels=IDS).loss
    move(wrapped, seed=3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_merging_between_forward_and_backward_is_refused(tiny_model):
    wrapped = adapted(tiny_model())
    stale = wrapped(input_ids=IDS, labels=IDS).loss
    wrapped.merge_adapter()
    with pytest.raises(
        UsageError, match="were merged between a forward pass and its backward pass"
    ):
        stale.backward()


def reference_logits(model: nn.Module, state: dict[str, Tensor], wrapped: PeftModel) -> Tensor:
    model.load_state_dict(merged_by_hand(state, wrapped))
    return logits(model)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_evaluation_after_a_step_sees_it(tiny_model, optimizer, options):
    reference = tiny_model()
    before = copy.deepcopy(reference.state_dict())
    wrapped = adapted(tiny_model())
    steps = optimizer([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2, **options)
    for _ in range(2):
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        steps.step()
        steps.zero_grad()
        assert torch.equal(logits(wrapped), reference_logits(reference, before, wrapped))


def write_data(parameter: nn.Parameter) -> None:
    parameter.data.mul_(1.5)


def write_under_no_grad(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.mul_(1.5)


def replace_data(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data * 1.5


def write_alias(parameter: nn.Parameter) -> None:
    parameter.detach().mul_(1.5)


@pytest.mark.parametrize("write", [write_under_no_grad, replace_data, write_alias])
def test_evaluation_sees_writes_at_once(tiny_model, write):
    reference = tiny_model()
    before = copy.deepcopy(reference.state_dict())
    wrapped = adapted(tiny_model())
    logits(wrapped)
    for parameter in vectors(wrapped).values():
        write(parameter)
    assert torch.equal(logits(wrapped), reference_logits(reference, before, wrapped))


@pytest.mark.parametrize(
    "between",
    [
        lambda model: model.eval(),
        lambda model: model.train().eval(),
        lambda model: model(input_ids=IDS),
        lambda model: (model.set_adapter("other"), logits(model), model.set_adapter("default")),
        lambda model: model.load_state_dict(model.state_dict()),
    ],
    ids=["eval()", "train() and eval()", "a training pass", "another adapter", "load_state_dict"],
)
def test_evaluation_sees_writes_to_data_after_a_sign(tiny_model, between):
    """``data`` is behind every counter, so weights averaged into it need a sign: ``eval()``."""
    reference = tiny_model()
    before = copy.deepcopy(reference.state_dict())
    wrapped = two_adapters(tiny_model())
    logits(wrapped)
    for parameter in vectors(wrapped).values():
        write_data(parameter)
    between(wrapped)
    assert torch.equal(logits(wrapped), reference_logits(reference, before, wrapped))


def test_inference_writes_the_vectors_once(tiny_model, monkeypatch):
    """So that it costs what the base costs."""
    from neft.tuner.functional import Selection

    wrapped = two_adapters(tiny_model())
    logits(wrapped)
    writes: list[Selection] = []
    monkeypatch.setattr(Selection, "write", lambda self, *rest: writes.append(self))
    logits(wrapped)
    wrapped.generate(IDS, max_new_tokens=3, do_sample=False)
    assert not writes
    with wrapped.disable_adapter():
        logits(wrapped)
    assert len(writes) == len(vectors(wrapped))
