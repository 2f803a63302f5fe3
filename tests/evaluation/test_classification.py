"""Accuracy and macro-F1 against counts written out."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from neft.evaluation import score_predictions


def naive_macro_f1(predictions, references, labels) -> float:
    values = []
    for label in labels:
        pairs = list(zip(predictions, references, strict=True))
        hits = sum(pair == (label, label) for pair in pairs)
        false_alarms = sum(one == label != other for one, other in pairs)
        misses = sum(one != label == other for one, other in pairs)
        if hits + false_alarms + misses:
            values.append(Fraction(2 * hits, 2 * hits + false_alarms + misses))
    return float(100 * sum(values) / len(values))


@pytest.mark.parametrize("labels", [None, ("yes", "no", "maybe"), ("no", "yes", "maybe", "never")])
def test_by_definition(labels) -> None:
    rng = random.Random(0)
    references = rng.choices(["yes", "no", "maybe"], [5, 3, 1], k=60)
    predictions = [rng.choice([reference, "yes", "none of these", ""]) for reference in references]
    scores = score_predictions("classification", predictions, references, None, labels=labels)
    hits = sum(one == other for one, other in zip(predictions, references, strict=True))
    assert scores["accuracy"].score == pytest.approx(100 * hits / 60)
    expected = naive_macro_f1(predictions, references, labels or {*references})
    assert scores["macro-F1"].score == pytest.approx(expected)
    for score in scores.values():
        assert 0 < score.low < score.score < score.high < 100


def test_given_label_that_is_only_predicted_counts() -> None:
    texts = ["a", "b", "c"], ["a", "b", "b"]
    without = score_predictions("classification", *texts, None)["macro-F1"]
    given = score_predictions("classification", *texts, None, labels=("a", "b", "c"))["macro-F1"]
    assert without.score == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert given.score == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)


def test_perfect_predictions_score_100_whatever_labels_are_given() -> None:
    texts = ["a", "b"] * 5
    scores = score_predictions("classification", texts, texts, None, labels=("a", "b", "c"))
    for score in scores.values():
        assert (score.score, score.low, score.high) == (100, 100, 100)


def test_case_and_outer_space_do_not_count_and_all_else_does() -> None:
    references = ["Neutral", "neutral", "STRASSE"]
    scores = score_predictions(
        "classification", [" neutral\n", "neutral.", "Straße"], references, None, labels=["Neutral"]
    )
    assert scores["accuracy"].score == pytest.approx(200 / 3)
    assert scores["accuracy"].signature == "nrefs:1|bs:1000|seed:12345|match:exact|case:fold"
    assert scores["macro-F1"].score == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert scores["macro-F1"].signature == (
        "nrefs:1|bs:1000|seed:12345|labels:2|match:exact|case:fold"
    )


def test_empty_predictions() -> None:
    for score in score_predictions("classification", ["", ""], ["a", "b"], None).values():
        assert (score.score, score.low, score.high) == (0, 0, 0)
