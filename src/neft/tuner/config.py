"""Configuration of a NeFT adapter."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType
from torch import nn

from neft.errors import NeuronError
from neft.neurons import Axis, NeuronSet


@dataclass
class NeftConfig(PeftConfig):
    """Train exactly the given neurons (Algorithm 1, step 4); everything else stays bit-identical.

    The saved ``adapter_config.json`` carries the neurons, so an adapter folder is self-contained.

    Args:
        neurons: a ``NeuronSet``, the path of a saved one, or a dict of module name (as in
            ``model.named_modules()``) -> indices.
        axes: for a dict of indices: module name -> ``"row"`` or ``"column"``, where the architecture
            table does not know the module or another axis is wanted. Default: as the table says,
            rows where it knows none.
        modules_to_save: modules to train and save whole beside the neurons, e.g. a classifier head.
    """

    neurons: NeuronSet | str | os.PathLike[str] | dict[str, Any] | None = None
    axes: dict[str, str] | None = None
    modules_to_save: list[str] | None = None
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Set from the neurons; PEFT reads it."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["NEFT"]
        if self.neurons is None:
            raise NeuronError(
                "NeftConfig needs neurons: a NeuronSet, the path of a saved one, or a dict of module "
                "name -> indices."
            )
        if isinstance(self.neurons, (str, os.PathLike)):
            self.neurons = NeuronSet.load(self.neurons)
        elif isinstance(self.neurons, Mapping) and "format" in self.neurons:
            self.neurons = NeuronSet.from_dict(self.neurons, where="adapter configuration")
        self._set_target_modules()

    def resolve(self, model: nn.Module) -> NeuronSet:
        """The neuron set, with indices given as a dict looked up in ``model`` once."""
        if not isinstance(self.neurons, NeuronSet):
            assert isinstance(self.neurons, Mapping)
            self.neurons = _looked_up(self.neurons, self.axes or {}, model)
            self.axes = None
            self._set_target_modules()
        return self.neurons

    def _set_target_modules(self) -> None:
        if isinstance(self.neurons, NeuronSet):
            self.target_modules = set(self.neurons.modules())

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, the neurons as one bitmap a projection."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if isinstance(self.neurons, NeuronSet):
            fields["neurons"] = self.neurons.to_dict()
        if isinstance(self.target_modules, set):
            fields["target_modules"] = sorted(self.target_modules)
        return fields


def _looked_up(
    indices: Mapping[str, Iterable[int]], axes: Mapping[str, str], model: nn.Module
) -> NeuronSet:
    from neft.projections import find_projections

    projections = find_projections(
        model, modules=list(indices), axes={name: Axis(axis) for name, axis in axes.items()}
    )
    return NeuronSet(projections, {name: list(chosen) for name, chosen in indices.items()})
