"""The paper's own way of training chosen neurons: full gradients, multiplied by a mask.

It keeps full gradients and full optimizer state, and weight decay moves the masked weights all the
same; it exists to be compared with.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from neft.neurons import NeuronSet


def mask_gradients(model: nn.Module, neurons: NeuronSet) -> list[RemovableHandle]:
    """Zero every gradient of ``model`` outside the chosen neurons, in each backward pass.

    Args:
        model: an ordinary model, all of whose parameters become trainable.
        neurons: what may be trained (Algorithm 1, step 4).

    Returns:
        Handles whose ``remove()`` takes the masks off again.
    """
    handles = []
    for name, parameter in model.named_parameters():
        mask = torch.zeros_like(parameter, dtype=torch.bool)
        module = name.removesuffix(".weight")
        if module in neurons:
            indices = torch.from_numpy(neurons[module]).to(mask.device)
            mask.index_fill_(neurons.projections[module].neuron_dim, indices, True)
        parameter.requires_grad_(True)
        handles.append(parameter.register_hook(mask.mul))
    return handles
