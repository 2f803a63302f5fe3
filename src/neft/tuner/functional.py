"""The arithmetic of a linear layer of which only some neurons are trained.

Shape suffixes: ``T`` tokens (all leading dimensions), ``I`` and ``O`` the layer's input and output
features, ``K`` chosen neurons, ``L`` length of a neuron: ``I`` for rows, ``O`` for columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neft.neurons import Axis
from neft.products import faster_linear, product


@dataclass(frozen=True)
class Selection:
    """Which neurons of one weight: their axis, and where they lie in the stored weight."""

    axis: Axis
    neuron_dim: int
    indices_K: Tensor

    def write(self, weight: Tensor, vectors_KL: Tensor) -> None:
        """Overwrite the chosen neurons of the stored ``weight`` in place."""
        values = vectors_KL.to(weight.dtype)
        if self.neuron_dim == 0:
            weight.index_copy_(0, self.indices_K, values)
            return
        # Row by row of the weight. index_copy_ would go neuron by neuron, and without the copy the values
        # would be read across their rows: both stride through memory.
        values_LK = values.T.contiguous()
        weight.scatter_(1, self.indices_K.expand_as(values_LK), values_LK)

    def read(self, weight: Tensor) -> Tensor:
        """A copy of the chosen neurons of the stored ``weight``, ``[K, L]``."""
        chosen = weight.index_select(self.neuron_dim, self.indices_K)
        return chosen if self.neuron_dim == 0 else chosen.T.contiguous()


@dataclass(frozen=True)
class ResidentLayer:
    """A linear layer whose weight can be made to hold the trained vectors."""

    load: Callable[[], Tensor]
    """The weight as it is stored, with the vectors written into it."""
    run: Callable[[Tensor, Tensor], Tensor]
    """The layer's own forward pass, of an input and the weight that ``load`` returned."""
    transposed: bool
    """The weight is stored as ``[I, O]``."""
    release: Callable[[], None] = lambda: None
    """Called as soon as the weight has been used."""


class _WriteThrough(torch.autograd.Function):
    """The layer's own forward pass, with gradients for its input, its bias and the vectors only.

    Where an ordinary linear layer would compute a gradient of the whole weight ``[O, I]``, this
    computes that of the chosen neurons ``[K, L]``: ``dy[:, sel].T @ x`` for rows, ``x[:, sel].T @ dy``
    for columns; the latter need only ``x[:, sel]`` from the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        layer: ResidentLayer,
        selections: Sequence[Selection],
        *vectors: Tensor,
    ) -> Tensor:
        with faster_linear():
            y = layer.run(x, layer.load())
        layer.release()
        ctx.layer = layer
        ctx.selections = selections
        ctx.input_dtype = x.dtype
        ctx.vector_dtypes = [vector.dtype for vector in vectors]
        # Under autocast the products of the backward pass run in the dtype of the output.
        inputs = [
            None
            if not needed
            else x
            if selection.axis is Axis.ROW
            # Several times as fast as from a batch of matrices.
            else x.reshape(-1, x.shape[-1]).index_select(-1, selection.indices_K)
            for selection, needed in zip(selections, ctx.needs_input_grad[4:], strict=True)
        ]
        inputs = [None if kept is None else kept.to(y.dtype) for kept in inputs]
        # The vectors are saved so that autograd refuses a backward pass after they were changed.
        ctx.save_for_backward(*vectors, *inputs)
        ctx.num_vectors = len(vectors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[ctx.num_vectors :]
        dy_TO = dy.reshape(-1, dy.shape[-1])
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            # Loaded again: other adapters may have used the weight since the forward pass, and a
            # sharded weight was gathered anew.
            weight = ctx.layer.load().to(dy.dtype)
            # One product of matrices: a batch of products with one weight is several times as slow.
            dx_TI = product(dy_TO, weight.T if ctx.layer.transposed else weight)
            dx = dx_TI.reshape(*dy.shape[:-1], dx_TI.shape[-1]).to(ctx.input_dtype)
            ctx.layer.release()
        if ctx.needs_input_grad[1]:
            dbias = dy_TO.sum(0)
        dvectors = [
            None if kept is None else _vector_gradient(selection, kept, dy_TO).to(dtype)
            for selection, kept, dtype in zip(
                ctx.selections, inputs, ctx.vector_dtypes, strict=True
            )
        ]
        return dx, dbias, None, None, *dvectors


def _vector_gradient(selection: Selection, kept: Tensor, dy_TO: Tensor) -> Tensor:
    """Gradient ``[K, L]`` of the chosen neurons; ``kept`` is x (rows) or x[:, sel] (columns)."""
    kept_T = kept.reshape(-1, kept.shape[-1])
    if selection.axis is Axis.ROW:
        return dy_TO.index_select(-1, selection.indices_K).T @ kept_T
    return kept_T.T @ dy_TO


def write_through(
    x: Tensor,
    bias: Tensor | None,
    layer: ResidentLayer,
    selections: Sequence[Selection],
    vectors: Sequence[Tensor],
) -> Tensor:
    """The layer's output with the vectors in its weight; differentiable in x, bias, vectors.

    Args:
        x: input ``[..., I]``.
        bias: the layer's own bias ``[O]``, only so that it can receive a gradient.
        layer: how to load the vectors and run the layer.
        selections: for each of ``vectors``, where it belongs.
        vectors: trained neurons ``[K, L]`` each.
    """
    y: Tensor = _WriteThrough.apply(x, bias, layer, selections, *vectors)
    return y


def without_columns(x: Tensor, selections: Sequence[Selection]) -> Tensor:
    """``x`` ``[..., I]`` with zeros where chosen columns read: the layer then leaves them out.

    Their originals need not be known, and cannot be where the weight is offloaded.
    """
    for selection in selections:
        if selection.axis is Axis.COLUMN:
            x = x.index_fill(-1, selection.indices_K, 0)
    return x


def overlay(
    y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    selection: Selection,
    vectors: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The output of a layer with trained neurons, from its output without its chosen columns.

    For weights that cannot be written (offloaded, quantized, compiled into a graph): rows replace their
    outputs, columns add what they write. Costs about the share of chosen neurons more than the layer
    alone, and rounds differently from ``write_through`` in the last bits.

    Args:
        y: output of the untouched layer for ``without_columns(x)``, ``[..., O]``.
        x: the layer's input ``[..., I]``.
        bias: its bias ``[O]``.
        selection: which neurons.
        vectors: trained neurons ``[K, L]``.
        dtype: of the weight that the layer multiplies by, which would hold the vectors rounded to it; so
            does the overlay.
    """
    vectors = vectors.to(dtype).to(y.dtype)
    if selection.axis is Axis.COLUMN:
        return y + x.index_select(-1, selection.indices_K).to(y.dtype) @ vectors
    replaced = x.to(y.dtype) @ vectors.T
    if bias is not None:
        replaced = replaced + bias.index_select(0, selection.indices_K).to(y.dtype)
    return y.index_copy(-1, selection.indices_K, replaced)
