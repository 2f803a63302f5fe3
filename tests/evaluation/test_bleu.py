"""BLEU and chrF++ against sacrebleu's command line and its own intervals."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from sacrebleu.metrics import BLEU, CHRF

from neft.evaluation import score_predictions

FRENCH = (
    ["Le chat est assis sur le tapis .", "Ouvrir un Fichier", "Fermer la fenêtre", ""],
    ["Le chat s'assoit sur le tapis.", "ouvrir le fichier", "Fermer cette fenêtre", "Annuler"],
)
CHINESE = (["我们明天去北京。", "打开文件"], ["我们明天要去北京。", "打开一个文件"])
THAI = (["เปิดไฟล์", "ปิดหน้าต่าง"], ["เปิดแฟ้ม", "ปิดหน้าต่างนี้"])


def by_command_line(predictions, references, tmp_path, *arguments: str) -> list[dict[str, object]]:
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
        (THAI, "Thai", "char", False),
    ],
)
def test_scores_are_sacrebleus(texts, language, tokenizer, lowercase, tmp_path) -> None:
    scores = score_predictions("translation", *texts, language, lowercase)
    flags = ["-m", "bleu", "chrf", "--chrf-word-order", "2", "-w", "6", "--tokenize"]
    flags += [tokenizer, *["-lc", "--chrf-lowercase"] * lowercase]
    expected = by_command_line(*texts, tmp_path, *flags)
    assert list(scores) == ["BLEU", "chrF++"]
    for score, entry in zip(scores.values(), expected, strict=True):
        assert score.score == pytest.approx(entry["score"], abs=1e-6)
        assert score.signature.replace("bs:1000|seed:12345|", "") == entry["signature"]
        assert 0 < score.score < 100
        assert score.low < score.high


def test_interval_of_many_texts(monkeypatch) -> None:
    monkeypatch.setenv("SACREBLEU_SEED", "7")
    references = [f"ouvrir le fichier {n} de la liste {n % 7}" for n in range(203)]
    predictions = [
        text if n % 3 else text.replace("fichier", "dossier") for n, text in enumerate(references)
    ]
    scores = score_predictions("translation", predictions, references, "fr")
    monkeypatch.delenv("SACREBLEU_SEED")
    for name, metric in {"BLEU": BLEU(), "chrF++": CHRF(word_order=2)}.items():
        expected = metric.corpus_score(predictions, [references], n_bootstrap=1000)
        assert scores[name].score == pytest.approx(expected.score)
        assert (scores[name].high - scores[name].low) / 2 == pytest.approx(expected._ci, abs=1e-4)
        assert scores[name].low < expected._mean < scores[name].high
        assert scores[name].signature == str(metric.get_signature())


def test_spaces_before_full_stops_are_nobodys_business(caplog) -> None:
    texts = ["Fin de la ligne ."] * 100
    score_predictions("translation", texts, texts, "fr")
    assert not caplog.records


@pytest.mark.parametrize("language", ["fr", "zh", "th"])
def test_perfect_and_empty_predictions(language) -> None:
    texts = ["un deux trois quatre cinq", "six sept huit neuf dix"]
    for score in score_predictions("translation", texts, texts, language).values():
        assert (score.score, score.low, score.high) == pytest.approx((100, 100, 100))
    for score in score_predictions("translation", ["", ""], texts, language).values():
        assert (score.score, score.low, score.high) == (0, 0, 0)
