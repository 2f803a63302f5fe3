"""The recipes at the paper's size name every cell of its tables, of the sizes that it gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from neft.comparison.outline import Outline, outline
from neft.comparison.schema import Comparison, load_comparison
from neft.pipeline.stages import stage_names

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "recipes" / "paper"

LARGE = {"en-zh-100k", "en-fr-100k", "fr-zh-100k"}
TABLE_2 = {
    *("en-zh-20k", "en-fr-20k", "fr-zh-20k", "hi-zh-4.5k", "hi-fr-4.5k", "en-mi-10k", "en-bs-10k"),
    *LARGE,
}
BASELINES = {"FT-full", "FT-embed", "FT-{in,out}", "LoRA r=256", "NeFT 9%"}
# Millions of trained parameters as Table 6 has them, and what they are made of.
TABLE_6 = {
    "NeFT 0.4%": ("25.6", "6,250 neurons"),
    "NeFT 1.5%": ("102.4", "25,000 neurons"),
    "NeFT 3%": ("204.8", "50,000 neurons"),
    "NeFT 6%": ("409.6", "100,000 neurons"),
    "NeFT 9%": ("614.4", "150,000 neurons"),
    "NeFT 12%": ("819.2", "200,000 neurons"),
    "LoRA r=8": ("20.0", "rank 8"),
    "LoRA r=16": ("40.0", "rank 16"),
    "LoRA r=64": ("159.9", "rank 64"),
    "LoRA r=128": ("319.8", "rank 128"),
    "LoRA r=256": ("639.6", "rank 256"),
}
# What Table 6 leaves out.
NOT_IN_TABLE_6 = {
    "en-fr-20k": {"NeFT 0.4%", "NeFT 1.5%"},
    "hi-fr-4.5k": {"NeFT 0.4%", "NeFT 1.5%"},
    "en-mi-10k": {"NeFT 0.4%", "NeFT 1.5%", "NeFT 3%", "NeFT 6%"},
    "en-bs-10k": {"NeFT 0.4%", "NeFT 1.5%", "NeFT 3%", "NeFT 6%", "NeFT 12%", "LoRA r=64"},
}


def load(name: str) -> Comparison:
    return load_comparison(PAPER / f"{name}.yaml", [f"model.config={PAPER / 'llama-2-7b.json'}"])


def planned(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Outline]]:
    """Task -> row -> what a dry run shows, for a file that is read as a user reads it: from the root."""
    monkeypatch.chdir(ROOT)
    found: dict[str, dict[str, Outline]] = {}
    for row in outline(load_comparison(f"recipes/paper/{name}.yaml")):
        found.setdefault(row.task, {})[row.name] = row
    return found


def test_tables_2_and_6(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = planned("table2", monkeypatch)
    assert set(cells) == TABLE_2
    for task, rows in cells.items():
        sizes = set() if task in LARGE else set(TABLE_6) - NOT_IN_TABLE_6.get(task, set())
        assert set(rows) == BASELINES | sizes
        for name in rows.keys() & TABLE_6.keys():
            millions = f"{rows[name].num_trainable / 1e6:.1f}"
            assert (millions, rows[name].note) == TABLE_6[name]
        # The percentages of Table 2, of 6,738,415,616 parameters.
        assert rows["FT-full"].num_trainable == 6_738_415_616
        assert int(rows["FT-embed"].percent + 0.5) == 2
        assert rows["FT-{in,out}"].num_trainable == 2 * 32 * 11008 * 4096


def test_table_1(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = planned("table1", monkeypatch)
    assert set(cells) == {"en", "fr", "de"}
    ways = {"NeFT 6% Probe": "probe", "NeFT 6% Cosine": "cosine", "NeFT 6% Random": "cosine"}
    comparison = load("table1")
    for task, rows in cells.items():
        assert set(rows) == {"FT-full", "LoRA of 6%", *ways}
        for name, way in ways.items():
            assert (rows[name].num_trainable, rows[name].note) == (409_600_000, "100,000 neurons")
            recipe = comparison.cell(task, comparison.row(name), 0, 2e-5)
            assert recipe.score.method == way
            assert ("warmup" in stage_names(recipe)) == (name == "NeFT 6% Cosine")
        assert rows["LoRA of 6%"].num_trainable == pytest.approx(409_600_000, rel=0.01)


def test_table_3(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = planned("table3", monkeypatch)
    assert set(cells) == {"en-zh", "fr-zh", "hi-zh"}
    for (task, rows), language in zip(cells.items(), ("En", "Fr", "Hi"), strict=True):
        union = f"NeFT 9% Union ({language})"
        assert set(rows) == BASELINES | {"NeFT 12%", union}
        assert rows[union].note.endswith(f"those of translate-{task}")


def test_table_4_and_figure_4(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = planned("table4", monkeypatch)
    assert set(cells) == {"original", "separate"}
    assert {"FT-full", "NeFT 9%", "NeFT 9% Early"} <= set(cells["original"])
    assert set(cells["separate"]) == {"FT-full", "NeFT 6%", "NeFT 6% Trans"}
    # Figure 4: 3% and 3, 4, 6, 7, 9% more, of either end; at each x as many parameters in both.
    for extra in (3, 4, 6, 7, 9):
        lowest = cells["original"][f"NeFT {3 + extra}%"]
        highest = cells["original"][f"NeFT 3% + Reversed {extra}%"]
        assert lowest.num_trainable == highest.num_trainable
        assert lowest.percent == pytest.approx(3 + extra, rel=0.02)


def test_every_method_may_choose_its_rate() -> None:
    for name in ("table1", "table2", "table3", "table4"):
        for entry in load(name).methods:
            if entry.learning_rates is not None:
                assert len(entry.learning_rates) > 1
                assert 2e-5 in entry.learning_rates  # the paper's


def test_neurons_are_found_as_in_the_paper() -> None:
    table_2, table_4 = load("table2"), load("table4")

    def warmup(comparison: Comparison, task: str, row: str):
        recipe = comparison.cell(task, comparison.row(row), 0, 2e-5)
        assert recipe.warmup is not None
        return recipe, recipe.warmup, recipe.warmup.data_of(recipe.data)

    # The large sets take the neurons of the small ones.
    _, small, found_on = warmup(table_2, "en-fr-20k", "NeFT 9%")
    _, large, also_on = warmup(table_2, "en-fr-100k", "NeFT 9%")
    assert (found_on.train, found_on.dev) == (also_on.train, also_on.dev)
    assert small.model_copy(update={"train": None}) == large.model_copy(update={"train": None})
    for task, steps in (("en-zh-20k", 3200), ("hi-zh-4.5k", 750), ("hi-fr-4.5k", 750)):
        assert warmup(table_2, task, "NeFT 9%")[1].steps == steps
    for task, steps in (("en-zh", 790), ("fr-zh", 38), ("hi-zh", 21)):
        assert warmup(load("table3"), task, "NeFT 9%")[1].steps == steps
    early, _, _ = warmup(table_4, "original", "NeFT 9% Early")
    assert early.score.step == 800
    trans, _, elsewhere = warmup(table_4, "separate", "NeFT 6% Trans")
    original, _, _ = warmup(table_4, "original", "NeFT 6%")
    assert elsewhere.train == original.data.train != trans.data.train


def test_decoding_is_the_papers() -> None:
    for name in ("table2", "table3", "table4"):
        comparison = load(name)
        for cell in comparison.first_cells():
            recipe = comparison.first_recipe(*cell)
            assert (recipe.evaluate.num_beams, recipe.evaluate.no_repeat_ngram_size) == (1, 4)
            assert recipe.evaluate.lowercase == (recipe.data.target_language == "French")
            assert recipe.data.style == "plain"
            assert recipe.data.max_length == 1024
            batch = 3 if recipe.data.task == "summarization" else 6
            assert (recipe.train.batch_size, recipe.model.dtype) == (batch, "bfloat16")
