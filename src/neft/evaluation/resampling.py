"""Intervals and significance from the statistics of single examples.

Random draws are those of sacrebleu with its default seed, so that its intervals and p-values come out.
"""

from __future__ import annotations

import numpy as np

from neft.evaluation.metric import Array, Metric

SEED = 12345
NUM_RESAMPLES = 1000
"""Of a bootstrap (Efron, 1979; for translation Koehn, 2004)."""
NUM_TRIALS = 10_000
"""Of a randomization test."""
_TRIALS_AT_ONCE = 1000
# Of a score: the same difference, reached by other sums, must count as the same.
_ROUNDING = 1e-9


def confidence_interval(metric: Metric, statistics: Array) -> tuple[float, float]:
    """Ends of the 95% percentile interval of a score over resampled test sets.

    Args:
        metric: gives the score of summed statistics.
        statistics: ``[examples, statistics]``.
    """
    num_examples = len(statistics)
    generator = np.random.default_rng(SEED)
    sums = np.empty((NUM_RESAMPLES, statistics.shape[1]))
    for sample in sums:
        drawn = generator.choice(num_examples, num_examples)
        sample[:] = np.bincount(drawn, minlength=num_examples) @ statistics
    scores = np.sort(metric.scores(sums))
    outside = NUM_RESAMPLES // 40
    return float(scores[outside]), float(scores[-1 - outside])


def randomization_p_value(metric: Metric, system: Array, baseline: Array) -> float:
    """Two-sided p-value of a difference of two systems, by paired approximate randomization.

    Were the systems alike, their outputs for an example could be exchanged. The p-value is the share of
    trials, each example's outputs exchanged or not at random, whose difference is no smaller than the
    one found (Noreen, 1989; Riezler and Maxwell, 2005), the one found being counted as a trial.

    Args:
        metric: gives the score of summed statistics.
        system: statistics ``[examples, statistics]``.
        baseline: the same of the other system, for the same examples in the same order.

    Returns:
        In 0..1; 1 for systems alike, at the least ``1 / (NUM_TRIALS + 1)``.
    """
    both = np.stack([system.sum(0), baseline.sum(0)])
    found = _difference(metric, both[:1], both[1:])
    generator = np.random.default_rng(SEED)
    num_as_large = 0
    for _ in range(NUM_TRIALS // _TRIALS_AT_ONCE):
        exchanged = generator.integers(2, size=(_TRIALS_AT_ONCE, len(system)), dtype=bool)
        one = both[1] + exchanged.astype(np.float64) @ (system - baseline)
        differences = _difference(metric, one, both.sum(0) - one)
        num_as_large += int(np.count_nonzero(differences >= found - _ROUNDING))
    return (num_as_large + 1) / (NUM_TRIALS + 1)


def _difference(metric: Metric, one: Array, other: Array) -> Array:
    return np.abs(metric.scores(one) - metric.scores(other))
