"""Weights of a model wherever they lie, one tensor at a time."""

from neft.checkpoints.matrix import Matrix, find_matrix
from neft.checkpoints.opening import open_weights
from neft.checkpoints.source import TensorInfo, WeightSource

__all__ = ["Matrix", "TensorInfo", "WeightSource", "find_matrix", "open_weights"]
