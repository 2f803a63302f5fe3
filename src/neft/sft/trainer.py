"""TRL's SFTTrainer, with a loss that is exact over batches and affordable without Triton."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import is_triton_available
from trl import SFTTrainer

from neft import processes
from neft.errors import DivergenceError
from neft.sft.batches import FilledUp, LengthGrouped
from neft.sft.loss import target_loss
from neft.sft.prompts import IGNORED
from neft.sft.resume import last_checkpoint
from neft.sft.sharded import gather_trained, load_own_share, own_share, write_weights
from neft.sft.zero import torch_optimizer

_WATCHED = {
    "loss": "training loss",
    "grad_norm": "norm of the gradient",
    "eval_loss": "development loss",
}


class TargetTrainer(SFTTrainer):
    """Trains on examples with ``input_ids`` and ``labels``; stops at the first non-finite loss."""

    control: TrainerControl

    def create_accelerator_and_postprocess(self) -> None:
        """Set up FSDP2 on the CPU too, where accelerate would train by DDP without a word."""
        if self.args.fsdp and self.args.bf16:
            # Left to accelerate, gradients would be summed over processes in 16 bits.
            self.args.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp and state.distributed_type is DistributedType.MULTI_CPU:
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True
        assert self.is_fsdp_enabled == bool(self.args.fsdp)
        assert self.is_deepspeed_enabled == bool(self.args.deepspeed)

    @property
    def _is_divided(self) -> bool:
        """Each process has but a share of the optimizer's state, and of the weights, or some of them."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train, from the start or from a checkpoint."""
        if self._is_divided and resume_from_checkpoint and isinstance(self.model, PeftModel):
            # While its weights are whole. Other models were loaded from the checkpoint in the first
            # place.
            super()._load_from_checkpoint(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            if self.deepspeed is not None:
                # Its hooks hold each other, and all weights.
                self.deepspeed.destroy()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._is_divided:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        # Else the trainer would look for a checkpoint of DeepSpeed's own, which is a pickle.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model or adapter as one process would, whatever share of it each of several has."""
        if not self._is_divided:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.model, PeftModel):
            self._save(str(folder), state_dict=gather_trained(self.model))
            return
        write_weights(self.model, folder, writes=self.args.should_save)
        if self.args.should_save:
            self.model.config.save_pretrained(folder)
            self.model.generation_config.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_divided:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        with self._own_optimizer() as optimizer:
            torch.save(own_share(optimizer), self._own_optimizer_file(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._is_divided:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        file = self._own_optimizer_file(checkpoint)
        share = torch.load(file, map_location="cpu", weights_only=True)
        with self._own_optimizer() as optimizer:
            load_own_share(optimizer, share)
        file = Path(checkpoint) / "scheduler.pt"
        self.lr_scheduler.load_state_dict(torch.load(file, weights_only=True))

    def _own_optimizer(self) -> AbstractContextManager[Optimizer]:
        """Torch's own, with what this process has of its state."""
        return (
            torch_optimizer(self.optimizer)
            if self.is_deepspeed_enabled
            else nullcontext(self.optimizer)
        )

    def _own_optimizer_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"optimizer_{self.args.process_index}.pt"

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
        if num_items_in_batch is None:
            return total / count
        # Processes average their gradients; those of one batch must add up.
        return total * self.args.world_size / num_items_in_batch

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        num_processes = self.args.world_size
        grouped = self.args.train_sampling_strategy == "group_by_length"
        if num_processes == 1 and not grouped:
            sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return sampler
        batch_size, seed = self.args.train_batch_size * num_processes, self.args.seed
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        if num_processes > 1:
            lengths.pop()  # the filler
        order: Any = (
            LengthGrouped(lengths, batch_size, seed)
            if grouped
            # What accelerate makes of the trainer's own in one process.
            else SeedableRandomSampler(lengths, data_seed=seed)
        )
        if num_processes > 1:
            order = FilledUp(order, batch_size, filler=len(lengths))
        self.add_callback(_TellEpoch(order))
        found: Sampler[int] = order
        return found

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
                # That of one process among several counts as often, for the average.
                weight = torch.tensor(float(self.args.world_size), device=inputs["labels"].device)
                loss += self.compute_loss(
                    self.model_wrapped, inputs, num_items_in_batch=weight
                ).item()
            num_tokens += int((inputs["labels"][:, 1:] != IGNORED).sum())
        # In float64: float32 tells no single token from another beyond 16 million.
        sums = processes.sum_over_all(torch.tensor([loss, num_tokens], dtype=torch.float64))
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
        # DeepSpeed keeps gradients elsewhere, and their norm.
        is_freed = all(parameter.grad is None for parameter in model.parameters())
        if is_freed and not self.is_deepspeed_enabled:
            return None  # in the backward pass
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

    def __init__(self, sampler: LengthGrouped | FilledUp) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, _args: Any, state: TrainerState, _control: Any, **_: Any) -> None:
        self._sampler.set_epoch(int(state.epoch or 0))
