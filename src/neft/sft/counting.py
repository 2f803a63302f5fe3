"""How large LoRA is on a model, found from shapes alone: no weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neft.sft.methods import lora_projections

if TYPE_CHECKING:
    from torch import nn


def matching_rank(network: nn.Module, num_parameters: int) -> int:
    """LoRA rank whose trainable parameters come nearest to ``num_parameters``.

    Of two that are equally near, the lower. At least 1, also where a lower budget cannot be met.

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
