"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004), by rouge-score, over words of every script."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from importlib.metadata import version
from typing import Any, Literal, Protocol

import numpy as np

from neft.evaluation.languages import SPACELESS_SCRIPTS
from neft.evaluation.metric import Array, Expected, format_signature


class _Tokenizer(Protocol):
    def tokenize(self, text: str) -> list[str]: ...


class UnicodeWords:
    """Lower-cased words of letters, marks and digits of any script.

    Where a script has no spaces between words (see ``SPACELESS_SCRIPTS``), each character with its marks
    is a word. Texts are brought to Unicode's form NFC first, so that an accent is one thing however it
    was typed. All else, punctuation and symbols, only separates words.
    """

    def tokenize(self, text: str) -> list[str]:
        """Split one text; may give no words."""
        words: list[str] = _word_pattern().findall(unicodedata.normalize("NFC", text).lower())
        return words


@cache
def _word_pattern() -> Any:
    import regex

    # By extensions: the long-vowel mark of Japanese belongs to two scripts, and is Common itself.
    scripts = "".join(rf"\p{{scx={name}}}" for name in SPACELESS_SCRIPTS)
    written = r"[\p{L}\p{M}\p{N}]"
    return regex.compile(rf"(?V1)[{written}&&[{scripts}]]\p{{M}}*|[{written}--[{scripts}]]+")


class Rouge:
    """Mean F1 of one kind of ROUGE over the examples; no stemming."""

    def __init__(
        self, kind: Literal["rouge1", "rouge2", "rougeL"], expected: Expected, legacy: bool = False
    ) -> None:
        """``legacy`` takes rouge-score's own tokenizer, as the paper: a word is of a-z and 0-9."""
        self._kind = kind
        self._references = expected.references
        self._legacy = legacy

    @cached_property
    def _scorer(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer

        tokenizer: _Tokenizer = DefaultTokenizer() if self._legacy else UnicodeWords()
        return RougeScorer([self._kind], tokenizer=tokenizer)

    def statistics(self, predictions: Sequence[str]) -> Array:
        """F1 in 0..1, and 1: the number of examples once summed."""
        pairs = zip(self._references, predictions, strict=True)
        return np.array(
            [(self._scorer.score(*pair)[self._kind].fmeasure, 1.0) for pair in pairs], np.float64
        )

    def scores(self, sums: Array) -> Array:
        """Mean F1 in percent."""
        return 100.0 * sums[:, 0] / sums[:, 1]

    def signature(self, resampling: Mapping[str, int]) -> str:
        """Measure, case, tokenizer, stemming and version of rouge-score."""
        choices = {
            "measure": "f1",
            "case": "lc",
            "tok": "a-z0-9" if self._legacy else "unicode-words,spaceless-scripts-by-char",
            "stem": "no",
            "version": f"rouge-score-{version('rouge-score')}",
        }
        return format_signature(resampling, choices)
