"""The layer's arithmetic against autograd on a dense weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neft.neurons import Axis
from neft.tuner.functional import ResidentLayer, Selection, overlay, without_columns, write_through

IN, OUT = 5, 7
CASES = [
    pytest.param(axis, transposed, with_bias, id=f"{axis}-{transposed=}-{with_bias=}")
    for axis in Axis
    for transposed in (False, True)
    for with_bias in (False, True)
]


def selection(axis: Axis, transposed: bool) -> Selection:
    return Selection(axis, int((axis is Axis.COLUMN) != transposed), torch.tensor([0, 3, 4]))


def dense(weight: Tensor, vectors: Tensor, chosen: Selection) -> Tensor:
    """The weight with the vectors in it, one neuron at a time, differentiable in the vectors."""
    slices = list(weight.unbind(chosen.neuron_dim))
    for vector, index in zip(vectors, chosen.indices_K.tolist(), strict=True):
        slices[index] = vector
    return torch.stack(slices, chosen.neuron_dim)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    y = x @ (weight if transposed else weight.T)
    return y if bias is None else y + bias


def tensors(
    axis: Axis, transposed: bool, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = random(IN, OUT) if transposed else random(OUT, IN)
    vectors = random(3, IN if axis is Axis.ROW else OUT)
    return random(2, 4, IN), weight, vectors, random(OUT) if with_bias else None


@pytest.mark.parametrize(("axis", "transposed", "with_bias"), CASES)
def test_write_through_equals_a_dense_weight(axis, transposed, with_bias):
    x, weight, vectors, bias = tensors(axis, transposed, with_bias)
    chosen = selection(axis, transposed)
    leaves = [t.requires_grad_() for t in (x, vectors, bias) if t is not None]
    expected = product(x, dense(weight, vectors, chosen), bias, transposed)
    dy = torch.randn(
        expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    gradients = torch.autograd.grad(expected, leaves, dy)

    frozen = weight.clone()

    def load() -> Tensor:
        with torch.no_grad():
            chosen.write(frozen, vectors)
        return frozen

    layer = ResidentLayer(load, lambda x, weight: product(x, weight, bias, transposed), transposed)
    y = write_through(x, bias, layer, [chosen], [vectors])
    torch.testing.assert_close(y, expected)
    # Whatever uses the shared weight before the backward pass must not matter.
    frozen.fill_(float("nan"))
    frozen.copy_(weight)
    for actual, gradient in zip(torch.autograd.grad(y, leaves, dy), gradients, strict=True):
        torch.testing.assert_close(actual, gradient)


@pytest.mark.parametrize(("axis", "transposed", "with_bias"), CASES)
def test_overlay_equals_a_dense_weight(axis, transposed, with_bias):
    x, weight, vectors, bias = tensors(axis, transposed, with_bias)
    chosen = selection(axis, transposed)
    leaves = [t.requires_grad_() for t in (x, vectors, bias) if t is not None]
    expected = product(x, dense(weight, vectors, chosen), bias, transposed)
    untouched = product(without_columns(x, [chosen]), weight, bias, transposed)
    y = overlay(untouched, x, bias, chosen, vectors, weight.dtype)
    torch.testing.assert_close(y, expected)
    dy = torch.randn(
        expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    for actual, gradient in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        torch.testing.assert_close(actual, gradient)


@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("transposed", [False, True])
def test_read_returns_what_write_wrote(axis, transposed):
    _, weight, vectors, _ = tensors(axis, transposed, False)
    chosen = selection(axis, transposed)
    untouched = weight.clone()
    originals = chosen.read(weight)
    chosen.write(weight, vectors)
    assert torch.equal(chosen.read(weight), vectors)
    assert torch.equal(weight, dense(untouched, vectors, chosen))
    chosen.write(weight, originals)
    assert torch.equal(weight, untouched)


def test_vectors_changed_between_forward_and_backward_are_refused():
    x, weight, vectors, _ = tensors(Axis.ROW, False, False)
    vectors.requires_grad_()
    chosen = selection(Axis.ROW, False)
    layer = ResidentLayer(lambda: weight, lambda x, weight: x @ weight.T, transposed=False)
    y = write_through(x, None, layer, [chosen], [vectors])
    with torch.no_grad():
        vectors.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
