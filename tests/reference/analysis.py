"""The paper's analyses by their definitions, one neuron at a time: slow and plainly right."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from scipy.stats import hypergeom, pearsonr
from torch import nn


def hidden_states(model: Any, texts: Sequence[Sequence[int]], final_norm: str) -> np.ndarray:
    """Mean hidden state after each layer ``[layers, hidden]``; text by text, by transformers' own.

    What transformers gives last has passed the final norm, which is therefore taken out of ``model``.
    """
    owner, _, name = final_norm.rpartition(".")
    setattr(model.get_submodule(owner), name, nn.Identity())
    means = []
    for text in texts:
        with torch.no_grad():
            states = model(torch.tensor([list(text)]), output_hidden_states=True).hidden_states
        means.append([layer[0].double().mean(0).numpy() for layer in states[1:]])
    return np.mean(means, axis=0)


def utilization(vector: np.ndarray, hidden: np.ndarray, layer: int) -> tuple[float, int]:
    """Largest ``|r|`` with the hidden states of its own layer and above, and the layer where."""
    found = [
        (abs(pearsonr(vector, hidden[above]).statistic), above)
        for above in range(layer, len(hidden))
    ]
    best = max(r for r, _ in found)
    return best, next(above for r, above in found if r == best)


def ranks(values: Sequence[float]) -> list[int]:
    """1 for the largest; equal values in their order."""
    order = sorted(range(len(values)), key=lambda neuron: (-values[neuron], neuron))
    return [order.index(neuron) + 1 for neuron in range(len(values))]


def bucket(rank: int, length: int, edges: Sequence[float]) -> int:
    """Number of the bucket whose edges enclose the percentile of a rank, the upper one included."""
    percentile = Fraction(100 * rank, length)
    return next(i for i, high in enumerate(edges[1:]) if percentile <= Fraction(str(high)))


def chance_jaccard(num_a: int, num_b: int, num_candidates: int) -> float:
    """Expected Jaccard index of random sets of these sizes."""
    both = hypergeom(num_candidates, num_a, num_b)
    return float(
        sum(
            both.pmf(k) * k / (num_a + num_b - k)
            for k in range(min(num_a, num_b) + 1)
            if num_a + num_b - k <= num_candidates
        )
    )
