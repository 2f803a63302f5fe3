"""Ways of scoring neurons, one a file."""

from neft.scoring.activation import score_by_activation
from neft.scoring.cosine import score_neurons
from neft.scoring.gradient import score_by_gradient
from neft.scoring.norm import score_by_norm

__all__ = ["score_by_activation", "score_by_gradient", "score_by_norm", "score_neurons"]
