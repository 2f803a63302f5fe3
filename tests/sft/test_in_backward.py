"""Weights that are updated in the backward pass: the same training, with one gradient at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import Run, assert_same, assert_same_weights, run_until

from neft.errors import UsageError
from neft.recipe import ModelSection
from neft.sft import train as training
from neft.sft.in_backward import StepInBackward

OPTIMIZERS = ["adamw", "adafactor"]
# Far above any gradient's, so that nothing is clipped.
UNCLIPPED = 1e6


class CountGradients(StepInBackward):
    """Counts the gradients that there are whenever a weight is about to be updated."""

    most = 0

    def on_train_begin(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        def count(_weight: torch.Tensor) -> None:
            alive = sum(weight.grad is not None for weight in model.parameters())
            type(self).most = max(self.most, alive)

        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(count)
        super().on_train_begin(*args, model=model, **kwargs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["full", "neft"])
def test_same_as_the_trainers_own_step(
    run: Run, tmp_path: Path, method: str, optimizer: str
) -> None:
    plain = run(tmp_path / "a", method, optimizer=optimizer, max_grad_norm=UNCLIPPED)
    lean = run(tmp_path / "b", method, optimizer=optimizer, in_backward=True)
    assert_same_weights(plain.path, lean.path)
    assert plain.history["dev"] == lean.history["dev"]
    losses = [[step["loss"] for step in run.history["train"]] for run in (plain, lean)]
    assert losses[0] == losses[1]


def test_optimizers_differ(run: Run, tmp_path: Path) -> None:
    one, other = (run(tmp_path / name, optimizer=name) for name in OPTIMIZERS)
    assert one.history["dev"] != other.history["dev"]
    assert other.history["dev"][-1]["loss"] < other.history["dev"][0]["loss"]


def test_one_gradient_at_a_time(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "StepInBackward", CountGradients)
    monkeypatch.setattr(CountGradients, "most", 0)
    run(tmp_path, in_backward=True)
    assert CountGradients.most == 1


def test_history_has_no_norm(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path, in_backward=True)
    assert all(step.keys() == {"step", "loss", "learning_rate"} for step in result.history["train"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_run_goes_on(run: Run, tmp_path: Path, optimizer: str) -> None:
    unbroken = run(tmp_path / "a", optimizer=optimizer, in_backward=True)
    run_until(5, run, tmp_path / "b", optimizer=optimizer, in_backward=True)
    assert_same(unbroken, run(tmp_path / "b", optimizer=optimizer, in_backward=True))


def test_refuses_several_processes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="before 2 processes could share"):
        run(tmp_path, in_backward=True)
    assert not any(tmp_path.iterdir())


def test_refuses_half_precision(
    base: ModelSection, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    half = base.model_copy(update={"dtype": "float16"})
    with pytest.raises(UsageError, match="float16 gradients can be checked"):
        run(tmp_path, model=half, in_backward=True)
