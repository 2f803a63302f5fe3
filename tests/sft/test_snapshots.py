"""Snapshots: the weights after chosen steps, kept beside the result whatever is killed when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import (
    Killed,
    Run,
    assert_same,
    assert_same_weights,
    kill,
    kill_at,
    plain_weights,
    weights_in,
)
from transformers import TrainerCallback

from neft.errors import UsageError
from neft.recipe import ModelSection
from neft.sft import callbacks, resume
from neft.sft import train as training
from neft.sft.train import TrainingResult
from neft.sft.trainer import TargetTrainer


class Remember(TrainerCallback):
    """Copies of the trained weights after each step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.weights[state.global_step] = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }


@pytest.fixture
def remember(monkeypatch: pytest.MonkeyPatch) -> Remember:
    remembered = Remember()
    make = training._trainer

    def trainer(*args: Any) -> TargetTrainer:
        made = make(*args)
        made.add_callback(remembered)
        return made

    monkeypatch.setattr(training, "_trainer", trainer)
    return remembered


def in_file(name: str) -> str:
    """A parameter's name as an adapter's file has it."""
    return name.replace(".default", "")


@pytest.mark.parametrize("method", ["full", "neft", "lora"])
def test_snapshots_are_the_weights_after_their_steps(
    method: str, base: ModelSection, run: Run, remember: Remember, tmp_path: Path
) -> None:
    result = run(tmp_path, method, steps=8, snapshots=(2, 6, 8))
    kept = tmp_path / "snapshots"
    assert sorted(folder.name for folder in kept.iterdir()) == ["2", "6", "8"]
    for step in (2, 6, 8):
        folder = kept / str(step)
        weights = weights_in(folder)
        expected = {in_file(name): tensor for name, tensor in remember.weights[step].items()}
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(weights[name], tensor), f"{step}: {name}"
        # A folder like the result's, that loads.
        assert {file.name for file in folder.iterdir()} == {
            file.name for file in result.path.iterdir()
        }
        assert plain_weights(folder, base).keys() == plain_weights(result.path, base).keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [result.path.name, "snapshots", "training.json"]
    )


def test_snapshot_of_the_best_step_takes_no_space(run: Run, tmp_path: Path) -> None:
    # At this rate the loss falls, then diverges.
    result = run(tmp_path, learning_rate=0.3, steps=10, warmup_steps=8, snapshots=(2, 4, 6, 8, 10))
    assert result.best_step < result.num_steps
    for step in (2, 4, 6, 8, 10):
        file = tmp_path / "snapshots" / str(step) / "model.safetensors"
        assert file.samefile(result.path / "model.safetensors") == (step == result.best_step)


def test_snapshots_change_nothing_else(run: Run, tmp_path: Path) -> None:
    with_them = run(tmp_path / "with", snapshots=(2, 4))
    assert_same(run(tmp_path / "without"), with_them)
    assert not (tmp_path / "without" / "snapshots").exists()


def kill_second_time(original: Callable[..., Any]) -> Callable[..., Any]:
    calls = []

    def replacement(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        return original(*args, **kwargs)

    return replacement


def kill_after(original: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        raise Killed

    return replacement


def kill_now(_original: Callable[..., Any]) -> Callable[..., Any]:
    return kill


# What to replace, by what: the moment at which the run is killed.
MOMENTS: dict[str, tuple[Any, str, Callable[[Any], Callable[..., Any]]]] = {
    "before a snapshot": (callbacks, "link_weights", kill_now),
    "halfway through its files": (resume, "_link", kill_second_time),
    "after a snapshot, before the checkpoint is sealed": (callbacks, "seal", kill_now),
    "after the checkpoint is sealed": (callbacks, "seal", kill_after),
    "after old checkpoints went": (callbacks, "discard_superseded", kill_after),
    "in the next step": (callbacks.SealCheckpoints, "on_step_begin", lambda _: kill_at(2)),
    "after the next checkpoint": (callbacks.SealCheckpoints, "on_step_begin", lambda _: kill_at(5)),
    "while the result is published": (training, "link_weights", kill_now),
}


@pytest.fixture(scope="module")
def unbroken() -> dict[str, TrainingResult]:
    return {}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_keeps_its_snapshots(
    moment: str,
    run: Run,
    unbroken: dict[str, TrainingResult],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"steps": 6, "snapshots": (2, 6)}
    if "whole" not in unbroken:
        unbroken["whole"] = run(tmp_path_factory.mktemp("whole"), **options)
    place, name, replacement = MOMENTS[moment]
    with monkeypatch.context() as patched:
        patched.setattr(place, name, replacement(getattr(place, name, None)))
        with pytest.raises(Killed):
            run(tmp_path, **options)
    whole = unbroken["whole"]
    assert_same(run(tmp_path, **options), whole)
    kept = tmp_path / "snapshots"
    assert sorted(folder.name for folder in kept.iterdir()) == ["2", "6"]
    for folder in kept.iterdir():
        assert_same_weights(folder, whole.path.parent / "snapshots" / folder.name)


# --------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("step", [3, 0, -2])
def test_steps_without_a_checkpoint(step: int, run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"snapshots has {step}, which is no multiple of"):
        run(tmp_path / "run", snapshots=(2, step))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("length", "num_steps"),
    [
        ({"steps": 7}, 7),
        # 20 examples in batches of 4, two batches a step: 3 steps an epoch.
        ({"steps": None, "epochs": 2.5, "gradient_accumulation": 2}, 8),
    ],
)
def test_steps_beyond_the_end(
    length: dict[str, Any], num_steps: int, run: Run, tmp_path: Path
) -> None:
    last = num_steps - num_steps % 2
    with pytest.raises(
        UsageError, match=f"snapshots has {last + 2}, but the run ends after step {num_steps}"
    ):
        run(tmp_path, snapshots=(2, last + 2), **length)
    # The folder is free for what was meant.
    assert run(tmp_path, snapshots=(2, last), **length).num_steps == num_steps
    assert (tmp_path / "snapshots" / str(last)).is_dir()


def test_other_snapshots_are_another_run(run: Run, tmp_path: Path) -> None:
    run(tmp_path, steps=2, snapshots=(2,))
    with pytest.raises(UsageError, match=r"snapshots was \[2\] there and is \[\] here"):
        run(tmp_path, steps=2)
