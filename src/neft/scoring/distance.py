"""The distance ``1 - cos`` between the neurons of two matrices, exact where it is small, and fast.

For a neuron that is a before and b = a + d after, the three sums |a|², a·d and |d|² give

    |b| - |a| = (2 a·d + |d|²) / (|a| + |b|)        with |b|² = |a|² + 2 a·d + |d|²
    1 - cos   = (|d|² - (|b| - |a|)²) / (2 |a| |b|)

in which nothing of the order of |a|² is subtracted from its like: the relative error is a few float64
roundings, times |d|² over its part that is orthogonal to a. ``d`` is exact in float64 for weights of up
to 32 bits whose magnitudes lie within 2²⁹ of one another, and correctly rounded beyond.

Where one norm is far below the other |b|² does cancel; such neurons take the plain cosine, which is
accurate where the distance is not small.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

LARGEST = 1e150
"""Largest magnitude of a weight: the square of one much larger is beyond float64."""

# Elements of a matrix that are worked on at once: their float64 copies fit the cache of one core.
_BLOCK = 2**16
# Neurons that one thread scores at once. Column neurons are read in runs of that many elements.
_SLAB = 1024
# |d|² / (2 |a| |b|) from which the plain cosine is used: the norms then differ by a factor of 200, and
# |b|² may have lost five of its sixteen digits.
_FAR = 100.0


@contextmanager
def scoring_threads() -> Iterator[Executor]:
    """As many threads as torch uses, each running torch's operations by itself.

    On blocks that fit a cache, splitting every single operation among threads costs more in waiting than
    it saves, and much more on a busy machine; here each thread has neurons of its own.
    """
    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with pool:
            yield pool
    finally:
        # The setting is the thread's own, but also the default of threads that are started later.
        torch.set_num_threads(num_threads)


def cosine_distances(before: Tensor, after: Tensor, neuron_dim: int, pool: Executor) -> Tensor:
    """``1 - cos`` of each neuron of two matrices.

    Args:
        before: ``[rows, columns]``, any floating-point dtype, on the CPU.
        after: the same shape; its dtype may differ.
        neuron_dim: dimension that counts neurons: 0 if they are rows, 1 if they are columns.
        pool: from ``scoring_threads``.

    Returns:
        float64 ``[num_neurons]`` in 0..2: 0 for a neuron that is zero on both sides, 1 for one that is
        zero on one side; NaN for one with a weight that is not finite.
    """
    slabs = zip(before.split(_SLAB, neuron_dim), after.split(_SLAB, neuron_dim), strict=True)
    return torch.cat(
        list(pool.map(lambda slab: _slab_distances(slab[0], slab[1], neuron_dim), slabs))
    )


def _slab_distances(before: Tensor, after: Tensor, neuron_dim: int) -> Tensor:
    sums = _sums_of_rows if neuron_dim == 0 else _sums_of_columns
    aa, ad, dd = sums(before, after)
    growth = 2 * ad + dd
    norm_a, norm_b = aa.sqrt(), (aa + growth).clamp(min=0).sqrt()
    twice_product = 2 * norm_a * norm_b
    distances = (dd - (growth / (norm_a + norm_b)) ** 2) / twice_product
    # What did not move has no distance, and where it is zero, no direction either.
    distances[dd == 0] = 0.0
    far = torch.nonzero(dd > _FAR * twice_product).squeeze(1)
    for chunk in far.split(_BLOCK // _SLAB):
        a, b = (side.index_select(neuron_dim, chunk).double() for side in (before, after))
        distances[chunk] = _plain_distances(a, b, dim=1 - neuron_dim)
    return distances.clamp(0.0, 2.0)


def _plain_distances(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """``1 - a·b / |a| |b|`` along ``dim``; 1 where either is zero."""
    products = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    cosines = (a * b).sum(dim) / products
    distances: Tensor = 1 - cosines.where(products > 0, 0.0)
    return distances


def _sums_of_rows(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|a|², a·d and |d|² of each row."""
    num_rows, length = before.shape
    block = max(1, _BLOCK // length)
    a_and_d = torch.empty(block, 2, length, dtype=torch.float64)
    grams = torch.empty(num_rows, 2, 2, dtype=torch.float64)
    for a_rows, b_rows, gram in zip(
        before.split(block), after.split(block), grams.split(block), strict=True
    ):
        rows = a_and_d[: len(gram)]
        a, d = rows.unbind(1)
        a.copy_(a_rows)
        d.copy_(b_rows).sub_(a)
        torch.bmm(rows, rows.mT, out=gram)
    return grams[:, 0, 0], grams[:, 0, 1], grams[:, 1, 1]


def _sums_of_columns(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|a|², a·d and |d|² of each column."""
    num_columns = before.shape[1]
    block = max(1, _BLOCK // num_columns)
    a_and_d = torch.empty(2, block, num_columns, dtype=torch.float64)
    # Row r of every block is added to row r, so that memory is walked in its order.
    sums = torch.zeros(3, block, num_columns, dtype=torch.float64)
    for a_rows, b_rows in zip(before.split(block), after.split(block), strict=True):
        both = a_and_d[:, : len(a_rows)]
        a, d = both
        a.copy_(a_rows)
        d.copy_(b_rows).sub_(a)
        sums[:2, : len(a)].addcmul_(both, a)
        sums[2, : len(a)].addcmul_(d, d)
    aa, ad, dd = sums.sum(1)
    return aa, ad, dd
