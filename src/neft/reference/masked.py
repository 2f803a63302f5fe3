"""The paper's own way of training chosen neurons: full gradients, multiplied by a mask.

It keeps full gradients and full optimizer state, and weight decay moves the masked weights all the
same; it exists to be compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from neft.errors import NeuronError
from neft.neurons import NeuronSet


def mask_gradients(model: nn.Module, neurons: NeuronSet) -> list[RemovableHandle]:
    """Zero every gradient of ``model`` outside the chosen neurons, in each backward pass.

    Args:
        model: an ordinary model, all of whose parameters become trainable.
        neurons: what may be trained (Algorithm 1, step 4).

    Returns:
        Handles whose ``remove()`` takes the masks off again.

    Raises:
        NeuronError: neurons of a module that the model does not have, or has in another shape.
    """
    parameters = dict(model.named_parameters())
    _check_fits(neurons, parameters)
    handles = []
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in parameters.items()}
    for name, chosen in neurons.items():
        projection = neurons.projections[name]
        mask = projection.weight_in(masks[projection.parameter])
        mask.index_fill_(projection.neuron_dim, torch.from_numpy(chosen).to(mask.device), True)
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        handles.append(parameter.register_hook(_Mask(masks[name])))
    return handles


class _Mask:
    """Follows the gradients to the device that the model has been moved to since."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    def __call__(self, gradient: Tensor) -> Tensor:
        self._mask = self._mask.to(gradient.device)
        return gradient * self._mask


def _check_fits(neurons: NeuronSet, parameters: dict[str, nn.Parameter]) -> None:
    for name in neurons.modules():
        projection = neurons.projections[name]
        found = parameters.get(projection.parameter)
        if found is None or not projection.fits(found.shape):
            there = "none" if found is None else f"one of {tuple(found.shape)}"
            raise NeuronError(
                f"{name}: the neurons were chosen in a weight of shape {projection.weight_shape}, but "
                f"this model has {there} there. The set was made for another model, or the weight is "
                "tied to another."
            )
