"""ROUGE against definitions written out, and against rouge-score itself where the tokenizers agree."""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from functools import cache
from importlib.metadata import version

import pytest
from rouge_score.rouge_scorer import RougeScorer

from neft.evaluation import score_predictions
from neft.evaluation.rouge import UnicodeWords


def f1(overlap: int, predicted: int, expected: int) -> float:
    return 2 * overlap / (predicted + expected) if predicted + expected else 0.0


def naive(kind: str, predicted: list[str], expected: list[str]) -> float:
    if kind == "L":
        return f1(longest_common(tuple(predicted), tuple(expected)), len(predicted), len(expected))
    size = int(kind)
    one, other = (
        Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
        for words in (predicted, expected)
    )
    return f1((one & other).total(), one.total(), other.total())


@cache
def longest_common(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return longest_common(one[:-1], other[:-1]) + 1
    return max(longest_common(one[:-1], other), longest_common(one, other[:-1]))


def scored(predictions: list[str], references: list[str]) -> dict[str, float]:
    scores = score_predictions("summarization", predictions, references, None)
    return {name: score.score for name, score in scores.items()}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("L'Été  arrive, déjà-vu: 42 %s!", ["l", "été", "arrive", "déjà", "vu", "42", "s"]),
        ("打开 LibreOffice 7文件。", ["打", "开", "libreoffice", "7", "文", "件"]),
        ("हिन्दी में सारांश।", ["हिन्दी", "में", "सारांश"]),
        ("مُلخَّص بالعربية، ١٢", ["مُلخَّص", "بالعربية", "١٢"]),
        ("한국어 요약", ["한국어", "요약"]),
        ("サーバーーを", ["サ", "ー", "バ", "ー", "ー", "を"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("ཡིག་ཆ", ["ཡི", "ག", "ཆ"]),
        ("Straße ΣΟΦΟΣ ÇA", ["straße", "σοφο\u03c2", "ça"]),
        ("x_y\tz\u00a0a\nb", ["x", "y", "z", "a", "b"]),
        ("…!? ¡¿ — 🙂", []),
        ("", []),
    ],
)
def test_words_of_every_script(text, words) -> None:
    assert UnicodeWords().tokenize(text) == words
    assert UnicodeWords().tokenize(unicodedata.normalize("NFD", text)) == words


@pytest.mark.parametrize(
    "words",
    ["the cat sat", "été déjà où", "文 件 打", "किताब में है", "كتاب في البيت", "책 읽다 집"],
)
def test_scores_by_definition(words) -> None:
    rng = random.Random(0)
    references = [" ".join(rng.choices(words.split(), k=9)) for _ in range(20)]
    predictions = [" ".join(rng.choices(words.split(), k=rng.randint(0, 12))) for _ in range(20)]
    found = scored(predictions, references)
    tokenize = UnicodeWords().tokenize
    for kind in "12L":
        values = [
            naive(kind, tokenize(prediction), tokenize(reference))
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        assert found[f"ROUGE-{kind}"] == pytest.approx(100 * sum(values) / 20)
        assert 10 < found[f"ROUGE-{kind}"] < 90


def test_legacy_is_rouge_scores_default() -> None:
    predictions = ["Le café déjà fermé", "打开 LibreOffice", "The cats sat"]
    references = ["Le café est fermé", "启动 LibreOffice", "the cat sat down"]
    found = scored(predictions, references)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for kind in "12L":
        values = [
            scorer.score(reference, prediction)[f"rouge{kind}"].fmeasure
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        assert found[f"ROUGE-{kind} (legacy)"] == pytest.approx(100 * sum(values) / 3)
    # Of the second text the library's words are "libreoffice" alone.
    assert found["ROUGE-1 (legacy)"] > found["ROUGE-1"]


def test_signatures() -> None:
    scores = score_predictions("summarization", ["a b"], ["a c"], "Chinese", lowercase=True)
    assert list(scores) == [f"ROUGE-{kind}{mode}" for mode in ("", " (legacy)") for kind in "12L"]
    start = "nrefs:1|bs:1000|seed:12345|measure:f1|case:lc|tok:"
    end = f"|stem:no|version:rouge-score-{version('rouge-score')}"
    for name, score in scores.items():
        legacy = name.endswith("(legacy)")
        tokens = "a-z0-9" if legacy else "unicode-words,spaceless-scripts-by-char"
        assert score.signature == f"{start}{tokens}{end}"


def test_interval_is_a_bootstrap_of_the_mean() -> None:
    references = ["a b c d"] * 40
    predictions = ["a b c d"] * 30 + ["x"] * 10
    score = score_predictions("summarization", predictions, references, None)["ROUGE-1"]
    rng = random.Random(1)
    means = sorted(sum(rng.choices([100.0] * 30 + [0.0] * 10, k=40)) / 40 for _ in range(4000))
    assert score.score == pytest.approx(75)
    assert score.low == pytest.approx(means[100], abs=2.6)
    assert score.high == pytest.approx(means[-101], abs=2.6)


def test_perfect_and_empty_predictions() -> None:
    texts = ["un deux trois", "打开文件"]
    perfect, nothing = scored(texts, texts), scored(["", ""], texts)
    assert [perfect[f"ROUGE-{kind}"] for kind in "12L"] == pytest.approx([100] * 3)
    assert set(nothing.values()) == {0.0}
