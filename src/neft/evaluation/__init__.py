"""Evaluation: what a model generates for the test split, how good that is, and what it forgot."""

from neft.evaluation.generate import generate
from neft.evaluation.languages import bleu_tokenizer
from neft.evaluation.loss import TextLoss, target_loss, text_loss
from neft.evaluation.metric import Score
from neft.evaluation.metrics import METRICS_OF_TASK, check_metrics, score_predictions
from neft.evaluation.significance import Paired, significance

__all__ = [
    "METRICS_OF_TASK",
    "Paired",
    "Score",
    "TextLoss",
    "bleu_tokenizer",
    "check_metrics",
    "generate",
    "score_predictions",
    "significance",
    "target_loss",
    "text_loss",
]
