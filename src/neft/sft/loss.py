"""The loss of target tokens, for which nothing else is projected to the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from neft.sft.prompts import IGNORED


def target_loss(model: Any, inputs: Mapping[str, Tensor], head: nn.Module) -> tuple[Tensor, Tensor]:
    """Cross entropy of the target tokens of a batch.

    Args:
        model: a causal language model of transformers, possibly wrapped.
        inputs: ``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, length]``.
        head: the model's module that projects hidden states to the vocabulary.

    Returns:
        The sum of the losses, and the number of target tokens.
    """
    # Position t predicts token t + 1.
    next_labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
    is_scored = next_labels != IGNORED
    with _projecting_only(is_scored, head):
        logits = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
        ).logits
    total = F.cross_entropy(logits.float(), next_labels[is_scored], reduction="sum")
    return total, is_scored.sum()


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
