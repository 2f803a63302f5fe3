"""TRL's SFTTrainer, with a loss that is exact over batches and affordable without Triton."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import is_triton_available
from trl import SFTTrainer

from neft.errors import DivergenceError
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
        # Position t predicts token t + 1.
        next_labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
        is_scored = next_labels != IGNORED
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        with _projecting_only(is_scored, head):
            logits = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
            ).logits
        total = F.cross_entropy(logits.float(), next_labels[is_scored], reduction="sum")
        return total / (is_scored.sum() if num_items_in_batch is None else num_items_in_batch)

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


class LengthGrouped(Sampler[int]):
    """Positions in an order whose batches hold like lengths, the batches themselves being shuffled.

    The trainer's own sampler goes from long to short within each pool, so that the length of texts
    follows the learning rate; and it draws from a global generator, so that a resumed run differs.

    Args:
        lengths: of the examples, in tokens.
        batch_size: examples that are padded to one length.
        seed: of the order; every epoch has another.
    """

    # Examples are sorted within random pools of this many batches: enough for little padding.
    _POOL = 32

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Tell it which epoch comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """The positions of one epoch."""
        # Not their sum: the second epoch of one seed must not be the first of the next.
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        size = self._POOL * self._batch_size
        pools = [order[start : start + size] for start in range(0, len(order), size)]
        batches = [
            pool[start : start + self._batch_size]
            for pool in (sorted(pool, key=self._lengths.__getitem__) for pool in pools)
            for start in range(0, len(pool), self._batch_size)
        ]
        # Only the last batch may be smaller, as the loader cuts batches of one size.
        last = [batches.pop()] if len(batches[-1]) < self._batch_size else []
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return iter([position for batch in shuffled + last for position in batch])


class _TellEpoch(TrainerCallback):
    """Tells a sampler the epoch, which wrappers of several processes do not pass on when resuming."""

    def __init__(self, sampler: LengthGrouped) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, _args: Any, state: TrainerState, _control: Any, **_: Any) -> None:
        self._sampler.set_epoch(int(state.epoch or 0))


@contextmanager
def _projecting_only(is_scored: Tensor, head: nn.Module) -> Iterator[None]:
    """Let ``head`` see only the hidden states ``[num_scored, hidden]`` of positions ``[batch, length]``.

    A hook rather than a projection of our own, as models scale or cap their logits in their own ways.
    """
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][is_scored],))
    try:
        yield
    finally:
        hook.remove()
