"""Ways of finding neurons in one comparison, against what lies in the folders of its cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neft.comparison.cells import Cell, Cells
from neft.comparison.discovery import collect_discovery
from neft.comparison.discovery_table import discovery_markdown
from neft.comparison.plan import Plan
from neft.comparison.results import collect
from neft.comparison.run import compare
from neft.comparison.schema import load_comparison
from neft.neurons import NeuronScores, NeuronSet


def row(name: str, **fields: Any) -> dict[str, Any]:
    common = {"name": name, "method": "neft", "select": {"percent": 9}, "learning_rates": [1e-2]}
    return common | fields


METHODS = [
    row("full"),
    row("lean", warmup={"optimizer": "adafactor", "in_backward": True}),
    row("gradient", warmup={"method": "gradient", "snapshots": []}),
    row("lora", warmup={"method": "lora", "snapshots": []}),
    row("activation", warmup={"method": "activation", "snapshots": []}),
    row("norm", warmup={"method": "norm", "snapshots": []}),
    row("random", select={"percent": 9, "which": "random"}),
    row("with gate", score={"modules": ["up", "gate", "down"]}),
    {"name": "whole", "method": "full", "learning_rates": [1e-3]},
]
TRAINED = [entry["name"] for entry in METHODS if entry["name"] != "whole"]


@pytest.fixture(scope="module")
def finished(tiny_comparison, tmp_path_factory) -> tuple[Path, Cells]:
    folder = tmp_path_factory.mktemp("discovery")
    comparison = load_comparison(tiny_comparison(folder, methods=METHODS))
    compared = compare(comparison, say=lambda line: None)
    assert not compared.failures
    assert folder / "compared" / "upper-discovery.png" in compared.figures
    return folder / "compared", Cells(comparison)


@pytest.fixture(scope="module")
def ways(finished) -> dict[str, dict[str, Any]]:
    found = json.loads((finished[0] / "discovery.json").read_text())
    [task] = found["tasks"]
    assert task["reference"] == "full"
    assert found["provenance"]["model"]
    return {way["name"]: way for way in task["ways"]}


def scores_of(cells: Cells, name: str) -> NeuronScores:
    jobs = cells.jobs(Cell("upper", name, 0, 1e-2))
    return NeuronScores.load(jobs["score"].folder / "scores.safetensors")


def chosen_by(cells: Cells, name: str) -> set[tuple[str, int]]:
    jobs = cells.jobs(Cell("upper", name, 0, 1e-2))
    neurons = NeuronSet.load(jobs["select"].folder / "neurons.json")
    return {(module, int(i)) for module, indices in neurons.items() for i in indices}


def test_every_way_is_there(ways) -> None:
    assert list(ways) == TRAINED


def test_overlap_by_budget(finished, ways) -> None:
    def lowest(scores: NeuronScores, percent: float) -> set[tuple[float, str, int]]:
        ranked = sorted(
            (-distance, name, index)
            for name, distances in scores.distances.items()
            for index, distance in enumerate(distances)
        )
        return {entry[1:] for entry in ranked[: len(scores.select(percent=percent))]}

    reference = scores_of(finished[1], "full")
    for name in ("lean", "gradient", "lora", "activation", "norm"):
        own = scores_of(finished[1], name)
        for percent, share in ways[name]["overlap"].items():
            mine, theirs = (lowest(scores, float(percent)) for scores in (own, reference))
            assert share == pytest.approx(len(mine & theirs) / len(mine))
    assert set(ways["full"]["overlap"].values()) == {1.0}
    assert ways["random"]["overlap"] is None
    assert ways["with gate"]["overlap"] is None


def test_overlap_of_what_is_trained(finished, ways) -> None:
    reference = chosen_by(finished[1], "full")
    for name, way in ways.items():
        own = chosen_by(finished[1], name)
        assert way["share_of_choice"] == pytest.approx(len(own & reference) / len(own))
    candidates = len(scores_of(finished[1], "full"))
    assert ways["random"]["chance"] == pytest.approx(len(reference) / candidates)
    assert ways["with gate"]["chance"] == pytest.approx(len(reference) / candidates / 1.5)


def test_costs(finished, ways) -> None:
    cells = finished[1]
    for name, way in ways.items():
        jobs = cells.jobs(Cell("upper", name, 0, 1e-2))
        own = [jobs[stage] for stage in ("warmup", "score") if stage in jobs]
        assert bool(own) == (name != "random")
        if own:
            seconds = [cells.finished(job).seconds for job in own]
            assert way["seconds"] == pytest.approx(sum(seconds))
            assert way["peak_memory_bytes"] is None or way["peak_memory_bytes"] > 0
        else:
            assert way["seconds"] is None
            assert way["peak_memory_bytes"] is None


def test_table(finished) -> None:
    lines = (finished[0] / "discovery.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    names = [line.split(" | ")[0].removeprefix("| ") for line in rows]
    assert names == ["neurons by", "---", "chance", *TRAINED]
    assert len({line.count("|") for line in rows}) == 1


def test_nothing_to_compare(tiny_comparison, tmp_path: Path) -> None:
    comparison = load_comparison(tiny_comparison(tmp_path, methods=[METHODS[0], METHODS[-1]]))
    compare(comparison, say=lambda line: None)
    cells = Cells(comparison)
    assert collect_discovery(cells, collect(cells, Plan(cells))) == []
    assert discovery_markdown([]) == ""
    assert not (tmp_path / "compared" / "discovery.json").exists()
