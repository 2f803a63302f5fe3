from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from neft.comparison.schema import is_comparison
from neft.errors import RecipeError
from neft.recipe import (
    HubData,
    ParallelFiles,
    Recipe,
    checked,
    find_recipes,
    load_recipe,
    read_fields,
)

GOOD: dict[str, Any] = {
    "output": "runs/demo",
    "model": {"path": "models/tiny"},
    "data": {
        "task": "translation",
        "train": "train.jsonl",
        "dev": "dev.jsonl",
        "test": "test.jsonl",
        "source_language": "English",
        "target_language": "French",
    },
    "warmup": {"learning_rate": 5e-5, "steps": 200},
    "select": {"percent": 9},
    "train": {"learning_rate": 1e-3, "epochs": 1},
}


def changed(**settings: Any) -> dict[str, Any]:
    """``GOOD`` with ``section__key=value`` replaced; ``...`` removes."""
    fields = copy.deepcopy(GOOD)
    for place, value in settings.items():
        *path, last = place.split("__")
        section = fields
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
        if value is ...:
            del section[last]
    return fields


def faults(fields: dict[str, Any]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        checked(Recipe, fields, "r.yaml")
    head, *lines = str(caught.value).split("\n")
    count = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
    assert head == f"r.yaml: {count}:"
    return [line.removeprefix("  ") for line in lines]


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(GOOD), encoding="utf-8")
    return path


def test_good_recipe_and_its_defaults() -> None:
    recipe = checked(Recipe, GOOD, "r.yaml")
    assert recipe.select is not None
    assert (recipe.select.percent, recipe.select.count, recipe.select.which) == (9, None, "lowest")
    assert recipe.train.method == "neft"
    assert recipe.train.weight_decay == 0
    assert recipe.score.modules is None
    assert recipe.data.train == "train.jsonl"


def test_a_recipe_survives_its_own_dump() -> None:
    recipe = checked(Recipe, changed(data__dev={"source": "dev.en", "target": "dev.fr"}), "r.yaml")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert checked(Recipe, recipe.model_dump(), "again") == recipe


def test_load_names_the_file_in_faults(recipe_file: Path) -> None:
    assert load_recipe(recipe_file) == checked(Recipe, GOOD, "r.yaml")
    recipe_file.write_text(yaml.safe_dump(changed(train__stepz=3)), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file)
    assert (
        str(caught.value)
        == f"{recipe_file}: 1 fault:\n  train.stepz: unknown key (found 3); did you mean steps?"
    )
    assert caught.value.exit_code == 2


def test_numbers_as_yaml_writes_them(recipe_file: Path) -> None:
    """YAML 1.1 takes 5e-5, without a point, for text."""
    recipe_file.write_text(yaml.safe_dump(GOOD).replace("5.0e-05", "5e-5"), encoding="utf-8")
    assert "5e-5" in recipe_file.read_text()
    warmup = load_recipe(recipe_file).warmup
    assert warmup is not None
    assert warmup.learning_rate == 5e-5


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"bogus": 1}, "bogus: unknown key (found 1)"),
        ({"data__bogus": {"a": 1}}, "data.bogus: unknown key"),
        ({"output": ...}, "output: is missing"),
        ({"data__train": ...}, "data.train: is missing"),
        ({"model": None}, "model: should be a section (found None)"),
        ({"model": "models/tiny"}, "model: should be a section (found 'models/tiny')"),
        ({"model__path": 5}, "model.path: Input should be a valid string (found 5)"),
        (
            {"model__dtype": "int8"},
            "model.dtype: Input should be 'float32', 'bfloat16' or 'float16'",
        ),
        (
            {"model__trust_remote_code": "perhaps"},
            "model.trust_remote_code: Input should be a valid b",
        ),
        ({"data__fields": ["source"]}, "data.fields: should be a mapping (found ['source'])"),
        ({"data__labels": "yes"}, "data.labels: should be a list (found 'yes')"),
        (
            {"data__labels": ["a", False]},
            "data.labels.1: Input should be a valid string (found False)",
        ),
        ({"data__train_limit": 0}, "data.train_limit: Input should be greater than 0 (found 0)"),
        ({"train__batch_size": 2.5}, "train.batch_size: Input should be a valid integer"),
        ({"train__batch_size": True}, "train.batch_size: should be a number (found True)"),
        ({"train__learning_rate": True}, "train.learning_rate: should be a number (found True)"),
        ({"train__learning_rate": "fast"}, "train.learning_rate: Input should be a valid number"),
        (
            {"train__learning_rate": 0},
            "train.learning_rate: Input should be greater than 0 (found 0)",
        ),
        ({"train__learning_rate": float("inf")}, "train.learning_rate: Input should be a finite"),
        ({"train__weight_decay": float("inf")}, "train.weight_decay: Input should be a finite"),
        (
            {"train__warmup_steps": -1},
            "train.warmup_steps: Input should be greater than or equal to 0",
        ),
        (
            {"train__method": "lora+"},
            "train.method: Input should be 'full', 'embed', 'in_out', 'lora', 'mask' or 'neft'",
        ),
        ({"train__method": "lora"}, "train: method 'lora' and the section lora go together"),
        ({"train__lora": {"rank": 8}}, "train: method 'lora' and the section lora go together"),
        (
            {"train__method": "lora", "train__lora": {"rank": 8, "match": "neft"}},
            "train.lora: give either rank or match",
        ),
        (
            {"train__method": "lora", "train__lora": {"match": "neft"}, "select": ...},
            "recipe: train.lora.match 'neft' needs the section select, whose budget it matches",
        ),
        (
            {"train__method": "mask", "train__weight_decay": 0.1},
            "train: method 'mask' needs weight_decay 0",
        ),
        (
            {"select__neurons": "n.json"},
            "select: neurons takes a set as it is; remove the budgets",
        ),
        (
            {"select__reversed_percent": 3, "select__which": "random"},
            "select: the reversed neurons are joined to the lowest, not to random",
        ),
        (
            {"select__reversed_percent": 3, "select__reversed_count": 3},
            "select: give either reversed_percent or reversed_count",
        ),
        (
            {"warmup__snapshots": [7]},
            "warmup: snapshots has 7, which is no multiple of evaluate_every = 50",
        ),
        ({"score__step": 7}, "recipe: score.step 7 is not one of warmup.snapshots"),
        ({"score__probe": {"folds": 3}}, "score: the section probe needs method 'probe'"),
        (
            {"score": {"method": "probe", "step": 7}},
            "score: step is one of a warm-up, which method 'probe' does without",
        ),
        (
            {"score": {"method": "probe", "probe": {"folds": 1}}},
            "score.probe.folds: Input should be greater than or equal to 2 (found 1)",
        ),
        (
            {"score": {"method": "probe", "probe": {"layers": []}}},
            "score.probe.layers: Tuple should have at least 1 item after validation, not 0 (found [])",
        ),
        (
            {"score": {"method": "probe"}},
            "recipe: score.method 'probe' needs labels, so data.task classification, not 'translation'",
        ),
        (
            {"evaluate__general": {"text": "t.jsonl", "split": "x"}},
            "evaluate.general.split: unknown key",
        ),
        ({"train__steps": 5}, "train: give either epochs or steps"),
        ({"train__epochs": ...}, "train: give either epochs or steps"),
        ({"select__percent": 0}, "select.percent: Input should be greater than 0 (found 0)"),
        ({"select__percent": -9}, "select.percent: Input should be greater than 0 (found -9)"),
        ({"select__percent": 101}, "select.percent: Input should be less than or equal to 100"),
        ({"select__percent": float("nan")}, "select.percent: Input should be a finite number"),
        ({"select__count": 5}, "select: give one of percent, count and megabytes"),
        (
            {"select__megabytes": 5},
            "select: give one of percent, count and megabytes",
        ),
        ({"select__percent": ..., "select__megabytes": 0}, "select.megabytes: Input should be gr"),
        ({"select__rule": "best"}, "select.rule: Input should be 'paper', 'even', 'floor' or"),
        ({"select__floor": 30}, "select: floor goes with rule 'floor', not with 'paper'"),
        ({"select__rule": "floor", "select__floor": 0}, "select.floor: Input should be greater"),
        ({"select__rule": "floor", "select__floor": 101}, "select.floor: Input should be less"),
        (
            {"select__rule": "even", "select__reversed_percent": 3},
            "select: the reversed neurons go with rule 'paper'",
        ),
        (
            {"select__above_rounding": True, "select__reversed_percent": 3},
            "select: the reversed neurons go with rule 'paper', and without above_rounding",
        ),
        (
            {"select": {"neurons": "n.json", "rule": "even"}},
            "select: neurons takes a set as it is; remove rule and above_rounding",
        ),
        (
            {"warmup": ..., "select__which": "random", "select__above_rounding": True},
            "recipe: train.method 'neft' needs the section warmup",
        ),
        ({"select__percent": ...}, "select: give one of percent, count and megabytes"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0 (found -1)"),
        ({"seed": 2**32}, "seed: Input should be less than 4294967296"),
        ({"warmup": ...}, "recipe: train.method 'neft' needs the section warmup, unless"),
        ({"select": ...}, "recipe: train.method 'neft' needs the section select"),
        (
            {"warmup": ..., "train__method": "mask"},
            "recipe: train.method 'mask' needs the section warmup, unless",
        ),
        (
            {"data__target_language": ...},
            "data: translation needs source_language and target_language",
        ),
        ({"data__task": "prompt"}, "data: task 'prompt' needs a template"),
        ({"data__labels": ["a"]}, "data.labels: are for classification, not for 'translation'"),
        ({"warmup__rank": 4}, "warmup: rank goes with method 'lora', not with 'full'"),
        (
            {"train__in_backward": True, "train__max_grad_norm": 0.5},
            "train: in_backward frees gradients before their norm is known",
        ),
        ({"data__task": "classification"}, "data: classification needs labels"),
        ({"data__task": "chat", "data__template": "x"}, "data: task 'chat' takes its prompts from"),
        (
            {"data__task": "chat", "data__style": "plain"},
            "data: task 'chat' needs the chat template",
        ),
        (
            {"data__task": "summarization", "data__target_language": ...},
            "data: summarization needs target_language",
        ),
    ],
)
def test_one_fault(settings: dict[str, Any], fault: str) -> None:
    (found,) = faults(changed(**settings))
    assert found.startswith(fault)


def test_training_without_neurons_needs_no_warmup() -> None:
    recipe = checked(Recipe, changed(warmup=..., select=..., train__method="full"), "r.yaml")
    assert recipe.warmup is None


def test_all_faults_at_once() -> None:
    fields = changed(
        data__train=5,
        data__task="translate",
        train__epochs=0,
        train__x=1,
        model=...,
        select__percent=0,
    )
    assert faults(fields) == [
        "model: is missing",
        "data.task: Input should be 'translation', 'summarization', 'classification', 'prompt' or "
        "'chat' (found 'translate')",
        "data.train: should be a file, {source, target} of two text files, or {id, split} on the Hub "
        "(found 5)",
        "select.percent: Input should be greater than 0 (found 0)",
        "train.epochs: Input should be greater than 0 (found 0)",
        "train.x: unknown key (found 1)",
    ]


SET = {"id": "org/set", "split": "test"}
NOT_A_FIELD = "'sorce' is not a field of this task; it has source, target"


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"data__template": "{0} {source}"}, "data.template: {0} is not a plain placeholder"),
        ({"data__template": "{source!r}"}, "data.template: {source} is not a plain placeholder"),
        ({"data__template": "translate {source"}, "data.template: expected '}' before end"),
        ({"data__fields": {"sorce": "en"}}, f"data.fields: {NOT_A_FIELD}"),
        ({"data__test": SET | {"fields": {"sorce": "en"}}}, f"data.test.fields: {NOT_A_FIELD}"),
        (
            {"warmup__train": SET | {"fields": {"sorce": "en"}}},
            f"warmup.train.fields: {NOT_A_FIELD}",
        ),
        (
            {
                "data__fields": {"premise": "p"},
                "data__task": "chat",
                "data__source_language": ...,
                "data__target_language": ...,
            },
            "data.fields: 'premise' is not a field of this task; it has messages",
        ),
    ],
)
def test_fields_and_template(settings: dict[str, Any], fault: str) -> None:
    (told,) = faults(changed(**settings))
    assert told.startswith(fault)


def test_several_unknown_fields_are_told_at_once() -> None:
    told = faults(changed(data__fields={"a": "x", "target": "y", "b": "z"}))
    assert [line.partition(" is ")[0] for line in told] == ["data.fields: 'a'", "data.fields: 'b'"]


def test_data_sources() -> None:
    fields = changed(
        data__train={"source": "a.en", "target": "a.fr"},
        data__test={"id": "org/set", "split": "test"},
    )
    data = checked(Recipe, fields, "r.yaml").data
    assert data.train == ParallelFiles(source="a.en", target="a.fr")
    assert data.dev == "dev.jsonl"
    assert data.test == HubData(id="org/set", split="test")


SOURCE = (
    "data.train: should be a file, {source, target} of two text files, or {id, split} on the Hub"
)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, [f"{SOURCE} (found None)"]),
        (["a", "b"], [f"{SOURCE} (found ['a', 'b'])"]),
        ({"path": "x"}, [SOURCE]),
        ({"id": "org/set"}, ["data.train.split: is missing"]),
        ({"source": "a.en"}, ["data.train.target: is missing"]),
        ({"target": "a.fr"}, ["data.train.source: is missing"]),
        (
            {"source": 1, "target": 2},
            [
                "data.train.source: Input should be a valid string (found 1)",
                "data.train.target: Input should be a valid string (found 2)",
            ],
        ),
        (
            {"id": "org/set", "split": "train", "name": "x"},
            ["data.train.name: unknown key (found 'x')"],
        ),
    ],
)
def test_faults_of_a_data_source(source: Any, expected: list[str]) -> None:
    assert faults(changed(data__train=source)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "not a YAML file"),
        (b"\xff\xfe\xff", "not a YAML file"),
        (b"", "a recipe is a mapping of sections"),
        (b"- model", "a recipe is a mapping of sections"),
        (b"!!python/object/apply:os.getcwd []", "not a YAML file"),
    ],
)
def test_file_that_holds_no_recipe(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read") as caught:
            load_recipe(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_overrides(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            "seed=3",
            "train.learning_rate=2e-4",
            "evaluate.num_beams=4",
            "data.train={source: a.en, target: a.fr}",
            "score.modules=[up, down, o]",
            "select.percent=",
            "select.count=100",
            "output=runs/a=b",
        ],
    )
    assert recipe.seed == 3
    assert recipe.train.learning_rate == 2e-4
    assert recipe.evaluate.num_beams == 4
    assert recipe.data.train == ParallelFiles(source="a.en", target="a.fr")
    assert recipe.score.modules == ("up", "down", "o")
    assert recipe.select is not None
    assert (recipe.select.percent, recipe.select.count) == (None, 100)
    assert recipe.output == "runs/a=b"
    assert recipe.data.dev == "dev.jsonl"


def test_the_last_override_wins(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["seed=1", "seed=2"]).seed == 2


def test_override_of_an_empty_section(recipe_file: Path) -> None:
    recipe_file.write_text(yaml.safe_dump(changed(evaluate=None)), encoding="utf-8")
    assert load_recipe(recipe_file, ["evaluate.num_beams=4"]).evaluate.num_beams == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: expected section.key=value"),
        ("=3", "--set =3: expected section.key=value"),
        ("seed=[", r"--set seed=\[: not a YAML value"),
        ("seed.deep=3", "--set seed.deep=3: 'seed' is not a section"),
        ("data.train.split=x", "'train' is not a section"),
        ("train.epoch=3", r"train.epoch: unknown key \(found 3\); did you mean epochs\?"),
        ("seed=many", "seed: Input should be a valid integer"),
    ],
)
def test_wrong_override(recipe_file: Path, override: str, message: str) -> None:
    recipe_file.write_text(yaml.safe_dump(changed(seed=0)), encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file, [override])


def test_recipes_are_frozen() -> None:
    recipe = checked(Recipe, GOOD, "r.yaml")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


def test_find_recipes_looks_into_folders(tmp_path):
    (tmp_path / "deep").mkdir()
    files = [tmp_path / "a.yaml", tmp_path / "deep" / "b.yaml"]
    for file in files:
        file.touch()
    (tmp_path / "notes.txt").touch()
    assert find_recipes([tmp_path]) == files
    assert find_recipes([files[1], files[0]]) == [files[1], files[0]]


@pytest.mark.parametrize("missing", ["nowhere", "nowhere.yaml", "empty"])
def test_find_recipes_names_a_place_without_any(tmp_path, missing):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=f"{missing}: no recipe there"):
        find_recipes([tmp_path / missing])


def test_every_recipe_of_the_project_fits():
    for recipe in find_recipes([Path(__file__).parents[1] / "recipes"]):
        if not is_comparison(read_fields(recipe)):  # those have tests of their own
            load_recipe(recipe)


def read(text: str, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "r.yaml").write_text(text)
    return read_fields(tmp_path / "r.yaml")


@pytest.mark.parametrize("text", ["a: 1\n'a': 2\n", "b: {a: 1}\nc:\n  a: 1\n  a: 1\n"])
def test_a_key_given_twice(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"the key 'a' is given twice(.|\n)*r\.yaml\", line"):
        read(text, tmp_path)


def test_merged_mappings_give_way_to_own_keys(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b, y: 3, z: 3}\n"
    assert read(text, tmp_path) == {
        "a": {"x": 1, "y": 1},
        "b": {"x": 1, "y": 2},
        "c": {"x": 1, "y": 3, "z": 3},
    }


@pytest.mark.parametrize(
    "select",
    [{"percent": 9, "which": "random"}, {"neurons": "chosen.json"}],
    ids=["random", "file"],
)
def test_neurons_that_need_no_scores_need_no_warmup(select: dict[str, Any]) -> None:
    recipe = checked(Recipe, changed(warmup=..., select=select), "r.yaml")
    assert recipe.select is not None
    assert not recipe.select.needs_scores


def test_probes_need_labels_and_no_warmup() -> None:
    data = GOOD["data"] | {"task": "classification", "labels": ["yes", "no"]}
    recipe = checked(Recipe, changed(warmup=..., data=data, score={"method": "probe"}), "r.yaml")
    assert not recipe.score.needs_warmup
    assert recipe.score.probe is None
    assert (recipe.score.probing.layers, recipe.score.probing.folds) == (None, 5)
    own = changed(warmup=..., data=data, score={"method": "probe", "probe": {"layers": [0, 29]}})
    assert checked(Recipe, own, "r.yaml").score.probing.layers == (0, 29)


def test_the_warmup_has_the_data_and_seed_of_the_run_unless_it_has_its_own() -> None:
    recipe = checked(Recipe, changed(seed=3), "r.yaml")
    assert recipe.warmup is not None
    assert recipe.warmup.data_of(recipe.data) == recipe.data
    assert recipe.warmup.seed_of(recipe.seed) == 3
    own = checked(Recipe, changed(warmup__train="other.jsonl", warmup__seed=0, seed=3), "r.yaml")
    assert own.warmup is not None
    assert own.warmup.data_of(own.data).train == "other.jsonl"
    assert own.warmup.data_of(own.data).dev == own.data.dev
    assert own.warmup.seed_of(own.seed) == 0
