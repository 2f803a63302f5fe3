"""The Markdown of results that were put together by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from neft.comparison.results import Provenance, RowResult, SeedResult, Summary, TaskResult
from neft.comparison.schema import load_comparison
from neft.comparison.table import draw_figures, markdown
from neft.comparison.tuning import Trial
from neft.evaluation import Score
from neft.pipeline.evaluate import Evaluation

MADE = Provenance("2026-01-01", {"torch": "2"}, "abc", {"cores": 2})
PROVENANCE: dict[str, Any] = {
    "model": "content:1",
    "machine": {"cores": 2},
    "packages": {"torch": "2"},
    "commit": None,
}


def seed_result(seed: int, score: float) -> SeedResult:
    return SeedResult(
        seed=seed,
        scores={"BLEU": Score(score, "tok:13a", score - 1, score + 1)},
        general_loss=3.5,
        dev_loss=1.25,
        best_step=2,
        num_steps=4,
        seconds_per_step=0.5,
        peak_memory_bytes=1_500_000_000,
        num_trainable=250,
        folders={},
        neurons_data={},
        trained=MADE,
        evaluated=MADE,
    )


def row(name: str, scores: list[float], **changes: Any) -> RowResult:
    mean = sum(scores) / len(scores) if scores else 0.0
    summary = Summary(mean, 1.0 if len(scores) > 1 else None, None, None, None, is_best=False)
    fields: dict[str, Any] = {
        "task": "upper",
        "name": name,
        "method": "neft",
        "state": "done",
        "failure": None,
        "trials": (Trial(1e-3, 1.5), Trial(2e-3, 1.25)),
        "rate": 2e-3,
        "rate_of": None,
        "rate_at_edge": False,
        "seeds": tuple(seed_result(number, score) for number, score in enumerate(scores)),
        "metrics": {"BLEU": summary} if scores else {},
        "forgetting": 0.25 if scores else None,
    }
    return RowResult(**fields | changes)


def task(*rows: RowResult) -> TaskResult:
    base = Evaluation({"BLEU": Score(1.0, "tok:13a", 0.5, 1.5)}, 200, 1.0, 3.25)
    return TaskResult("upper", 200, base, MADE, 1000, {}, rows)


@pytest.fixture
def comparison(tiny_comparison, tmp_path):
    figure = {"file": "f", "series": {"all": ["neft", "full"], "other": ["lora"]}}
    return load_comparison(tiny_comparison(tmp_path, seeds=[0, 1], figures=[figure]))


def lines(comparison: Any, *rows: RowResult, failures: tuple[str, ...] = ()) -> list[str]:
    return markdown(comparison, [task(*rows)], failures, PROVENANCE).splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_has_mean_spread_difference_and_costs(comparison) -> None:
    summary = Summary(21.0, 1.5, 2.0, 0.0004, "ar:10000", is_best=True)
    found = lines(
        comparison, row("neft", [19.0, 19.0]), row("full", [20, 22], metrics={"BLEU": summary})
    )
    (line,) = [line for line in found if line.startswith("| full")]
    assert cells(line) == [
        "full",
        "250",
        "25.00",
        "0.002",
        "1.250",
        "**21.0 ± 1.5**",
        "+2.0 (< 0.001)",
        "+0.250",
        "0.50",
        "1.50 GB",
    ]
    header, _, base = (
        line
        for line in found
        if line.startswith("| method")
        or "---:" in line
        or ("base" in line and line.startswith("|"))
    )
    assert len(cells(header)) == len(cells(line)) == len(cells(base))
    assert any("Mean ± standard deviation over seeds 0, 1" in line for line in found)
    assert any("`ar:10000`" in line for line in found)


def test_grids_are_told_with_the_choice_and_what_failed(comparison) -> None:
    trials = (
        Trial(1e-3, 1.5),
        Trial(2e-3, 1.25),
        Trial(4e-3, math.inf, "diverged"),
        Trial(8e-3, None),
    )
    found = lines(comparison, row("neft", [1.0, 2.0], trials=trials, rate_at_edge=True))
    assert "- neft: 0.001 1.500, 0.002 1.250*, 0.004 failed, 0.008 ..." in found
    assert any(line.startswith("†") for line in found)
    assert any("0.002†" in line for line in found)


def test_a_row_that_takes_its_rate_elsewhere_says_so(comparison) -> None:
    found = lines(comparison, row("random", [1.0, 2.0], rate_of="neft", trials=()))
    assert any("0.002‡" in line for line in found)
    assert not any(line.startswith("- random") for line in found)


def test_incomplete_rows_are_marked(comparison) -> None:
    failure = "killed | by\nsomebody"
    found = lines(
        comparison,
        row("neft", [1.0], state="training"),
        row("a|b", [], state="failed", failure=failure, rate=None),
        failures=(f"upper, a|b: {failure}",),
    )
    assert any(line.startswith("| neft (training, 1 seed) |") for line in found)
    (failed,) = [line for line in found if line.startswith("| a/b")]
    assert "failed: killed / by somebody" in failed
    assert "## Failures" in found
    assert "- upper, a/b: killed / by somebody" in found


def test_provenance(comparison) -> None:
    text = "\n".join(lines(comparison, row("neft", [1.0, 2.0])))
    for told in ("content:1", "cores 2", "torch 2", "not run from a git checkout", "`tok:13a`"):
        assert told in text


def test_figures_have_the_rows_that_are_there(comparison, tmp_path) -> None:
    drawn = draw_figures(comparison, [task(row("neft", [1.0, 2.0]))], tmp_path)
    assert [file.name for file in drawn] == ["f.png", "f.svg"]
    assert draw_figures(comparison, [task(row("random", [1.0, 2.0]))], tmp_path) == []
