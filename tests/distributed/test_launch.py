"""``neft run`` under torchrun: scores as of one process, one error, and a stop that loses nothing."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from subprocess import PIPE, CompletedProcess
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from training import ACCELERATE, TORCHRUN, launch, launching
from typer.testing import CliRunner

from neft import processes
from neft.cli import app
from neft.errors import UsageError
from neft.pipeline.run import run
from neft.pipeline.store import RECORD
from neft.recipe import DistributedSection, ModelSection, TrainingSection, load_recipe
from neft.sft.engines import check_engine

if TYPE_CHECKING:
    from conftest import TinyModel, TinyRecipe

NEFT = ["-m", "neft"]


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_stopped_and_continued_by_two_as_by_one(
    tmp_path: Path, tiny_recipe: TinyRecipe, engine: str
) -> None:
    changes = {"warmup.steps": 40, "warmup.evaluate_every": 10, "distributed": {"engine": engine}}
    recipe = tiny_recipe(tmp_path, **changes)
    alone = tmp_path / "alone"
    run(load_recipe(recipe, [f"output={alone}"]), say=lambda line: None)

    output = tmp_path / "run"
    with launching(2, [*NEFT, "run", str(recipe)], stderr=PIPE) as launched:
        for line in launched.stderr:
            if line.startswith("step 10/"):
                launched.send_signal(signal.SIGINT)
                break
        rest = launched.stderr.read()
    assert launched.returncode != 0
    assert "error: interrupted. The same command goes on where it stopped." in rest
    assert (output / ".warmup.partial" / "checkpoints").is_dir()

    ended = launch(2, [*NEFT, "run", str(recipe)], stdout=PIPE, stderr=PIPE)
    assert ended.returncode == 0, ended.stderr
    assert "warmup: continues" in ended.stderr
    assert ended.stdout.count("5 test examples") == 1
    predicted = ((folder / "evaluate/predictions.jsonl").read_text() for folder in (alone, output))
    assert next(predicted) == next(predicted)
    scored = (scores_in(folder / "evaluate/scores.json") for folder in (alone, output))
    assert next(scored) == next(scored)
    expected, found = (
        load_file(folder / "train/adapter/adapter_model.safetensors") for folder in (alone, output)
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    # What several have finished, one goes on with.
    said: list[str] = []
    run(load_recipe(recipe), say=said.append)
    assert all("already done" in line for line in said)


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_over_a_quantized_base_as_by_one(
    tmp_path: Path, tiny_recipe: TinyRecipe, engine: str
) -> None:
    pytest.importorskip("bitsandbytes")
    changes = {"warmup.method": "norm", "model.quantization": "4bit"}
    changes["distributed"] = {"engine": engine}
    check_by_two_as_by_one(tiny_recipe(tmp_path, **changes))


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_experts_by_two_as_by_one(
    tmp_path: Path, tiny_recipe: TinyRecipe, tiny_model: TinyModel, engine: str
) -> None:
    changes = {"warmup.method": "norm", "distributed": {"engine": engine}}
    recipe = tiny_recipe(tmp_path, **changes)
    for file in (tmp_path / "model").glob("model*.safetensors"):
        file.unlink()
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    check_by_two_as_by_one(recipe)


def test_launched_by_accelerate(tmp_path: Path, tiny_recipe: TinyRecipe) -> None:
    changes = {"warmup.method": "norm", "distributed": {"engine": "fsdp2"}}
    # Of "train 9" and "train 10", the longer is dropped.
    changes["data.max_length"] = 75
    ended = check_by_two_as_by_one(tiny_recipe(tmp_path, **changes), ACCELERATE)
    assert ended.stderr.count("data.train: of 16 examples, 6 were dropped") == 1
    record = json.loads((tmp_path / "run/train/training.json").read_text())
    assert record["crew"] == {"num_processes": 2, "engine": "fsdp2"}


def check_by_two_as_by_one(recipe: Path, launcher: list[str] = TORCHRUN) -> CompletedProcess[str]:
    alone = recipe.parent / "alone"
    run(load_recipe(recipe, [f"output={alone}"]), say=lambda line: None)
    ended = launch(2, [*NEFT, "run", str(recipe)], launcher, stdout=PIPE, stderr=PIPE)
    assert ended.returncode == 0, ended.stderr
    expected, found = (
        load_file(folder / "train/adapter/adapter_model.safetensors")
        for folder in (alone, recipe.parent / "run")
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    return ended


def scores_in(file: Path) -> Any:
    """Without the time that it took."""
    return json.loads(file.read_text()) | {"seconds": None}


def test_what_cannot_be_done_is_told_once(tmp_path: Path, tiny_recipe: TinyRecipe) -> None:
    recipe = tiny_recipe(tmp_path, **{"train.batch_size": 3})
    refused = launch(2, [*NEFT, "run", str(recipe)], stdout=PIPE, stderr=PIPE)
    assert refused.returncode != 0
    assert refused.stderr.count("error:") == 1
    assert "batch_size is 3, which 2 processes cannot share evenly" in refused.stderr
    assert not list((tmp_path / "run").rglob(RECORD))


def check(
    engine: str = "fsdp2",
    method: str = "neft",
    dtype: str = "float32",
    quantization: str | None = None,
    **options: Any,
) -> None:
    fields = {"path": "model", "dtype": dtype, "quantization": quantization}
    model = ModelSection.model_validate(fields)
    training = TrainingSection(**({"learning_rate": 1, "steps": 1} | options))
    check_engine(DistributedSection.model_validate({"engine": engine}), model, training, method)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"batch_size": 7}, "batch_size is 7, which 2 processes cannot share evenly"),
        ({"in_backward": True, "engine": "ddp"}, "before 2 processes could share their gradients"),
        ({"method": "mask"}, "fsdp2 divides them among processes. Use method 'neft'"),
        (
            {"quantization": "4bit"},
            "fsdp2 cannot divide among processes. Use distributed.engine ddp or zero2",
        ),
        ({"quantization": "8bit", "engine": "zero3"}, "whose packed weights zero3 cannot divide"),
        ({"method": "mask", "engine": "zero2"}, "zero2 divides them among processes"),
        ({"dtype": "float16"}, "a scaling that was not tried with fsdp2"),
        ({"optimizer": "adafactor"}, "Adafactor needs rows and columns of whole weights"),
    ],
)
def test_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str
) -> None:
    check(**changes)  # one process can
    monkeypatch.setenv("WORLD_SIZE", "2")
    check()
    with pytest.raises(UsageError, match=reason):
        check(**changes)


def test_deepspeed_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"zero3 needs .* pip install 'neft\[deepspeed\]'"):
        check(engine="zero3")


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    processes.check_launch()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    with pytest.raises(UsageError, match="4 processes were started on a machine with 3"):
        processes.check_launch()


def test_an_engine_that_the_launcher_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="which the recipe decides"):
        processes.check_launch()


def test_commands_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = CliRunner().invoke(app, ["validate", "recipes/demo.yaml"])
    assert refused.exit_code == 2
    assert "This command is for one process, and 2 were started" in refused.stderr
