"""What 16-bit storage means for cosine scores."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

_ROUNDED = ("bfloat16", "float16")


def rounding_turn(dtype: str) -> float:
    """The distance ``1 - cos`` that rounding a float32 vector to ``dtype`` causes by itself, typically.

    With eps the spacing of the dtype's values at 1, rounding puts a weight between 2^e and 2^(e+1) off
    by up to eps 2^e / 2, in the mean square by (eps 2^e)² / 12, and the mean square of such weights is
    7/3 (2^e)², both for values spread evenly. So it moves a vector w by d with |d|²/|w|² = eps²/28,
    nearly all of it across w, and 1 - cos = |d|²/(2 |w|²) = eps²/56: 1.1e-6 for bfloat16, 1.7e-8 for
    float16.
    """
    return _eps(dtype) ** 2 / 56


def rounding_floor(dtype: str) -> float:
    """The distance above which a neuron moved by more than rounding to ``dtype`` moves it.

    Half of all neurons are moved further by rounding than is typical. What it does to a weight is, by its
    size, most just above a power of two: the error is as large as between there and the next, and the
    weight smallest. Were all weights of a vector there, |d|²/|w|² would be eps²/12 in the mean, and
    1 - cos = eps²/24: 2.5e-6 for bfloat16, 4.0e-8 for float16. Weights of a model lie all over between
    powers of two, so none of its neurons of usual width comes near.
    """
    return _eps(dtype) ** 2 / 24


def _eps(dtype: str) -> float:
    return float(torch.finfo(getattr(torch, dtype)).eps)


@dataclass(frozen=True)
class Rounding:
    """How much of what was measured may be rounding."""

    dtype: str
    """The coarsest in which weights are stored."""
    typical: float
    """The distance that rounding to it causes in the mean."""
    floor: float
    """The distance that it hardly ever exceeds."""
    share_below: float
    """Share of the neurons with a distance that is not larger than ``floor``, 0..1."""


def find_rounding(
    dtypes: Collection[str], distances: Iterable[npt.NDArray[np.float64]]
) -> Rounding | None:
    """Compare distances with the rounding of the stored dtypes; ``None`` if none has 16 bits."""
    stored = [dtype for dtype in _ROUNDED if dtype in dtypes]
    if not stored:
        return None
    coarsest = max(stored, key=rounding_floor)
    floor = rounding_floor(coarsest)
    below = np.concatenate([values <= floor for values in distances])
    return Rounding(coarsest, rounding_turn(coarsest), floor, float(below.mean()))
