"""Linear layers whose weight is stored in 4 or 8 bits: by bitsandbytes, or by torchao.

What differs between the two is here, and neither is imported: a layer of theirs brings its library along.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from neft.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Class of the weight in bitsandbytes' Linear8bitLt and Linear4bit.
_INT8, _4BIT = "Int8Params", "Params4bit"


def is_quantized(layer: nn.Module) -> bool:
    """Whether ``layer`` is a linear layer whose quantized weight can be read back."""
    kind = type(getattr(layer, "weight", None))
    known = kind.__name__ in (_INT8, _4BIT) or kind.__module__.startswith("torchao.")
    return known and hasattr(layer, "in_features")


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(module name, layer) of every quantized linear layer of a model."""
    for name, module in model.named_modules():
        # An adapter's layer shows the weight of the layer in it as its own.
        if not hasattr(module, "base_layer") and is_quantized(module):
            yield name, module


def dequantized(layer: nn.Module) -> Tensor:
    """The weight ``[O, I]`` that a quantized layer stands for: a new tensor, in floating point.

    Raises:
        UsageError: a weight that is not quantized yet, or that bitsandbytes has repacked.
    """
    from peft.utils.integrations import dequantize_bnb_weight

    weight: Any = layer.weight
    match type(weight).__name__:
        case "Params4bit":
            if weight.quant_state is None:
                raise _not_yet_quantized(layer)
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                raise UsageError(
                    "A forward pass in eval mode has made bitsandbytes repack its 4-bit weights for "
                    "this CPU, which rounds their scales and cannot be undone. Load the model anew, and "
                    "add the adapter before the first forward pass."
                )
            values: Tensor = dequantize_bnb_weight(weight)
        case "Int8Params":
            state: Any = layer.state
            if state.SCB is None and weight.SCB is None:
                raise _not_yet_quantized(layer)
            values = dequantize_bnb_weight(weight, state)
        case _:
            values = weight.dequantize()
    return values


def _not_yet_quantized(layer: nn.Module) -> UsageError:
    return UsageError(
        f"A {type(layer).__name__} holds a weight that is not quantized yet. Move the model to its "
        "device first, e.g. by model.to('cpu'): bitsandbytes quantizes then."
    )


def values_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of what ``dequantized`` returns."""
    import torch

    weight: Any = layer.weight
    match type(weight).__name__:
        case "Params4bit":
            found = torch.float32 if weight.quant_state is None else weight.quant_state.dtype
        case "Int8Params":
            found = torch.float32
        case _:
            found = weight.dtype
    dtype: torch.dtype = found
    return dtype


def compute_dtype(layer: nn.Module, x: Tensor) -> torch.dtype:
    """In which dtype a quantized layer multiplies for an input ``x``."""
    dtype: torch.dtype = getattr(layer, "compute_dtype", None) or x.dtype
    return dtype


def keep_format(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking the 4-bit weights of ``model``.

    On CPUs with AVX512-BF16, version 0.50 does so in place in the first forward pass in eval mode: scales
    are rounded to bfloat16, what ``dequantize_4bit`` makes of the weight is something else from then on,
    and no gradient passes through the layer any more, not even in training mode.
    """
    for _, layer in quantized_layers(model):
        if type(layer.weight).__name__ == _4BIT:
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def check_gradients_pass(model: nn.Module) -> None:
    """Try whether gradients pass through the quantized layers of ``model``.

    Torchao's kernels that quantize the activations too have no backward pass, and do not complain: what
    lies below them would be trained by the residual stream alone.

    Raises:
        UsageError: names the first layer through which they do not.
    """
    import torch
    from torch.nn import functional as F

    for name, layer in quantized_layers(model):
        weight: Any = layer.weight
        if not type(weight).__module__.startswith("torchao."):
            continue
        # Some kernels refuse fewer tokens.
        probe = torch.zeros(32, weight.shape[1], dtype=weight.dtype, device=weight.device)
        with torch.enable_grad():
            passes = F.linear(probe.requires_grad_(), weight).requires_grad
        if not passes:
            raise UsageError(
                f"{name}: no gradient passes through its quantized weight ({type(weight).__name__}), "
                "because activations are quantized too. Train over weight-only quantization (e.g. "
                "torchao's Int8WeightOnlyConfig); the adapter then loads over this model too."
            )


def keep_plain(model: nn.Module, names: Sequence[str]) -> None:
    """Let the configuration of a quantized model say that some of its layers are no longer quantized.

    Else transformers would quantize them, or take them for quantized, when the model is loaded again.

    Args:
        model: one that transformers quantized; others have no such configuration.
        names: modules that hold a plain weight now.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None or not names:
        return
    config = quantizer.quantization_config
    field = "llm_int8_skip_modules"
    if not hasattr(config, field):
        field = "modules_to_not_convert"
    # Of these, transformers adds the output head by itself only where the configuration names none.
    setattr(config, field, sorted({*quantizer.modules_to_not_convert, *names}))
