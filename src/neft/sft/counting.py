"""What a method costs on a model, found from shapes alone: no weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from neft.recipe import Quantization, TrainSection
from neft.sft.methods import find_method, lora_projections

if TYPE_CHECKING:
    from torch import nn

DType: TypeAlias = Literal["float32", "bfloat16", "float16"]

WIDTHS: dict[DType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a scalar."""
# With its scales: a byte for 64 weights in 4 bits, themselves scaled by four for 256.
_QUANTIZED_BYTES: dict[Quantization, float] = {"4bit": 0.5 + (1 + 4 / 256) / 64, "8bit": 1.0}


def num_trainable(
    network: nn.Module, train: TrainSection, num_neuron_parameters: int | None = None
) -> int:
    """Count the scalars that a method trains.

    Args:
        network: the base model; its parameters may be on the meta device.
        train: its method, and the settings of LoRA with ``rank`` resolved.
        num_neuron_parameters: scalars in the chosen neurons, for ``neft`` and ``mask``.

    Raises:
        UsageError: a model that cannot be trained by this method.
        ArchitectureError: a model whose projections cannot be found.
    """
    method = find_method(train.method)
    if method.weights is not None:
        return sum(weight.numel() for weight in method.weights(network))
    if train.lora is not None:
        assert train.lora.rank is not None
        return train.lora.rank * _lora_parameters_of_one_rank(network)
    assert num_neuron_parameters is not None
    return num_neuron_parameters


def matching_rank(network: nn.Module, num_parameters: int) -> int:
    """LoRA rank whose trainable parameters come nearest to ``num_parameters``.

    Of two that are equally near, the lower. At least 1, also where a lower budget cannot be met:
    ``num_trainable`` tells by how much it is exceeded.

    Raises:
        ArchitectureError: a network without linear layers.
    """
    of_one_rank = _lora_parameters_of_one_rank(network)
    below, rest = divmod(num_parameters, of_one_rank)
    return max(1, below + (2 * rest > of_one_rank))


def _lora_parameters_of_one_rank(network: nn.Module) -> int:
    """One vector on the input side and one on the output side of each adapted layer."""
    return sum(
        projection.num_neurons + projection.vector_length
        for projection in lora_projections(network)
    )


def num_linear(network: nn.Module) -> int:
    """Count the scalars of all linear layers but the LM head: those that quantization packs.

    Raises:
        ArchitectureError: a network without linear layers.
    """
    return sum(p.num_neurons * p.vector_length for p in lora_projections(network))


def frozen_bytes(
    num_parameters: int, num_linear: int, dtype: DType, quantization: Quantization | None
) -> int:
    """Bytes of weights that nothing trains.

    Args:
        num_parameters: scalars of the base model.
        num_linear: as ``num_linear`` counts.
        dtype: ``model.dtype`` of the recipe.
        quantization: ``model.quantization``.
    """
    width = WIDTHS[dtype]
    if quantization is None:
        return width * num_parameters
    return round(
        width * (num_parameters - num_linear) + _QUANTIZED_BYTES[quantization] * num_linear
    )


def memory_bytes(
    network: nn.Module,
    train: TrainSection,
    num_trainable: int,
    dtype: DType,
    quantization: Quantization | None = None,
) -> int:
    """Estimate the memory that training keeps from step to step, without activations.

    With ``P`` parameters of the base model, ``T`` trained ones, and ``b`` bytes in ``dtype``:

    ========================  =====================================================================
    full, embed, in_out       ``4 P`` float32 weights, ``12 T`` gradients and Adam's two moments
    mask                      ``4 P + 12 P`` as of all weights, ``P`` for the mask
    lora                      ``b P`` frozen weights, ``16 T`` weights, gradients and moments
    neft                      ``b P + 16 T`` likewise, ``b T`` for the vectors that were displaced
    ========================  =====================================================================

    In 16 bits the first four also keep a copy of the weights for the products, another ``b P``.
    Quantized, ``b`` is about 0.52 or 1 for all linear layers but the LM head, and nothing is displaced.

    Args:
        network: the base model; its parameters may be on the meta device.
        train: its method.
        num_trainable: as ``num_trainable`` counts.
        dtype: ``model.dtype`` of the recipe.
        quantization: ``model.quantization``; only with ``lora`` and ``neft``.
    """
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    width = WIDTHS[dtype]
    if find_method(train.method).makes_adapter:
        frozen = frozen_bytes(num_parameters, num_linear(network), dtype, quantization)
        is_displaced = train.method == "neft" and quantization is None
        return frozen + 16 * num_trainable + is_displaced * width * num_trainable
    copies = 0 if dtype == "float32" else width * num_parameters
    if train.method == "mask":
        return (4 + 12 + 1) * num_parameters + copies
    return 4 * num_parameters + 12 * num_trainable + copies
