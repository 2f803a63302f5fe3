"""Batches of texts of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches_by_length(texts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Positions of the texts, the longest first: little padding, and too large a batch fails at once.

    Equal lengths go in the order of their tokens, so that the batches depend on the set of texts alone.
    """
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), tuple(texts[i])))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
