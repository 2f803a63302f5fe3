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


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """``a @ b`` by the faster library, without gradients; both may be transposed views."""
    return _by_onednn(a_MK, b_KN.T) if _goes_faster(a_MK, b_KN.T) else a_MK @ b_KN


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
    """``_linear`` in the place of ``F.linear``, as long as anybody wants it."""

    def __init__(self) -> None:
        self._num_users = 0
        self._lock = Lock()

    def begin(self) -> None:
        with self._lock:
            self._num_users += 1
            F.linear = _linear

    def end(self) -> None:
        with self._lock:
            self._num_users -= 1
            if not self._num_users:
                F.linear = _PYTORCHS_LINEAR


_PYTORCHS_LINEAR = F.linear
_replacement = _Replacement()


# Named as PyTorch names them, for calls by keyword.
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not _goes_faster(*tensors):
        return _PYTORCHS_LINEAR(input, weight, bias)
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
        dy_TO = dy.reshape(-1, dy.shape[-1])
        dx = dweight = dbias = None
        if weight_OI is not None:
            dx = product(dy_TO, weight_OI).reshape(*dy.shape[:-1], weight_OI.shape[1])
        if x is not None:
            dweight = product(dy_TO.T, x.reshape(-1, x.shape[-1]))
        if ctx.needs_input_grad[2]:
            dbias = dy_TO.sum(0)
        return dx, dweight, dbias


def _by_onednn(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")
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
