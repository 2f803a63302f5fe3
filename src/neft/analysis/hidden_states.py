"""Mean hidden states of a model on a data set (paper, section 6), gathered in one pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neft.errors import DataError
from neft.files import replaced_atomically
from neft.streaming import Batch, layers_of, stream, text_means

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

HIDDEN_STATES_FORMAT = "neft-hidden-states"
_VERSION = 1


@dataclass(frozen=True)
class HiddenStates:
    """What the residual stream of a model holds on average."""

    means: NDArray[np.float64]
    """``[num_layers, hidden_size]``: the hidden state after each layer, averaged over the tokens of a
    text, then over texts. The embeddings are left out, and the last layer's is that before the final
    norm."""
    num_texts: int
    num_tokens: int

    @property
    def num_layers(self) -> int:
        return len(self.means)

    @property
    def hidden_size(self) -> int:
        return int(self.means.shape[1])

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        from safetensors.numpy import save_file

        header = {
            "version": _VERSION,
            "num_texts": self.num_texts,
            "num_tokens": self.num_tokens,
        }
        with replaced_atomically(path) as part:
            # safetensors writes the memory of an array, whatever its strides.
            means = np.ascontiguousarray(self.means)
            save_file({"means": means}, part, {HIDDEN_STATES_FORMAT: json.dumps(header)})

    @classmethod
    def load(cls, path: Path) -> HiddenStates:
        """Read a file that ``save`` wrote.

        Raises:
            DataError: it is missing, torn, or something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {})[HIDDEN_STATES_FORMAT])
                if header["version"] != _VERSION:
                    raise DataError(
                        f"{path}: version {header['version']!r} of the hidden states format is unknown "
                        f"to this release, which reads version {_VERSION}. Upgrade neft."
                    )
                return cls(file.get_tensor("means"), header["num_texts"], header["num_tokens"])
        except KeyError as error:
            raise DataError(f"{path}: not a hidden states file ({error} is missing).") from error
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: cannot be read as hidden states: {error}.") from error


class HiddenStateCollector:
    """Gathers ``HiddenStates`` while a model reads texts; see ``stream``."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._batch: Batch
        self._num_texts = 0
        self._num_tokens = 0

    def watch(self, model: nn.Module) -> Sequence[RemovableHandle]:
        return [
            module.register_forward_hook(partial(self._add, layer))
            for layer, module in layers_of(model).items()
        ]

    def begin(self, batch: Batch) -> None:
        self._batch = batch
        self._num_texts += len(batch.lengths)
        self._num_tokens += sum(batch.lengths)

    def _add(self, layer: int, _module: nn.Module, _inputs: object, hidden: Tensor) -> None:
        total = text_means(layer, hidden, self._batch).sum(0)
        self._sums[layer] = self._sums[layer] + total if layer in self._sums else total

    @property
    def result(self) -> HiddenStates:
        """Of all texts read so far, at least one."""
        assert self._num_texts, "no text was read"
        assert list(self._sums) == list(range(len(self._sums))), "layers are numbered from 0"
        means = np.stack([total.numpy() for total in self._sums.values()]) / self._num_texts
        return HiddenStates(means, self._num_texts, self._num_tokens)


def mean_hidden_states(
    model: Any, texts: Sequence[Sequence[int]], *, batch_size: int
) -> HiddenStates:
    """The hidden state after each layer, averaged over tokens, then texts (paper, section 6).

    Sums are float64, and memory does not grow with the number of texts.

    Args:
        model: a causal language model of transformers, with or without a PEFT adapter.
        texts: token ids; the paper takes prompts together with what the model generated for them.
        batch_size: texts at once; changes nothing but rounding.

    Raises:
        DataError, UsageError: see ``stream``.
        ArchitectureError: the model's layers cannot be found.
        RunError: a hidden state that is not finite, or too little memory on the device.
    """
    collector = HiddenStateCollector()
    stream(model, texts, [collector], batch_size=batch_size, title="Hidden states")
    return collector.result
