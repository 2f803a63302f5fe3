"""BLEU (Papineni et al., 2002) and chrF++ (Popović, 2017), by sacrebleu."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from neft.evaluation.languages import bleu_tokenizer, check_spaces
from neft.evaluation.metric import Array, Expected


class SacreBleuMetric:
    """Any metric of sacrebleu against one reference an example."""

    def __init__(self, make: Callable[[Sequence[Sequence[str]]], Any], expected: Expected) -> None:
        """``make`` gets sacrebleu's metric from its lists of references."""
        self._make = make
        self._references = list(expected.references)

    @cached_property
    def _metric(self) -> Any:
        # Late, because sacrebleu then counts the n-grams of all references.
        return self._make([self._references])

    # Public methods would count each prediction's n-grams anew for every resample; those of its own
    # significance tests don't.

    def statistics(self, predictions: Sequence[str]) -> Array:
        """Counts of n-grams, ``[examples, statistics]``."""
        return np.array(self._metric._extract_corpus_statistics(predictions, None), np.float64)

    def scores(self, sums: Array) -> Array:
        """Scores ``[samples]`` of summed counts ``[samples, statistics]``."""
        score = self._metric._compute_score_from_stats
        return np.array([score(counts).score for counts in sums.tolist()])

    def signature(self, resampling: Mapping[str, int]) -> str:
        """As sacrebleu writes it."""
        signature = self._metric.get_signature()
        for name, value in resampling.items():
            signature.update(name, value)
        return str(signature)


def bleu(expected: Expected) -> SacreBleuMetric:
    """BLEU with the tokenizer of the target language.

    Raises:
        UsageError: no tokenizer for the target language.
    """
    tokenizer = bleu_tokenizer(expected.target_language)
    if tokenizer == "13a":
        check_spaces(expected.references, expected.target_language)

    def make(references: Sequence[Sequence[str]]) -> Any:
        from sacrebleu.metrics import BLEU

        # force: no advice about the spaces that a model writes before a full stop.
        return BLEU(
            lowercase=expected.lowercase, tokenize=tokenizer, references=references, force=True
        )

    return SacreBleuMetric(make, expected)


def chrf_plus_plus(expected: Expected) -> SacreBleuMetric:
    """chrF++: F2 over characters up to 6-grams and words up to bigrams."""

    def make(references: Sequence[Sequence[str]]) -> Any:
        from sacrebleu.metrics import CHRF

        return CHRF(word_order=2, lowercase=expected.lowercase, references=references)

    return SacreBleuMetric(make, expected)
