"""The engines by which several processes train one model: what each can do, and its settings."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from neft import processes
from neft.errors import UsageError
from neft.recipe import DistributedSection, ModelSection, TrainingSection
from neft.sft import zero


def engine_name(distributed: DistributedSection) -> str | None:
    """The engine that trains in this launch; ``None`` in one process, which needs none."""
    return distributed.engine if processes.num_processes() > 1 else None


def share(batch_size: int) -> int:
    """Examples of a batch that come to one process."""
    return batch_size // processes.num_processes()


def check_engine(
    distributed: DistributedSection, model: ModelSection, options: TrainingSection, method: str
) -> None:
    """Refuse, with the reason, what an engine would do wrongly or not at all.

    Raises:
        UsageError: of what was asked for, something is not to be had with this engine.
    """
    engine = engine_name(distributed)
    if engine is None:
        return
    num_processes = processes.num_processes()
    if options.batch_size % num_processes:
        raise UsageError(
            f"batch_size is {options.batch_size}, which {num_processes} processes cannot share evenly. "
            f"Make it a multiple of {num_processes}, or start as many processes as divide it."
        )
    if options.in_backward:
        raise UsageError(
            f"in_backward updates weights before {num_processes} processes could share their gradients. "
            "Run it in one process, or set it to false."
        )
    if engine == "ddp":
        return
    if engine in zero.STAGES and importlib.util.find_spec("deepspeed") is None:
        raise UsageError(
            f"distributed.engine {engine} needs the package deepspeed, which is not installed: "
            "pip install 'neft[deepspeed]'. Or use fsdp2, which divides the same things."
        )
    if method == "mask":
        raise UsageError(
            f"Method 'mask' masks gradients of whole weights, and {engine} divides them among "
            "processes. Use method 'neft', which computes the same, or distributed.engine ddp."
        )
    if model.quantization is not None and engine != "zero2":
        raise UsageError(
            f"model.quantization is {model.quantization!r}, whose packed weights {engine} cannot divide "
            "among processes. Use distributed.engine ddp or zero2, or leave the base as it is."
        )
    if model.dtype == "float16":
        raise UsageError(
            f"model.dtype is float16, whose gradients need a scaling that was not tried with {engine}. "
            "Use bfloat16 or float32, or distributed.engine ddp."
        )
    if options.optimizer == "adafactor":
        raise UsageError(
            f"Adafactor needs rows and columns of whole weights, and {engine} divides them among "
            "processes. Use optimizer adamw, or distributed.engine ddp."
        )


def engine_at_work(distributed: DistributedSection) -> AbstractContextManager[None]:
    """Around a training: what the engine needs, and leaves behind."""
    if engine_name(distributed) in zero.STAGES:
        return zero.deepspeed_at_work()
    return nullcontext()


def engine_settings(
    distributed: DistributedSection, dtype: str, *, masters: bool
) -> dict[str, Any]:
    """Arguments of the trainer's configuration.

    Args:
        distributed: names the engine.
        dtype: of the products of matrices.
        masters: all weights are float32, whatever ``dtype``.
    """
    # float16 needs the loss scaling that comes with it in any case.
    settings = {"bf16": dtype == "bfloat16" and masters, "fp16": dtype == "float16"}
    match engine_name(distributed):
        case "ddp":
            # All that is trained has a gradient in every step, and no buffer changes.
            return settings | {"ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False}
        case "fsdp2":
            return settings | {"fsdp": True, "fsdp_config": _fsdp_config(distributed)}
        case "zero2" | "zero3" as engine:
            config = zero.configuration(engine, dtype, masters=masters)
            return settings | {"bf16": False, "deepspeed": config}
        case _:  # one process
            return settings


def _fsdp_config(distributed: DistributedSection) -> dict[str, Any]:
    reshard = distributed.reshard_after_forward
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": True if reshard is None else reshard,
        "state_dict_type": "SHARDED_STATE_DICT",
    }
