"""The command line: exit codes, one message an error, output for people, pipes and machines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import neft
from neft.cli import app
from neft.neurons import Axis, NeuronScores, NeuronSet, Projection


def call(*arguments: object) -> Result:
    """The command in this process; errors that it does not foresee are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    assert "Nobody foresaw" not in result.stderr
    return result


def shell(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "neft", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


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
    assert result.stderr.startswith("error: ZeroDivisionError: by zero [of all things]\n")
    assert "--debug" in result.stderr
    assert "Traceback" not in result.stderr


def test_interrupt(tmp_path, monkeypatch) -> None:
    def interrupt(path: Path) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("neft.pipeline.info.describe", interrupt)
    result = call("info", tmp_path)
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted. The same command goes on where it stopped.\n"


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
        (["--percent", "19"], "percent is 19, but the scored projections hold only 18%"),
        (["--count", "19"], "count is 19"),
        ([], "by percent or by count"),
        (["--percent", "1", "--count", "1"], "by percent or by count"),
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
    median = next(row for row in info["quantiles of 1 - cosine"] if row["quantile"] == "50%")
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


def test_status_of_no_run(tmp_path) -> None:
    result = call("status", tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path}: no folder of a run" in result.stderr
