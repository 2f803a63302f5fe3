"""Which comparisons are refused, and what recipes the others stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neft.comparison.schema import load_comparison
from neft.errors import RecipeError

NEFT = {"name": "neft", "method": "neft", "select": {"percent": 9}, "learning_rates": [1e-2, 3e-2]}
FULL = {"name": "full", "method": "full", "learning_rates": [1e-3]}

NEFT_LIKE = {"name": "like", "method": "neft", "select": {"percent": 3}, "rate_of": "neft"}


def faults(file: Path) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_comparison(file)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(str(file))
    return [line.strip() for line in lines] or [head]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"methods": [NEFT, NEFT]}, "recipe: two methods are named 'neft'"),
        (
            {"methods": [FULL | {"method": "sgd"}]},
            "methods.0.method: Input should be 'full', 'embed'",
        ),
        ({"methods": [FULL | {"rate": 1}]}, "methods.0.rate: unknown key"),
        (
            {"methods": [FULL | {"learning_rates": [2e-3, 1e-3]}]},
            "methods.0: learning_rates should be one or more, ascending and different",
        ),
        (
            {"methods": [FULL | {"rate_of": "full"}]},
            "methods.0: give either learning_rates or rate_of",
        ),
        (
            {"methods": [NEFT, {"name": "x", "method": "full", "rate_of": "nft"}]},
            "recipe: method 'x': rate_of names 'nft', which is none of neft, x",
        ),
        (
            {"methods": [NEFT, FULL | {"tasks": ["lower"]}]},
            "recipe: method 'full': task names 'lower', which is none of upper",
        ),
        ({"methods": [FULL | {"tasks": []}]}, "methods.0: tasks is empty"),
        (
            {"methods": [FULL | {"select": {"percent": 9}}]},
            "methods.0: method 'full' trains no chosen neurons: remove select and score",
        ),
        (
            {"methods": [FULL | {"union_with": ["upper"]}]},
            "methods.0: method 'full' trains no chosen neurons: remove union_with",
        ),
        (
            {"methods": [FULL | {"method": "lora", "lora": {"rank": 2}, "select": {"percent": 9}}]},
            "methods.0: method 'lora' trains no chosen neurons: remove select, or let lora match",
        ),
        (
            {"methods": [NEFT | {"union_with": ["upper"]}]},
            "recipe: method 'neft': runs on task 'upper', with whose neurons it would be joined",
        ),
        (
            {
                "tasks": {"upper": {}, "other": {}},
                "methods": [FULL, NEFT | {"tasks": ["other"]}, NEFT_LIKE],
            },
            "recipe: method 'like': rate_of names 'neft', which is not run on upper",
        ),
        (
            {"tasks": {"upper": {}, "other": {}}, "methods": [NEFT, FULL | {"tasks": ["other"]}]}
            | {"reference": "full"},
            "recipe: reference 'full' is not run on task 'upper'",
        ),
        (
            {"train.learning_rate": 1e-3},
            "recipe: train.learning_rate: belongs to a method, as learning_rates",
        ),
        (
            {"methods": [FULL | {"train": {"method": "neft"}}]},
            "recipe: method 'full': train.method: belongs to a method, as method",
        ),
        (
            {"tasks": {"upper": {"train": {"lora": {"rank": 3}}}}},
            "recipe: tasks.upper.train.lora: belongs to a method, as lora",
        ),
        (
            {"figures": [{"file": "../f", "series": {"a": ["neft"]}}]},
            "figures.0.file: String should match pattern",
        ),
        (
            {"figures": [{"file": "f", "series": {"a": ["neft"]}}] * 2},
            "recipe: two figures are named 'f'",
        ),
        (
            {"methods": [NEFT | {"union_with": ["lower"]}]},
            "recipe: method 'neft': task names 'lower', which is none of upper",
        ),
        ({"reference": "lora"}, "recipe: reference names 'lora', which is none of neft, full"),
        ({"seeds": [1, 1]}, "recipe: seed 1 is given twice"),
        ({"seeds": []}, "recipe: seeds should have at least one"),
        ({"tasks": {}}, "recipe: tasks should have at least one"),
        (
            {"tasks": {"upper": {}, "idle": {}}, "methods": [NEFT | {"tasks": ["upper"]}]},
            "recipe: tasks.idle: no method is run on it",
        ),
        (
            {"figures": [{"file": "f", "series": {"a": ["lora"]}}]},
            "recipe: figure 'f' names 'lora', which is none of neft, full",
        ),
        # Faults of the cells, with the first cell that has them.
        (
            {"train.stepz": 3},
            "train.stepz: unknown key (found 3); did you mean steps? (task 'upper', method 'neft')",
        ),
        ({"data.target_language": None}, "data: translation needs source_language and target"),
        (
            {"methods": [FULL, {k: v for k, v in NEFT.items() if k != "select"}]},
            "recipe: train.method 'neft' needs the section select (task 'upper', method 'neft')",
        ),
        (
            {"methods": [FULL | {"method": "lora", "lora": {"match": "neft"}}]},
            "recipe: train.lora.match 'neft' needs the section select, whose budget it matches",
        ),
        (
            {"methods": [FULL, NEFT | {"score": {"step": 3}}]},
            "recipe: score.step 3 is not one of warmup.snapshots (task 'upper', method 'neft')",
        ),
    ],
)
def test_one_fault(tiny_comparison, tmp_path, changes: dict[str, Any], fault: str) -> None:
    file = tiny_comparison(tmp_path, **({"methods": [NEFT, FULL]} | changes))
    (found,) = faults(file)
    assert found.startswith(fault)


def test_a_fault_that_all_cells_share_is_told_once_and_all_faults_at_once(
    tiny_comparison, tmp_path
) -> None:
    changes = {"train.stepz": 3, "evaluate.beams": 2, "methods": [NEFT, FULL]}
    found = faults(tiny_comparison(tmp_path, **changes))
    assert len(found) == 2


def test_a_single_run_is_no_comparison(tiny_recipe, tmp_path) -> None:
    (found,) = faults(tiny_recipe(tmp_path))
    assert "has no methods to compare; it is a recipe for neft run" in found


def test_a_cell_is_the_shared_sections_overlaid_by_task_and_method(
    tiny_comparison, tmp_path
) -> None:
    tasks = {"upper": {"train": {"steps": 3}, "evaluate": {"lowercase": True}}}
    methods = [NEFT | {"train": {"batch_size": 2}, "warmup": {"steps": 2}}]
    comparison = load_comparison(tiny_comparison(tmp_path, tasks=tasks, methods=methods))
    recipe = comparison.cell("upper", comparison.methods[0], 7, 2e-3)
    assert recipe.seed == 7
    assert recipe.train.learning_rate == 2e-3
    assert (recipe.train.steps, recipe.train.batch_size, recipe.train.evaluate_every) == (3, 2, 2)
    assert recipe.warmup is not None
    assert (recipe.warmup.steps, recipe.warmup.learning_rate) == (2, 1e-2)
    assert recipe.evaluate.lowercase


def test_random_neurons_follow_the_seed_unless_told_otherwise(tiny_comparison, tmp_path) -> None:
    random = NEFT | {"select": {"percent": 9, "which": "random"}}
    fixed = random | {"name": "fixed", "select": random["select"] | {"seed": 5}}
    comparison = load_comparison(
        tiny_comparison(tmp_path, methods=[random, fixed, NEFT | {"name": "n"}])
    )
    seeds = [comparison.cell("upper", entry, 3, 1e-2).select for entry in comparison.methods]
    assert [select and select.seed for select in seeds] == [3, 5, 0]


def test_what_lends_its_neurons_is_checked_too(tiny_comparison, tmp_path) -> None:
    tasks = {"upper": {}, "lent": {"warmup": {"stepz": 3}}}
    methods = [NEFT | {"union_with": ["lent"], "tasks": ["upper"]}]
    (found,) = faults(tiny_comparison(tmp_path, tasks=tasks, methods=methods))
    assert (
        found
        == "warmup.stepz: unknown key (found 3); did you mean steps? (task 'lent', method 'neft')"
    )


def test_faults_of_names_and_of_cells_are_told_at_once_a_line_each(
    tiny_comparison, tmp_path
) -> None:
    lent = NEFT_LIKE | {"name": "lent", "union_with": ["nowhere"], "rate_of": "nothing"}
    changes = {"seeds": [], "reference": "x", "methods": [NEFT, NEFT, lent], "train.stepz": 3}
    found = faults(tiny_comparison(tmp_path, **changes))
    assert found == [
        "recipe: seeds should have at least one",
        "recipe: two methods are named 'neft'",
        "recipe: reference names 'x', which is none of neft, neft, lent",
        "recipe: method 'lent': task names 'nowhere', which is none of upper",
        "recipe: method 'lent': rate_of names 'nothing', which is none of neft, lent",
        "train.stepz: unknown key (found 3); did you mean steps? (task 'upper', method 'neft')",
    ]
    found = faults(tiny_comparison(tmp_path, methods=[]))
    assert found == [
        "recipe: methods should have at least one",
        "recipe: tasks.upper: no method is run on it",
    ]
