"""Loss on plain text: by how much it rises, a model has forgotten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neft.errors import DataError, RunError
from neft.evaluation.batching import batches_by_length

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextLoss:
    """How well a model predicts texts."""

    loss: float
    """Mean cross-entropy of a token, in nats."""
    num_tokens: int
    """Tokens that were predicted: all of a text but its first."""


def text_loss(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int,
    batch_size: int,
) -> TextLoss:
    """Mean next-token loss over all tokens of all texts; a long text weighs more than a short one.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        tokenizer: adds the special tokens that it adds to any text, such as a BOS token.
        texts: plain texts, without a template.
        max_length: tokens of a text that are read; the rest is cut off.
        batch_size: texts at once; changes nothing but rounding.

    Raises:
        DataError: no text has two tokens.
        RunError: a loss that is not finite, or too little memory on the device.
    """
    encoded = (tokenizer(text, verbose=False)["input_ids"][:max_length] for text in texts)
    token_ids = [ids for ids in encoded if len(ids) > 1]
    if not token_ids:
        raise DataError(
            f"None of {len(texts)} texts has two tokens within max_length = {max_length}, so no token "
            "can be predicted. Give longer texts."
        )
    losses: list[float] = []
    was_training = model.training
    model.eval()
    try:
        for batch in batches_by_length(token_ids, batch_size):
            losses += _sums_of_losses([token_ids[position] for position in batch], model)
    finally:
        model.train(was_training)
    total = math.fsum(losses)
    if not math.isfinite(total):
        raise RunError(
            f"The loss on {len(texts)} texts is {total}. The model's weights are broken, or too large "
            "for its dtype: check them, or set model.dtype to float32."
        )
    num_tokens = sum(len(ids) - 1 for ids in token_ids)
    return TextLoss(total / num_tokens, num_tokens)


def _sums_of_losses(texts: Sequence[Sequence[int]], model: Any) -> list[float]:
    """Sum of the losses of each text's tokens but the first."""
    import torch
    import torch.nn.functional as F

    longest = max(map(len, texts))
    input_ids = torch.zeros((len(texts), longest), dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(texts):
        # Padding to the right: no token of a causal model sees what follows it.
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    with torch.no_grad():
        try:
            logits: torch.Tensor = model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).logits
            # One text at a time in float32, which for large vocabularies is most of the memory.
            sums = [
                F.cross_entropy(
                    logits[row, : len(ids) - 1].float(),
                    input_ids[row, 1 : len(ids)],
                    reduction="sum",
                )
                for row, ids in enumerate(texts)
            ]
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"The device has too little memory for {len(texts)} texts of up to {longest} tokens at "
                "once. Lower evaluate.batch_size."
            ) from error
    values: list[float] = torch.stack(sums).tolist()
    return values
