"""How much each unit of the feed-forward networks is at work on a data set (beyond the paper).

Where utilization compares vectors, this looks at what the model does: the size of each unit's
activation, token by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neft.analysis.matching import check_same_projections
from neft.analysis.neuron_columns import concatenated, neuron_columns
from neft.analysis.table import Table
from neft.analysis.units import UnitCollector
from neft.errors import UsageError
from neft.neurons import Projection
from neft.streaming import Batch, stream

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]

PERCENTS = (50, 90, 99)
"""Quantiles of |a| that are kept."""

QUANTILE_ERROR = 1 / 32
"""Largest relative error of a quantile, for |a| within ``RANGE``."""

RANGE = (2.0**-16, 2.0**12)
"""Quantiles below count as 0, those above as the upper end."""

# A bin holds the float32 numbers of one exponent and one value of the first four bits of the mantissa:
# a cut through their bits, so that every number compares with a bin's edges exactly.
_SHIFT = 23 - 4
_FIRST, _LAST = (int(np.float32(end).view(np.int32)) >> _SHIFT for end in RANGE)
# One more below for what is smaller than the range, and one above.
_NUM_BINS = _LAST - _FIRST + 2

# Tokens that are counted at once: the places of their activations take eight bytes each.
_TOKENS = 1024


@dataclass(frozen=True)
class UnitActivity:
    """What the units of a model did on a data set; a is a unit's activation on a token."""

    projections: Mapping[str, Projection]
    """The down projections by module name, by layer; unit *n* feeds neuron *n*."""
    mean: Mapping[str, Floats]
    """Module name -> mean |a| ``[units]``."""
    active: Mapping[str, Floats]
    """Module name -> share of the tokens with |a| at or above the threshold ``[units]``, in 0..1."""
    quantiles: Mapping[int, Mapping[str, Floats]]
    """Percent -> module name -> the smallest |a| that this many percent of the tokens do not exceed
    ``[units]``, to within ``QUANTILE_ERROR``."""
    thresholds: Mapping[str, float]
    """Module name -> from which |a| on a unit counts as active."""
    num_texts: int
    num_tokens: int


class ActivityCollector(UnitCollector):
    """Gathers ``UnitActivity`` while a model reads texts; see ``unit_activity``."""

    def __init__(self, thresholds: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self._thresholds = thresholds
        self._counts: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._num_texts = 0
        self._num_tokens = 0

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        self._num_texts += len(batch.texts)
        self._num_tokens += int(batch.mask.sum())

    def _add(self, projection: Projection, activations: Tensor) -> None:
        import torch

        name, device = projection.name, activations.device
        if name not in self._counts:
            size = projection.num_neurons
            self._counts[name] = torch.zeros(size * _NUM_BINS, dtype=torch.int32, device=device)
            self._sums[name] = torch.zeros(size, dtype=torch.float64, device=device)
        first_bins = torch.arange(projection.num_neurons, device=device) * _NUM_BINS
        one = torch.ones(1, dtype=torch.int32, device=device)
        for part in activations.split(_TOKENS):
            sizes = part.abs()
            self._sums[name] += sizes.sum(0, dtype=torch.float64)
            bins = (sizes.view(torch.int32) >> _SHIFT) - (_FIRST - 1)
            places = (bins.clamp_(0, _NUM_BINS - 1) + first_bins).flatten()
            self._counts[name].scatter_add_(0, places, one.expand(len(places)))

    @property
    def result(self) -> UnitActivity:
        """Of all texts read so far, at least one."""
        assert self._num_tokens, "no text was read"
        mean: dict[str, Floats] = {}
        active: dict[str, Floats] = {}
        quantiles: dict[int, dict[str, Floats]] = {percent: {} for percent in PERCENTS}
        thresholds: dict[str, float] = {}
        if self._thresholds is not None:
            _check_thresholds(self._thresholds, self.projections)
        for name in self.projections:
            mean[name] = self._sums[name].cpu().numpy() / self._num_tokens
            wanted = mean[name].mean() if self._thresholds is None else self._thresholds[name]
            lowest_bin = max(1, _bin_of(wanted))
            thresholds[name] = float(_lower_edges(lowest_bin))
            counts = self._counts[name].view(-1, _NUM_BINS).cpu().numpy()
            active[name] = counts[:, lowest_bin:].sum(1) / self._num_tokens
            up_to = counts.cumsum(1)
            for percent in PERCENTS:
                enough = 100 * up_to >= percent * self._num_tokens
                quantiles[percent][name] = _middles(enough.argmax(1))
        return UnitActivity(
            self.projections,
            mean,
            active,
            quantiles,
            thresholds,
            self._num_texts,
            self._num_tokens,
        )


def unit_activity(
    model: Any,
    texts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    thresholds: Mapping[str, float] | None = None,
) -> UnitActivity:
    """How much each unit of a model is at work on texts, in one pass; padding does not count.

    A unit is *active* on a token where |a| is no less than the mean |a| of its layer, over all units and
    tokens. That follows the layer's scale, and leaves a share room to rise and to fall: gated units are
    never quite at rest, so a threshold near zero would call them active throughout. (A root mean square
    would not do: in some models a few units on a few tokens make up nearly all of it.) The threshold is
    rounded down, by less than 1/16 of it, to the edge of a bin, and for that edge the share is exact.

    Means are exact; quantiles are taken from a histogram of |a| for each unit, in 16 bins an octave (1.8
    KiB a unit), so that memory does not grow with the texts.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        texts: token ids.
        batch_size: texts at once; changes nothing but rounding.
        thresholds: module name -> |a| from which on a unit is active, instead of the layer's mean: that
            of another model, to compare with it.

    Raises:
        DataError, UsageError: see ``stream``.
        ArchitectureError: the model's down projections cannot be found.
        UsageError: thresholds of another model.
        RunError: an activation that is not finite, or too little memory on the device.
    """
    collector = ActivityCollector(thresholds)
    stream(model, texts, [collector], batch_size=batch_size, title="Activity")
    return collector.result


def activity_table(before: UnitActivity, after: UnitActivity) -> Table:
    """Two models side by side, one row a unit, by layer.

    Returns:
        ``layer``, ``index``, and each of ``mean``, ``active``, ``q50``, ``q90``, ``q99`` with ``_before``
        and ``_after``; see ``UnitActivity``.

    Raises:
        NeuronError: models of different shape.
        UsageError: shares by different thresholds.
    """
    check_same_projections(before.projections, after.projections, ("before", "after"))
    if before.thresholds != after.thresholds:
        raise UsageError(
            "The shares of active tokens before and after have different thresholds, so they cannot be "
            "compared. Take the second with the thresholds of the first."
        )
    projections = before.projections.values()
    place = neuron_columns(projections)
    sides = {"before": before, "after": after}
    measures = {
        f"{measure}_{side}": concatenated(projections, values)
        for measure in ("mean", "active", *(f"q{percent}" for percent in PERCENTS))
        for side, activity in sides.items()
        for values in (_values(activity, measure),)
    }
    return Table(
        {"layer": place["layer"], "index": place["index"], **measures},
        {
            "thresholds": dict(before.thresholds),
            "quantile_error": QUANTILE_ERROR,
            "num_texts": {side: activity.num_texts for side, activity in sides.items()},
            "num_tokens": {side: activity.num_tokens for side, activity in sides.items()},
        },
    )


def _values(activity: UnitActivity, measure: str) -> Mapping[str, Floats]:
    if measure.startswith("q"):
        return activity.quantiles[int(measure.removeprefix("q"))]
    return activity.mean if measure == "mean" else activity.active


def _check_thresholds(
    thresholds: Mapping[str, float], projections: Mapping[str, Projection]
) -> None:
    if missing := [name for name in projections if name not in thresholds]:
        raise UsageError(
            f"{missing[0]}: has no threshold; there are thresholds of {len(thresholds)} modules, e.g. "
            f"{next(iter(thresholds), 'none')}. They are of another model."
        )


def _bin_of(value: float) -> int:
    bits = int(np.float32(value).view(np.int32))
    return min(max((bits >> _SHIFT) - (_FIRST - 1), 0), _NUM_BINS - 1)


def _lower_edges(bins: NDArray[np.int64] | int) -> Floats:
    """The smallest number in each bin but the first, which begins at 0."""
    bits = (np.asarray(bins) + (_FIRST - 1)) << _SHIFT
    return bits.astype(np.int32).view(np.float32).astype(np.float64)


def _middles(bins: NDArray[np.int64]) -> Floats:
    """What stands for the numbers of a bin."""
    middles = (_lower_edges(bins) + _lower_edges(bins + 1)) / 2
    middles[bins == 0] = 0.0
    middles[bins == _NUM_BINS - 1] = RANGE[1]
    return middles
