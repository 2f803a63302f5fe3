"""Saving and loading where every process has but a share of each tensor (FSDP2, ZeRO).

Weights are gathered one tensor at a time, and written a file at a time, in the format of one process; so
memory is bounded by a file, and whoever reads them need not know how they were trained. The state of the
optimizer stays where it is: each process writes its own share, which only as many processes can read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from neft.checkpoints.module import gathered, whole_shape
from neft.files import write_json

# Of weights that are in the first process's memory at a time, beside a single larger tensor.
_FILE_BYTES = 2**30


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the shares of all processes, on the CPU; all must call this, in the same order."""
    return gathered(tensor).cpu()


def gather_trained(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors of a model by name; all processes must call this."""
    _give_up_copies(model)
    return {
        name: whole(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def write_weights(model: nn.Module, folder: Path, *, writes: bool) -> None:
    """Write all weights of a model; all processes must call this, of which one writes.

    Args:
        model: its tied weights are written once.
        folder: gets ``model.safetensors``, or numbered files and ``model.safetensors.index.json``.
        writes: whether this process does.
    """
    _give_up_copies(model)
    tensors = dict(_stored(model))
    files = _files(tensors)
    for name, members in files.items():
        content: dict[str, Tensor] = {}
        for member in members:
            tensor = gathered(tensors[member])
            if writes:
                content[member] = tensor.cpu()
            del tensor
        if writes:
            save_file(content, folder / name, {"format": "pt"})
    if writes and len(files) > 1:
        index = {
            "metadata": {"total_size": sum(map(_num_bytes, tensors.values()))},
            "weight_map": {member: name for name, members in files.items() for member in members},
        }
        write_json(folder / "model.safetensors.index.json", index)


def _give_up_copies(model: nn.Module) -> None:
    """Leave a module its shares alone: without a backward pass, some keep what they gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that belong into a checkpoint."""
    yield from model.named_parameters()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        if name not in parameters:
            yield name, tensor


def _num_bytes(tensor: Tensor) -> int:
    return whole_shape(tensor).numel() * tensor.element_size()


def _files(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """File -> names of its tensors, in order."""
    files: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if files[-1] and size + _num_bytes(tensor) > _FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += _num_bytes(tensor)
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {
        f"model-{number:05d}-of-{len(files):05d}.safetensors": names
        for number, names in enumerate(files, start=1)
    }


def own_share(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's ``state_dict()`` with this process's share in place of each divided tensor."""
    state = optimizer.state_dict()
    shares = {
        number: {key: _local(value) for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return state | {"state": shares}


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def load_own_share(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer of divided weights the state of which ``own_share`` made this process's share."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    joined = {
        number: {key: _joined(value, parameters[number]) for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": joined})


def _joined(value: Any, parameter: Tensor) -> Any:
    # The number of steps, the only other tensor, is of no dimension.
    if not (torch.is_tensor(value) and value.ndim and isinstance(parameter, DTensor)):
        return value
    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
