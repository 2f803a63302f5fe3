"""One pass of a model over texts, with collectors that watch it.

What a model does on a data set is too much to keep: hidden states alone are texts x tokens x layers x
width. Collectors reduce what they see batch by batch, so memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from neft.batching import batches_by_length
from neft.errors import ArchitectureError, DataError, OutOfMemoryError, RunError, UsageError
from neft.projections import as_module, find_projections

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Batch:
    """What the model is about to read."""

    texts: NDArray[np.int64]
    """Positions ``[batch]`` in the list of texts."""
    input_ids: Tensor
    """Token ids ``[batch, tokens]``; texts start at the left."""
    mask: Tensor
    """Booleans ``[batch, tokens]``: which are tokens of a text, and no padding."""
    lengths: tuple[int, ...]
    """Tokens of each text."""


class Collector(Protocol):
    """Watches a model by hooks on its modules."""

    def watch(self, model: nn.Module) -> Sequence[RemovableHandle]:
        """Register hooks; called once, before the first batch."""

    def begin(self, batch: Batch) -> None:
        """Called before the model reads ``batch``, during which hooks are called."""


def stream(
    model: Any,
    texts: Sequence[Sequence[int]],
    collectors: Sequence[Collector],
    *,
    batch_size: int,
    title: str,
) -> None:
    """Let ``model`` read every text once, watched by ``collectors``.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        texts: token ids, each text at least one token.
        collectors: are left with what they gathered.
        batch_size: texts at once, of like length.
        title: of the progress bar on stderr, if that is a terminal.

    Raises:
        DataError: as ``check_texts``.
        UsageError: ``batch_size`` below 1.
        RunError: too little memory on the device.
    """
    import torch
    from rich.console import Console
    from rich.progress import track

    from neft.products import faster_linear

    check_texts(as_module(model), texts)
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be at least 1.")
    batches = list(batches_by_length(texts, batch_size))
    console = Console(stderr=True)
    was_training = model.training
    model.eval()
    with ExitStack() as hooks, torch.no_grad(), faster_linear():
        hooks.callback(model.train, was_training)
        for collector in collectors:
            for handle in collector.watch(model):
                hooks.callback(handle.remove)
        for positions in track(
            batches, title, console=console, transient=True, disable=not console.is_terminal
        ):
            batch = _batch(texts, positions, model.device)
            for collector in collectors:
                collector.begin(batch)
            _read(model, batch)


def text_means(layer: int, hidden: Tensor, batch: Batch) -> Tensor:
    """The hidden state after a layer, averaged over the tokens of each text.

    Args:
        layer: its index, for the error.
        hidden: ``[batch, tokens, hidden_size]``, on any device.
        batch: what the model reads.

    Returns:
        float64 ``[batch, hidden_size]``, on the CPU.

    Raises:
        RunError: a hidden state that is not finite.
    """
    import torch

    # Text by text: no copy of the batch in float64, and nothing of the padding.
    means = torch.stack(
        [
            states[:length].mean(0, dtype=torch.float64)
            for states, length in zip(hidden, batch.lengths, strict=True)
        ]
    ).cpu()
    if not means.isfinite().all():
        row = int(torch.nonzero(~means.isfinite())[0, 0])
        raise RunError(
            f"Layer {layer}: a hidden state of text {batch.texts[row] + 1} is not finite. The "
            "model's weights are broken, or too large for its dtype: check them, or load it in "
            "float32."
        )
    return means


def layers_of(model: Any) -> Mapping[int, nn.Module]:
    """The transformer layers of a model, by index, in order.

    Raises:
        ArchitectureError: its projections cannot be found, or lie outside a stack of layers.
    """
    network = as_module(model)
    names = {
        projection.layer: _layer_name(projection.name, projection.layer)
        for projection in find_projections(network)
        if projection.layer is not None
    }
    if not names:
        raise ArchitectureError(
            f"{type(network).__name__}: its projections lie in no stack of layers, so there are no "
            "hidden states between layers to look at."
        )
    return {layer: network.get_submodule(names[layer]) for layer in sorted(names)}


def _layer_name(projection: str, layer: int) -> str:
    parts = projection.split(".")
    return ".".join(parts[: parts.index(str(layer)) + 1])


def check_texts(network: nn.Module, texts: Sequence[Sequence[int]]) -> None:
    """Check that a model can read each of the texts.

    Args:
        network: the plain model; its weights may be on the meta device.
        texts: token ids.

    Raises:
        DataError: no texts, or one that is empty or longer than the model's context.
    """
    if not len(texts):
        raise DataError("There are no texts to read; give at least one.")
    context = context_length(network)
    for number, text in enumerate(texts, start=1):
        if not len(text):
            raise DataError(f"Text {number} of {len(texts)} has no tokens; leave it out.")
        if context is not None and len(text) > context:
            raise DataError(
                f"Text {number} of {len(texts)} has {len(text)} tokens, more than the {context} of the "
                "model's context (max_position_embeddings). Shorten it; in a recipe, set max_length to "
                f"{context} or less."
            )


def context_length(network: nn.Module) -> int | None:
    """The most tokens that a model can read at once, where its configuration says so."""
    config: Any = getattr(network, "config", None)
    if config is None:
        return None
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def _batch(texts: Sequence[Sequence[int]], positions: Sequence[int], device: torch.device) -> Batch:
    import torch

    lengths = tuple(len(texts[position]) for position in positions)
    input_ids = torch.zeros((len(positions), max(lengths)), dtype=torch.long)
    mask = torch.zeros((len(positions), max(lengths)), dtype=torch.bool)
    for row, position in enumerate(positions):
        # Padding to the right: no token of a causal model sees what follows it.
        input_ids[row, : lengths[row]] = torch.tensor(texts[position])
        mask[row, : lengths[row]] = True
    order = np.array(positions, dtype=np.int64)
    return Batch(order, input_ids.to(device), mask.to(device), lengths)


def _read(model: Any, batch: Batch) -> None:
    import torch

    # Without the head: logits would be most of the memory, and nobody looks at them.
    stack: Any = as_module(model).base_model
    try:
        stack(input_ids=batch.input_ids, attention_mask=batch.mask.long(), use_cache=False)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"The device has too little memory for {len(batch.texts)} texts of up to "
            f"{batch.mask.shape[1]} tokens at once. Lower the batch size."
        ) from error
