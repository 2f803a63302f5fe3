"""Watching the units of feed-forward networks.

Unit *n* of a layer multiplies column *n* of its down projection, its *out neuron*, into the residual
stream; by how much on a token is its *activation*: the input of the down projection, in Llama
``act_fn(gate) * up``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from neft.errors import RunError
from neft.neurons import Projection
from neft.projections import as_module, check_can_be_watched, find_projections
from neft.streaming import Batch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


WITHOUT_UNITS = "Leave the analysis out."
"""What to do where units cannot be watched."""


class UnitCollector(ABC):
    """A ``Collector`` of activations; see ``stream``.

    Raises, when it starts to watch a model:
        ArchitectureError: its down projections cannot be found, or are those of experts.
    """

    def __init__(self) -> None:
        self.projections: dict[str, Projection] = {}
        """The down projections by module name, by layer."""
        self._batch: Batch

    def watch(self, model: nn.Module) -> Sequence[RemovableHandle]:
        self.projections = {
            projection.name: projection for projection in find_projections(model, ["down"])
        }
        check_can_be_watched(self.projections.values(), WITHOUT_UNITS)
        network = as_module(model)
        return [
            # A wrapper that an adapter put there is called with the same input.
            network.get_submodule(name).register_forward_pre_hook(partial(self._see, projection))
            for name, projection in self.projections.items()
        ]

    def begin(self, batch: Batch) -> None:
        self._batch = batch

    def _see(self, projection: Projection, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        activations = inputs[0].flatten(0, -2)[self._batch.mask.flatten()].float()
        if not activations.isfinite().all():
            raise RunError(
                f"{projection.name}: an activation is not finite. The model's weights are broken, or "
                "too large for its dtype: check them, or load it in float32."
            )
        self._add(projection, activations)

    @abstractmethod
    def _add(self, projection: Projection, activations: Tensor) -> None:
        """Take in float32 ``[tokens, units]``: the tokens of the batch without padding, text by text."""
