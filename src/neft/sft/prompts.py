"""From examples to token ids: the prompt as generation will see it, then the target, then EOS.

Prompt and target are tokenised apart and joined. What the model is trained to continue is therefore,
token for token, what it is given at inference: no token straddles the boundary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neft.errors import DataError
from neft.recipe import DataSection
from neft.sft.data import Example, Split, load_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that the loss leaves out."""


@dataclass(frozen=True)
class Encoded:
    """A split ready for training."""

    input_ids: list[list[int]]
    labels: list[list[int]]
    """As long as ``input_ids``; ``IGNORED`` on the prompt."""
    num_dropped: int
    """Examples left out: longer than ``max_length``, or nothing of the target within it."""
    num_truncated: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def counts(self) -> dict[str, int]:
        """What became of the examples."""
        return {"used": len(self), "dropped": self.num_dropped, "truncated": self.num_truncated}


def prompt_ids(
    example: Example, tokenizer: PreTrainedTokenizerBase, data: DataSection
) -> list[int]:
    """The tokens that generation starts from; never truncated."""
    return _prompts([example], tokenizer, data)[0]


def encode(
    example: Example, tokenizer: PreTrainedTokenizerBase, data: DataSection
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one example, of equal length and untruncated.

    Token ids start with exactly ``prompt_ids`` and end with the tokenizer's EOS token: the one token on
    which every generation stops, whatever the model's own generation settings say.
    """
    return _encode([example], tokenizer, data)[0]


def encode_all(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, data: DataSection
) -> Encoded:
    """Encode a split, and drop or truncate what is longer than ``data.max_length``.

    Truncation cuts off the end, EOS included, so that a cut text does not teach the model to stop; an
    example of which no target token is left is dropped.

    Raises:
        DataError: no example is left.
    """
    input_ids, labels = [], []
    num_truncated = 0
    limit = data.max_length
    for ids, target_labels in _encode(examples, tokenizer, data):
        overlong = len(ids) > limit
        if overlong and (
            data.overlong == "drop" or all(label == IGNORED for label in target_labels[:limit])
        ):
            continue
        num_truncated += overlong
        input_ids.append(ids[:limit])
        labels.append(target_labels[:limit])
    if not input_ids:
        raise DataError(
            f"All {len(examples)} examples are longer than data.max_length = {limit} tokens; none is "
            "left. Raise max_length, or set data.overlong to truncate."
        )
    return Encoded(input_ids, labels, len(examples) - len(input_ids), num_truncated)


def load_encoded(data: DataSection, split: Split, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Load and encode a split; tells how many examples were too long.

    Raises:
        DataError: a file, row or field that cannot be used, or no example is left.
    """
    examples = load_examples(data, split)
    encoded = encode_all(examples, tokenizer, data)
    if encoded.num_dropped or encoded.num_truncated:
        _log.warning(
            "data.%s: of %d examples, %d were dropped and %d truncated to max_length = %d tokens.",
            split,
            len(examples),
            encoded.num_dropped,
            encoded.num_truncated,
            data.max_length,
        )
    return encoded


def _encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, data: DataSection
) -> list[tuple[list[int], list[int]]]:
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            "The tokenizer has no EOS token, so the model could not learn where a target ends. Set "
            "eos_token in its tokenizer_config.json."
        )
    prompts = _prompts(examples, tokenizer, data)
    targets = _token_ids([example.target for example in examples], tokenizer, special=False)
    return [
        ([*prompt, *target, end], [*[IGNORED] * len(prompt), *target, end])
        for prompt, target in zip(prompts, targets, strict=True)
    ]


def _prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, data: DataSection
) -> list[list[int]]:
    if _uses_chat_template(tokenizer, data):
        texts = [_chat_text(example, tokenizer) for example in examples]
        # The template has written the special tokens already.
        return _token_ids(texts, tokenizer, special=False)
    texts = [example.prompt for example in examples if isinstance(example.prompt, str)]
    assert len(texts) == len(examples), "only a chat template can render messages"
    prompts = _token_ids(texts, tokenizer, special=True)
    # Some tokenizers close every text with EOS; a prompt is to be continued.
    return [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids for ids in prompts]


def _uses_chat_template(tokenizer: PreTrainedTokenizerBase, data: DataSection) -> bool:
    if data.style == "plain":
        return False
    if tokenizer.chat_template is not None:
        return True
    if data.style == "chat" or data.task == "chat":
        raise DataError(
            "The tokenizer has no chat template, which data.style 'chat' and task 'chat' need. Use a "
            "chat model, or another task with style 'plain'."
        )
    return False


def _chat_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    from jinja2 import TemplateError

    if isinstance(example.prompt, str):
        turns = [{"role": "user", "content": example.prompt}]
    else:
        turns = [{"role": turn.role, "content": turn.content} for turn in example.prompt]
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise DataError(
            f"{example.place}: the model's chat template refuses these messages: {error}"
        ) from error
    assert isinstance(text, str)
    return text


def _token_ids(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, special: bool
) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False
    )["input_ids"]
    return ids
