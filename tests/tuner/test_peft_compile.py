"""torch.compile: the same numbers as without, before and after everything that changes the model."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from adapters import IDS, adapted, base_state, same_bits, vectors
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from neft import NeftConfig


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    """Up, down and a bias: what a transformer block has, at a price that compiling allows."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.up = nn.Linear(16, 48)
            self.down = nn.Linear(48, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


def block() -> PeftModel:
    """Rows of ``up`` and columns of ``down``, two overlapping adapters."""
    axes = {"down": "column"}
    wrapped = get_peft_model(
        Block(), NeftConfig(neurons={"up": [0, 3, 5], "down": [1, 2]}, axes=axes)
    )
    wrapped.add_adapter("other", NeftConfig(neurons={"up": [3, 4], "down": [2, 40]}, axes=axes))
    generator = torch.Generator().manual_seed(1)
    for adapter in ("default", "other"):
        for parameter in vectors(wrapped, adapter).values():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))


def evaluate(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


def test_life_of_a_compiled_model():
    """Compiled and eager passes in turn through the life of a model, against an eager twin."""
    model, twin = block(), block()
    before = copy.deepcopy(base_state(twin))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def check() -> None:
        # Compiled, eager and compiled again: vectors that an eager pass left in the base weight must
        # not be counted twice.
        for run in (compiled, model, compiled):
            torch.testing.assert_close(evaluate(run), evaluate(twin))

    # Every adapter, merged or not, in evaluation or training, is a graph of its own.
    with torch._dynamo.config.patch(recompile_limit=32):
        check()
        for change in (
            lambda wrapped: wrapped.set_adapter("other"),
            lambda wrapped: wrapped.merge_adapter(),
            lambda wrapped: wrapped.unmerge_adapter(),
            lambda wrapped: wrapped.set_adapter("default"),
            scale,
        ):
            change(model)
            change(twin)
            check()
        with model.disable_adapter(), twin.disable_adapter():
            check()
        check()

        for run in (compiled, twin):
            run(X).square().mean().backward()
        check_gradients(model, twin)
        for wrapped in (model, twin):
            for parameter in vectors(wrapped).values():
                parameter.data.sub_(parameter.grad)
            wrapped.eval()
        check()
    assert same_bits(base_state(model), before)


def scale(model: PeftModel) -> None:
    for parameter in vectors(model).values():
        parameter.data.mul_(1.5)
    model.eval()


def check_gradients(model: PeftModel, twin: PeftModel, **tolerance: float) -> None:
    expected = vectors(twin)
    for name, parameter in vectors(model).items():
        assert parameter.grad.dtype is torch.float32
        torch.testing.assert_close(parameter.grad, expected[name].grad, **tolerance)


# inductor itself uses what torch deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor():
    model, twin = block(), block()
    for run in (torch.compile(model, fullgraph=True), twin):
        run(X).square().mean().backward()
    check_gradients(model, twin)


def test_two_active_adapters():
    config = partial(NeftConfig, axes={"down": "column"})
    wrapped = get_peft_model(Block(), config(neurons={"up": [0, 3], "down": [1, 2]}))
    wrapped.add_adapter("other", config(neurons={"up": [4], "down": [40]}))
    for adapter in ("default", "other"):
        for parameter in vectors(wrapped, adapter).values():
            parameter.data.mul_(2)
    wrapped.base_model.set_adapter(["default", "other"])
    compiled = torch.compile(wrapped, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(evaluate(compiled), evaluate(wrapped))


def test_gradient_of_the_input():
    model, twin = block(), block()
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    for run, x in zip((torch.compile(model, backend="aot_eager"), twin), inputs, strict=True):
        run(x).square().mean().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_half_precision_base():
    """The vectors are rounded as the weight would round them."""
    model, twin = block().bfloat16(), block().bfloat16()
    compiled = torch.compile(model, backend="aot_eager")
    outputs = [run(X.bfloat16()) for run in (compiled, twin)]
    torch.testing.assert_close(*outputs, rtol=0.02, atol=0.02)
    for output in outputs:
        output.square().mean().backward()
    check_gradients(model, twin, rtol=0.02, atol=1e-3)


def test_language_model(tiny_model):
    model, twin = (adapted(tiny_model(num_hidden_layers=1)) for _ in "ab")
    compiled = torch.compile(model, backend="aot_eager")
    for run in (compiled, twin):
        run(input_ids=IDS, labels=IDS).loss.backward()
    check_gradients(model, twin)


def test_nothing_is_compiled_again_for_the_same_adapter():
    counter = torch._dynamo.testing.CompileCounter()
    model = block()
    compiled = torch.compile(model, backend=counter)
    evaluate(compiled)
    assert counter.frame_count == 1
    for _ in range(3):
        evaluate(compiled)
    assert counter.frame_count == 1


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
def test_adapter_on_a_model_that_is_compiled_already(tmp_path, in_place, as_dict):
    def compiled() -> nn.Module:
        model = Block()
        if not in_place:
            return torch.compile(model, backend="aot_eager")
        model.compile(backend="aot_eager")
        return model

    expected = evaluate(block())
    config = NeftConfig(neurons=block().peft_config["default"].neurons)
    if as_dict:
        config = NeftConfig(neurons=dict(config.neurons.items()), axes={"down": "column"})
    wrapped = get_peft_model(compiled(), config).eval()
    values = vectors(block()).values()
    for parameter, value in zip(vectors(wrapped).values(), values, strict=True):
        parameter.data.copy_(value)
    torch.testing.assert_close(evaluate(wrapped), expected)

    wrapped.save_pretrained(tmp_path)  # the file knows nothing of it
    assert torch.equal(evaluate(PeftModel.from_pretrained(Block(), tmp_path).eval()), expected)
    again = PeftModel.from_pretrained(compiled(), tmp_path).eval()
    torch.testing.assert_close(evaluate(again), expected)


def test_a_cast_behind_our_back_is_noticed():
    model = block()
    for parameter in vectors(model).values():
        parameter.data = parameter.data.bfloat16()
    with pytest.warns(UserWarning, match="something cast the trained vectors"):
        torch.compile(model, backend="aot_eager")(X).sum().backward()
    assert {parameter.dtype for parameter in vectors(model).values()} == {torch.float32}
