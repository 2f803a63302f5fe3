"""Cosine distances against eighty decimal digits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from neft.scoring import distance
from neft.scoring.distance import cosine_distances, scoring_threads
from reference.cosine import cosine_distances as exact_distances

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROWS, COLUMNS = 0, 1


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with scoring_threads() as threads:
        yield threads


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fine_tuned(*shape: int, step: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weights of the size of a model's, and the same after changes ``step`` times as large."""
    before = 0.02 * random(*shape)
    return before, before + 0.02 * step * random(*shape, seed=1)


def check(before: Tensor, after: Tensor, neuron_dim: int, pool: Executor, rel: float) -> None:
    found = cosine_distances(before, after, neuron_dim, pool)
    assert found.dtype == torch.float64
    expected = exact_distances(before, after, neuron_dim)
    np.testing.assert_allclose(found.numpy(), expected, rtol=rel, atol=0)


@pytest.mark.parametrize("neuron_dim", [ROWS, COLUMNS])
@pytest.mark.parametrize(("left", "right"), [*itertools.product(DTYPES, DTYPES)])
def test_every_pair_of_dtypes(
    left: torch.dtype, right: torch.dtype, neuron_dim: int, pool: Executor
) -> None:
    before, after = fine_tuned(24, 40)
    check(before.to(left), after.to(right), neuron_dim, pool, rel=1e-12)


@pytest.mark.parametrize("neuron_dim", [ROWS, COLUMNS])
def test_a_millionth_between_float32_weights(neuron_dim: int, pool: Executor) -> None:
    before, after = (side.float() for side in fine_tuned(24, 40, step=1.4e-3))
    found = cosine_distances(before, after, neuron_dim, pool)
    assert found.min() > 3e-7
    assert found.max() < 3e-6
    check(before, after, neuron_dim, pool, rel=1e-12)


@pytest.mark.parametrize("neuron_dim", [ROWS, COLUMNS])
@pytest.mark.parametrize("num_neurons", [1, 6, 7, 8, 15, 50])
@pytest.mark.parametrize("length", [1, 5, 9, 64, 67])
def test_sizes_that_are_no_multiple_of_a_block(
    num_neurons: int,
    length: int,
    neuron_dim: int,
    pool: Executor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A block has several neurons or vectors, exactly one, or would have less than one.
    monkeypatch.setattr(distance, "_BLOCK", 64)
    monkeypatch.setattr(distance, "_SLAB", 7)
    shape = (num_neurons, length) if neuron_dim == ROWS else (length, num_neurons)
    before, after = (side.float() for side in fine_tuned(*shape, step=0.3))
    found = cosine_distances(before, after, neuron_dim, pool)
    expected = exact_distances(before, after, neuron_dim)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-15)


def test_blocks_of_the_real_size(pool: Executor) -> None:
    # Slabs of 1024 neurons, blocks of 31 and 64 rows; the oracle is quick enough for a few neurons.
    before, after = (side.float() for side in fine_tuned(1027, 2053))
    some_rows, some_columns = [0, 30, 31, 1023, 1024, 1026], [0, 1023, 1024, 2047, 2048, 2052]
    by_row = cosine_distances(before, after, ROWS, pool)[some_rows]
    by_column = cosine_distances(before, after, COLUMNS, pool)[some_columns]
    exact_rows = exact_distances(before[some_rows], after[some_rows], ROWS)
    exact_columns = exact_distances(before[:, some_columns], after[:, some_columns], COLUMNS)
    np.testing.assert_allclose(by_row, exact_rows, rtol=1e-12)
    np.testing.assert_allclose(by_column, exact_columns, rtol=1e-12)


def test_strided_storage_is_the_same_matrix(pool: Executor) -> None:
    before, after = (side.float() for side in fine_tuned(20, 30))
    by_row = cosine_distances(before, after, ROWS, pool)
    transposed = cosine_distances(before.T.contiguous(), after.T, COLUMNS, pool)
    torch.testing.assert_close(transposed, by_row, rtol=1e-12, atol=0)


def orthogonal_to(a: Tensor) -> Tensor:
    """Rows of the length of those of ``a``, at right angles to them."""
    other = random(*a.shape, seed=2)
    unit = a / a.norm(dim=1, keepdim=True)
    other -= (other * unit).sum(1, keepdim=True) * unit
    return other * (a.norm(dim=1) / other.norm(dim=1)).unsqueeze(1)


@pytest.mark.parametrize("angle", [1e-8, 1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.999, 1.5])
def test_small_angles(angle: float, scale: float, pool: Executor) -> None:
    a = random(8, 33)
    b = scale * (a + angle * orthogonal_to(a))
    # What is lost beside relative accuracy is float64's roundings of |d|², where d is nearly all growth.
    atol = 1e-15 * (scale - 1) ** 2
    found = cosine_distances(a, b, ROWS, pool)
    np.testing.assert_allclose(found.numpy(), exact_distances(a, b, ROWS), rtol=1e-12, atol=atol)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 0.999, 1.001, 3.0, 1e3])
def test_scaling_is_no_distance(scale: float, pool: Executor) -> None:
    a = random(8, 33)
    distances = cosine_distances(a, scale * a, ROWS, pool)
    assert distances.min() >= 0
    assert distances.max() < 1e-12


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("neuron_dim", [ROWS, COLUMNS])
def test_opposite(scale: float, neuron_dim: int, pool: Executor) -> None:
    a = random(9, 33).float()
    distances = cosine_distances(a, -scale * a, neuron_dim, pool)
    torch.testing.assert_close(distances, torch.full_like(distances, 2.0), rtol=1e-13, atol=0)
    assert distances.max() <= 2


@pytest.mark.parametrize("neuron_dim", [ROWS, COLUMNS])
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-10, 1e-4, 1e4, 1e10, 1e20, 1e37])
def test_neurons_that_came_alive_or_died(scale: float, neuron_dim: int, pool: Executor) -> None:
    before, after = random(90, 70).float(), (scale * random(90, 70, seed=1)).float()
    check(before, after, neuron_dim, pool, rel=1e-7)


def test_no_weight_is_too_small_or_too_large(pool: Executor) -> None:
    for dtype, magnitude in (
        (torch.float32, 1e-44),
        (torch.float32, 3e38),
        (torch.bfloat16, 1e-39),
    ):
        before = (magnitude * random(6, 40).clamp(-1, 1)).to(dtype)
        after = (magnitude * random(6, 40, seed=1).clamp(-1, 1)).to(dtype)
        check(before, after, ROWS, pool, rel=1e-12)


@pytest.mark.parametrize("neuron_dim", [ROWS, COLUMNS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_neurons(dtype: torch.dtype, neuron_dim: int, pool: Executor) -> None:
    before = random(4, 6).to(dtype)
    after = before.clone()
    before[0] = after[0] = before[1] = after[2] = 0
    if neuron_dim == COLUMNS:
        before, after = before.T.contiguous(), after.T.contiguous()
    distances = cosine_distances(before, after, neuron_dim, pool)
    assert distances.tolist() == [0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("neuron_dim", [ROWS, COLUMNS])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["before", "after", "both"])
@pytest.mark.parametrize("rest", [0.0, 1.0])
def test_what_is_not_finite_becomes_nan(
    side: str, value: float, rest: float, neuron_dim: int, pool: Executor
) -> None:
    before, after = random(5, 5).float(), random(5, 5, seed=1).float()
    for name, tensor in (("before", before), ("after", after)):
        tensor.select(neuron_dim, 3).mul_(rest)
        if side in (name, "both"):
            tensor[3, 3] = value
    distances = cosine_distances(before, after, neuron_dim, pool)
    assert distances.isnan().tolist() == [False, False, False, True, False]


@pytest.fixture
def own_threads() -> Iterator[None]:
    """What a test does to torch's number of threads ends with it."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.usefixtures("own_threads")
def test_threads_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance, "_SLAB", 16)
    before, after = (side.float() for side in fine_tuned(100, 200))
    results = []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        with scoring_threads() as pool:
            results.append([cosine_distances(before, after, dim, pool) for dim in (ROWS, COLUMNS)])
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


@pytest.mark.usefixtures("own_threads")
def test_the_number_of_threads_is_as_before() -> None:
    def of_a_new_thread() -> int:
        with ThreadPoolExecutor(1) as fresh:
            return fresh.submit(torch.get_num_threads).result()

    torch.set_num_threads(2)
    with scoring_threads() as pool:
        assert set(pool.map(lambda _: torch.get_num_threads(), range(4))) == {1}
        assert torch.get_num_threads() == 2
    assert (torch.get_num_threads(), of_a_new_thread()) == (2, 2)
