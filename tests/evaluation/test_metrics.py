"""The table of metrics, and what is refused before and after there are predictions."""

from __future__ import annotations

from typing import get_args

import pytest

from neft.errors import DataError, UsageError
from neft.evaluation import METRICS_OF_TASK, Score, check_metrics, score_predictions
from neft.recipe import Task

TASKS = get_args(Task)


def test_every_task_has_metrics() -> None:
    assert set(METRICS_OF_TASK) == set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_one_example(task) -> None:
    scores = score_predictions(task, ["un deux"], ["un trois"], "fr")
    assert tuple(scores) == METRICS_OF_TASK[task]
    for score in scores.values():
        assert score.low == score.score == score.high


@pytest.mark.parametrize("task", TASKS)
def test_scores_come_out_the_same_again(task) -> None:
    predictions = ["a b c", "d e", "f g h"] * 3
    references = ["a b", "d e", "h g f"] * 3
    one, other = (score_predictions(task, predictions, references, "fr") for _ in range(2))
    assert one == other


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], ["a", "b"], "1 predictions but 2 references"),
        (["a", "b"], ["a"], "2 predictions but 1 references"),
        ([], [], "No examples to score"),
        (["a", "b"], ["a", " "], "Reference 2 of 2 is empty"),
    ],
)
def test_unusable_pairs_are_refused(task, predictions, references, message) -> None:
    with pytest.raises(DataError, match=message):
        score_predictions(task, predictions, references, "fr")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("references", "message"),
    [([], "No examples to score"), (["a", "\n"], "Reference 2 of 2 is empty")],
)
def test_unusable_references_are_found_without_predictions(task, references, message) -> None:
    with pytest.raises(DataError, match=message):
        check_metrics(task, "fr", references)


@pytest.mark.parametrize("task", ["translation", "prompt", "chat"])
def test_missing_tokenizer_is_found_without_predictions(task) -> None:
    with pytest.raises(UsageError, match="target_language is missing"):
        check_metrics(task, None, ["打开文件"])
    with pytest.raises(UsageError, match="target_language is missing"):
        score_predictions(task, ["打开"], ["打开文件"], None)
    check_metrics(task, "Chinese", ["打开文件"])


@pytest.mark.parametrize("task", ["summarization", "classification"])
def test_other_metrics_need_no_language(task) -> None:
    check_metrics(task, None, ["打开文件"])


def test_scores_of_older_versions_can_be_read() -> None:
    assert Score(**{"score": 1.5, "signature": "nrefs:1"}) == Score(1.5, "nrefs:1", None, None)
