"""Token ids as strings, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Decoder:
    """Writes tokens as they stand in a text.

    Decoding a piece of text by itself is not enough: SentencePiece tokenizers then drop the space that
    the first token begins with. What a token adds to the text before it keeps the space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def token(self, token_id: int) -> str:
        """One token, e.g. ``" the"``; part of a character is ``"\\ufffd"``."""
        return self._after(self._some_text, [token_id])

    def context(self, token_ids: Sequence[int], position: int, width: int) -> tuple[str, str, str]:
        """What is left of a token, the token, and what is right of it, up to ``width`` tokens each."""
        left = token_ids[max(0, position - width) : position]
        token = token_ids[position : position + 1]
        right = token_ids[position + 1 : position + 1 + width]
        # At the very start of a text the space that is dropped is none that was written.
        middle = self._after(left, token)
        return self._text(left), middle, self._after([*left, *token], right)

    @cached_property
    def _some_text(self) -> list[int]:
        ids: list[int] = self._tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _after(self, before: Sequence[int], token_ids: Sequence[int]) -> str:
        """The text of ``token_ids`` after ``before``."""
        start, whole = self._text(before), self._text([*before, *token_ids])
        # Where the two share a character, the whole does not start with the part.
        return whole[len(start) :] if whole.startswith(start) else self._text(token_ids)

    def _text(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
        return text
