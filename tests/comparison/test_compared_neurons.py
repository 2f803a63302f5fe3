"""What methods did to the neurons, side by side, against the tables of the cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neft.analysis.table import Table
from neft.comparison.cells import Cells
from neft.comparison.plan import Plan
from neft.comparison.publish import Compared
from neft.comparison.run import compare
from neft.comparison.schema import load_comparison
from neft.errors import RecipeError

METHODS: list[dict[str, Any]] = [
    {"name": "neft", "method": "neft", "select": {"percent": 9}, "learning_rates": [1e-2]},
    {"name": "full", "method": "full", "learning_rates": [1e-3]},
    {
        "name": "early",
        "method": "neft",
        "select": {"percent": 9},
        "score": {"step": 2},
        "analysis": {"causal": True},
        "rate_of": "neft",
    },
    {"name": "embed", "method": "embed", "analysis": False, "learning_rates": [1e-3]},
]
ANALYSIS = {"contexts": 0, "causal": False, "limit": 3}


@pytest.fixture(scope="module")
def finished(tiny_comparison, tmp_path_factory) -> tuple[Path, Compared, Cells]:
    folder = tmp_path_factory.mktemp("neurons")
    comparison = load_comparison(
        tiny_comparison(folder, seeds=[0, 1], analysis=ANALYSIS, methods=METHODS)
    )
    return folder / "compared", compare(comparison, say=lambda line: None), Cells(comparison)


@pytest.fixture(scope="module")
def tables(finished) -> dict[tuple[str, int], Table]:
    """(row, seed) -> the table of its neurons."""
    _, _, cells = finished
    return {
        (row.name, cell.seed): Table.load(job.folder / "neurons.parquet")
        for row in Plan(cells).rows()
        for cell in row.cells
        if (job := cells.jobs(cell).get("analysis"))
    }


def content(folder: Path) -> Any:
    (task,) = json.loads((folder / "neurons.json").read_text())["tasks"]
    return task


def test_rows_are_those_with_an_analysis(finished, tables) -> None:
    folder, result, _ = finished
    assert not result.failures
    assert sorted(tables) == sorted(
        (name, seed) for name in ("neft", "full", "early") for seed in (0, 1)
    )
    assert [row["name"] for row in content(folder)["rows"]] == ["neft", "full", "early"]
    assert all(row.state == "done" for row in result.results[0].rows)


def test_averages_are_those_of_the_ranks(finished, tables) -> None:
    folder, _, _ = finished
    for row in content(folder)["rows"]:
        moved = [
            np.abs(np.asarray(tables[row["name"], seed]["rank_change"])).mean() for seed in (0, 1)
        ]
        assert row["average_rank_change"] == pytest.approx(np.mean(moved))
        assert row["spread"] == pytest.approx(np.std(moved, ddof=1))
        of_type = [sum(np.asarray(tables[row["name"], seed]["suppressed"])) for seed in (0, 1)]
        assert row["suppressed"] == pytest.approx(np.mean(of_type))


def test_pairs_compare_the_same_seed(finished, tables) -> None:
    folder, _, _ = finished
    pairs = content(folder)["pairs"]
    assert [(pair["a"], pair["b"]) for pair in pairs] == [
        ("neft", "full"),
        ("neft", "early"),
        ("full", "early"),
    ]
    for pair in pairs:
        differences = [
            np.abs(
                np.asarray(tables[pair["a"], seed]["rank_after"])
                - np.asarray(tables[pair["b"], seed]["rank_after"])
            ).mean()
            for seed in (0, 1)
        ]
        assert pair["average_rank_change"] == pytest.approx(np.mean(differences))


def test_buckets_are_those_of_one_analysis_where_there_is_one_seed(finished, tables) -> None:
    folder, _, cells = finished
    (row, *_) = content(folder)["rows"]
    found = []
    for seed in (0, 1):
        (cell,) = (
            cell
            for row_ in Plan(cells).rows()
            for cell in row_.cells
            if (row_.name, cell.seed) == ("neft", seed)
        )
        buckets = Table.load(cells.jobs(cell)["analysis"].folder / "buckets.csv").rows()
        found.append([b["mean_rank_change"] for b in buckets if b["role"] == "all"])
    expected = np.mean(found, axis=0)
    np.testing.assert_allclose(np.array(row["buckets"], dtype=float), expected, rtol=1e-12)


def test_unrelated_orders_differ_by_a_third(finished) -> None:
    folder, _, _ = finished
    rng = np.random.default_rng(0)
    # Two layers of 64 in neurons and as many out neurons: two lists of 128.
    drawn = [np.abs(rng.permutation(128) - rng.permutation(128)).mean() for _ in range(2000)]
    assert content(folder)["unrelated"] == pytest.approx(np.mean(drawn), rel=0.02)


def test_warm_ups_are_compared_by_what_they_would_choose(finished) -> None:
    folder, _, _ = finished
    rows = content(folder)["selections"]
    assert {(row["a"], row["b"]) for row in rows} == {("neft", "early"), ("early", "neft")}
    assert sorted({row["percent"] for row in rows}) == [3, 6, 9, 12]
    assert all(0 <= row["share"] <= 1 for row in rows)


def test_tables_and_figures_are_written(finished) -> None:
    folder, result, _ = finished
    text = (folder / "neurons.md").read_text()
    for part in ("upper: neurons", "| early |", "lowest 25% by cosine", "neft, early"):
        assert part in text
    drawn = {path.name for path in result.figures}
    for name in ("buckets", "pairs", "affected", "overlap"):
        assert {f"upper-neurons-{name}.png", f"upper-neurons-{name}.svg"} <= drawn
    assert list(content(folder)["causal"]) == ["early"]


def test_a_row_has_settings_for_an_analysis_that_is_not_asked_for(
    tiny_comparison, tmp_path
) -> None:
    with pytest.raises(RecipeError, match="'early': has settings for an analysis"):
        load_comparison(tiny_comparison(tmp_path, methods=METHODS))
