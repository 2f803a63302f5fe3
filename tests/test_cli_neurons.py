"""``neft neurons``, ``neft extract`` and ``neft diff`` against Python's sets and plain files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from neft.cli import app
from neft.console import short_names
from neft.neurons import Axis, NeuronScores, NeuronSet, Projection
from neft.projections import find_projections

NAMES = [f"model.layers.{layer}.mlp.{role}_proj" for layer in (0, 1) for role in ("up", "down")]
PROJECTIONS = [
    Projection(
        name, int(name.split(".")[2]), role, Axis.ROW if role == "up" else Axis.COLUMN, 64, 32
    )
    for name in NAMES
    for role in [name.rpartition(".")[2].removesuffix("_proj")]
]


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    assert "unexpected" not in result.stderr
    return result


def done(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    return result.stderr


def pairs(neurons: NeuronSet) -> set[tuple[str, int]]:
    return {(name, index) for name, indices in neurons.items() for index in indices.tolist()}


def drawn(seed: int, model: str | None = None) -> NeuronSet:
    random = np.random.RandomState(seed)
    indices = {name: random.permutation(64)[:20] for name in NAMES[seed % 2 :]}
    provenance = {"method": "cosine"} | ({"model_identity": model} if model else {})
    return NeuronSet(PROJECTIONS, indices, provenance)


@pytest.fixture
def sets(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{name}.json" for name in "abc"]
    for seed, file in enumerate(files):
        drawn(seed).save(file)
    return files


@pytest.fixture
def model(tiny_config, tmp_path: Path) -> Path:
    tiny_config().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    path = tmp_path / "scores.safetensors"
    distances = {name: np.arange(64.0) for name in NAMES}
    NeuronScores(PROJECTIONS, distances, 100_000, {"method": "cosine"}).save(path)
    return path


# Union, intersection, difference


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    ("operation", "combine"),
    [("union", set.union), ("intersect", set.intersection), ("subtract", set.difference)],
)
def test_operations(sets, tmp_path, operation, combine, count) -> None:
    operands = [pairs(NeuronSet.load(file)) for file in sets[:count]]
    expected = combine(*operands)
    shown = done("neurons", operation, *sets[:count], "-o", tmp_path / "out.json")
    result = NeuronSet.load(tmp_path / "out.json")
    assert pairs(result) == expected
    assert f"num neurons: {len(expected)}\n" in shown
    assert result.provenance["operation"] == operation
    assert list(result.provenance["operands"]) == [str(file) for file in sets[:count]]
    assert f"operation: {operation}\n" in done("neurons", "show", tmp_path / "out.json")


def test_a_result_knows_its_model(tmp_path) -> None:
    files = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for seed, (file, model) in enumerate(zip(files, (None, "content:1", None), strict=True)):
        drawn(seed, model).save(file)
    done("neurons", "union", *files, "-o", tmp_path / "out.json")
    assert NeuronSet.load(tmp_path / "out.json").provenance["model_identity"] == "content:1"


def wider() -> NeuronSet:
    return NeuronSet([Projection(NAMES[0], 0, "up", Axis.ROW, 80, 32)], {NAMES[0]: [79]})


def gpt2() -> NeuronSet:
    name = "transformer.h.0.mlp.c_fc"
    return NeuronSet([Projection(name, 0, "up", Axis.ROW, 64, 32, True)], {name: [1]})


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([drawn(1, "content:2")], "were chosen in different base models (content:1 and content:2)"),
        ([drawn(1), drawn(2, "content:2")], "were chosen in different base models (content:1 and"),
        ([wider()], f"{NAMES[0]} has 64 row neurons of length 32 in one, and 80 row neurons"),
        ([gpt2()], "the layers are model.layers in one, and transformer.h in the other"),
    ],
)
@pytest.mark.parametrize("operation", ["union", "intersect", "subtract"])
def test_sets_of_different_models(tmp_path, operation, others, message) -> None:
    files = [tmp_path / f"{number}.json" for number in range(1 + len(others))]
    for file, neurons in zip(files, [drawn(0, "content:1"), *others], strict=True):
        neurons.save(file)
    error = refused("neurons", operation, *files, "-o", tmp_path / "out.json")
    assert message in error
    assert str(files[0]) in error
    assert str(files[-1]) in error
    assert not (tmp_path / "out.json").exists()


def test_other_projections_of_the_same_model(tmp_path, sets) -> None:
    gate = "model.layers.0.mlp.gate_proj"
    NeuronSet([Projection(gate, 0, "gate", Axis.ROW, 64, 32)], {gate: [3]}).save(
        tmp_path / "gate.json"
    )
    done("neurons", "union", sets[0], tmp_path / "gate.json", "-o", tmp_path / "out.json")
    expected = pairs(NeuronSet.load(sets[0])) | {(gate, 3)}
    assert pairs(NeuronSet.load(tmp_path / "out.json")) == expected


def test_operations_refuse(sets, scores, tmp_path) -> None:
    out = ("-o", tmp_path / "out.json")
    error = refused("neurons", "union", sets[0], scores, *out)
    assert "scores.safetensors: holds scores" in error
    assert "neft select" in error
    assert "give two or more" in refused("neurons", "union", sets[0], *out)
    assert "no neuron is left" in refused("neurons", "subtract", sets[0], sets[0], *out)
    assert "nowhere.json: no such" in refused("neurons", "union", "nowhere.json", *sets, *out)
    (tmp_path / "list.json").write_text("[]")
    assert "list.json: expected a JSON" in refused(
        "neurons", "union", tmp_path / "list.json", *sets
    )
    (tmp_path / "empty").mkdir()
    assert "empty: has no adapter_config" in refused("neurons", "union", tmp_path / "empty", *sets)
    assert not (tmp_path / "out.json").exists()


# Overlap


def test_overlap_is_that_of_analyze(sets, scores) -> None:
    found = json.loads(done("neurons", "overlap", *sets, "--json"))
    assert found == json.loads(done("analyze", "overlap", *sets, "--json"))
    a, b = (pairs(NeuronSet.load(file)) for file in sets[:2])
    (row,) = (row for row in found if (row["a"], row["b"]) == (str(sets[0]), str(sets[1])))
    assert row["share"] == len(a & b) / len(a)
    with_scores = json.loads(done("neurons", "overlap", sets[0], scores, "--percent", 1, "--json"))
    assert {row["percent"] for row in with_scores} == {1.0}


def test_overlap_refuses(sets) -> None:
    assert "a.json: is given twice" in refused("neurons", "overlap", sets[0], *sets)
    assert "There are 1 selections" in refused("neurons", "overlap", sets[0])
    error = refused("neurons", "overlap", *sets, "--percent", 3)
    assert "--percent 3: is a budget for scores" in error


def test_overlap_shows_short_names(sets) -> None:
    shown = done("neurons", "overlap", *sets)
    assert "a.json" in shown
    assert str(sets[0].parent) not in shown
    assert "None" not in shown
    assert "layer" not in shown


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["x/a.json", "x/b.json"], ["a.json", "b.json"]),
        (["x/a/n.json", "x/b/n.json"], ["a/n.json", "b/n.json"]),
        (["a/x/n.json", "b/x/n.json", "m.json"], ["a/x/n.json", "b/x/n.json", "m.json"]),
        (["n.json", "x/n.json"], ["n.json", "x/n.json"]),
        (["/r/a", "/r/b"], ["a", "b"]),
    ],
)
def test_short_names(files, expected) -> None:
    assert short_names([Path(file) for file in files]) == expected


# Show


def test_show(sets) -> None:
    neurons = NeuronSet.load(sets[0])
    found = json.loads(done("neurons", "show", sets[0], "--json"))
    assert {(m, i) for m, indices in found["indices"].items() for i in indices} == pairs(neurons)
    assert found["neurons"] == [{"layer": n, "up": 20, "down": 20} for n in (0, 1)]
    assert found["provenance"] == {"method": "cosine"}
    shown = done("neurons", "show", sets[0])
    assert " ".join(map(str, sorted(neurons[NAMES[0]].tolist())[:8])) + " ..." in shown
    assert "num neurons: 80\n" in shown
    assert "method: cosine" in shown


def test_show_refuses(scores) -> None:
    assert "holds scores" in refused("neurons", "show", scores)
    assert "no such file" in refused("neurons", "show", "nowhere.json")


# Convert


def authors(neurons: NeuronSet) -> dict[str, list[int]]:
    sides = {"up": "in", "down": "out"}
    return {
        f"{layer}_{side}": sorted(neurons[f"model.layers.{layer}.mlp.{role}_proj"].tolist())
        for layer in (0, 1)
        for role, side in sides.items()
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [("n.csv", []), ("n.json", ["--to", "authors"]), ("n.txt", ["--to", "csv"])],
)
def test_there_and_back(sets, model, tmp_path, name, options) -> None:
    there, back = tmp_path / name, tmp_path / "back.json"
    done("neurons", "convert", sets[1], "-o", there, *options)
    if name == "n.txt":
        there = there.rename(tmp_path / "renamed.csv")
    done("neurons", "convert", there, "-o", back, "--model", model)
    result = NeuronSet.load(back)
    assert result == NeuronSet.load(sets[1])
    assert list(result.projections.values()) == find_projections(model)
    assert result.provenance["source"] == str(there)
    assert result.provenance["model_identity"].startswith("content:")


def test_authors_json(sets, tmp_path) -> None:
    done("neurons", "convert", sets[0], "-o", tmp_path / "n.json", "--to", "authors")
    assert json.loads((tmp_path / "n.json").read_text()) == authors(NeuronSet.load(sets[0]))


def test_csv(sets, tmp_path) -> None:
    done("neurons", "convert", sets[0], "-o", tmp_path / "n.csv")
    with (tmp_path / "n.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["module", "layer", "role", "index"]
    assert {(row[0], int(row[3])) for row in rows} == pairs(NeuronSet.load(sets[0]))
    assert {tuple(row[:3]) for row in rows} == {(p.name, str(p.layer), p.role) for p in PROJECTIONS}


def test_a_copy_keeps_all(sets, tmp_path) -> None:
    done("neurons", "convert", sets[0], "-o", tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_bytes() == sets[0].read_bytes()


HEADER = "module,layer,role,index\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("n.csv", "module,index\n", "line 1: the columns are module, index; layer is missing"),
        ("n.csv", "", "line 1: the columns are none"),
        ("n.csv", HEADER, "n.csv: holds no neurons"),
        ("n.csv", f"{HEADER}{NAMES[0]},0,up,64\n", "line 2: index is '64'"),
        ("n.csv", f"{HEADER}{NAMES[0]},0,up,1\n{NAMES[0]},0,up,x\n", "line 3: index is 'x'"),
        ("n.csv", f"{HEADER}{NAMES[0]},0,up\n", "line 2: index is ''"),
        (
            "n.csv",
            f"{HEADER}{NAMES[0]},1,up,1\n",
            "line 2: says layer 1, role up, but in this model",
        ),
        ("n.csv", f"{HEADER}model.up,0,up,1\n", "line 2: 'model.up' is no up projection"),
        ("n.csv", f"{HEADER}nowhere,0,mine,1\n", "'nowhere' matches no module"),
        ("n.json", '{"9_in": [1]}', "n.json: '9_in' names no up or down projection"),
        ("n.json", '{"0_in": [99]}', "neuron index 99 is outside 0..63"),
        ("n.json", '{"0_in": ["a"]}', "neuron indices must be"),
        ("n.json", '{"0_in": 3}', "n.json: not a neuron set"),
        ("n.json", "{}", "n.json: not a neuron set"),
        ("n.json", "{", "n.json: not a JSON file"),
    ],
)
def test_imports_refuse(model, tmp_path, name, text, message) -> None:
    (tmp_path / name).write_text(text)
    error = refused(
        "neurons", "convert", tmp_path / name, "-o", tmp_path / "out.json", "--model", model
    )
    assert message in error
    assert not (tmp_path / "out.json").exists()


def test_convert_refuses(sets, scores, model, tmp_path) -> None:
    assert "n.txt: ends in neither" in refused("neurons", "convert", sets[0], "-o", "n.txt")
    for name, text in {"n.csv": HEADER, "n.json": '{"0_in": [1]}'}.items():
        (tmp_path / name).write_text(text)
        error = refused("neurons", "convert", tmp_path / name, "-o", tmp_path / "out.json")
        assert f"{name}: tells indices, but not which projections" in error
        assert "--model" in error
    assert "holds scores" in refused("neurons", "convert", scores, "-o", tmp_path / "out.json")
    options = ("-o", tmp_path / "out.json", "--model", model)
    assert "leave out --model" in refused("neurons", "convert", sets[0], *options)
    gate = "model.layers.0.mlp.gate_proj"
    NeuronSet([Projection(gate, 0, "gate", Axis.ROW, 64, 32)], {gate: [3]}).save(
        tmp_path / "gate.json"
    )
    options = ("-o", tmp_path / "out.json", "--to", "authors")
    assert "up and down projections only" in refused(
        "neurons", "convert", tmp_path / "gate.json", *options
    )
    assert not (tmp_path / "out.json").exists()


# Extract and diff


@pytest.fixture
def models(tiny_model, tmp_path: Path) -> list[Path]:
    folders = [tmp_path / "base", tmp_path / "finetuned"]
    for seed, folder in enumerate(folders):
        tiny_model(seed=seed).save_pretrained(folder)
    return folders


def test_extract(models, tmp_path) -> None:
    shown = done("extract", *models, "--percent", 9, "-o", tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "extraction.json").read_text())
    assert f"num neurons: {written['num_neurons']}\n" in shown
    assert f"of all weights: {100 * written['share_of_model']:.1f}%\n" in shown
    printed = done("extract", *models, "--percent", 9, "-o", tmp_path / "again", "--json")
    assert json.loads(printed) == written
    info: dict[str, Any] = json.loads(done("info", tmp_path / "adapter", "--json"))
    assert info["num_neurons"] == written["num_neurons"]
    assert info["base_model"] == str(models[0])


def test_extracted_adapters_are_sets(models, tmp_path) -> None:
    for count in (9, 20):
        done("extract", *models, "--count", count, "-o", tmp_path / str(count))
    folders = [tmp_path / "20", tmp_path / "9"]
    done("neurons", "subtract", *folders, "-o", tmp_path / "n.json")
    assert len(NeuronSet.load(tmp_path / "n.json")) == 11


def test_extract_with_scores(tiny_recipe, tiny_model, tmp_path) -> None:
    recipe = tiny_recipe(tmp_path)
    tiny_model(seed=1).save_pretrained(tmp_path / "finetuned")
    models = tmp_path / "model", tmp_path / "finetuned"
    options = ("--recipe", recipe, "--set", "data.test_limit=3")
    shown = done("extract", *models, "--count", 9, "-o", tmp_path / "adapter", *options)
    assert "scores on 3 test examples" in shown
    assert "chrF++" in shown
    assert "gain kept" in shown


def test_extract_refuses(models, tmp_path) -> None:
    out = ("-o", tmp_path / "adapter")
    assert "by percent" in refused("extract", *models, *out)
    error = refused("extract", *models, *out, "--count", 1, "--set", "seed=1")
    assert "--set seed=1: replaces a setting of a recipe; name that with --recipe" in error
    file = tmp_path / "s.safetensors"
    assert "--set seed=1" in refused("score", *models, "-o", file, "--set", "seed=1")
    assert "nowhere: no such" in refused("extract", models[0], "./nowhere", "--count", 1, *out)
    assert "no neuron of the 4 scored" in refused(
        "extract", models[0], models[0], "--count", 5, *out
    )
    assert "base: exists already" in refused("extract", *models, "--count", 1, "-o", models[0])
    missing = ("--recipe", tmp_path / "none.yaml")
    assert "none.yaml: cannot be read" in refused("extract", *models, "--count", 1, *out, *missing)
    assert not (tmp_path / "adapter").exists()


def test_diff(models, tmp_path) -> None:
    found = json.loads(done("diff", *models, "--json", "--plot", tmp_path / "map.svg"))
    assert (found["before"], found["after"]) == tuple(map(str, models))
    assert found["left_out"] == {}
    assert sum(row["share"] for row in found["by_role"]) == pytest.approx(1)
    assert len(found["weights"]) == 21
    assert "change in %" in (tmp_path / "map.svg").read_text()
    shown = done("diff", *models)
    for text in ("by role", "embedding", "norm", "by layer", "gate"):
        assert text in shown
    assert "None" not in shown


def test_diff_refuses(models, tiny_model, tmp_path) -> None:
    error = refused("diff", *models, "--plot", tmp_path / "map.pdf")
    assert "map.pdf: the output should end in .png or .svg" in error
    tiny_model(intermediate_size=48).save_pretrained(tmp_path / "other")
    assert "has shape [48, 32]" in refused("diff", models[0], tmp_path / "other")
    assert "nowhere: no such folder" in refused("diff", models[0], "./nowhere")
    assert not (tmp_path / "map.pdf").exists()


# Help


@pytest.mark.parametrize(
    "command", ["extract", "diff", *(("neurons", name) for name in ("union", "show", "convert"))]
)
def test_help(command) -> None:
    words = (command,) if isinstance(command, str) else command
    assert "Usage" in done(*words, "--help")


def test_plot_help_lists_the_figures() -> None:
    from neft.report.plots import PLOTS

    shown = " ".join(done("plot", "--help").replace("│", " ").split())
    assert ", ".join(PLOTS) in shown
