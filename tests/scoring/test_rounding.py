from __future__ import annotations

import numpy as np
import pytest
import torch

from neft.scoring.rounding import find_rounding, rounding_floor, rounding_turn
from reference.cosine import cosine_distances


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_rounding_causes_typically(dtype: str) -> None:
    even = torch.rand(3, 4000, generator=torch.Generator().manual_seed(0)) + 1.0
    even *= torch.tensor([1.0, -1.0]).repeat(2000)
    distances = cosine_distances(even, even.to(getattr(torch, dtype)), 0)
    np.testing.assert_allclose(distances, rounding_turn(dtype), rtol=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_floor_is_what_it_causes_just_above_powers_of_two(dtype: str) -> None:
    eps = torch.finfo(getattr(torch, dtype)).eps
    generator = torch.Generator().manual_seed(0)
    few_steps = 1.0 + 4 * eps * torch.rand(3, 4000, generator=generator)
    powers = 2.0 ** torch.randint(-2, 2, (3, 4000), generator=generator)
    mixed = few_steps * torch.tensor([1.0, -1.0]).repeat(2000)
    for weights in (mixed, mixed * powers):
        distances = cosine_distances(weights, weights.to(getattr(torch, dtype)), 0)
        np.testing.assert_allclose(distances, rounding_floor(dtype), rtol=0.1)


def test_bell_shaped_weights_are_near_it() -> None:
    weights = 0.02 * torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    distances = cosine_distances(weights, weights.bfloat16(), 0)
    typical = rounding_turn("bfloat16")
    assert (distances > typical).all()
    assert (distances < 1.5 * typical).all()


def test_share_of_neurons_below() -> None:
    distances = [np.array([0.0, 1e-9, 1e-3]), np.array([1.0])]
    assert find_rounding({"float32", "float64"}, distances) is None
    coarse = find_rounding({"float32", "float16", "bfloat16"}, distances)
    assert coarse is not None
    assert (coarse.dtype, coarse.share_below) == ("bfloat16", 0.5)
    assert coarse.floor == rounding_floor("bfloat16") > rounding_floor("float16")
    assert coarse.typical == rounding_turn("bfloat16") < coarse.floor
    fine = find_rounding({"float16"}, [np.array([1e-7, 1e-9])])
    assert fine is not None
    assert (fine.dtype, fine.share_below) == ("float16", 0.5)
