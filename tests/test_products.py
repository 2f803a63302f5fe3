"""Products by oneDNN, where PyTorch's own leave half of the processor idle.

All of it runs on any processor: what decides is the processor's name, which these tests replace.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from neft import NeftConfig, NeuronSet, find_projections, products
from neft.evaluation import generate, target_loss
from neft.products import faster_linear, onednn_is_faster, product
from neft.recipe import EvaluateSection
from neft.scoring import score_by_activation, score_by_gradient
from neft.streaming import stream

T, I, O = 48, 160, 144  # noqa: E741


class _OfAnotherKind(Tensor):
    pass


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 17, T - 1, T, T + 1, 131])
def test_a_product_is_as_good_as_pytorchs(
    num_tokens: int, is_transposed: bool, onednn: Mock
) -> None:
    [x] = tensors((num_tokens, I))
    [weight] = tensors((O, I) if is_transposed else (I, O))
    weight = weight.T if is_transposed else weight
    found = product(x, weight)
    assert onednn.call_count == 1
    exact = x.double() @ weight.double()
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6 * I)


def test_few_numbers_of_tokens_reach_onednn() -> None:
    given = {number: products._round_number(number) for number in range(1, 2048)}
    assert all(number * 8 / 9 <= most <= number for number, most in given.items())
    assert len({given[number] for number in range(1024, 2048)}) == 8


@pytest.mark.parametrize("leading", [(), (1,), (2, 24), (3, 17)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("frozen", ["nothing", "x", "weight", "bias", "all"])
def test_a_linear_layer_gives_the_same_output_and_gradients(
    leading: tuple[int, ...], has_bias: bool, frozen: str, onednn: Mock
) -> None:
    x, weight, bias, dy = tensors((*leading, I), (O, I), (O,), (*leading, O))
    names = ["x", "weight", "bias"][: 2 + has_bias]
    given = dict(zip(names, [x, weight, bias], strict=False))

    def outcome() -> tuple[Tensor, list[Tensor | None]]:
        leaves = {
            name: value.clone().requires_grad_(frozen not in (name, "all"))
            for name, value in given.items()
        }
        y = F.linear(leaves["x"], leaves["weight"], bias=leaves.get("bias"))
        assert y.requires_grad == (frozen != "all")
        if y.requires_grad:
            y.backward(dy)
        return y.detach(), [leaf.grad for leaf in leaves.values()]

    expected = outcome()
    assert onednn.call_count == 0
    with faster_linear():
        found = outcome()
    num_gradients = sum(frozen not in (name, "all") for name in ("x", "weight"))
    assert onednn.call_count == 1 + num_gradients
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * I)


def test_what_is_not_faster_stays_pytorchs_own(
    onednn: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = tensors((T, I), (O, I))
    with faster_linear():
        assert F.linear(x.double(), weight.double()).dtype is torch.float64
        assert F.linear(x.bfloat16(), weight.bfloat16()).dtype is torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(x, weight).dtype is torch.bfloat16
            assert product(x, weight.T).dtype is torch.bfloat16
        assert F.linear(x.to("meta"), weight.to("meta")).is_meta
        # Such as those that FSDP divides among processes, which have products of their own.
        F.linear(x, weight.as_subclass(_OfAnotherKind))
        monkeypatch.setattr(products, "_WORTHWHILE", T * I * O + 1)
        F.linear(x, weight)
        monkeypatch.setattr(products, "_WORTHWHILE", 1)
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
        F.linear(x, weight)
        product(x, weight.T)
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
        assert onednn.call_count == 0
        F.linear(x, weight)
        assert onednn.call_count == 1
    F.linear(x, weight)
    assert onednn.call_count == 1


def test_a_compiled_layer_is_left_to_the_compiler(onednn: Mock) -> None:
    layer = nn.Linear(I, O)
    [x] = tensors((T, I))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with faster_linear():
        found = compiled(x)
    assert onednn.call_count == 0
    torch.testing.assert_close(found, layer(x))


@pytest.mark.parametrize(
    ("text", "capability", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\n", "AVX512", True),
        ("vendor_id\t: AuthenticAMD\n", "AVX2", False),
        ("vendor_id\t: GenuineIntel\n", "AVX512", False),
        (None, "AVX512", True),
    ],
    ids=["AMD", "AMD without AVX-512", "Intel", "AMD on Windows"],
)
def test_the_processor_decides(
    text: str | None, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path, encoding: str) -> str:
        assert path == Path("/proc/cpuinfo")
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(platform, "processor", lambda: "AMD64 Family 26, AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    onednn_is_faster.cache_clear()
    try:
        assert onednn_is_faster() is expected
    finally:
        onednn_is_faster.cache_clear()


def test_on_other_processors_nothing_is_replaced(
    onednn: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    x, weight = tensors((T, I), (O, I))
    own = F.linear
    with faster_linear():
        assert F.linear is own
        product(x, weight.T)
    assert onednn.call_count == 0


@pytest.mark.usefixtures("onednn")
def test_pytorchs_own_is_back_when_the_last_one_ends() -> None:
    own = F.linear
    one, other = ExitStack(), ExitStack()
    for user in (one, other):
        user.enter_context(faster_linear())
    one.close()
    assert F.linear is not own
    with pytest.raises(RuntimeError, match="stop"), other:
        raise RuntimeError("stop")
    assert F.linear is own


def test_others_who_replaced_it_are_left_what_is_not_faster_and_come_back(
    monkeypatch: pytest.MonkeyPatch, onednn: Mock
) -> None:
    others = Mock(wraps=F.linear)
    monkeypatch.setattr(F, "linear", others)
    x, weight = tensors((T, I), (O, I))
    with faster_linear():
        F.linear(x, weight)
        assert (onednn.call_count, others.call_count) == (1, 0)
        F.linear(x.double(), weight.double())
        assert others.call_count == 1
    assert F.linear is others


def test_others_who_replace_it_meanwhile_stay(
    monkeypatch: pytest.MonkeyPatch, onednn: Mock
) -> None:
    own = F.linear
    x, weight = tensors((T, I), (O, I))
    with faster_linear():
        others = Mock(wraps=F.linear)
        monkeypatch.setattr(F, "linear", others)
        # As a NeFT layer does.
        with faster_linear():
            F.linear(x, weight)
            F.linear(x.double(), weight.double())
        assert (onednn.call_count, others.call_count) == (1, 2)
    assert F.linear is others
    monkeypatch.setattr(F, "linear", own)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every trained parameter, after one pass over a batch."""
    ids = torch.randint(128, (2, 12), generator=torch.Generator().manual_seed(7))
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def adapted(model: nn.Module) -> nn.Module:
    projections = find_projections(model)
    neurons = NeuronSet(projections, {p.name: np.arange(0, 64, 3) for p in projections})
    return get_peft_model(model, NeftConfig(neurons=neurons))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("method", ["full", "neft"])
def test_a_model_has_the_same_gradients(
    tiny_model: Any, method: str, checkpointing: bool, onednn: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model() if method == "full" else adapted(tiny_model())
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(products, "onednn_is_faster", lambda: False)
        expected = gradients(model)
    assert onednn.call_count == 0
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with faster_linear():
        found = gradients(model)
    # All of two layers of seven, and the head, forward; in the upper layer, gradients of inputs.
    assert onednn.call_count >= 15 + 8
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_trained_layers_are_fast_by_themselves_and_evaluate_as_the_base_does(
    tiny_model: Any, onednn: Mock
) -> None:
    model = adapted(tiny_model())
    gradients(model)
    # Two layers of two projections: the output, and the input's gradient but for the lowest.
    assert onednn.call_count == 4 * 2 - 1
    ids = torch.arange(24)[None]
    onednn.reset_mock()
    with torch.no_grad():
        active = model.eval()(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    assert onednn.call_count == 0
    assert torch.equal(active, merged)


BATCH = {name: torch.arange(5, 29)[None] for name in ("input_ids", "labels")}
ROOMS: dict[str, Callable[[Any, Any], object]] = {
    "streaming": lambda model, _: stream(model, [[5, 6, 7]], [], batch_size=1, title=""),
    "scoring by activation": lambda model, _: score_by_activation(
        model, [{"input_ids": BATCH["input_ids"], "attention_mask": torch.ones(1, 24)}]
    ),
    "scoring by gradient": lambda model, _: score_by_gradient(model, [BATCH]),
    "generation": lambda model, tokenizer: generate(
        model, tokenizer, [[5, 6]], EvaluateSection(max_new_tokens=1)
    ),
    "loss": lambda model, _: target_loss(model, [[5, 6]], [[5, 6]], batch_size=1),
}


@pytest.mark.parametrize("room", ROOMS)
def test_what_runs_a_model_goes_faster(
    room: str, tiny_model: Any, tiny_tokenizer: Any, onednn: Mock
) -> None:
    own = F.linear
    ROOMS[room](tiny_model(), tiny_tokenizer())
    # Seven layers in each of two, at least.
    assert onednn.call_count >= 14
    assert F.linear is own
