"""Whether systems differ from a baseline by more than the choice of test examples explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from neft.errors import DataError, UsageError
from neft.evaluation.metric import Array, Expected
from neft.evaluation.metrics import METRICS, corpus_score
from neft.evaluation.resampling import NUM_TRIALS, SEED, randomization_p_value


@dataclass(frozen=True)
class Paired:
    """A system beside the baseline, on the same examples."""

    difference: float
    """The system's score less the baseline's."""
    p_value: float
    """Two-sided: how often systems that are alike differ by as much."""
    signature: str


def significance(
    metric: str,
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str],
    baseline: str,
    *,
    target_language: str | None,
    lowercase: bool = False,
    labels: Sequence[str] | None = None,
    num_runs: int = 1,
) -> dict[str, Paired]:
    """Compare systems with a baseline by paired approximate randomization.

    Args:
        metric: a name in ``METRICS``.
        systems: name -> predictions, of the baseline too.
        references: the expected texts, in the same order.
        baseline: a name in ``systems``.
        target_language: this and the next as for ``score_predictions``.
        lowercase: compare lower-cased texts.
        labels: of a classification, beside those that occur in ``references``.
        num_runs: how many runs (seeds) of each system follow one another in its predictions, all on the
            same examples; ``references`` repeats as often. The outputs of all runs for an example are
            exchanged together, as they are no independent evidence: the example is hard or easy in all.

    Returns:
        Every other system's comparison, in the order of ``systems``.

    Raises:
        DataError: no texts, different counts, an empty reference, or references that do not repeat.
        UsageError: an unknown metric or baseline, or no tokenizer for the target language.
    """
    if metric not in METRICS:
        raise UsageError(f"Unknown metric {metric!r}; choose one of {', '.join(METRICS)}.")
    if baseline not in systems:
        raise UsageError(f"No baseline {baseline!r} among the systems {', '.join(systems)}.")
    expected = Expected(references, target_language, lowercase, labels)
    for name, predictions in systems.items():
        expected.check_count(predictions, f"{name}: ")
    _check_runs(references, num_runs)
    measure = METRICS[metric](expected)
    signature = measure.signature({"ar": NUM_TRIALS, "seed": SEED})
    if num_runs > 1:
        signature += f"|runs:{num_runs}"
    of_baseline = _sum_of_runs(measure.statistics(systems[baseline]), num_runs)
    score_of_baseline = corpus_score(measure, of_baseline)
    compared = {}
    for name, predictions in systems.items():
        if name == baseline:
            continue
        statistics = _sum_of_runs(measure.statistics(predictions), num_runs)
        difference = corpus_score(measure, statistics) - score_of_baseline
        p_value = randomization_p_value(measure, statistics, of_baseline)
        compared[name] = Paired(difference, p_value, signature)
    return compared


def _check_runs(references: Sequence[str], num_runs: int) -> None:
    num_examples = len(references) // num_runs
    if list(references) != list(references[:num_examples]) * num_runs:
        raise DataError(
            f"The {len(references)} references are not those of one test set {num_runs} times over; "
            "give the runs of a system one after the other, each with all references in the same order."
        )


def _sum_of_runs(statistics: Array, num_runs: int) -> Array:
    """``[runs x examples, statistics]`` to ``[examples, statistics]``."""
    runs: Array = statistics.reshape(num_runs, -1, statistics.shape[1])
    summed: Array = runs.sum(0)
    return summed
