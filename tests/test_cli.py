"""The command line: exit codes, one message an error, output for people, pipes and machines."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import neft
from neft.cli import app
from neft.console import size
from neft.neurons import Axis, NeuronScores, NeuronSet, Projection
from neft.pipeline.store import locked


def call(*arguments: object) -> Result:
    """The command in this process; errors that it does not foresee are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    assert "unexpected" not in result.stderr
    return result


def shell(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "neft", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes() for name in files(folder) if (folder / name).is_file()
    }


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    projections = [
        Projection("layers.0.up", 0, "up", Axis.ROW, 6, 4),
        Projection("layers.0.down", 0, "down", Axis.COLUMN, 6, 4),
        Projection("layers.1.up", 1, "up", Axis.ROW, 6, 4),
    ]
    distances = {
        projection.name: np.arange(6) / 100 + number
        for number, projection in enumerate(projections)
    }
    path = tmp_path / "scores.safetensors"
    NeuronScores(projections, distances, 400, {"method": "cosine"}).save(path)
    return path


# The program


def test_version() -> None:
    result = call("--version")
    assert result.exit_code == 0
    assert result.stdout == f"neft {neft.__version__}\n"


def test_help_names_every_command() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for command in ("run", "status", "score", "select", "train", "evaluate", "merge", "info"):
        assert f" {command} " in result.stdout
        assert call(command, "--help").exit_code == 0


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from neft.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'sacrebleu', 'numpy', 'pydantic'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["run"],
        ["run", "a.yaml", "--what"],
        ["select", "s.safetensors", "--percent", "nine"],
        ["select", "s.safetensors", "--which", "best"],
        ["merge", "adapter"],
    ],
)
def test_wrong_use(arguments) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.parametrize("position", [0, 1, 3])
def test_debug_shows_the_traceback_wherever_it_stands(tmp_path, position) -> None:
    arguments = ["run", "missing.yaml", "--overwrite"]
    quiet = shell(*arguments, cwd=tmp_path)
    assert quiet.returncode == 2
    assert quiet.stdout == ""
    assert quiet.stderr == "error: missing.yaml: cannot be read: No such file or directory.\n"
    arguments.insert(position, "--debug")
    debug = shell(*arguments, cwd=tmp_path)
    assert debug.returncode == 2
    assert debug.stderr.startswith("Traceback")
    assert debug.stderr.endswith(quiet.stderr)


def test_unforeseen_error(tmp_path, monkeypatch) -> None:
    def fail(path: Path) -> Any:
        raise ZeroDivisionError("by zero [of all things]")

    monkeypatch.setattr("neft.pipeline.info.describe", fail)
    result = CliRunner().invoke(app, ["info", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "error: unexpected ZeroDivisionError: by zero [of all things]\n"
    )
    assert "--debug" in result.stderr
    assert "Traceback" not in result.stderr


def test_unusable_output(tiny_recipe, tmp_path) -> None:
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "file").write_text("")
    result = call("run", recipe, "--set", f"output={tmp_path}/file/run")
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {tmp_path}/file/run: cannot be made, as {tmp_path}/file is a file. Choose another "
        "output folder.\n"
    )
    result = call("run", recipe, "--set", f"output={recipe}")
    assert result.exit_code == 2
    assert f"{recipe}: is a file" in result.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("select {scores} --count 3 -o {scores}", "should end in .json"),
        ("select {neurons} --count 3 -o {neurons}", "belongs to what this command reads"),
        ("select {scores} --count 3 -o {tmp}", "should end in .json"),
        ("select {scores} --count 3 -o {tmp}/dir.json", "dir.json: is a folder"),
        ("select {scores} --count 3 -o {scores}/n.json", "scores.safetensors: is a file"),
        ("neurons union {neurons} {other} -o {scores}", "should end in .json"),
        ("neurons union {neurons} {other} -o {other}", "belongs to what this command reads"),
        ("neurons convert {neurons} -o {neurons} --to csv", "belongs to what"),
        ("neurons convert {neurons} -o {recipe} --to csv", "in .json or .csv or .txt"),
        ("neurons overlap {neurons} {other} -o {tmp}/o.txt", "in .csv or .parquet"),
        ("analyze overlap {neurons} {other} -o {tmp}/other.csv", "other.json: belongs to"),
        ("score --recipe {recipe} -o {recipe}", "should end in .safetensors"),
        ("score --recipe {recipe} -o {tmp}/dir.safetensors", "dir.safetensors: is a folder"),
        ("score {model} {model} -o {model}/model.safetensors", "belongs to what"),
        ("diff {model} {model} --plot {tmp}/map.pdf", "should end in .png or .svg"),
        ("report {tmp} -o {recipe}", "should end in .html"),
        ("plot change {tmp} -o {recipe}/change", "recipe.yaml: is a file"),
    ],
)
def test_outputs_that_must_not_be_written(tiny_recipe, scores, tmp_path, command, message) -> None:
    recipe = tiny_recipe(tmp_path)
    neurons = NeuronScores.load(scores).select(count=2)
    places = {"neurons": tmp_path / "neurons.json", "other": tmp_path / "other.json"}
    for place in places.values():
        neurons.save(place)
    for name in ("dir.json", "dir.safetensors"):
        (tmp_path / name).mkdir()
    before = contents(tmp_path)
    names = {"tmp": tmp_path, "recipe": recipe, "scores": scores, "model": tmp_path / "model"}
    result = call(*command.format_map(names | places).split())
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert contents(tmp_path) == before


def test_interrupt(tmp_path, monkeypatch) -> None:
    def interrupt(path: Path) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("neft.pipeline.info.describe", interrupt)
    result = call("info", tmp_path)
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted. The same command goes on where it stopped.\n"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (48_900_000, "48.9 MB"), (27e9, "27.0 GB")],
)
def test_sizes_for_people(num_bytes, text) -> None:
    assert size(num_bytes) == text


# Neurons


def test_select(scores, tmp_path) -> None:
    neurons = tmp_path / "neurons.json"
    result = call("select", scores, "--percent", 9, "-o", neurons)
    assert result.exit_code == 0, result.stderr
    # 9% of 400 parameters are 9 neurons of length 4; scores rise with layer and index.
    chosen = NeuronSet.load(neurons)
    assert {name: indices.tolist() for name, indices in chosen.items()} == {
        "layers.1.up": [0, 1, 2, 3, 4, 5],
        "layers.0.down": [3, 4, 5],
    }
    assert "num neurons: 9\n" in result.stdout
    assert str(neurons) in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--megabytes", "0.00005"], {"layers.1.up": [3, 4, 5]}),
        (["--count", 4, "--rule", "even"], {"layers.0.down": [4, 5], "layers.1.up": [4, 5]}),
        (
            ["--count", 4, "--rule", "floor", "--floor", 30, "--which", "highest"],
            {"layers.0.up": [0, 1, 2, 3]},
        ),
        (
            ["--count", 5, "--rule", "floor", "--floor", 100],
            {"layers.0.down": [4, 5], "layers.1.up": [3, 4, 5]},
        ),
    ],
)
def test_select_by_a_rule(scores, tmp_path, arguments, expected) -> None:
    result = call("select", scores, *arguments, "-o", tmp_path / "neurons.json")
    assert result.exit_code == 0, result.stderr
    chosen = NeuronSet.load(tmp_path / "neurons.json")
    assert {name: indices.tolist() for name, indices in chosen.items()} == expected


def test_select_above_rounding(scores, tmp_path) -> None:
    measured = NeuronScores.load(scores)
    measured.provenance["rounding"] = {"floor": 2.0}
    measured.save(scores)
    result = call(
        "select", scores, "--count", 6, "--above-rounding", "-o", tmp_path / "neurons.json"
    )
    assert result.exit_code == 2
    assert "hold only 5 neurons" in result.stderr


def test_select_random(scores, tmp_path) -> None:
    for seed in (1, 2):
        for attempt in "ab":
            path = tmp_path / f"{seed}{attempt}.json"
            arguments = ["--count", 5, "--which", "random", "--seed", seed, "-o", path]
            assert call("select", scores, *arguments).exit_code == 0
    sets = {name: NeuronSet.load(tmp_path / f"{name}.json") for name in ("1a", "1b", "2a")}
    assert sets["1a"] == sets["1b"] != sets["2a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--percent", "0"], "percent is 0"),
        (["--percent", "-1"], "percent is -1"),
        (["--percent", "nan"], "percent is nan"),
        (["--percent", "19"], "percent is 19, but the scored projections hold only 18"),
        (["--count", "19"], "count is 19"),
        (["--megabytes", "0.0003"], "scored projections hold only 0.000288 MB of an adapter's"),
        (["--count", "7", "--rule", "units"], "whole units make 6 or 8 neurons"),
        (["--count", "5", "--rule", "floor", "--floor", "0"], "floor is 0"),
        (["--count", "5", "--floor", "20"], "--floor 20 is for --rule floor, not for paper"),
        (["--count", "5", "--seed", "0"], "--seed 0 is for --which random, not for lowest"),
        ([], "by percent, count or megabytes"),
        (["--percent", "1", "--count", "1"], "by percent, count or megabytes"),
    ],
)
def test_select_refuses(scores, tmp_path, arguments, message) -> None:
    result = call("select", scores, "-o", tmp_path / "neurons.json", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert files(tmp_path) == {"scores.safetensors"}


def test_info_of_scores(scores) -> None:
    result = call("info", scores, "--json")
    info = json.loads(result.stdout)
    assert info["kind"] == "scores"
    assert info["num_neurons"] == 18
    median = next(row for row in info["quantiles of 1 - cos"] if row["quantile"] == "50%")
    assert median == {
        "quantile": "50%",
        "up": pytest.approx(np.median([*np.arange(6) / 100, *np.arange(6) / 100 + 2])),
        "down": pytest.approx(1.025),
        "all": pytest.approx(1.025),
    }
    assert "50%" in call("info", scores).stdout


def test_info_of_neurons(scores, tmp_path) -> None:
    call("select", scores, "--count", 9, "-o", tmp_path / "neurons.json")
    info = json.loads(call("info", tmp_path / "neurons.json", "--json").stdout)
    assert info["num_neurons"] == 9
    assert info["neurons"] == [
        {"layer": 0, "up": 0, "down": 3},
        {"layer": 1, "up": 6, "down": 0},
    ]
    assert info["provenance"]["method"] == "cosine"


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("none", lambda path: None, "no such file"),
        ("text.json", lambda path: path.write_text("neurons"), "not a JSON file"),
        ("list.json", lambda path: path.write_text("[]"), "expected a JSON object"),
        ("other.json", lambda path: path.write_text("{}"), "not a neuron set"),
        (
            "weights.safetensors",
            lambda path: path.write_bytes(b"1234"),
            "not a readable scores file",
        ),
        ("folder", Path.mkdir, "has no adapter_config.json"),
    ],
)
def test_info_refuses(tmp_path, name, make, message) -> None:
    make(tmp_path / name)
    result = call("info", tmp_path / name)
    assert result.exit_code == 2
    assert message in result.stderr
    assert str(tmp_path / name) in result.stderr


def test_torn_scores(scores, tmp_path) -> None:
    torn(scores)
    result = call("select", scores, "--count", 1, "-o", tmp_path / "neurons.json")
    assert result.exit_code == 2
    assert "scores.safetensors: not a readable scores file" in result.stderr


def test_validate_tells_of_every_recipe(tiny_recipe, tmp_path) -> None:
    good = tiny_recipe(tmp_path)
    for name in ("bad.yaml", "worse.yaml"):
        (tmp_path / name).write_text(f"{good.read_text()}\nunknown: {name}\n")
    recipes = tmp_path / "bad.yaml", good, tmp_path / "worse.yaml"
    result = call("validate", *recipes)
    assert result.exit_code == 2
    assert result.stdout == f"{good}: fits\n"
    assert result.stderr.count("unknown key") == 2
    result = call("validate", good, "--set", "train.steps=many")
    assert result.exit_code == 2
    assert "train.steps" in result.stderr


# Runs that cannot start


def write(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        (remove("test.jsonl"), [], r"data.test: {}/test.jsonl: no such file"),
        (remove("model/config.json"), [], "{}/model: has no config.json"),
        (remove("model/tokenizer.json"), [], "{}/model: the tokenizer cannot be loaded"),
        (remove("model/model.safetensors"), [], "{}/model"),
        (write("train.jsonl", ""), [], "train.jsonl: holds no rows"),
        (write("dev.jsonl", '{"source": "a"}\n'), [], "dev.jsonl, line 1: no field 'target'"),
        (write("test.jsonl", '{"source": "a", "target": ""}\n'), [], "field 'target' is empty"),
        (write("test.jsonl", '{"source": "a"\n'), [], "test.jsonl, line 1"),
        (None, ["model.path=/nowhere/model"], "/nowhere/model"),
        (None, ["data.max_length=4"], "max_length"),
        (None, ["data.style=chat"], "no chat template"),
        (None, ["data.target_language=Japanese"], "ja-mecab"),
        (None, ["select.percent=60"], "percent is 60"),
        (None, ["select={count: 1000000}"], "count is 1000000"),
        (None, ["score.modules=[gate_up]"], "gate_up"),
        (None, ["train.report_to=[nobody]"], "report_to: 'nobody'"),
        (None, ["train.step=3"], "train.step: unknown key"),
        (None, ["train.steps=many"], "train.steps"),
        (None, ["select.percent=.nan"], "select.percent"),
        (None, ["select.percent=0"], "select.percent"),
        (None, ["nonsense"], "expected section.key=value"),
    ],
)
def test_run_refuses_before_anything_expensive(
    tiny_recipe, tmp_path, spoil, settings, message
) -> None:
    recipe = tiny_recipe(tmp_path)
    if spoil:
        spoil(tmp_path)
    before = files(tmp_path)
    result = call("run", recipe, *(part for text in settings for part in ("--set", text)))
    assert result.exit_code == 2, result.stderr
    assert message.format(tmp_path) in result.stderr
    assert result.stdout == ""
    assert files(tmp_path) == before


def test_estimate_of_a_run(tiny_recipe, tmp_path) -> None:
    recipe = tiny_recipe(tmp_path)
    shown = call("estimate", recipe)
    assert shown.exit_code == 0, shown.output
    rows = {line.split()[0]: line.split() for line in shown.stdout.splitlines() if line.split()}
    # The last two columns: steps, seconds a step.
    assert rows["warmup"][1] == "full"
    assert float(rows["train"][-1]) > 0
    assert rows["evaluate"][-1] == "-"
    without = call("estimate", recipe, "--no-calibrate", "--json", "--set", "train.batch_size=2")
    stages = {stage["stage"]: stage for stage in json.loads(without.stdout)}
    assert stages["train"]["seconds_per_step"] is None
    assert stages["train"]["memory"]["gradients"] == 4 * stages["train"]["num_trainable"]
    assert not (tmp_path / "run").exists()


def test_estimate_of_a_comparison_without_weights() -> None:
    recipe = Path(__file__).parents[1] / "recipes" / "paper" / "table2.yaml"
    shown = call("estimate", recipe, "--set", "seeds=[0]")
    assert shown.exit_code == 0, shown.output
    assert "614.4M" in shown.stdout  # NeFT 9%: 150,000 neurons of length 4096
    assert "all of them targets" in shown.stdout


def test_status_of_no_run(tmp_path) -> None:
    result = call("status", tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path}: no folder of a run" in result.stderr


# A whole run, and its parts alone


@pytest.fixture(scope="module")
def finished(tiny_recipe, tmp_path_factory) -> tuple[Path, Result]:
    """The folder of a recipe that has run, and what the command printed."""
    folder = tmp_path_factory.mktemp("finished")
    result = call("run", tiny_recipe(folder))
    assert result.exit_code == 0, result.stderr
    return folder, result


def test_run_prints_results_on_stdout_and_what_happens_on_stderr(finished) -> None:
    folder, result = finished
    for shown in (
        "base",
        "NeFT",
        "BLEU",
        "chrF++",
        "trained parameters",
        "time a step",
        "13a",
        "TEST 4",
    ):
        assert shown in result.stdout
    assert result.stdout.endswith(f"adapter: {folder / 'run' / 'train' / 'adapter'}\n")
    assert "warmup: starts\n" in result.stderr
    assert "\x1b" not in result.output


def test_run_again(finished) -> None:
    folder, result = finished
    again = shell("run", folder / "recipe.yaml")
    assert again.returncode == 0
    assert again.stdout == result.stdout
    assert [line.partition(",")[0] for line in again.stderr.splitlines()] == [
        f"{stage}: already done"
        for stage in ("prepare", "baseline", "warmup", "score", "select", "train", "evaluate")
    ]


def test_finished_run_needs_nothing_heavy(finished) -> None:
    folder, _ = finished
    script = (
        "import sys; from neft.cli import app\n"
        "try: app(['run', sys.argv[1]])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script, str(folder / "recipe.yaml")], check=True)


def test_status(finished) -> None:
    folder, _ = finished
    stages = json.loads(call("status", folder / "run", "--json").stdout)
    assert [stage["stage"] for stage in stages][-1] == "evaluate"
    assert {stage["state"] for stage in stages} == {"done"}
    assert all(stage["num_bytes"] > 0 for stage in stages)
    shown = call("status", folder / "run").stdout
    assert shown.count("done") == len(stages)


def test_another_recipe_is_refused(finished) -> None:
    folder, _ = finished
    result = call("run", folder / "recipe.yaml", "--set", "train.learning_rate=0.5")
    assert result.exit_code == 2
    assert f"  {folder / 'run' / 'train'}\n" in result.stderr
    assert "train.learning_rate is 0.1 there, 0.5 in this recipe" in result.stderr
    assert "--overwrite" in result.stderr


def test_run_at_work_is_refused(tiny_recipe, tmp_path) -> None:
    recipe = tiny_recipe(tmp_path)
    with locked(tmp_path / "run" / ".lock"):
        result = call("run", recipe)
    assert result.exit_code == 1
    assert "is working here" in result.stderr


def test_diverging_run_fails(tiny_recipe, tmp_path) -> None:
    recipe = tiny_recipe(tmp_path, **{"warmup.learning_rate": 1e38})
    result = call("run", recipe)
    assert result.exit_code == 1, result.stderr
    assert "tep" in result.stderr.splitlines()[-1]
    stages = json.loads(call("status", tmp_path / "run", "--json").stdout)
    assert {stage["stage"]: stage["state"] for stage in stages}["baseline"] == "done"


def test_score_and_select_alone(finished, tmp_path) -> None:
    folder, _ = finished
    scores, neurons = tmp_path / "scores.safetensors", tmp_path / "neurons.json"
    models = folder / "model", folder / "run" / "warmup" / "model"
    assert call("score", *models, "-o", scores).exit_code == 0
    assert call("select", scores, "--percent", 9, "-o", neurons).exit_code == 0
    assert NeuronSet.load(neurons) == NeuronSet.load(folder / "run" / "select" / "neurons.json")


def test_score_of_other_modules(finished, tmp_path) -> None:
    folder, _ = finished
    scores = tmp_path / "scores.safetensors"
    models = folder / "model", folder / "run" / "warmup" / "model"
    assert (
        call("score", *models, "-o", scores, "--modules", "o", "--modules", "*.q_proj").exit_code
        == 0
    )
    assert {p.role for p in NeuronScores.load(scores).projections.values()} == {"o", "q"}
    refused = call("score", *models, "-o", tmp_path / "none.safetensors", "--modules", "qkv")
    assert refused.exit_code == 2
    assert not (tmp_path / "none.safetensors").exists()


def test_train_alone(finished, tmp_path) -> None:
    folder, _ = finished
    neurons = folder / "run" / "select" / "neurons.json"
    arguments = ["train", folder / "recipe.yaml", "--neurons", neurons, "-o", tmp_path / "mine"]
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    weights = "adapter/adapter_model.safetensors"
    expected = (folder / "run" / "train" / weights).read_bytes()
    assert (tmp_path / "mine" / weights).read_bytes() == expected
    assert result.stdout.splitlines() == [str(tmp_path / "mine" / "adapter")]
    assert "train: already done" in call(*arguments).stderr
    # The adapter holds the same neurons.
    arguments[3] = folder / "run" / "train" / "adapter"
    assert "train: already done" in call(*arguments).stderr
    arguments[3] = tmp_path / "other.json"
    scores = folder / "run" / "score" / "scores.safetensors"
    call("select", scores, "--count", 3, "-o", arguments[3])
    differs = re.search("neurons is (.*) there, (.*) in this recipe", call(*arguments).stderr)
    assert differs is not None
    assert differs[1] != differs[2]
    assert max(map(len, differs.groups())) < 80
    arguments[3] = neurons
    (tmp_path / "mine").rename(tmp_path / "renamed")
    renamed = call(*arguments[:-1], tmp_path / "renamed")
    assert "train: already done" in renamed.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name them with --neurons"),
        (["--neurons", "scores.safetensors"], "scores.safetensors: holds scores of all neurons"),
        (["--neurons", "nowhere.json"], "nowhere.json: no such file"),
        (["--neurons", "n.json", "--set", "train.method=full"], "leave out --neurons n.json"),
    ],
)
def test_train_wants_neurons(tiny_recipe, scores, tmp_path, monkeypatch, options, message) -> None:
    recipe = tiny_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    result = call("train", recipe, "-o", "mine", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "starts" not in result.stderr
    assert files(tmp_path) == before


def test_train_refuses_neurons_of_another_model(finished, scores, tmp_path) -> None:
    folder, _ = finished
    call("select", scores, "--count", 3, "-o", tmp_path / "neurons.json")
    before = files(tmp_path)
    arguments = ["--neurons", tmp_path / "neurons.json", "-o", tmp_path / "mine"]
    result = call("train", folder / "recipe.yaml", *arguments)
    assert result.exit_code == 2
    assert "layers.1.up" in result.stderr
    assert files(tmp_path) == before


def predictions(folder: Path) -> list[str]:
    return (folder / "predictions.jsonl").read_text().splitlines()


def test_evaluate_alone(finished, tmp_path) -> None:
    """The base, the adapter on it, and both merged, as in the run."""
    folder, _ = finished
    recipe, adapter = folder / "recipe.yaml", folder / "run" / "train" / "adapter"
    assert call("merge", adapter, "-o", tmp_path / "merged").exit_code == 0
    for name, stage, options in (
        ("base", "baseline", []),
        ("tuned", "evaluate", ["--adapter", adapter]),
        ("plain", "evaluate", ["--model", tmp_path / "merged"]),
    ):
        result = call("evaluate", recipe, "-o", tmp_path / name, "--json", *options)
        assert result.exit_code == 0, result.stderr
        assert predictions(tmp_path / name) == predictions(folder / "run" / stage)
        expected = json.loads((folder / "run" / stage / "scores.json").read_text())
        assert json.loads(result.stdout)["scores"] == expected["scores"]
    shown = call("evaluate", recipe, "-o", tmp_path / "base").stdout
    assert "BLEU" in shown
    assert str(tmp_path / "base" / "predictions.jsonl") in shown
    (tmp_path / "base").rename(tmp_path / "renamed")
    again = call("evaluate", recipe, "-o", tmp_path / "renamed")
    assert "evaluate: already done" in again.stderr


def test_evaluate_other_data(finished, tmp_path) -> None:
    folder, _ = finished
    row = {"source": "one", "target": "ONE"}
    (tmp_path / "other.jsonl").write_text(json.dumps(row))
    options = ["--data", tmp_path / "other.jsonl", "-o", tmp_path / "out"]
    assert call("evaluate", folder / "recipe.yaml", *options).exit_code == 0
    assert [json.loads(line)["reference"] for line in predictions(tmp_path / "out")] == ["ONE"]


def test_evaluate_refuses_a_torn_adapter(finished, tmp_path) -> None:
    folder, _ = finished
    adapter = shutil.copytree(folder / "run" / "train" / "adapter", tmp_path / "adapter")
    torn(adapter / "adapter_model.safetensors")
    before = files(tmp_path)
    options = ["--adapter", adapter, "-o", tmp_path / "out"]
    result = call("evaluate", folder / "recipe.yaml", *options)
    assert result.exit_code == 2
    assert str(adapter) in result.stderr
    assert files(tmp_path) == before


def test_info_of_adapter(finished) -> None:
    folder, _ = finished
    adapter = folder / "run" / "train" / "adapter"
    info = json.loads(call("info", adapter, "--json").stdout)
    neurons = NeuronSet.load(folder / "run" / "select" / "neurons.json")
    assert info["kind"] == "adapter"
    assert info["method"] == "NEFT"
    assert info["num_neurons"] == len(neurons)
    assert info["base_model"] == str(folder / "model")
    assert "num neurons" in call("info", adapter).stdout
