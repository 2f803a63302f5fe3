"""Metrics against sacrebleu's command line, and by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from neft.errors import DataError, UsageError
from neft.evaluation import accuracy, bleu_tokenizer, corpus_scores, score_predictions

FRENCH = (
    ["Le chat est assis sur le tapis .", "Ouvrir un Fichier", ""],
    ["Le chat s'assoit sur le tapis.", "ouvrir le fichier", "Annuler"],
)
CHINESE = (["我们明天去北京。", "打开文件"], ["我们明天要去北京。", "打开一个文件"])


def by_command_line(predictions, references, tmp_path, *arguments: str) -> dict[str, object]:
    (tmp_path / "reference.txt").write_text("\n".join(references) + "\n", encoding="utf-8")
    (tmp_path / "prediction.txt").write_text("\n".join(predictions) + "\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "sacrebleu", "reference.txt", "-i", "prediction.txt", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("texts", "language", "tokenizer", "lowercase"),
    [
        (FRENCH, "French", "13a", False),
        (FRENCH, "fr", "13a", True),
        (CHINESE, "Chinese", "zh", False),
    ],
)
def test_scores_are_sacrebleus(texts, language, tokenizer, lowercase, tmp_path) -> None:
    scores = corpus_scores(*texts, language, lowercase)
    flags = [
        "-m",
        "bleu",
        "chrf",
        "--tokenize",
        tokenizer,
        "-w",
        "6",
        *["-lc", "--chrf-lowercase"] * lowercase,
    ]
    expected = {
        entry["name"].removesuffix("2"): entry
        for entry in by_command_line(*texts, tmp_path, *flags)
    }
    assert list(scores) == ["BLEU", "chrF"]
    for name, score in scores.items():
        assert score.score == pytest.approx(expected[name]["score"], abs=1e-6)
        assert score.signature == expected[name]["signature"]
        assert 0 < score.score < 100


def test_identical_texts_score_100() -> None:
    texts = ["un deux trois quatre cinq", "six sept huit neuf dix"]
    for score in corpus_scores(texts, texts, "fr").values():
        assert score.score == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [
        ("Chinese", "zh"),
        ("Simplified Chinese", "zh"),
        ("zh-CN", "zh"),
        ("ZH_hans", "zh"),
        ("zho_Hant", "zh"),
        ("Chinese (Taiwan)", "zh"),
        ("Thai", "char"),
        ("km", "char"),
        ("French", "13a"),
        ("fr-TH", "13a"),
        ("hi", "13a"),
        ("Maori", "13a"),
        ("Māori", "13a"),
        ("", "13a"),
        (None, "13a"),
    ],
)
def test_tokenizer_of_language(language, tokenizer) -> None:
    assert bleu_tokenizer(language) == tokenizer


@pytest.mark.parametrize(
    ("language", "module", "extra"),
    [("Japanese", "MeCab", "ja"), ("ja-JP", "MeCab", "ja"), ("Korean", "mecab_ko", "ko")],
)
def test_missing_tokenizer_is_an_error(language, module, extra) -> None:
    try:
        __import__(module)
    except ImportError:
        with pytest.raises(UsageError, match=rf"{language}.*sacrebleu\[{extra}\]"):
            bleu_tokenizer(language)
    else:
        assert bleu_tokenizer(language) == f"{extra}-mecab"


def test_accuracy_by_hand() -> None:
    score = accuracy(
        [" Neutral", "entailment.", "entailment"], ["neutral", "entailment", "entailment"]
    )
    assert math.isclose(score.score, 200 / 3)
    assert score.signature == "match:exact|case:fold|n:3"


def test_task_decides_the_metrics() -> None:
    texts = ["neutral"], ["neutral"]
    assert list(score_predictions("classification", *texts, None)) == ["accuracy"]
    assert list(score_predictions("summarization", *texts, "Chinese")) == ["BLEU", "chrF"]


@pytest.mark.parametrize("metric", [accuracy, lambda p, r: corpus_scores(p, r, "fr")])
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], ["a", "b"], "1 predictions but 2 references"),
        ([], [], "No examples to score"),
        (["a", "b"], ["a", " "], "Reference 2 of 2 is empty"),
    ],
)
def test_unusable_pairs_are_refused(metric, predictions, references, message) -> None:
    with pytest.raises(DataError, match=message):
        metric(predictions, references)
