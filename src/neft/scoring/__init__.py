"""Ways of scoring neurons, one a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from neft.neurons import NeuronScores
from neft.scoring.cosine import score_neurons

METHODS: Mapping[str, Callable[..., NeuronScores]] = {"cosine": score_neurons}
"""By the ``score.method`` of a recipe."""

__all__ = ["METHODS", "score_neurons"]
