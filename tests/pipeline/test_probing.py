"""Scores by probes from a recipe: its texts, its labels, and the run that follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from neft.errors import ArchitectureError, DataError
from neft.models import load_model
from neft.neurons import NeuronScores, NeuronSet
from neft.pipeline.probing import check_probe, probe_scores
from neft.pipeline.run import run
from neft.recipe import Recipe, load_recipe
from neft.scoring.probe import fit_probes, score_by_probe

if TYPE_CHECKING:
    from conftest import TinyModel, TinyRecipe, TinyTokenizer

LABELS = ["yes", "no", "maybe"]
WORDS = {"yes": "aab", "no": "wxyz", "maybe": "mnomn"}


def rows(num_rows: int) -> list[dict[str, Any]]:
    """Labels by name and by number; a text says its label."""
    return [
        {
            "premise": f"{number} {WORDS[LABELS[number % 3]]}",
            "hypothesis": WORDS[LABELS[number % 3]] * (1 + number % 2),
            "label": LABELS[number % 3] if number % 2 else number % 3,
        }
        for number in range(num_rows)
    ]


@pytest.fixture
def nli(tiny_recipe: TinyRecipe, tmp_path: Path):
    """``nli(**changes)``: a recipe that classifies; keywords as of ``tiny_recipe``."""

    def make(**changes: Any) -> Recipe:
        file = tiny_recipe(
            tmp_path,
            data={
                "task": "classification",
                "labels": LABELS,
                "template": "{premise} / {hypothesis}",
                **{split: str(tmp_path / f"{split}.jsonl") for split in ("train", "dev", "test")},
            },
            score={"method": "probe", "probe": {"folds": 2}},
            warmup=None,
            **changes,
        )
        for split, num_rows in {"train": 18, "dev": 4, "test": 5}.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows(num_rows))
            (tmp_path / f"{split}.jsonl").write_text(lines)
        return load_recipe(file)

    return make


def test_texts_are_the_prompts_of_the_training_split(nli, tiny_tokenizer: TinyTokenizer) -> None:
    texts, labels = check_probe(nli())
    tokenizer = tiny_tokenizer()
    assert labels == [LABELS[number % 3] for number in range(18)]
    assert [tokenizer.decode(text) for text in texts] == [
        "{premise} / {hypothesis}".format_map(row) for row in rows(18)
    ]


@pytest.mark.parametrize("place", ["score.probe", "data.train_limit"])
def test_the_first_texts(place: str, nli) -> None:
    value = {"folds": 2, "limit": 7} if place == "score.probe" else 7
    texts, labels = check_probe(nli(**{place: value}))
    assert (texts, labels) == tuple(part[:7] for part in check_probe(nli()))


def test_long_texts_are_dropped_or_cut_as_in_training(nli) -> None:
    everything, all_labels = check_probe(nli())
    short = [len(text) <= 15 for text in everything]
    assert 0 < sum(short) < 18
    texts, labels = check_probe(nli(**{"data.max_length": 15}))
    assert texts == [text for text, fits in zip(everything, short, strict=True) if fits]
    assert labels == [label for label, fits in zip(all_labels, short, strict=True) if fits]
    texts, labels = check_probe(nli(**{"data.max_length": 15, "data.overlong": "truncate"}))
    assert texts == [text[:15] for text in everything]
    assert labels == all_labels


def test_scores_are_those_of_the_parts(nli, tiny_model: TinyModel) -> None:
    recipe = nli(**{"score.modules": ["down", "q"], "score.probe": {"layers": [1], "folds": 3}})
    scores = probe_scores(recipe)
    probes = fit_probes(tiny_model(), *check_probe(recipe), layers=[1], folds=3)
    expected = score_by_probe(tiny_model(), probes, ["down", "q"])
    assert scores.projections == expected.projections
    for name, distances in expected.distances.items():
        np.testing.assert_array_equal(scores.distances[name], distances)
    assert scores.provenance == expected.provenance | {"before": recipe.model.path}
    assert scores.provenance["accuracies"][0] > scores.provenance["chance"]


def test_weights_are_compared_in_the_precision_in_which_they_are_stored(
    nli, tiny_model: TinyModel
) -> None:
    recipe = nli(**{"model.dtype": "bfloat16"})
    scores = probe_scores(recipe)
    probes = fit_probes(load_model(recipe.model), *check_probe(recipe), folds=2)
    expected = score_by_probe(tiny_model(), probes)  # float32, as in the file
    for name, distances in expected.distances.items():
        np.testing.assert_array_equal(scores.distances[name], distances)


@pytest.mark.parametrize(
    ("changes", "error", "fault"),
    [
        ({"data.train_limit": 1}, DataError, "two labels or more, but all have 'yes'"),
        ({"data.train_limit": 5}, DataError, "Label 'maybe' has 1 of the 5 texts"),
        ({"data.max_length": 3}, DataError, "There are no texts"),
        (
            {"data.template": "{premise}" * 40},
            DataError,
            r"Text 1 of \d+ has 2\d\d tokens, more than the 128 .* set max_length to 128",
        ),
        ({"score.probe": {"layers": [2]}}, ArchitectureError, r"layers is \[2\]"),
    ],
)
def test_bad_input_is_found_before_the_model_is_loaded(
    changes: dict[str, Any],
    error: type[Exception],
    fault: str,
    nli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = nli(**changes)
    monkeypatch.setattr("neft.pipeline.probing.load_model", lambda *_: pytest.fail("loaded"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 128})
    )
    with pytest.raises(error, match=fault):
        probe_scores(recipe)


def test_a_run_without_warmup(nli, tmp_path: Path) -> None:
    run(nli(), say=lambda _: None)
    folder = tmp_path / "run"
    assert not (folder / "warmup").exists()
    scores = NeuronScores.load(folder / "score" / "scores.safetensors")
    chosen = NeuronSet.load(folder / "select" / "neurons.json")
    assert chosen == scores.select(percent=9)
    threshold = min(scores.distances[name][neurons].min() for name, neurons in chosen.items())
    assert sum((of > threshold).sum() for of in scores.distances.values()) < len(chosen)
    assert (folder / "train" / "adapter").is_dir()
