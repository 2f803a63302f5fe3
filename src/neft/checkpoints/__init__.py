"""Weights of a model wherever they lie, one tensor at a time."""

from neft.checkpoints.matrix import Matrix
from neft.checkpoints.opening import open_weights
from neft.checkpoints.source import TensorInfo, WeightSource

__all__ = ["Matrix", "TensorInfo", "WeightSource", "open_weights"]
