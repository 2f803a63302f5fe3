"""The analysis of a run: its tables agree with the models, whatever cut it off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from neft.analysis import files as tables
from neft.analysis.table import Table
from neft.checkpoints import open_weights
from neft.cli import app
from neft.errors import UsageError
from neft.evaluation import target_loss, text_loss
from neft.models import load_model, load_tokenizer
from neft.neurons import NeuronScores, NeuronSet
from neft.pipeline.adapter import load_merged
from neft.pipeline.run import analyze, run
from neft.recipe import load_recipe
from neft.sft.data import load_examples
from neft.sft.prompts import encode_all

ALL = {
    tables.NEURONS,
    tables.BUCKETS,
    tables.ACTIVITY,
    tables.CONTEXTS,
    tables.LENS,
    tables.CAUSAL,
}


def nothing(_line: str) -> None:
    pass


def made(folder: Path) -> set[str]:
    suffixes = (".csv", ".parquet")
    return {path.name for path in folder.iterdir() if path.suffix in suffixes}


@pytest.fixture(scope="module")
def finished(tiny_recipe, tmp_path_factory) -> Path:
    """A run whose recipe asks for nothing but the usual, analysed afterwards."""
    folder = tmp_path_factory.mktemp("analysed")
    run(load_recipe(tiny_recipe(folder)), say=nothing)
    assert analyze(folder / "run", say=nothing) == folder / "run" / "analysis"
    return folder


@pytest.fixture(scope="module")
def recipe(finished, tiny_recipe):
    return load_recipe(tiny_recipe(finished))


def test_every_table_is_there(finished) -> None:
    assert made(finished / "run" / "analysis") == ALL


def test_neurons_are_those_of_the_run(finished, recipe) -> None:
    table = Table.load(finished / "run" / "analysis" / tables.NEURONS)
    neurons = NeuronSet.load(finished / "run" / "select" / "neurons.json")
    scores = NeuronScores.load(finished / "run" / "score" / "scores.safetensors")
    before = open_weights(recipe.model.path)
    after = open_weights(load_merged(recipe, finished / "run" / "train"))
    assert len(table) == len(scores)
    for row in table.rows():
        name, index = row["module"], row["index"]
        projection = scores.projections[name]
        assert (row["layer"], row["role"]) == (projection.layer, projection.role)
        assert row["trained"] == (index in neurons[name])
        assert row["distance"] == scores.distances[name][index]
        a, b = (
            source.read(f"{name}.weight").select(projection.neuron_dim, index).double()
            for source in (before, after)
        )
        assert row["norm_before"] == pytest.approx(a.norm().item(), rel=1e-12)
        assert row["change"] == pytest.approx((b - a).norm().item() / a.norm().item(), rel=1e-9)
        assert (row["change"] > 0) == row["trained"]
        assert row["rank_change"] == row["rank_after"] - row["rank_before"]


def test_nothing_restored_is_the_trained_model_and_all_restored_the_base(finished, recipe) -> None:
    rows = Table.load(finished / "run" / "analysis" / tables.CAUSAL).rows()
    assert rows[0]["kind"] == "none"
    assert rows[0]["task_rise"] == 0
    tokenizer = load_tokenizer(recipe.model)
    encoded = encode_all(load_examples(recipe.data, "dev"), tokenizer, recipe.data)
    trained, base = (
        target_loss(model, encoded.input_ids, encoded.labels, batch_size=2).loss
        for model in (
            load_merged(recipe, finished / "run" / "train"),
            load_model(recipe.model),
        )
    )
    assert rows[0]["task_loss"] == pytest.approx(trained, rel=1e-6)
    restored = next(row for row in rows if row["kind"] == "all")
    assert restored["task_loss"] == pytest.approx(base, rel=1e-6)
    assert restored["task_rise"] == pytest.approx(base - trained, rel=1e-4)


def test_a_second_time_nothing_is_done(finished) -> None:
    said: list[str] = []
    analyze(finished / "run", say=said.append)
    assert [line.partition(",")[0] for line in said] == ["analysis: already done"]


def test_an_attempt_that_was_cut_off_goes_on(finished, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished / "run", folder)
    shutil.rmtree(folder / "analysis")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("neft.pipeline.analyze.lens", stop)
        with pytest.raises(KeyboardInterrupt):
            analyze(folder, say=nothing)
    partial = folder / ".analysis.partial"
    assert made(partial) == ALL - {tables.LENS, tables.CAUSAL}
    kept = (partial / tables.NEURONS).stat().st_mtime_ns
    analyze(folder, say=nothing)
    assert (folder / "analysis" / tables.NEURONS).stat().st_mtime_ns == kept
    for name in ALL:
        whole, resumed = (
            Table.load(place / "analysis" / name) for place in (finished / "run", folder)
        )
        assert list(whole.columns) == list(resumed.columns)
        for column in whole.columns:
            np.testing.assert_array_equal(whole[column], resumed[column])


def test_a_recipe_with_the_section_runs_it(finished, tiny_recipe, tmp_path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run" / "analysis")
    random = NeuronScores.load(tmp_path / "run" / "score" / "scores.safetensors").select(
        percent=9, which="random"
    )
    random.save(tmp_path / "random.json")
    settings = [
        "analysis={contexts: 0, causal: false}",
        f"analysis.overlap_with={{chance: {tmp_path / 'random.json'}}}",
    ]
    run(load_recipe(tiny_recipe(tmp_path), settings), say=nothing)
    folder = tmp_path / "run" / "analysis"
    assert made(folder) == ALL - {tables.CONTEXTS, tables.CAUSAL} | {tables.OVERLAP}
    chosen = NeuronSet.load(tmp_path / "run" / "select" / "neurons.json")
    first = Table.load(folder / tables.OVERLAP).rows()[0]
    assert (first["a"], first["b"]) == ("this run", "chance")
    assert first["share"] == chosen.overlap(random)


def test_the_causal_test_reads_as_many_general_texts(tiny_recipe, tmp_path) -> None:
    texts = [f"some text, number {number}" for number in range(5)]
    (tmp_path / "general.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    settings = [
        f"evaluate.general={{text: {tmp_path / 'general.jsonl'}}}",
        "analysis={limit: 2, contexts: 0}",
    ]
    recipe = load_recipe(tiny_recipe(tmp_path), settings)
    run(recipe, say=nothing)
    first = Table.load(tmp_path / "run" / "analysis" / tables.CAUSAL).rows()[0]
    expected = text_loss(
        load_merged(recipe, tmp_path / "run" / "train"),
        load_tokenizer(recipe.model),
        texts[:2],
        max_length=256,
        batch_size=2,
    )
    assert first["general_loss"] == pytest.approx(expected.loss, rel=1e-6)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_methods_that_choose_no_neurons(tiny_recipe, tmp_path, method: str) -> None:
    settings = [f"train.method={method}", "analysis={}"]
    settings += ["train.lora={rank: 2}"] if method == "lora" else []
    run(load_recipe(tiny_recipe(tmp_path), settings), say=nothing)
    folder = tmp_path / "run" / "analysis"
    assert made(folder) == ALL - {tables.CAUSAL}
    table = Table.load(folder / tables.NEURONS)
    assert "distance" not in table.columns
    assert np.asarray(table["trained"]).all()
    assert (np.asarray(table["change"]) > 0).all()


def test_an_unfinished_run_is_refused(finished, tmp_path) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "evaluate")
    shutil.rmtree(tmp_path / "run" / "analysis")
    with pytest.raises(UsageError, match=r"evaluate: is not there.*neft run"):
        analyze(tmp_path / "run", say=nothing)
    assert not (tmp_path / "run" / "analysis").exists()
    with pytest.raises(UsageError, match="no folder of a run"):
        analyze(tmp_path, say=nothing)


@pytest.mark.parametrize("part", ["utilization", "ranks", "activity", "lens", "causal"])
def test_the_command_line_shows_each_part(finished, part: str) -> None:
    shown = CliRunner().invoke(app, ["analyze", part, str(finished / "run")])
    assert shown.exit_code == 0, shown.output
    as_json = CliRunner().invoke(app, ["analyze", part, str(finished / "run"), "--json"])
    assert as_json.exit_code == 0
    assert json.loads(as_json.stdout)


def test_threads_change_nothing(finished, tmp_path) -> None:
    threads = torch.get_num_threads()
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "analysis")
    try:
        torch.set_num_threads(3)
        analyze(tmp_path / "run", say=nothing)
    finally:
        torch.set_num_threads(threads)
    whole, again = (
        Table.load(place / "run" / "analysis" / tables.NEURONS) for place in (finished, tmp_path)
    )
    np.testing.assert_allclose(
        np.asarray(whole["utilization_after"]), np.asarray(again["utilization_after"]), rtol=1e-5
    )


def test_the_report_shows_what_was_found(finished, tmp_path) -> None:
    page = tmp_path / "report.html"
    shown = CliRunner().invoke(app, ["report", str(finished / "run"), "-o", str(page)])
    assert shown.exit_code == 0, shown.output
    text = page.read_text()
    table = Table.load(finished / "run" / "analysis" / tables.NEURONS)
    average = table.about["average_rank_change"]["all"]
    assert f"all {average:,.0f} (" in text  # in the words of Figure 5
    assert "lowest 25% by cosine" in text
    assert "neft analyze" not in text  # no gap


@pytest.mark.parametrize("name", ["training", "neurons", "scores", "figure3", "figure6", "causal"])
def test_figures_by_name(finished, tmp_path, name: str) -> None:
    stem = tmp_path / "drawn"
    shown = CliRunner().invoke(app, ["plot", name, str(finished / "run"), "-o", str(stem)])
    assert shown.exit_code == 0, shown.output
    assert stem.with_suffix(".png").stat().st_size > 1000
    assert stem.with_suffix(".svg").read_text().startswith("<?xml")


def test_an_unknown_figure_lists_those_that_are_known(finished) -> None:
    shown = CliRunner().invoke(app, ["plot", "figure9", str(finished / "run")])
    assert shown.exit_code == 2
    assert "figure3" in shown.stderr


def test_overlap_of_files_on_the_command_line(finished, tmp_path) -> None:
    run_folder = finished / "run"
    scores = run_folder / "score" / "scores.safetensors"
    chosen = run_folder / "select" / "neurons.json"
    adapter = run_folder / "train" / "adapter"
    files = (chosen, adapter, scores)
    output = tmp_path / "overlap.csv"
    shown = CliRunner().invoke(
        app,
        ["analyze", "overlap", *map(str, files), "--percent", "9", "-o", str(output), "--json"],
    )
    assert shown.exit_code == 0, shown.output
    rows = json.loads(shown.stdout)
    assert all(row["share"] == 1 for row in rows)
    assert len(Table.load(output)) == len(rows) == 6
    refused = CliRunner().invoke(app, ["analyze", "overlap", str(chosen)])
    assert refused.exit_code == 2
    assert "two or more" in refused.stderr
