"""Updating weights inside the backward pass, so that hardly two gradients exist at a time."""

from __future__ import annotations

from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainingArguments


class StepInBackward(TrainerCallback):
    """Steps the optimizer for each weight as soon as its gradient is whole, and frees that.

    An optimizer passes over weights without a gradient. In the backward pass only one has one, so that
    a whole step for every weight touches just that; the trainer's own step then finds none.
    """

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(
        self,
        _args: TrainingArguments,
        _state: Any,
        _control: Any,
        optimizer: AcceleratedOptimizer,
        **_: Any,
    ) -> None:
        # The trainer's wrapper would wait for the end of an accumulation.
        inner = optimizer.optimizer

        def update(weight: Tensor) -> None:
            inner.step()
            weight.grad = None

        self._hooks = [
            weight.register_post_accumulate_grad_hook(update)
            for group in inner.param_groups
            for weight in group["params"]
        ]

    def on_train_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        while self._hooks:
            self._hooks.pop().remove()
