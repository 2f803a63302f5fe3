"""Comparisons of tiny models, whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neft.comparison.run import Compared, compare
from neft.comparison.schema import load_comparison


def compared(comparison: Path, *settings: str, **options) -> tuple[Compared, list[str]]:
    said: list[str] = []
    return compare(load_comparison(comparison, settings), say=said.append, **options), said


@pytest.fixture(scope="module")
def finished(tiny_comparison, tmp_path_factory) -> tuple[Path, Compared, list[str]]:
    """A folder, what a comparison found there, and what it said."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, *compared(tiny_comparison(folder, seeds=[0, 1]))


def test_every_row_is_there(finished) -> None:
    _, result, _ = finished
    (task,) = result.results
    assert not result.failures
    assert [row.name for row in task.rows] == ["neft", "full", "lora", "random"]
    for row in task.rows:
        assert row.state == "done"
        assert [seed.seed for seed in row.seeds] == [0, 1]
        assert list(row.metrics) == ["BLEU", "chrF++"]


def test_shared_stages_are_done_once(finished) -> None:
    folder, _, said = finished
    done = [line.partition(":")[0] for line in said if ": done" in line]
    assert len(done) == len(set(done))
    stages = [path.name.partition("-")[0] for path in (folder / "compared" / "stages").iterdir()]
    # Two trials of neft, of which one is the first seed's, and the second seed; two runs each of the others.
    counts = {name: stages.count(name) for name in set(stages)}
    # Random neurons: another set for each seed.
    assert counts == {"baseline": 1, "warmup": 1, "score": 1, "select": 3, "train": 9, "evaluate": 8}
