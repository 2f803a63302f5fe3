"""p-values against sacrebleu's randomization test, and against all exchanges of a small test set."""

from __future__ import annotations

import itertools
import random

import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from neft.errors import DataError, UsageError
from neft.evaluation import significance
from neft.evaluation.metric import Expected
from neft.evaluation.metrics import METRICS, corpus_score

WORDS = ["ouvrir", "fermer", "le", "la", "fichier", "fenêtre", "dans", "cette", "liste"]


def texts(count: int) -> list[str]:
    rng = random.Random(count)
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 12))) for _ in range(count)]


def noisy(references: list[str], share: float, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [
        " ".join(rng.choice(WORDS) if rng.random() < share else word for word in text.split())
        for text in references
    ]


@pytest.mark.parametrize(
    ("name", "metric"), [("BLEU", BLEU(lowercase=True)), ("chrF++", CHRF(6, 2, lowercase=True))]
)
def test_as_sacrebleu(name, metric) -> None:
    # sacrebleu's random bits and ours come out alike where the trials of a block fill whole words.
    references = texts(64)
    systems = {
        f"noise {share}": noisy(references, share, seed=number)
        for number, share in enumerate([0.3, 0.33, 0.36, 0.5])
    }
    found = significance(
        name, systems, references, "noise 0.3", target_language="fr", lowercase=True
    )
    signatures, expected = PairedTest(list(systems.items()), {name: metric}, [references])()
    _, (base, *others) = expected.values()
    assert list(found) == list(systems)[1:]
    for paired, other in zip(found.values(), others, strict=True):
        assert paired.difference == pytest.approx(other.score - base.score)
        # Not exactly: sacrebleu does not count trials whose difference is the one found.
        assert paired.p_value == pytest.approx(other.p_value, abs=5e-4)
        assert paired.signature == str(*signatures.values())
    p_values = [paired.p_value for paired in found.values()]
    assert 0.05 < max(p_values) < 1
    assert min(p_values) < 0.01


@pytest.mark.parametrize("name", METRICS)
def test_against_all_exchanges(name) -> None:
    """Of 7 examples there are 128 ways to exchange outputs."""
    if name in ("accuracy", "macro-F1"):
        references = list("aabbaba")
        system, baseline = list("aabbabb"), list("abbaabb")
    else:
        references = texts(7)
        system, baseline = noisy(references, 0.2, 1), noisy(references, 0.5, 2)
    metric = METRICS[name](Expected(references, "fr"))

    def difference(exchanged: tuple[bool, ...]) -> float:
        pairs = list(zip(system, baseline, exchanged, strict=True))
        one = metric.statistics([b if swap else a for a, b, swap in pairs])
        other = metric.statistics([a if swap else b for a, b, swap in pairs])
        return corpus_score(metric, one) - corpus_score(metric, other)

    # Exchanging all gives the same absolute difference, so half of the ways are enough.
    differences = [
        difference((False, *rest)) for rest in itertools.product([False, True], repeat=6)
    ]
    as_large = sum(abs(value) >= abs(differences[0]) - 1e-9 for value in differences)
    found = significance(
        name, {"new": system, "old": baseline}, references, "old", target_language="fr"
    )["new"]
    assert found.difference == pytest.approx(differences[0])
    assert found.p_value == pytest.approx(as_large / 64, abs=0.015)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("predictions", [["a b c d", "d e f", ""], ["", "", ""], ["x"] * 3])
def test_systems_alike(name, predictions) -> None:
    systems = {"base": predictions, "same": list(predictions)}
    found = significance(name, systems, ["a b c d", "d e", "f"], "base", target_language="fr")
    assert found["same"].difference == 0
    assert found["same"].p_value == 1


@pytest.mark.parametrize("name", METRICS)
def test_one_example_shows_nothing(name) -> None:
    systems = {"base": ["b"], "better": ["a"]}
    found = significance(name, systems, ["a"], "base", target_language="fr")
    assert found["better"].p_value == 1


def test_runs_are_no_independent_evidence() -> None:
    references = texts(40)
    systems = {"old": noisy(references, 0.4, 1), "new": noisy(references, 0.33, 2)}
    once = significance("BLEU", systems, references, "old", target_language="fr")["new"]
    thrice = {name: predictions * 3 for name, predictions in systems.items()}
    together = significance(
        "BLEU", thrice, references * 3, "old", target_language="fr", num_runs=3
    )["new"]
    apart = significance("BLEU", thrice, references * 3, "old", target_language="fr")["new"]
    assert together.difference == pytest.approx(once.difference)
    assert together.p_value == once.p_value
    assert apart.p_value < once.p_value / 2
    assert together.signature == f"{once.signature}|runs:3"


@pytest.mark.parametrize(
    ("systems", "references", "num_runs", "error", "message"),
    [
        ({"old": ["a"]}, ["a"], 1, UsageError, "No baseline 'base' among the systems old"),
        ({"base": ["a"], "new": []}, ["a"], 1, DataError, "new: 0 predictions but 1 references"),
        ({"base": ["a"]}, [" "], 1, DataError, "Reference 1 of 1 is empty"),
        ({"base": ["a"] * 4}, list("abba"), 2, DataError, "test set 2 times over"),
        ({"base": ["a"] * 3}, list("aaa"), 2, DataError, "test set 2 times over"),
    ],
)
def test_unusable_systems_are_refused(systems, references, num_runs, error, message) -> None:
    with pytest.raises(error, match=message):
        significance("BLEU", systems, references, "base", target_language="fr", num_runs=num_runs)


def test_unknown_metric() -> None:
    with pytest.raises(UsageError, match=r"Unknown metric 'bleu'.*BLEU, chrF\+\+"):
        significance("bleu", {"a": ["x"]}, ["x"], "a", target_language="fr")
