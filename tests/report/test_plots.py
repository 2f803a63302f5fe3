"""Figures by name: each one drawn from a run, with its numbers in words; each gap with its remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neft.analysis.table import Table
from neft.errors import UsageError
from neft.report.neuron_figures import draw_causal
from neft.report.plots import PLOTS, neuron_map, save_plot
from neft.report.run_data import RunData


@pytest.mark.parametrize("name", PLOTS)
def test_every_figure_is_written(tmp_path: Path, run_data: RunData, name: str) -> None:
    files = save_plot(run_data, name, tmp_path / name)
    assert [file.name for file in files] == [f"{name}.png", f"{name}.svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert len(files[1].read_bytes()) < 200_000


@pytest.mark.parametrize("name", PLOTS)
def test_every_gap_names_its_remedy(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        UsageError, match=rf"run: has no data for the figure {name}.*neft run RECIPE"
    ):
        save_plot(RunData("run"), name, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_unknown_figure(tmp_path: Path, run_data: RunData) -> None:
    with pytest.raises(UsageError, match=r"figure2: no figure of this name\. There are: training,"):
        save_plot(run_data, "figure2", tmp_path / "x")


def test_the_map_counts_what_was_chosen(run_data: RunData) -> None:
    found = neuron_map(run_data)
    assert found is not None
    assert run_data.neurons is not None
    for row, role in enumerate(found.roles):
        for column, layer in enumerate(found.layers):
            name = f"model.layers.{layer}.mlp.{role}_proj"
            assert found.num_trained[row, column] == len(run_data.neurons[name])
            assert found.num_candidates[row, column] == 48


def test_the_map_without_analysis_is_the_same(run_data: RunData) -> None:
    full, bare = neuron_map(run_data), neuron_map(replace(run_data, tables={}))
    assert full is not None
    assert bare is not None
    np.testing.assert_array_equal(full.num_trained, bare.num_trained)
    np.testing.assert_array_equal(full.num_candidates, bare.num_candidates)


def test_the_threshold_is_the_last_chosen_score(run_data: RunData) -> None:
    drawn = PLOTS["scores"].draw(run_data)
    assert drawn is not None
    assert run_data.scores is not None
    assert run_data.neurons is not None
    chosen = [
        run_data.scores.distances[name][index]
        for name, indices in run_data.neurons.items()
        for index in indices
    ]
    assert f"the selection ends at {min(chosen):.3g}." in drawn.alternative


def test_a_random_choice_has_no_threshold(run_data: RunData) -> None:
    assert run_data.scores is not None
    chosen = run_data.scores.select(percent=9, which="random")
    drawn = PLOTS["scores"].draw(replace(run_data, tables={}, neurons=chosen))
    assert drawn is not None
    assert "were trained." in drawn.alternative


def test_average_rank_change_beside_chance(run_data: RunData) -> None:
    """Two unrelated orders of n differ by (n^2 - 1) / 3n on average: counted out here."""
    drawn = PLOTS["figure5"].draw(run_data)
    assert drawn is not None
    rows = [row for row in run_data.tables["neurons"].rows() if row["role"] == "up"]
    average = sum(abs(row["rank_after"] - row["rank_before"]) for row in rows) / len(rows)
    ranks = range(len(rows))
    chance = sum(abs(one - other) for one in ranks for other in ranks) / len(rows) ** 2
    assert (
        f"up {average:,.0f} ({100 * average / chance:.1f}% of what unrelated" in drawn.alternative
    )


def test_bands_of_layers_are_named_by_their_numbers() -> None:
    rows = [("layers 0-2", 4, 0.5), ("layer 3", 2, 0.25)]
    groups, counts, rises = zip(*rows, strict=True)
    table = Table(
        {"group": groups, "kind": ["layer"] * 2, "num_neurons": counts, "task_rise": rises}
    )
    axes = draw_causal(table).axes[-1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0-2", "3"]
