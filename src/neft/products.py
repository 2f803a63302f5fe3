"""Products of float32 matrices where PyTorch leaves half of the processor idle.

PyTorch multiplies float32 matrices by MKL, which does not use the AVX-512 units of AMD's processors.
oneDNN, which PyTorch brings for other work, does, and takes less than half the time there. Its results
are as good, all in float32, but sums are taken in another order: the last bits differ.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Multiplications from which oneDNN is ahead; for fewer, its call takes longer to set up than to run.
_WORTHWHILE = 2**20


@cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, and a PyTorch that has both libraries."""
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        processor = platform.processor()
    return (
        "AuthenticAMD" in processor
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        # PyTorch's compiler calls it; nothing promises that it stays.
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def product(x_TI: Tensor, weight_IO: Tensor) -> Tensor:
    """``x @ weight`` by the faster library, without gradients; the weight may be a transposed view.

    For few shapes of weights and all numbers of tokens ``T``: oneDNN keeps code for each shape.
    """
    weight_OI = weight_IO.T
    return _by_onednn(x_TI, weight_OI) if _goes_faster(x_TI, weight_OI) else x_TI @ weight_IO


@contextmanager
def faster_linear() -> Iterator[None]:
    """Within it, float32 linear layers run by the faster library, in all threads.

        with faster_linear():
            trainer.train()

    Forward and backward pass both belong inside. Gradients of gradients and ``torch.func`` are not
    supported. Where PyTorch's own products are as fast (other processors, other dtypes), under autocast,
    while compiling and with ``torch.backends.mkldnn.enabled = False``, nothing changes.
    """
    if not onednn_is_faster():
        yield
        return
    # Not a TorchFunctionMode: it stands aside while it handles a call, and Tensor.backward is one, in
    # which checkpointed layers run again.
    _replacement.begin()
    try:
        yield
    finally:
        _replacement.end()


class _Replacement:
    """``_linear`` in the place of ``F.linear``, as long as anybody wants it.

    Others replace it too: DeepSpeed so that weights which it divides again are not kept for the backward
    pass. What was there before does what ``_linear`` leaves to it; what comes later stays.
    """

    def __init__(self) -> None:
        self.replaced = F.linear
        self._num_users = 0
        self._lock = Lock()

    def begin(self) -> None:
        with self._lock:
            if not self._num_users and F.linear is not _linear:
                self.replaced = F.linear
                F.linear = _linear
            self._num_users += 1

    def end(self) -> None:
        with self._lock:
            self._num_users -= 1
            if not self._num_users and F.linear is _linear:
                F.linear = self.replaced


_replacement = _Replacement()


# Named as PyTorch names them, for calls by keyword.
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not _goes_faster(*tensors):
        return _replacement.replaced(input, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        y: Tensor = _Linear.apply(input, weight, bias)
        return y
    return _by_onednn(input, weight, bias)


class _Linear(torch.autograd.Function):
    """Shape suffixes: ``T`` tokens, ``I`` and ``O`` input and output features."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight_OI if needs_x else None)
        return _by_onednn(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        dx = dweight = dbias = None
        if weight_OI is not None:
            dx = _by_onednn(dy, weight_OI.T)
        if x is not None:
            dweight = _weight_gradient(dy, x)
        if ctx.needs_input_grad[2]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
        return dx, dweight, dbias


def _by_onednn(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``F.linear``, without gradients."""
    x_TI = x.reshape(-1, x.shape[-1])
    most = _round_number(len(x_TI))
    if most == len(x_TI):
        y_TO = _onednn(x_TI, weight_OI, bias_O)
    else:
        # Made before what is temporary, which would leave a hole in the heap behind it.
        y_TO = x.new_empty(len(x_TI), len(weight_OI))
        y_TO[:most] = _onednn(x_TI[:most], weight_OI, bias_O)
        torch.mm(x_TI[most:], weight_OI.T, out=y_TO[most:])
        if bias_O is not None:
            y_TO[most:] += bias_O
    return y_TO.view(*x.shape[:-1], len(weight_OI))


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """``dy.T @ x`` of matrices with a row for each token."""
    dy_TO, x_TI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    most = _round_number(len(x_TI))
    gradient_OI = _onednn(dy_TO[:most].T, x_TI[:most].T)
    return gradient_OI.addmm_(dy_TO[most:].T, x_TI[most:])


def _round_number(num_tokens: int) -> int:
    """The most tokens that oneDNN is given of so many; PyTorch multiplies the others, a ninth at most.

    oneDNN makes code for each number of tokens, up to 0.7 MB for a shape of weights, and never gives all
    of that back; batches of texts have hundreds of lengths. Of round numbers there are eight between a
    power of two and the next.
    """
    step: int = 2 ** max(0, num_tokens.bit_length() - 4)
    return num_tokens // step * step


def _onednn(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")
    return y


def _goes_faster(x: Tensor, weight_OI: Tensor, *bias_O: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and onednn_is_faster()
        and all(_is_plain(tensor) for tensor in (x, weight_OI, *bias_O))
        and x.numel() * weight_OI.shape[0] >= _WORTHWHILE
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
    )
