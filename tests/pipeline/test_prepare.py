"""What is found wrong before anything expensive."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BloomConfig

from neft.errors import DataError
from neft.pipeline.prepare import check_data
from neft.projections import as_module
from neft.recipe import Recipe, load_recipe
from neft.streaming import context_length

CONTEXT = 128


def test_no_end() -> None:
    assert context_length(as_module(BloomConfig(n_layer=1))) is None


@pytest.fixture
def recipe(tiny_recipe, tmp_path: Path) -> Path:
    """Whose prompts are its sources, one token a character."""
    return tiny_recipe(tmp_path, **{"data.template": "{source}"})


def with_text(recipe: Path, split: str, source: str, *settings: str) -> Recipe:
    """The last example of a split is another."""
    file = recipe.parent / f"{split}.jsonl"
    rows = file.read_text().splitlines()
    rows[-1] = json.dumps({"source": source, "target": "x"})
    file.write_text("\n".join(rows))
    return load_recipe(recipe, settings)


# With the target and the end, or eight new tokens, 128.
@pytest.mark.parametrize(("split", "length"), [("train", 126), ("dev", 126), ("test", 120)])
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "llama"])
def test_texts_that_are_too_long_for_the_model(
    recipe: Path, tiny_model, model_type: str, split: str, length: int
) -> None:
    model = tiny_model(model_type, max_position_embeddings=CONTEXT)
    model.save_pretrained(recipe.parent / "model")
    check_data(with_text(recipe, split, length * "y"))
    number = len((recipe.parent / f"{split}.jsonl").read_text().splitlines())
    options = with_text(recipe, split, (length + 1) * "y")
    with pytest.raises(
        DataError, match=rf"{split}\.jsonl, line {number}: 12\d tokens.* has 128\. Lower"
    ):
        check_data(options)
    # Those that are left out or cut are in nobody's way.
    if split != "test":
        for overlong in ("drop", "truncate"):
            settings = ("data.max_length=128", f"data.overlong={overlong}")
            check_data(with_text(recipe, split, (length + 1) * "y", *settings))


def test_general_text_that_is_too_long_for_the_model(recipe: Path, tiny_model) -> None:
    tiny_model("gpt2", max_position_embeddings=CONTEXT).save_pretrained(recipe.parent / "model")
    text = recipe.parent / "general.jsonl"
    text.write_text(json.dumps({"text": "y"}))
    general = {"text": str(text), "max_length": CONTEXT}
    check_data(load_recipe(recipe, [f"evaluate.general={json.dumps(general)}"]))
    general["max_length"] = CONTEXT + 1
    with pytest.raises(DataError, match=r"evaluate\.general\.max_length: 129 .* Lower it to 128"):
        check_data(load_recipe(recipe, [f"evaluate.general={json.dumps(general)}"]))
