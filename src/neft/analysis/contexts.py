"""The tokens on which each unit is most active, in context (beyond the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neft.analysis.decoding import Decoder
from neft.analysis.table import Table
from neft.analysis.units import UnitCollector
from neft.errors import DataError, NeuronError
from neft.neurons import Indices, NeuronSet, Projection
from neft.streaming import Batch, stream

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# The numbers of tokens, and what is kept for each place, fit in 31 bits.
_MOST_TOKENS = 2**31 - 1

# Tokens of a batch that are looked at together; the first of all are all candidates.
_TOKENS = 512


@dataclass(frozen=True)
class TopTokens:
    """For each unit the tokens with the largest |a|, strongest first.

    A unit that is exactly 0 on a token is at rest there, so a unit may have fewer than k.
    """

    projections: Mapping[str, Projection]
    """The down projections by module name, by layer; unit *n* feeds neuron *n*."""
    activations: Mapping[str, NDArray[np.float32]]
    """Module name -> a with its sign ``[units, k]``; 0 where there is no token."""
    texts: Mapping[str, Indices]
    """Module name -> positions in the list of texts ``[units, k]``; -1 where there is no token."""
    positions: Mapping[str, Indices]
    """Module name -> positions in the text ``[units, k]``; -1 where there is no token."""
    read: Sequence[Sequence[int]]
    """The texts: token ids."""


class ContextCollector(UnitCollector):
    """Gathers ``TopTokens`` while a model reads texts; see ``top_tokens``.

    Args:
        texts: all that the model will read, in the order in which ``stream`` is given them.
        k: tokens a unit.
    """

    # What is kept for a unit and a token is one number, whose order is that of |a|, then of the place,
    # the first first: the bits of |a| as float32, 31 bits for the place, and the sign of a. No two are
    # equal, so neither batches nor the machine decide which of two equal activations is kept.

    def __init__(self, texts: Sequence[Sequence[int]], k: int) -> None:
        super().__init__()
        if k < 1:
            raise DataError(f"k is {k}; keep at least one token a unit.")
        self._texts = texts
        self._k = k
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        if len(ends) and ends[-1] >= _MOST_TOKENS:
            raise DataError(f"{ends[-1]} tokens are too many; give fewer than {_MOST_TOKENS}.")
        # Number of the first token of each text.
        self._starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        self._kept: dict[str, Tensor] = {}
        self._places: Tensor

    def begin(self, batch: Batch) -> None:
        import torch

        super().begin(batch)
        starts = torch.from_numpy(self._starts[batch.texts])
        numbers = starts[:, None] + torch.arange(batch.mask.shape[1])
        self._places = (_MOST_TOKENS - numbers.to(batch.mask.device))[batch.mask]

    def _add(self, projection: Projection, activations: Tensor) -> None:
        import torch

        kept = self._kept.get(projection.name)
        if kept is None:
            shape = (projection.num_neurons, self._k)
            kept = torch.zeros(shape, dtype=torch.int64, device=activations.device)
        for part, places in zip(
            activations.split(_TOKENS), self._places.split(_TOKENS), strict=True
        ):
            kept = self._strongest(kept, part.T.contiguous(), places)
        self._kept[projection.name] = kept

    def _strongest(self, kept: Tensor, units: Tensor, places: Tensor) -> Tensor:
        """The ``k`` largest keys ``[units, k]`` of those that are kept and of ``[units, tokens]``."""
        import torch

        bits = units.abs().view(torch.int32)
        # Most tokens are weaker than all that is kept, and one comparison rules them out.
        weakest = (kept[:, -1:] >> 32).to(torch.int32)
        unit, token = torch.nonzero((bits >= weakest) & (bits > 0), as_tuple=True)
        keys = (bits[unit, token].long() << 32) | (places[token] << 1)
        keys |= units[unit, token] < 0
        candidates = torch.cat([kept, _in_rows(keys, unit, len(units))], dim=1)
        return candidates.topk(self._k, dim=1).values

    @property
    def result(self) -> TopTokens:
        """Of all texts read so far."""
        activations: dict[str, NDArray[np.float32]] = {}
        texts: dict[str, Indices] = {}
        positions: dict[str, Indices] = {}
        for name in self.projections:
            keys = self._kept[name].cpu().numpy()
            sizes = (keys >> 32).astype(np.int32).view(np.float32)
            activations[name] = np.where(keys & 1, -sizes, sizes)
            numbers = _MOST_TOKENS - ((keys >> 1) & _MOST_TOKENS)
            found = np.searchsorted(self._starts, numbers, side="right") - 1
            texts[name] = np.where(keys > 0, found, -1)
            positions[name] = np.where(keys > 0, numbers - self._starts[found], -1)
        return TopTokens(self.projections, activations, texts, positions, self._texts)


def top_tokens(model: Any, texts: Sequence[Sequence[int]], *, k: int, batch_size: int) -> TopTokens:
    """For each unit of a model the k tokens with the largest |a|, in one pass; padding does not count.

    Of equal activations the one that comes first in ``texts`` is kept. Memory is units x k.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        texts: token ids.
        k: tokens a unit.
        batch_size: texts at once; changes nothing but rounding.

    Raises:
        DataError: no texts, an empty one, or 2^31 tokens and more.
        ArchitectureError: the model's down projections cannot be found.
        RunError: an activation that is not finite, or too little memory on the device.
    """
    collector = ContextCollector(texts, k)
    stream(model, texts, [collector], batch_size=batch_size, title="Contexts")
    return collector.result


def contexts(
    tops: Mapping[str, TopTokens],
    neurons: NeuronSet,
    tokenizer: PreTrainedTokenizerBase,
    *,
    width: int = 12,
) -> Table:
    """The strongest tokens of chosen units, as text.

    Args:
        tops: name of a model, such as ``before`` and ``after`` -> its tokens.
        neurons: whose units: of a neuron in an up, gate or down projection the unit that it belongs to.
            Others, such as those of attention, belong to none.
        tokenizer: of the models.
        width: tokens of context on either side.

    Returns:
        One row a unit, model and token, in this order: ``layer``, ``index``, ``model``, ``rank`` (1 is
        the strongest), ``activation`` (with its sign), ``left``, ``token``, ``right``.

    Raises:
        NeuronError: neurons of another model, or none that has a unit.
    """
    decoder = Decoder(tokenizer)
    rows = [
        (top.projections[name].layer, unit, model, *row)
        for name, unit in _units(neurons, tops)
        for model, top in tops.items()
        for row in _rows(top, name, unit, decoder, width)
    ]
    names = ("layer", "index", "model", "rank", "activation", "left", "token", "right")
    return Table({name: [row[column] for row in rows] for column, name in enumerate(names)})


def _in_rows(keys: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """``keys``, sorted by their row, as a matrix that is filled up with zeros."""
    import torch

    counts = torch.bincount(rows, minlength=num_rows)
    starts = counts.cumsum(0) - counts
    width = int(counts.max())
    matrix = torch.zeros((num_rows, width), dtype=keys.dtype, device=keys.device)
    matrix[rows, torch.arange(len(keys), device=keys.device) - starts[rows]] = keys
    return matrix


def _units(neurons: NeuronSet, tops: Mapping[str, TopTokens]) -> list[tuple[str, int]]:
    """(down projection, unit) of each neuron, by layer, then index, once."""
    found: dict[str, set[int]] = {}
    for name, indices in neurons.items():
        projection = neurons.projections[name]
        if projection.role not in ("up", "gate", "gate_up", "down"):
            continue
        for model, top in tops.items():
            down = _down_of(projection, top, model)
            # Gate and up that are fused lie one after the other.
            found.setdefault(down.name, set()).update((indices % down.num_neurons).tolist())
    if not found:
        raise NeuronError(
            f"None of {len(neurons)} neurons is in a feed-forward network, and only their units are "
            "watched. Give neurons of up, gate or down projections."
        )
    order = next(iter(tops.values())).projections
    return [(name, unit) for name in order for unit in sorted(found.get(name, ()))]


def _down_of(projection: Projection, top: TopTokens, model: str) -> Projection:
    """The down projection that the units of ``projection`` feed."""
    for down in top.projections.values():
        fused = 2 if projection.role == "gate_up" else 1
        if (
            down.layer == projection.layer
            and down.num_neurons * fused == projection.num_neurons
            and down.vector_length == projection.vector_length
        ):
            return down
    raise NeuronError(
        f"{projection.name}: with {projection.num_neurons} neurons of length "
        f"{projection.vector_length}, it is not of the model {model!r}. Give the neurons of the model "
        "that was watched."
    )


def _rows(
    top: TopTokens, name: str, unit: int, decoder: Decoder, width: int
) -> list[tuple[int, float, str, str, str]]:
    found = zip(
        top.activations[name][unit].tolist(),
        top.texts[name][unit].tolist(),
        top.positions[name][unit].tolist(),
        strict=True,
    )
    return [
        (rank, activation, *decoder.context(top.read[text], position, width))
        for rank, (activation, text, position) in enumerate(found, start=1)
        if text >= 0
    ]
