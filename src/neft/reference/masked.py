"""The paper's own way of training chosen neurons: full gradients, multiplied by a mask.

It keeps a full gradient and full optimizer state of every touched matrix, and weight decay moves the
masked weights all the same; it exists to be compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from neft.neurons import NeuronSet


def mask_gradients(model: nn.Module, neurons: NeuronSet) -> list[RemovableHandle]:
    """Freeze ``model`` except for the weights that hold chosen neurons, and mask their gradients.

    Args:
        model: an ordinary model, changed in place.
        neurons: what may be trained (Algorithm 1, step 4).

    Returns:
        Handles whose ``remove()`` takes the masks off again.
    """
    model.requires_grad_(False)
    handles = []
    for name, indices in neurons.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        mask = torch.zeros_like(weight)
        mask.index_fill_(
            neurons.projections[name].neuron_dim, torch.from_numpy(indices).to(weight.device), 1
        )
        weight.requires_grad_(True)
        handles.append(weight.register_hook(mask.mul))
    return handles
