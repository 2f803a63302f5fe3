"""A whole run on a tiny model: its results, its files, and that nothing can stop it for good.

As a script this file does a run again and again, each time killed just before a file or folder gets the
next of the names on its command line.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neft.errors import DivergenceError, RunError
from neft.neurons import NeuronSet
from neft.pipeline.evaluate import read_predictions
from neft.pipeline.results import Results
from neft.pipeline.run import run, train
from neft.pipeline.status import read_status
from neft.pipeline.store import locked
from neft.recipe import load_recipe
from neft.sft.callbacks import SealCheckpoints


def die_before(name: str) -> None:
    def audit(event: str, args: tuple[object, ...]) -> None:
        if event == "os.rename" and str(args[1]).endswith(name):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def run_and_die(recipe: str, names: list[str]) -> None:
    import neft.sft.train  # noqa: F401  (takes seconds, once for all children)

    for name in names:
        child = os.fork()
        if child == 0:
            die_before(name)
            run(load_recipe(recipe), say=print)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended == -signal.SIGKILL, f"{name}: {ended}"


if __name__ == "__main__":
    run_and_die(sys.argv[1], sys.argv[2:])
    sys.exit()


def quietly(recipe: Path, *settings: str, overwrite: bool = False) -> Results:
    return run(load_recipe(recipe, settings), overwrite=overwrite, say=lambda line: None)


@pytest.fixture(scope="module")
def unbroken(tiny_recipe, tmp_path_factory) -> tuple[Path, Results]:
    """The folder of a recipe that has run, and its results."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, quietly(tiny_recipe(folder))


def test_results(unbroken) -> None:
    folder, results = unbroken
    neurons = NeuronSet.load(folder / "run" / "select" / "neurons.json")
    assert results.method == "neft"
    assert results.num_examples == 5
    assert results.num_trainable == neurons.num_parameters
    assert 8.5 < results.percent_trainable <= 9
    assert results.num_steps == 4
    assert results.best_step in (2, 4)
    assert list(results.base) == list(results.trained) == ["BLEU", "chrF++"]
    assert results.artifact == "train/adapter"
    adapter = folder / "run" / results.artifact
    assert results.artifact_bytes == sum(path.stat().st_size for path in adapter.iterdir())


def test_samples_are_of_the_predictions(unbroken) -> None:
    folder, results = unbroken
    before = read_predictions(folder / "run" / "baseline" / "predictions.jsonl")
    after = read_predictions(folder / "run" / "evaluate" / "predictions.jsonl")
    assert [line.reference for line in after] == [f"TEST {number}" for number in range(5)]
    assert before != after
    assert [
        (sample.prompt, sample.reference, sample.base, sample.trained) for sample in results.samples
    ] == [
        (before[i].prompt, before[i].reference, before[i].prediction, after[i].prediction)
        for i in (0, 2, 4)
    ]


def test_scores_are_those_of_the_predictions(unbroken) -> None:
    from neft.evaluation import score_predictions

    folder, results = unbroken
    for stage, scores in (("baseline", results.base), ("evaluate", results.trained)):
        lines = read_predictions(folder / "run" / stage / "predictions.jsonl")
        texts = [line.prediction for line in lines], [line.reference for line in lines]
        assert scores == score_predictions("translation", *texts, "upper case")


def test_files(unbroken) -> None:
    folder, _ = unbroken
    found = {str(path.relative_to(folder / "run")) for path in (folder / "run").rglob("*.*")}
    assert found >= {
        "prepare/summary.json",
        "prepare/recipe.yaml",
        "warmup/model/model.safetensors",
        "score/scores.safetensors",
        "select/neurons.json",
        "train/adapter/adapter_model.safetensors",
        "evaluate/results.json",
    }
    # Neither locks nor checkpoints stay.
    assert not [name for name in found if "checkpoint-" in name or name.startswith(".")]
    summary = json.loads((folder / "run" / "prepare" / "summary.json").read_text())
    assert summary["neurons"]["num_to_train"] == len(
        NeuronSet.load(folder / "run" / "select" / "neurons.json")
    )
    assert summary["data"]["test"] == {"num_examples": 5}


def test_status(unbroken) -> None:
    folder, _ = unbroken
    stages = read_status(folder / "run")
    assert [stage.stage for stage in stages] == [
        "prepare",
        "baseline",
        "warmup",
        "score",
        "select",
        "train",
        "evaluate",
    ]
    assert {stage.state for stage in stages} == {"done"}


def states(output: Path) -> dict[str, str]:
    return {stage.stage: stage.state for stage in read_status(output)}


def test_status_of_an_unfinished_run(unbroken, tmp_path) -> None:
    folder, _ = unbroken
    output = shutil.copytree(folder / "run", tmp_path / "run")
    (output / "baseline" / "predictions.jsonl").unlink()
    shutil.rmtree(output / "warmup")
    record = json.loads((output / "score" / "stage.json").read_text())
    (output / "score" / "stage.json").write_text(json.dumps(record | {"fingerprint": "new"}))
    (output / "train").rename(output / ".train.partial")
    expected = {
        "prepare": "done",
        "baseline": "damaged",
        "warmup": "missing",
        "score": "done",
        "select": "stale",
        "train": "partial",
        "evaluate": "done",
    }
    assert states(output) == expected
    with locked(output / ".lock"):
        assert states(output) == expected | {"train": "running"}
    assert read_status(output)[5].num_bytes > 0
    (output / "select" / "stage.json").write_text("{")
    assert states(output) == expected | {"select": "damaged"}


def test_recipe_of_the_run_repeats_it(unbroken) -> None:
    folder, results = unbroken
    said: list[str] = []
    repeated = run(load_recipe(folder / "run" / "prepare" / "recipe.yaml"), say=said.append)
    assert repeated == results
    assert all("already done" in line for line in said)


def adapter(folder: Path) -> bytes:
    return (folder / "run" / "train" / "adapter" / "adapter_model.safetensors").read_bytes()


def test_killed_run_ends_like_an_unbroken_one(unbroken, tiny_recipe, tmp_path) -> None:
    recipe = tiny_recipe(tmp_path)
    names = [
        ".warmup.partial/checkpoints/checkpoint-4/complete.json",
        "run/warmup",
        ".train.partial/checkpoints/checkpoint-4/complete.json",
        "run/evaluate",
    ]
    command = [sys.executable, "-W", "ignore", __file__, str(recipe), *names]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr
    assert states(tmp_path / "run")["train"] == "done"
    assert states(tmp_path / "run")["evaluate"] == "partial"
    results = quietly(recipe)
    folder, expected = unbroken
    assert adapter(tmp_path) == adapter(folder)
    assert NeuronSet.load(tmp_path / "run" / "select" / "neurons.json") == NeuronSet.load(
        folder / "run" / "select" / "neurons.json"
    )
    assert results.trained == expected.trained
    assert results.best_dev_loss == expected.best_dev_loss


class Killed(BaseException):
    """Stands for a kill in this very process: nothing of the package catches it."""


def test_a_training_alone_goes_on_where_it_was_killed(unbroken, tmp_path) -> None:
    folder, _ = unbroken
    recipe, neurons = load_recipe(folder / "recipe.yaml"), folder / "run/select/neurons.json"

    def die_in_step_3(self: object, args: object, state: Any, *_: object, **__: object) -> None:
        if state.global_step == 2:
            raise Killed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SealCheckpoints, "on_step_begin", die_in_step_3)
        with pytest.raises(Killed):
            train(recipe, neurons, tmp_path / "mine", say=lambda line: None)
    said: list[str] = []
    train(recipe, neurons, tmp_path / "mine", say=said.append)
    assert said[0] == "train: continues"
    weights = "adapter/adapter_model.safetensors"
    expected = (folder / "run" / "train" / weights).read_bytes()
    assert (tmp_path / "mine" / weights).read_bytes() == expected


def test_a_training_that_broke_down_at_once_is_in_nobodys_way(tiny_recipe, tmp_path) -> None:
    path = tiny_recipe(tmp_path, **{"train.method": "in_out", "train.learning_rate": 1e30})
    with pytest.raises(DivergenceError, match="Lower the learning rate"):
        quietly(path)
    assert states(tmp_path / "run")["train"] == "missing"
    # The same if it was killed before its first checkpoint.
    leftover = tmp_path / "run" / ".train.partial"
    (leftover / "checkpoints").mkdir(parents=True)
    (leftover / "checkpoints" / "plan.json").write_text("{}")
    started = json.loads((tmp_path / "run" / "baseline" / "stage.json").read_text())
    (leftover / "started.json").write_text(json.dumps(started | {"stage": "train"}))
    quietly(path, "train.learning_rate=1e-3")


def test_full_fine_tuning_needs_no_neurons(tiny_recipe, tmp_path) -> None:
    recipe = tiny_recipe(tmp_path, **{"train.method": "full", "train.learning_rate": 1e-3})
    results = quietly(recipe)
    assert results.percent_trainable == 100
    assert results.artifact == "train/model"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "prepare",
        "baseline",
        "train",
        "evaluate",
    }


def test_diverging_run_keeps_what_it_has(tiny_recipe, tmp_path) -> None:
    recipe = tiny_recipe(tmp_path)
    quietly(recipe)
    with pytest.raises(RunError, match=r"[Ss]tep"):
        quietly(recipe, "train.learning_rate=1.0e+38", overwrite=True)
    assert states(tmp_path / "run")["warmup"] == "done"
    assert (tmp_path / "run" / "train" / "adapter").is_dir()


def test_classification(tiny_recipe, tmp_path) -> None:
    recipe = tiny_recipe(tmp_path)
    rows = (
        {"premise": f"p{number}", "hypothesis": "h", "label": number % 2} for number in range(4)
    )
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sources = {split: str(data) for split in ("train", "dev", "test")}
    fields = {"task": "classification", "labels": ["no", "yes"]} | sources
    results = quietly(recipe, f"data={json.dumps(fields)}")
    assert list(results.trained) == ["accuracy", "macro-F1"]
    assert results.trained["accuracy"].score in (0, 25, 50, 75, 100)
