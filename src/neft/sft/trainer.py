"""TRL's SFTTrainer, with a loss that is exact over batches and affordable without Triton."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import is_triton_available
from trl import SFTTrainer

from neft.errors import DivergenceError
from neft.sft.batches import LengthGrouped
from neft.sft.loss import target_loss
from neft.sft.prompts import IGNORED
from neft.sft.resume import last_checkpoint

_WATCHED = {
    "loss": "training loss",
    "grad_norm": "norm of the gradient",
    "eval_loss": "development loss",
}


class TargetTrainer(SFTTrainer):
    """Trains on examples with ``input_ids`` and ``labels``; stops at the first non-finite loss."""

    control: TrainerControl

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross entropy of the target tokens, summed and divided by ``num_items_in_batch``.

        TRL projects hidden states to the vocabulary tile by tile. Where it has Triton this saves memory
        at no cost; elsewhere it scores every prompt and pad token too, and takes several times as long
        as one projection of the target positions alone.
        """
        device = inputs["labels"].device
        has_kernel = device.type in ("cuda", "xpu") and is_triton_available()
        if has_kernel or return_outputs or self.aux_loss_enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        total, count = target_loss(model, inputs, head)
        return total / (count if num_items_in_batch is None else num_items_in_batch)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return sampler
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        grouped = LengthGrouped(lengths, self.args.train_batch_size, self.args.seed)
        self.add_callback(_TellEpoch(grouped))
        return grouped

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,  # noqa: ARG002
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss of a target token over the whole set, whatever the batches.

        The trainer's own loop averages the means of batches, which weighs a token by the company it
        keeps and makes the number depend on the batch size.
        """
        self.model.eval()
        loss = 0.0
        num_tokens = 0
        for inputs in self.get_eval_dataloader(eval_dataset):
            with torch.no_grad(), self.compute_loss_context_manager():
                one = torch.ones((), device=inputs["labels"].device)
                loss += self.compute_loss(self.model_wrapped, inputs, num_items_in_batch=one).item()
            num_tokens += int((inputs["labels"][:, 1:] != IGNORED).sum())
        sums = self.accelerator.reduce(torch.tensor([loss, num_tokens], device=self.args.device))
        metrics = {f"{metric_key_prefix}_loss": float(sums[0] / sums[1])}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Pass on what was measured, unless it is not a number: then stop, before any save."""
        for name, meaning in _WATCHED.items():
            # Loss scaling finds its scale by overflows, and skips the steps that they spoil.
            is_expected = name == "grad_norm" and self.args.fp16
            if name in logs and not math.isfinite(logs[name]) and not is_expected:
                raise DivergenceError(self._breakdown(meaning, logs[name]))
        super().log(logs, start_time)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:
        if all(parameter.grad is None for parameter in model.parameters()):
            return None  # freed in the backward pass
        norm: float = super()._get_grad_norm(model, grad_norm)
        return norm

    def _breakdown(self, meaning: str, value: float) -> str:
        kept = last_checkpoint(Path(self.args.output_dir))
        return (
            f"Step {self.state.global_step} of {self.state.max_steps}: the {meaning} is {value}. "
            + (f"The last good checkpoint is kept: {kept}. " if kept else "")
            + f"Lower the learning rate (now {self.args.learning_rate:g}), raise warmup_steps, or look "
            "for faulty weights in the base model."
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leave out the README that TRL writes with every checkpoint."""

    def _send_telemetry(self) -> None:
        """Report nothing about the user's run to anyone."""


class _TellEpoch(TrainerCallback):
    """Tells a sampler the epoch, which wrappers of several processes do not pass on when resuming."""

    def __init__(self, sampler: LengthGrouped) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, _args: Any, state: TrainerState, _control: Any, **_: Any) -> None:
        self._sampler.set_epoch(int(state.epoch or 0))
