"""Metrics of generated texts: no score without the signature that says how it was computed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from neft.errors import DataError, UsageError
from neft.recipe import Task


@dataclass(frozen=True)
class Score:
    """A metric's value and how it was computed."""

    score: float
    """In 0..100, higher is better."""
    signature: str
    """sacrebleu's, or in its form: what another person needs to get the same number."""


# Where no space separates words, BLEU needs a tokenizer of its own; sacrebleu's 13a is for all other
# languages. Names and codes as ISO 639, BCP 47 and FLORES write them.
_TOKENIZERS = {
    "zh": ("zh", "zho", "chi", "cmn", "yue", "chinese", "mandarin", "cantonese", "中文"),
    "ja-mecab": ("ja", "jpn", "japanese", "日本語"),
    "ko-mecab": ("ko", "kor", "korean", "한국어"),
    "char": ("th", "tha", "thai", "lo", "lao", "km", "khm", "khmer", "my", "mya", "burmese"),
}
_TOKENIZER_OF = {name: tokenizer for tokenizer, names in _TOKENIZERS.items() for name in names}


def bleu_tokenizer(target_language: str | None) -> str:
    """Name of sacrebleu's tokenizer for a language.

    ``zh`` for Chinese, ``ja-mecab`` and ``ko-mecab`` for Japanese and Korean, ``char`` for Thai, Lao,
    Khmer and Burmese, ``13a`` for all others and where the language is not known.

    Args:
        target_language: a name or code: ``"French"``, ``"Simplified Chinese"``, ``"zh-CN"``,
            ``"zho_Hans"``.

    Raises:
        UsageError: the language's tokenizer is not installed.
    """
    first, *others = re.split(r"[\s_()-]+", (target_language or "").strip().casefold())
    # Two letters name a language only in front: in "fr-TH" they are a country.
    names = [first, *(word for word in others if len(word) > 2)]
    tokenizer = next((_TOKENIZER_OF[name] for name in names if name in _TOKENIZER_OF), "13a")
    if tokenizer.endswith("-mecab"):
        _require_mecab(tokenizer, str(target_language))
    return tokenizer


def _require_mecab(tokenizer: str, target_language: str) -> None:
    from sacrebleu.metrics import BLEU

    try:
        BLEU(tokenize=tokenizer)
    except RuntimeError as error:
        extra = tokenizer.removesuffix("-mecab")
        raise UsageError(
            f"target_language {target_language!r}: BLEU needs sacrebleu's tokenizer {tokenizer}, which "
            f"is not installed. Install it with: pip install 'sacrebleu[{extra}]'."
        ) from error


def corpus_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    target_language: str | None,
    lowercase: bool = False,
) -> dict[str, Score]:
    """BLEU (Papineni et al., 2002) and chrF (Popović, 2015) over a corpus, by sacrebleu.

    Args:
        predictions: one text an example; may be empty texts.
        references: the expected texts, in the same order.
        target_language: name or code; decides BLEU's tokenizer (see ``bleu_tokenizer``).
        lowercase: compare lower-cased texts.

    Raises:
        DataError: no texts, different counts, or an empty reference.
        UsageError: the language's tokenizer is not installed.
    """
    from sacrebleu.metrics import BLEU, CHRF

    _check_pairs(predictions, references)
    metrics = {
        "BLEU": BLEU(lowercase=lowercase, tokenize=bleu_tokenizer(target_language)),
        "chrF": CHRF(lowercase=lowercase),
    }
    return {
        name: Score(
            metric.corpus_score(list(predictions), [list(references)]).score,
            str(metric.get_signature()),
        )
        for name, metric in metrics.items()
    }


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> Score:
    """Share of predictions that name the expected label, in percent.

    Case and outer whitespace do not count; everything else does.

    Raises:
        DataError: no texts, different counts, or an empty reference.
    """
    _check_pairs(predictions, references)
    hits = sum(
        prediction.strip().casefold() == reference.strip().casefold()
        for prediction, reference in zip(predictions, references, strict=True)
    )
    return Score(100.0 * hits / len(references), f"match:exact|case:fold|n:{len(references)}")


def score_predictions(
    task: Task,
    predictions: Sequence[str],
    references: Sequence[str],
    target_language: str | None,
    lowercase: bool = False,
) -> dict[str, Score]:
    """The metrics of a task: accuracy for classification, BLEU and chrF for all that writes text."""
    if task == "classification":
        return {"accuracy": accuracy(predictions, references)}
    return corpus_scores(predictions, references, target_language, lowercase)


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references):
        raise DataError(
            f"{len(predictions)} predictions but {len(references)} references; give one of each for "
            "every example, in the same order."
        )
    if not references:
        raise DataError("No examples to score; give at least one prediction with its reference.")
    for number, reference in enumerate(references, start=1):
        if not reference.strip():
            raise DataError(
                f"Reference {number} of {len(references)} is empty; nothing can be right there. Remove "
                "the example or fill it in."
            )
