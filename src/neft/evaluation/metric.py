"""What a metric is: additive statistics of each example, and a score of their sum.

A corpus, a bootstrap resample and two systems with some of their outputs exchanged are all sums over
examples. Whatever fits this form gets intervals and significance by one mechanism (see ``resampling``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from neft.errors import DataError

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """A metric's value, how it was computed, and how far the choice of test examples moves it."""

    score: float
    """In 0..100, higher is better."""
    signature: str
    """sacrebleu's, or in its form: what another person needs to get the same number."""
    low: float | None = None
    """Lower end of the 95% bootstrap confidence interval; ``None`` in files of older versions."""
    high: float | None = None


@dataclass(frozen=True)
class Expected:
    """What predictions are compared with, and how."""

    references: Sequence[str]
    """One text an example."""
    target_language: str | None = None
    """Name or code; decides BLEU's tokenizer (see ``bleu_tokenizer``)."""
    lowercase: bool = False
    """For BLEU and chrF++; ROUGE and the metrics of labels never see case."""
    labels: Sequence[str] | None = None
    """Of a classification; default: those that occur in ``references``."""

    def __post_init__(self) -> None:
        if not self.references:
            raise DataError(
                "No examples to score; give at least one prediction with its reference."
            )
        for number, reference in enumerate(self.references, start=1):
            if not reference.strip():
                raise DataError(
                    f"Reference {number} of {len(self.references)} is empty; nothing can be right "
                    "there. Remove the example or fill it in."
                )

    def check_count(self, predictions: Sequence[str], whose: str = "") -> None:
        """Raise ``DataError`` unless there is one prediction for each reference."""
        if len(predictions) != len(self.references):
            raise DataError(
                f"{whose}{len(predictions)} predictions but {len(self.references)} references; give "
                "one of each for every example, in the same order."
            )


class Metric(Protocol):
    """A metric together with what it compares predictions with."""

    def statistics(self, predictions: Sequence[str]) -> Array:
        """Statistics ``[examples, statistics]`` that can be summed over examples."""

    def scores(self, sums: Array) -> Array:
        """Scores ``[samples]`` in 0..100 of summed statistics ``[samples, statistics]``."""

    def signature(self, resampling: Mapping[str, int]) -> str:
        """How scores are computed; ``resampling`` is what else was done, under sacrebleu's names."""


def format_signature(resampling: Mapping[str, int], choices: Mapping[str, object]) -> str:
    """A signature in sacrebleu's form, for metrics that sacrebleu does not have."""
    fields = {"nrefs": 1, **resampling, **choices}
    return "|".join(f"{key}:{value}" for key, value in fields.items())
