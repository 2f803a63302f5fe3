"""Which examples go together in a batch, in which order, and how they become one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from neft.recipe import TrainingSection
from neft.sft.prompts import IGNORED, Encoded

FILLER = {"input_ids": [0, 0], "labels": [IGNORED, IGNORED]}
"""An example that nothing is learnt from."""


def batches_of(encoded: Encoded, options: TrainingSection, seed: int) -> list[list[int]]:
    """Positions of the examples of every batch that a training run reads.

    Args:
        encoded: the training split.
        options: length, batch size and order.
        seed: of the order; every epoch has another.

    Returns:
        One list a batch: ``steps * gradient_accumulation`` of them, or those of ``epochs``.
    """
    order = _orders(encoded, options, seed)
    if options.steps is not None:
        num_batches = options.steps * options.gradient_accumulation
    else:
        assert options.epochs is not None
        num_batches = math.ceil(options.epochs * math.ceil(len(encoded) / options.batch_size))
    batches: list[list[int]] = []
    while len(batches) < num_batches:
        epoch = next(order)
        batches += [
            epoch[start : start + options.batch_size]
            for start in range(0, len(epoch), options.batch_size)
        ]
    return batches[:num_batches]


def _orders(encoded: Encoded, options: TrainingSection, seed: int) -> Iterator[list[int]]:
    """The order of the examples in one epoch after the other."""
    if options.group_by_length:
        grouped = LengthGrouped([len(ids) for ids in encoded.input_ids], options.batch_size, seed)
        epoch = 0
        while True:
            grouped.set_epoch(epoch)
            yield list(grouped)
            epoch += 1
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(len(encoded), generator=generator).tolist()


def padded(encoded: Encoded, positions: Sequence[int]) -> dict[str, Tensor]:
    """One batch: ``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, length]``."""
    rows = [torch.tensor(encoded.input_ids[position]) for position in positions]
    labels = [torch.tensor(encoded.labels[position]) for position in positions]
    masks = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence(masks, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


class LengthGrouped(Sampler[int]):
    """Positions in an order whose batches hold like lengths, the batches themselves being shuffled.

    The trainer's own sampler goes from long to short within each pool, so that the length of texts
    follows the learning rate; and it draws from a global generator, so that a resumed run differs.

    Args:
        lengths: of the examples, in tokens.
        batch_size: examples that are padded to one length.
        seed: of the order; every epoch has another.
    """

    # Examples are sorted within random pools of this many batches: enough for little padding.
    _POOL = 32

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Tell it which epoch comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """The positions of one epoch."""
        # Not their sum: the second epoch of one seed must not be the first of the next.
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        size = self._POOL * self._batch_size
        pools = [order[start : start + size] for start in range(0, len(order), size)]
        batches = [
            pool[start : start + self._batch_size]
            for pool in (sorted(pool, key=self._lengths.__getitem__) for pool in pools)
            for start in range(0, len(pool), self._batch_size)
        ]
        # Only the last batch may be smaller, as the loader cuts batches of one size.
        last = [batches.pop()] if len(batches[-1]) < self._batch_size else []
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return iter([position for batch in shuffled + last for position in batch])


class FilledUp(Sampler[int]):
    """An order whose last batch is whole, so that processes can share it evenly.

    Left to themselves, they would train the first examples again.

    Args:
        order: positions of the examples.
        batch_size: of all processes together.
        filler: position of the example that fills up.
    """

    def __init__(self, order: SeedableRandomSampler | LengthGrouped, batch_size: int, filler: int):
        self._order = order
        self._num_fillers = -len(order) % batch_size
        self._filler = filler

    def set_epoch(self, epoch: int) -> None:
        """Tell it which epoch comes next."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        """Number of examples, fillers among them."""
        return len(self._order) + self._num_fillers

    def __iter__(self) -> Iterator[int]:
        """The positions of one epoch."""
        yield from self._order
        yield from [self._filler] * self._num_fillers
