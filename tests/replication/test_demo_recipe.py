"""The demo's recipe reads what the scripts beside it write."""

from __future__ import annotations

from pathlib import Path

import fetch_model
from neft.recipe import load_recipe

DEMO = Path(__file__).parents[2] / "recipes" / "demo.yaml"


def test_the_demo_reads_what_the_scripts_write():
    recipe = load_recipe(DEMO)
    assert Path(recipe.model.path) == fetch_model.DESTINATION
    for split in ("train", "dev", "test"):
        assert getattr(recipe.data, split) == f"data/en-fr/{split}.jsonl"
    assert recipe.train.method == "neft"
    assert recipe.select is not None
    assert recipe.select.percent == 9
