"""Activations of units, computed anew from the input of each feed-forward network, text by text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

TEXTS = [
    [5, 6, 7, 8, 9, 10, 11],
    [12],
    [13, 14, 15, 16],
    [17, 18, 19],
    [20, 21, 22],
    [30, 31, 32, 33, 34, 35],
]


def unit_activations(model: Any, texts: Sequence[Sequence[int]]) -> list[list[NDArray[np.float32]]]:
    """``[layer][text]`` -> ``[tokens, units]`` of a plain tiny Llama or GPT-2."""
    is_llama = model.config.model_type == "llama"
    layers = model.model.layers if is_llama else model.transformer.h
    found: list[list[NDArray[np.float32]]] = [[] for _ in layers]

    def keep(layer: int, mlp: Any, x: torch.Tensor) -> None:
        a = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) if is_llama else mlp.act(mlp.c_fc(x))
        found[layer].append(a[0].float().numpy())

    hooks = [
        layer.mlp.register_forward_pre_hook(lambda mlp, inputs, n=n: keep(n, mlp, inputs[0]))
        for n, layer in enumerate(layers)
    ]
    with torch.no_grad():
        for text in texts:
            model(input_ids=torch.tensor([text]))
    for hook in hooks:
        hook.remove()
    return found
