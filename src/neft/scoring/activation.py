"""How active each neuron is on given texts: forward passes alone.

A neuron that writes (``down``, ``o``) is active by its coefficient, the input of its projection; one that
reads (``up``, ``gate``, ``q``, ``k``, ``v``) by its response, the projection's output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neft import __version__
from neft.checkpoints import WeightSource, open_weights
from neft.errors import DataError, OutOfMemoryError, RunError
from neft.neurons import Axis, NeuronScores, Projection
from neft.products import faster_linear
from neft.projections import as_module, check_can_be_watched, check_plain, find_candidates

if TYPE_CHECKING:
    from torch import nn


class ActivationSums:
    """Sums of ``|activation|`` over tokens, while a model reads batches.

    Args:
        projections: whose neurons are watched.
        sums: module name -> float64 ``[num_neurons]``.
        count: how many tokens they are sums over.
    """

    def __init__(
        self, projections: Iterable[Projection], sums: Mapping[str, Tensor], count: int = 0
    ) -> None:
        self.projections = tuple(projections)
        self.sums = dict(sums)
        self.count = count

    @classmethod
    def nothing_yet(cls, projections: Iterable[Projection]) -> ActivationSums:
        """Zeros for projections.

        Raises:
            ArchitectureError: projections of experts.
        """
        projections = list(projections)
        check_can_be_watched(
            projections, "Score them by cosine, gradient or norm, or leave them out of modules."
        )
        zeros = {p.name: torch.zeros(p.num_neurons, dtype=torch.float64) for p in projections}
        return cls(projections, zeros)

    def add(self, model: Any, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Let ``model`` read batches of ``input_ids`` and ``attention_mask``, each ``[batch, length]``.

        Raises:
            RunError: an activation that is not finite, or too little memory on the device.
        """
        # Without the head: nobody looks at its logits.
        stack: Any = as_module(model).base_model
        with torch.no_grad(), faster_linear(), self._watching(model):
            for batch in batches:
                self._mask = batch["attention_mask"].bool()
                try:
                    stack(
                        input_ids=batch["input_ids"],
                        attention_mask=batch["attention_mask"],
                        use_cache=False,
                    )
                except torch.OutOfMemoryError as error:
                    raise OutOfMemoryError(
                        "The device has too little memory for a batch of "
                        f"{' x '.join(map(str, self._mask.shape))} tokens. Lower batch_size."
                    ) from error
                self.count += int(self._mask.sum())

    @contextmanager
    def _watching(self, model: nn.Module) -> Iterator[None]:
        was_training = model.training
        model.eval()
        with ExitStack() as undo:
            undo.callback(model.train, was_training)
            for projection in self.projections:
                module = model.get_submodule(projection.name)
                hook = module.register_forward_hook(partial(self._take, projection))
                undo.callback(hook.remove)
            yield

    def _take(
        self, projection: Projection, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        activations = inputs[0] if projection.axis is Axis.COLUMN else output
        # Some blocks flatten their tokens, text after text.
        of_tokens = activations.flatten(0, -2)[self._mask.flatten()]
        total = of_tokens.abs().sum(0, dtype=torch.float64).cpu()
        if not total.isfinite().all():
            raise RunError(
                f"{projection.name}: an activation is not finite. The model's weights are broken, or too "
                "large for its dtype: check them, or set model.dtype to float32."
            )
        self.sums[projection.name] += total

    def scores(self, base: WeightSource) -> NeuronScores:
        """Means over the tokens; of ``base``, only the shapes count."""
        means = {name: (total / self.count).numpy() for name, total in self.sums.items()}
        provenance = {
            "method": "activation",
            "before": base.label,
            "num_tokens": self.count,
            "neft": __version__,
        }
        return NeuronScores(self.projections, means, base.num_parameters, provenance)


def score_by_activation(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    modules: Sequence[str] | None = None,
    *,
    axes: Mapping[str, Axis] | None = None,
) -> NeuronScores:
    """Rank neurons by their mean ``|activation|``, the most active first.

    Args:
        model: a causal language model of transformers, without an adapter.
        batches: ``input_ids`` and ``attention_mask``, each ``[batch, length]``.
        modules: projections to score (see ``find_projections``); default: up and down.
        axes: pattern of module names -> axis, for modules that the architecture table does not know.

    Raises:
        AdapterError: the model has an adapter.
        ArchitectureError: projections that the model does not have, or of experts.
        NeuronError: the weight of one is tied to another's.
        DataError: no batches.
        RunError: an activation that is not finite, or too little memory on the device.
    """
    if not batches:
        raise DataError("There are no batches to read; give at least one.")
    check_plain(model, "and neurons are scored in a plain model")
    sums = ActivationSums.nothing_yet(find_candidates(model, modules, axes))
    sums.add(model, batches)
    return sums.scores(open_weights(model))
