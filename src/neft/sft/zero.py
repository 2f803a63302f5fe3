"""DeepSpeed's ZeRO: its configuration, and the way to what is within its optimizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import getclosurevars, isfunction
from typing import Any

import torch
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

STAGES = {"zero2": 2, "zero3": 3}


@contextmanager
def deepspeed_at_work() -> Iterator[None]:
    """Around a training: DeepSpeed as it is wanted here, and nothing of it afterwards."""
    # Before anybody else imports it: it would guess, and say so.
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        PartitionedParameterCoordinator,
    )

    # It would compile this when it is first used; gloo adds up without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It warns of every accumulation of gradients, which the trainer arranges for.
    accelerate = logging.getLogger("accelerate.accelerator")
    level = accelerate.level
    accelerate.setLevel(logging.ERROR)
    linear, depth = F.linear, len(FWD_MODULE_STACK)
    try:
        yield
    finally:
        accelerate.setLevel(level)
        # Stage 3 leaves all these behind: a function for every linear layer, and the model, in a list and
        # in the cache of a method.
        F.linear = linear
        del FWD_MODULE_STACK[depth:]
        for method in filter(isfunction, vars(PartitionedParameterCoordinator).values()):
            for value in getclosurevars(method).nonlocals.values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
        # Every model that is loaded as long as transformers knows of it would be divided.
        unset_hf_deepspeed_config()


def configuration(engine: str, dtype: str, *, masters: bool) -> dict[str, Any]:
    """What DeepSpeed is told.

    Args:
        engine: a key of ``STAGES``.
        dtype: of the products of matrices.
        masters: all weights are float32, whatever ``dtype``.
    """
    # By DeepSpeed's own default a bucket takes 2 GB; "auto" is by the width of the model.
    zero: dict[str, Any] = {"stage": STAGES[engine], "reduce_bucket_size": "auto"}
    if engine == "zero3":
        zero["stage3_prefetch_bucket_size"] = "auto"
        # Small parameters stay whole. They are gathered into one buffer, of one dtype.
        zero["stage3_param_persistence_threshold"] = "auto" if dtype == "float32" else 0
    config: dict[str, Any] = {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        # It would cast all parameters, and leave rounded what is trained in float32.
        "bf16": {"enabled": False},
    }
    if masters and dtype == "bfloat16":
        # Autocast as in one process; gradients are still summed in float32.
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": dtype,
            "lower_precision_safe_modules": [],
        }
    return config


@contextmanager
def torch_optimizer(wrapper: Any) -> Iterator[Optimizer]:
    """Torch's own optimizer, whose parameters are the shares of this process.

    Args:
        wrapper: the trainer's optimizer: accelerate's around ZeRO's around torch's.
    """
    zero = wrapper.optimizer
    inner: Optimizer = zero.optimizer
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        yield inner
        return
    # Stage 3 takes one share after the other into its group, and out again.
    for number, share in enumerate(zero.fp32_partitioned_groups_flat):
        inner.param_groups[zero.sub_group_to_group_id[number]]["params"].append(share)
    try:
        yield inner
    finally:
        for group in inner.param_groups:
            group["params"] = []
