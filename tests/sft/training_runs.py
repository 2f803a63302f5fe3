"""Training runs in tests: what they leave, and how they are killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from neft.models import load_model
from neft.recipe import LoraSection, ModelSection
from neft.sft.callbacks import SealCheckpoints
from neft.sft.train import TrainingResult


class Run(Protocol):
    def __call__(
        self,
        folder: Path,
        method: str = "full",
        *,
        model: ModelSection = ...,
        lora: LoraSection | None = None,
        seed: int = 1,
        snapshots: tuple[int, ...] = (),
        **options: Any,
    ) -> TrainingResult: ...


def weights_in(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint or an adapter."""
    [file] = folder.glob("*.safetensors")
    return load_file(file)


def plain_weights(folder: Path, base: ModelSection) -> dict[str, Tensor]:
    """All weights of the plain model by name: of a checkpoint, or of the base merged with an adapter."""
    if (folder / "adapter_config.json").exists():
        merged = PeftModel.from_pretrained(load_model(base), folder).merge_and_unload()
        return merged.state_dict()
    return load_model(base.model_copy(update={"path": str(folder)})).state_dict()


def assert_same(one: TrainingResult, other: TrainingResult) -> None:
    """Bit for bit the same weights, and the same history."""
    assert_same_weights(one.path, other.path)
    assert one.history == other.history
    assert one.best_step == other.best_step


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit, and the same files beside them."""
    mine, theirs = weights_in(one), weights_in(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    assert {file.name for file in one.iterdir()} == {file.name for file in other.iterdir()}


class Killed(BaseException):
    """Stands for a kill in this very process: nothing of the package catches it."""


def kill(*args: Any, **kwargs: Any) -> None:
    raise Killed


def kill_at(step: int) -> Callable[..., None]:
    """An ``on_step_begin`` of a callback."""

    def on_step_begin(self: Any, args: Any, state: Any, *rest: Any, **_: Any) -> None:
        if state.global_step == step:
            raise Killed

    return on_step_begin


def run_until(step: int, run: Run, folder: Path, *args: Any, **options: Any) -> None:
    """A run that is killed when this step begins."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SealCheckpoints, "on_step_begin", kill_at(step))
        with pytest.raises(Killed):
            run(folder, *args, **options)
