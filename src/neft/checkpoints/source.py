"""What every source of weights can tell."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from neft.checkpoints.matrix import Matrix, find_matrix
from neft.errors import CheckpointError
from neft.neurons import Projection

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: str
    """As torch calls it: ``float32``, ``bfloat16``, ..."""


class WeightSource(ABC):
    """The weights of one model, read one tensor at a time."""

    label: str
    """For provenance and messages: the folder or Hub id as it was given, or the class of a module."""
    tensors: Mapping[str, TensorInfo]
    """Every tensor by name; knowing them takes no reading of weights."""
    config_path: Path | None
    """The model's ``config.json``, where there is one."""

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The model's modules, for names and shapes; its weights may be without data.

        Raises:
            CheckpointError: there is no usable ``config.json`` to build it from.
        """

    @abstractmethod
    def _read(self, name: str, index: int | None) -> Tensor: ...

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Tensor ``name``, or its part ``[index]``, on the CPU, in the dtype in which it is stored.

        Treat it as read-only, and let go of it before the next: it may be the file itself, mapped into
        memory, or the weight of a live module.

        Raises:
            CheckpointError: there is no such tensor, or it cannot be read.
        """
        if name not in self.tensors:
            raise self._missing(name)
        return self._read(name, index)

    def matrix(self, projection: Projection) -> Matrix:
        """Where the weight of a projection is; for names see ``find``.

        That of an expert may be part of a tensor ``[experts, ...]``, or be made up of tensors of its own.

        Raises:
            CheckpointError: it is not there, or more than one could be meant.
        """
        found = find_matrix(self, projection)
        if found is not None:
            return found
        if f"{projection.parameter}_blocks" in self.tensors:
            raise CheckpointError(
                f"{self.label}: {projection.parameter} is stored in MXFP4 blocks. Load the model with "
                "quantization_config=Mxfp4Config(dequantize=True), save it, and give that checkpoint."
            )
        raise self._missing(projection.parameter)

    def weight_name(self, module: str) -> str:
        """Name of the weight of module ``module`` (as in ``model.named_modules()``); see ``find``.

        Raises:
            CheckpointError: there is no such tensor, or more than one could be meant.
        """
        wanted = f"{module}.weight"
        found = self.find(wanted)
        if found is None:
            raise self._missing(wanted)
        return found

    def find(self, parameter: str) -> str | None:
        """Name of the tensor that is ``parameter`` (as in ``model.named_parameters()``), if there is one.

        Checkpoints of a base model lack the prefix that its modules have inside a model with a head
        (GPT-2: ``h.0.mlp.c_fc`` for ``transformer.h.0.mlp.c_fc``), or the other way round; such a name is
        found where only one fits.

        Raises:
            CheckpointError: more than one could be meant.
        """
        if found := self.find_exact(parameter):
            return found
        fitting = [
            name
            for name in self.tensors
            for wanted in _spellings(parameter)
            if _is_prefixed(name, wanted) or _is_prefixed(wanted, name)
        ]
        if len(fitting) > 1:
            raise CheckpointError(
                f"{self.label}: has no tensor {parameter}, and several that end alike: "
                f"{', '.join(sorted(fitting))}."
            )
        return fitting[0] if fitting else None

    def find_exact(self, parameter: str) -> str | None:
        """The same, if it has the prefix that it has in the model."""
        return next((name for name in _spellings(parameter) if name in self.tensors), None)

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the whole model; tied weights count once.

        Raises:
            CheckpointError: as ``network``.
        """
        return sum(parameter.numel() for parameter in self.network.parameters())

    def _missing(self, name: str) -> CheckpointError:
        near = difflib.get_close_matches(name, self.tensors, n=3)
        hint = f"Near it: {', '.join(near)}." if near else f"It has {len(self.tensors)} others."
        return CheckpointError(
            f"{self.label}: has no tensor {name}. {hint} Is it a checkpoint of the same model?"
        )


def _spellings(parameter: str) -> tuple[str, ...]:
    """What files may call a parameter, without its prefix: Mixtral's keep the name of blocks of old."""
    old = parameter.replace(".mlp.", ".block_sparse_moe.")
    return (parameter,) if old == parameter else (parameter, old)


def _is_prefixed(name: str, plain: str) -> bool:
    """Whether ``name`` is ``plain`` inside an enclosing module, which is not one of many alike."""
    prefix = name.removesuffix(f".{plain}")
    return prefix != name and not any(part.isdigit() for part in prefix.split("."))
