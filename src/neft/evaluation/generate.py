"""Batched generation that does not depend on the order of the prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from neft.batching import batches_by_length
from neft.errors import DataError, OutOfMemoryError
from neft.recipe import EvaluateSection

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    options: EvaluateSection,
    progress: bool = True,
) -> list[str]:
    """Continue every prompt, greedily or by beam search.

    Prompts are batched by length, the longest first: little padding, and a batch that does not fit in
    memory fails at once. Batches depend on the set of prompts alone, not on their order, and every
    token that padding adds is masked; what remains of a batch's influence is rounding.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        tokenizer: has a pad token.
        prompts: token ids, each prompt at least one token.
        options: batch size, length, beams, ``no_repeat_ngram_size``.
        progress: whether to show a progress bar on stderr, if that is a terminal.

    Returns:
        The generated texts in the order of ``prompts``, without special tokens and outer whitespace.

    Raises:
        DataError: an empty prompt.
        RunError: too little memory on the device.
    """
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise DataError(
                f"Prompt {number} of {len(prompts)} has no tokens; nothing to continue."
            )
    config = _generation_config(model, tokenizer, options)
    batches = list(batches_by_length(prompts, options.batch_size))
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    texts = [""] * len(prompts)
    was_training = model.training
    model.eval()
    shown = track(batches, "Generating", console=console, transient=True, disable=hidden)
    try:
        with _without_own_settings(model):
            for batch in shown:
                generated = _continue([prompts[position] for position in batch], model, config)
                for position, tokens in zip(batch, generated, strict=True):
                    texts[position] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    finally:
        model.train(was_training)
    return texts


def _continue(
    prompts: Sequence[Sequence[int]], model: Any, config: GenerationConfig
) -> torch.Tensor:
    """New tokens ``[batch, new]``; rows that ended early are filled with the pad token."""
    import torch

    from neft.products import faster_linear

    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), config.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        # Padding goes to the left, so that every continuation starts at the same position.
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1
    with torch.no_grad(), faster_linear():
        try:
            sequences = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                generation_config=config,
            )
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"The device has too little memory for {len(prompts)} prompts of up to {longest} tokens "
                "at once. Lower evaluate.batch_size."
            ) from error
    new: torch.Tensor = sequences[:, longest:].cpu()
    return new


def _generation_config(
    model: Any, tokenizer: PreTrainedTokenizerBase, options: EvaluateSection
) -> GenerationConfig:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_end_tokens(model, tokenizer),
    )


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Let results follow from the recipe alone.

    What a call leaves open, a checkpoint's own generation_config.json would fill in: some sample by
    default, some penalise repetition.
    """
    from transformers import GenerationConfig

    # An adapter hands on what it finds in the model below it.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a text: chat models end a turn with another token than a document."""
    of_model = model.generation_config.eos_token_id
    tokens = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])}
    return sorted(token for token in tokens if token is not None)
