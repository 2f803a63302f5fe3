"""Configuration of a NeFT adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from peft.config import PeftConfig
from peft.utils.constants import EMBEDDING_LAYER_NAMES
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

    Raises:
        NeuronError: no neurons, a file that holds none, or axes for a set that knows its own.
    """

    neurons: NeuronSet | str | os.PathLike[str] | dict[str, Any] | None = None
    axes: dict[str, str] | None = None
    modules_to_save: list[str] | None = None
    # PEFT reads the names of the adapted modules here; the neurons tell them. An output head is left out:
    # PEFT would save it whole beside its vectors, and load it over that of any other base.
    target_modules: set[str] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["NEFT"]
        if isinstance(self.neurons, (str, os.PathLike)):
            self.neurons = NeuronSet.load(self.neurons)
        elif isinstance(self.neurons, Mapping) and "format" in self.neurons:
            self.neurons = NeuronSet.from_dict(self.neurons, where="adapter configuration")
        if not isinstance(self.neurons, (NeuronSet, Mapping)):
            raise NeuronError(
                f"NeftConfig: neurons is {self.neurons!r}; give a NeuronSet, the path of a saved one, or "
                "a dict of module name -> indices."
            )
        if self.axes and isinstance(self.neurons, NeuronSet):
            raise NeuronError(
                f"NeftConfig: axes={self.axes} is for neurons given as a dict; a NeuronSet has its own."
            )
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
            self.target_modules = {
                name
                for name in self.neurons.by_module
                if name.rpartition(".")[2] not in EMBEDDING_LAYER_NAMES
            }

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, the neurons as one bitmap a projection."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}
        if isinstance(self.neurons, NeuronSet):
            values["neurons"] = self.neurons.to_dict()
        elif isinstance(self.neurons, Mapping):
            values["neurons"] = {
                name: np.asarray(chosen).tolist() for name, chosen in self.neurons.items()
            }
        return values


def _looked_up(
    indices: Mapping[str, npt.ArrayLike], axes: Mapping[str, str], model: nn.Module
) -> NeuronSet:
    from neft.projections import find_projections

    if not indices:
        raise NeuronError("NeftConfig: neurons is an empty dict: there is nothing to train.")
    projections = find_projections(
        getattr(model, "_orig_mod", model),  # torch.compile wraps
        modules=list(indices),
        axes=cast("Mapping[str, Axis]", axes),  # checked there
    )
    return NeuronSet(projections, indices)
