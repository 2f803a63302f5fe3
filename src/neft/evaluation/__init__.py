"""Evaluation: what a model generates for the test split, and how good that is."""

from neft.evaluation.generate import generate
from neft.evaluation.metrics import (
    Score,
    accuracy,
    bleu_tokenizer,
    corpus_scores,
    score_predictions,
)

__all__ = [
    "Score",
    "accuracy",
    "bleu_tokenizer",
    "corpus_scores",
    "generate",
    "score_predictions",
]
