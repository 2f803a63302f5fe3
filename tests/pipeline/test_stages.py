"""Which stages a recipe has, and which of them a change of the recipe or its files touches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neft.neurons import Axis, NeuronSet, Projection
from neft.pipeline.run import planned_records
from neft.pipeline.stages import stage_names, stages_of
from neft.recipe import Recipe

ALL = ["prepare", "baseline", "warmup", "score", "select", "train", "evaluate"]
LEARNING = ["prepare", "warmup", "score", "select", "train", "evaluate"]


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "model").mkdir()
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl", "model/config.json"):
        (tmp_path / name).write_text(name)
    return {
        "output": "run",
        "model": {"path": str(tmp_path / "model")},
        "data": {
            "task": "translation",
            "source_language": "English",
            "target_language": "French",
            **{split: str(tmp_path / f"{split}.jsonl") for split in ("train", "dev", "test")},
        },
        "warmup": {"learning_rate": 1e-5, "steps": 10, "evaluate_every": 5},
        "score": {},
        "select": {"percent": 9},
        "train": {"learning_rate": 1e-3, "steps": 10},
        "evaluate": {},
    }


def fingerprints(fields: dict[str, Any]) -> dict[str, str]:
    planned = planned_records(stages_of(Recipe.model_validate(fields)))
    return {name: record.fingerprint for name, record in planned.items()}


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name in ALL if before.get(name) != after.get(name)]


@pytest.mark.parametrize(
    ("place", "value", "touched"),
    [
        ("output", "elsewhere", ["prepare"]),
        ("seed", 1, LEARNING),
        ("model.dtype", "bfloat16", ALL),
        ("model.attn_implementation", "eager", ALL),
        ("data.source_language", "German", ALL),
        ("data.style", "plain", ALL),
        ("data.template", "{source}", ALL),
        ("data.max_length", 512, LEARNING),
        ("data.overlong", "truncate", LEARNING),
        ("data.train_limit", 5, LEARNING),
        ("data.dev_limit", 5, LEARNING),
        ("data.test_limit", 5, ["prepare", "baseline", "evaluate"]),
        ("warmup.learning_rate", 2e-5, LEARNING),
        ("warmup.evaluate_every", 10, LEARNING),
        ("warmup.snapshots", [5], LEARNING),
        ("warmup.report_to", ["tensorboard"], ["prepare"]),
        ("score.modules", ["down"], ["prepare", "score", "select", "train", "evaluate"]),
        ("select.percent", 6, ["prepare", "select", "train", "evaluate"]),
        ("select.which", "highest", ["prepare", "select", "train", "evaluate"]),
        ("select.reversed_percent", 3, ["prepare", "select", "train", "evaluate"]),
        ("warmup.train_limit", 5, LEARNING),
        ("warmup.seed", 0, ["prepare"]),
        ("warmup.seed", 1, LEARNING),
        ("train.group_by_length", True, ["prepare", "train", "evaluate"]),
        ("train.method", "mask", ["prepare", "train", "evaluate"]),
        ("model.config", "config.json", ["prepare"]),
        ("train.learning_rate", 2e-3, ["prepare", "train", "evaluate"]),
        ("train.batch_size", 4, ["prepare", "train", "evaluate"]),
        ("train.report_to", ["tensorboard"], ["prepare"]),
        ("evaluate.max_new_tokens", 4, ["prepare", "baseline", "evaluate"]),
        ("evaluate.lowercase", True, ["prepare", "baseline", "evaluate"]),
    ],
)
def test_change_of_a_field(fields, place, value, touched) -> None:
    before = fingerprints(fields)
    *sections, key = place.split(".")
    section = fields
    for name in sections:
        section = section[name]
    section[key] = value
    assert changed(before, fingerprints(fields)) == touched


@pytest.mark.parametrize(
    ("name", "touched"),
    [
        ("train.jsonl", LEARNING),
        ("dev.jsonl", LEARNING),
        ("test.jsonl", ["prepare", "baseline", "evaluate"]),
        ("model/config.json", ALL),
        ("model/README.md", []),
    ],
)
def test_change_of_a_file(fields, tmp_path, name, touched) -> None:
    before = fingerprints(fields)
    (tmp_path / name).write_text("something else")
    assert changed(before, fingerprints(fields)) == touched


def test_neurons_of_other_data(fields, tmp_path) -> None:
    before = fingerprints(fields)
    (tmp_path / "other.jsonl").write_text("other")
    fields["warmup"]["train"] = str(tmp_path / "other.jsonl")
    # Training, on the data of the recipe, depends on it through the neurons alone.
    assert changed(before, fingerprints(fields)) == LEARNING
    fields["warmup"]["train"] = fields["data"]["train"]
    assert changed(before, fingerprints(fields)) == ["prepare"]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("analysis.limit", 7),
        ("analysis.causal", False),
        ("data.dev_limit", 5),
        ("data.max_length", 99),
        ("data.test_limit", 5),
        ("evaluate.batch_size", 3),
        ("train.learning_rate", 0.5),
    ],
)
def test_what_the_analysis_depends_on(fields, place: str, value: object) -> None:
    fields["analysis"] = {}
    before = fingerprints(fields)
    assert list(before) == [*ALL, "analysis"]
    section, key = place.split(".")
    fields[section][key] = value
    assert fingerprints(fields)["analysis"] != before["analysis"]


def test_an_analysis_is_the_only_stage_that_its_section_touches(fields) -> None:
    before = fingerprints(fields)
    fields["analysis"] = {"limit": 7}
    after = fingerprints(fields)
    assert changed(before, after) == ["prepare"]
    del after["analysis"]
    assert list(after) == list(before)


def test_random_neurons_need_no_warmup(fields) -> None:
    fields["select"]["which"] = "random"
    names = ["prepare", "baseline", "select", "train", "evaluate"]
    before = fingerprints(fields)
    assert list(before) == names
    fields["warmup"]["learning_rate"] = 1.0
    assert changed(before, fingerprints(fields)) == ["prepare"]
    fields["select"]["seed"] = 1
    assert "train" in changed(before, fingerprints(fields))
    del fields["warmup"]
    assert list(fingerprints(fields)) == names


def test_a_set_is_known_by_its_neurons_not_by_its_file(fields, tmp_path) -> None:
    projection = Projection("mlp.up", 0, "up", Axis.ROW, 4, 2)
    for name, indices in {"a": [1], "b": [1], "c": [2]}.items():
        chosen = NeuronSet([projection], {"mlp.up": indices}, {"made": name})
        chosen.save(tmp_path / f"{name}.json")
    found = {}
    for name in "abc":
        fields["select"]["union"] = [str(tmp_path / f"{name}.json")]
        found[name] = fingerprints(fields)
    assert changed(found["a"], found["b"]) == ["prepare"]
    assert changed(found["a"], found["c"]) == ["prepare", "select", "train", "evaluate"]


def test_general_text_touches_evaluations_alone(fields, tmp_path) -> None:
    before = fingerprints(fields)
    (tmp_path / "general.jsonl").write_text("some")
    fields["evaluate"]["general"] = {"text": str(tmp_path / "general.jsonl")}
    first = fingerprints(fields)
    assert changed(before, first) == ["prepare", "baseline", "evaluate"]
    (tmp_path / "general.jsonl").write_text("other")
    assert changed(first, fingerprints(fields)) == ["prepare", "baseline", "evaluate"]


def test_same_files_elsewhere(fields, tmp_path) -> None:
    before = fingerprints(fields)
    for name in ("model", "train.jsonl", "dev.jsonl", "test.jsonl"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    fields["model"]["path"] = str(tmp_path / "moved-model")
    for split in ("train", "dev", "test"):
        fields["data"][split] = str(tmp_path / f"moved-{split}.jsonl")
    assert changed(before, fingerprints(fields)) == ["prepare"]


def test_method_without_neurons_has_no_stages_for_them(fields) -> None:
    fields["train"]["method"] = "full"
    del fields["warmup"], fields["select"]
    names = ["prepare", "baseline", "train", "evaluate"]
    assert stage_names(Recipe.model_validate(fields)) == names
    assert list(fingerprints(fields)) == names
