"""A module in memory as a source of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from neft.checkpoints.source import TensorInfo, WeightSource
from neft.errors import CheckpointError
from neft.projections import as_module
from neft.quantized import dequantized, quantized_layers, values_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Where PEFT's wrappers keep the layer of the plain model.
_WRAPPED = ("base_layer", "original_module")


class ModuleWeights(WeightSource):
    """Weights of a live module, under the names of the plain model, dequantized.

    Of a module wrapped by PEFT these are the weights of its base: an adapter counts as far as it is
    merged into them. Where processes share them (FSDP2, ZeRO), all must read the same, and each weight is
    gathered when it is read, in every process.
    """

    def __init__(self, module: nn.Module) -> None:
        self._network = as_module(module)
        config = getattr(self._network, "config", None)
        origin = getattr(config, "name_or_path", "")
        self.label = type(self._network).__name__ + (f" ({origin})" if origin else "")
        self.config_path = None
        # NeFT adapters take their vectors out of the base weights when a state dict is made.
        states = self._network.state_dict(keep_vars=True)
        names = dict(_plain_parameters(self._network))
        self._parameters: Mapping[str, Tensor] = {name: states[key] for key, name in names.items()}
        quantized = {f"{path}.weight": layer for path, layer in quantized_layers(self._network)}
        self._quantized: Mapping[str, Any] = {
            name: quantized[key] for key, name in names.items() if key in quantized
        }
        self.tensors = {name: self._info(name) for name in self._parameters}

    def _info(self, name: str) -> TensorInfo:
        tensor, layer = self._parameters[name], self._quantized.get(name)
        shape = whole_shape(tensor) if layer is None else (layer.out_features, layer.in_features)
        dtype = tensor.dtype if layer is None else values_dtype(layer)
        return TensorInfo(tuple(shape), str(dtype).removeprefix("torch."))

    @property
    def network(self) -> nn.Module:
        return self._network

    @property
    def num_parameters(self) -> int:
        unique = {id(tensor): self.tensors[name].shape for name, tensor in self._parameters.items()}
        return sum(math.prod(shape) for shape in unique.values())

    def _read(self, name: str, index: int | None) -> Tensor:
        parameter = self._parameters[name]
        if parameter.is_meta:
            raise CheckpointError(
                f"{self.label}: {name} is on the meta device and has no data. Load the model without "
                "offloading, or give its folder."
            )
        if (layer := self._quantized.get(name)) is not None:
            return dequantized(layer).cpu()
        whole = gathered(parameter)
        return (whole if index is None else whole[index]).cpu()


def gathered(tensor: Tensor) -> Tensor:
    """A tensor with the shares of all processes, where it is shared; all of them must call this."""
    from torch import distributed

    if not distributed.is_available():
        return tensor.detach()
    if is_zero3(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_zero3(tensor: Tensor) -> bool:
    """Whether DeepSpeed divides a parameter among processes; between passes it is empty."""
    return hasattr(tensor, "ds_id")


def whole_shape(tensor: Tensor) -> torch.Size:
    """Of a tensor with the shares of all processes."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def _plain_parameters(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(key in the state dict, name in the plain model) of each parameter that is not an adapter's."""
    wrappers = {
        path: attribute
        for path, inner in module.named_modules(remove_duplicate=False)
        for attribute in _WRAPPED
        if hasattr(inner, attribute)
    }
    for key, _ in module.named_parameters(remove_duplicate=False):
        plain: list[str] = []
        path: list[str] = []
        for part in key.split("."):
            wrapped = wrappers.get(".".join(path))
            if wrapped is None:
                plain.append(part)
            elif part != wrapped:
                break  # beside the plain layer: an adapter's own
            path.append(part)
        else:
            yield key, ".".join(plain)
