"""Loss on plain text, by whose rise a model has forgotten, and on the targets of examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neft.batching import batches_by_length
from neft.errors import DataError, OutOfMemoryError, RunError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Label of a token that the loss leaves out: the one that torch's cross-entropy knows.
_IGNORED = -100


@dataclass(frozen=True)
class TextLoss:
    """How well a model predicts texts."""

    loss: float
    """Mean cross-entropy of a token, in nats."""
    num_tokens: int
    """Tokens that were predicted: of a plain text all but its first."""


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
    token_ids = [tokenizer(text, verbose=False)["input_ids"][:max_length] for text in texts]
    found = _mean_loss(model, token_ids, token_ids, batch_size)
    if found is None:
        raise DataError(
            f"None of {len(texts)} texts has two tokens within max_length = {max_length}, so no token "
            "can be predicted. Give longer texts."
        )
    return found


def target_loss(
    model: Any,
    input_ids: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    batch_size: int,
) -> TextLoss:
    """Mean next-token loss over the target tokens of all examples: what fine-tuning lowers.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        input_ids: token ids of each example, prompt and target.
        labels: as long as ``input_ids``, and equal to them but for -100 on tokens that do not count.
        batch_size: examples at once; changes nothing but rounding.

    Raises:
        DataError: no example has a target token, or labels that are not as long as their tokens.
        RunError: a loss that is not finite, or too little memory on the device.
    """
    if len(input_ids) != len(labels):
        raise DataError(f"{len(input_ids)} examples, but labels of {len(labels)}.")
    for number, (ids, expected) in enumerate(zip(input_ids, labels, strict=True), start=1):
        if len(ids) != len(expected):
            raise DataError(
                f"Example {number} has {len(ids)} tokens, but {len(expected)} labels; give every token "
                f"one, {_IGNORED} where it does not count."
            )
    found = _mean_loss(model, input_ids, labels, batch_size)
    if found is None:
        raise DataError(
            f"None of {len(input_ids)} examples has a target token after its first token, so there is "
            "nothing to predict."
        )
    return found


def _mean_loss(
    model: Any,
    input_ids: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    batch_size: int,
) -> TextLoss | None:
    """Over all labels that count; ``None`` if there are none."""
    # A first token has nothing before it to be predicted from.
    counts = [sum(label != _IGNORED for label in expected[1:]) for expected in labels]
    counting = [position for position, count in enumerate(counts) if count]
    if not counting:
        return None
    input_ids, labels = ([rows[position] for position in counting] for rows in (input_ids, labels))
    losses: list[float] = []
    was_training = model.training
    model.eval()
    try:
        for batch in batches_by_length(input_ids, batch_size):
            losses += _sums_of_losses(
                [input_ids[position] for position in batch],
                [labels[position] for position in batch],
                model,
            )
    finally:
        model.train(was_training)
    total = math.fsum(losses)
    if not math.isfinite(total):
        raise RunError(
            f"The loss on {len(counts)} texts is {total}. The model's weights are broken, or too large "
            "for its dtype: check them, or set model.dtype to float32."
        )
    return TextLoss(total / sum(counts), sum(counts))


def _sums_of_losses(
    texts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], model: Any
) -> list[float]:
    """Sum of the losses of each text's labels that count."""
    import torch
    import torch.nn.functional as F

    from neft.products import faster_linear

    longest = max(map(len, texts))
    input_ids = torch.zeros((len(texts), longest), dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    targets = torch.full_like(input_ids, _IGNORED)
    for row, (ids, expected) in enumerate(zip(texts, labels, strict=True)):
        # Padding to the right: no token of a causal model sees what follows it.
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        targets[row, : len(ids)] = torch.tensor(expected)
    input_ids, attention_mask, targets = (
        tensor.to(model.device) for tensor in (input_ids, attention_mask, targets)
    )
    with torch.no_grad(), faster_linear():
        try:
            logits: torch.Tensor = model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).logits
            # One text at a time in float32, which for large vocabularies is most of the memory.
            sums = [
                F.cross_entropy(
                    logits[row, : len(ids) - 1].float(),
                    targets[row, 1 : len(ids)],
                    ignore_index=_IGNORED,
                    reduction="sum",
                )
                for row, ids in enumerate(texts)
            ]
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"The device has too little memory for {len(texts)} texts of up to {longest} tokens at "
                "once. Lower evaluate.batch_size."
            ) from error
    values: list[float] = torch.stack(sums).tolist()
    return values
