"""The metrics of every task, in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from neft.evaluation.bleu import bleu, chrf_plus_plus
from neft.evaluation.classification import Accuracy, MacroF1
from neft.evaluation.metric import Array, Expected, Metric, Score
from neft.evaluation.resampling import NUM_RESAMPLES, SEED, confidence_interval
from neft.evaluation.rouge import Rouge
from neft.recipe import Task

METRICS: dict[str, Callable[[Expected], Metric]] = {
    "BLEU": bleu,
    "chrF++": chrf_plus_plus,
    "ROUGE-1": partial(Rouge, "rouge1"),
    "ROUGE-2": partial(Rouge, "rouge2"),
    "ROUGE-L": partial(Rouge, "rougeL"),
    "ROUGE-1 (legacy)": partial(Rouge, "rouge1", legacy=True),
    "ROUGE-2 (legacy)": partial(Rouge, "rouge2", legacy=True),
    "ROUGE-L (legacy)": partial(Rouge, "rougeL", legacy=True),
    "accuracy": Accuracy,
    "macro-F1": MacroF1,
}

_OF_TEXT = ("BLEU", "chrF++")
METRICS_OF_TASK: dict[Task, tuple[str, ...]] = {
    "translation": _OF_TEXT,
    "summarization": (
        *("ROUGE-1", "ROUGE-2", "ROUGE-L"),
        *("ROUGE-1 (legacy)", "ROUGE-2 (legacy)", "ROUGE-L (legacy)"),
    ),
    "classification": ("accuracy", "macro-F1"),
    "prompt": _OF_TEXT,
    "chat": _OF_TEXT,
}
"""Task -> its metrics; the first is the one to compare systems by."""


def check_metrics(task: Task, target_language: str | None, references: Sequence[str]) -> None:
    """Find what would otherwise fail once there are predictions.

    Raises:
        DataError: no references, or an empty one.
        UsageError: no tokenizer for the target language.
    """
    expected = Expected(references, target_language)
    for name in METRICS_OF_TASK[task]:
        METRICS[name](expected)


def score_predictions(
    task: Task,
    predictions: Sequence[str],
    references: Sequence[str],
    target_language: str | None,
    lowercase: bool = False,
    labels: Sequence[str] | None = None,
) -> dict[str, Score]:
    """All metrics of a task, with 95% bootstrap confidence intervals.

    Args:
        task: decides the metrics (see ``METRICS_OF_TASK``).
        predictions: one text an example; may be empty texts.
        references: the expected texts, in the same order.
        target_language: name or code; decides BLEU's tokenizer (see ``bleu_tokenizer``).
        lowercase: for BLEU and chrF++, compare lower-cased texts; the others never see case.
        labels: of a classification, beside those that occur in ``references``.

    Raises:
        DataError: no texts, different counts, or an empty reference.
        UsageError: no tokenizer for the target language.
    """
    expected = Expected(references, target_language, lowercase, labels)
    expected.check_count(predictions)
    return {name: _score(METRICS[name](expected), predictions) for name in METRICS_OF_TASK[task]}


def _score(metric: Metric, predictions: Sequence[str]) -> Score:
    statistics = metric.statistics(predictions)
    low, high = confidence_interval(metric, statistics)
    signature = metric.signature({"bs": NUM_RESAMPLES, "seed": SEED})
    return Score(corpus_score(metric, statistics), signature, low, high)


def corpus_score(metric: Metric, statistics: Array) -> float:
    """Score of all examples, from their statistics ``[examples, statistics]``."""
    return float(metric.scores(statistics.sum(0, keepdims=True))[0])
