"""What gradients foretell: how far the first steps of a full fine-tune would turn each neuron.

Adam moves a weight in each step by the learning rate, times a number that is near 1 or -1 as long as the
gradient keeps its sign from batch to batch, and small where the sign changes. The mean sign u of the
gradient over T batches, without an update in between, stands for that move. A neuron w would turn by

    1 - cos = |v|² / (2 |w|²)        v = u - (u·w / |w|²) w

in a run whose rates sum to 1, as long as that is small; the order does not depend on the sum.

A sum of signs takes one byte a weight for up to 127 batches, two for up to 32,767. Gradients are computed
one matrix after the other and freed at once. So beside the model's weights and activations, memory holds
these bytes for each weight of the scored projections, and one gradient; that of experts is of all in a
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from neft import __version__
from neft.checkpoints import WeightSource, open_weights
from neft.errors import ArchitectureError, DataError, DivergenceError
from neft.memory import naming_shortage
from neft.neurons import Axis, NeuronScores, Projection
from neft.products import faster_linear
from neft.projections import check_plain, find_candidates
from neft.quantized import is_quantized
from neft.scoring.neuron_vectors import SMALLEST, neuron_vectors

if TYPE_CHECKING:
    from torch import nn

# Of sums, the smallest that holds as many signs as there are batches is taken.
_SUMS = (torch.int8, torch.int16, torch.int32)

Loss: TypeAlias = Callable[[Any, Mapping[str, Tensor]], Tensor]


class GradientSigns:
    """Sums of the signs of gradients, weight by weight, while a model reads batches.

    Args:
        projections: whose weights' gradients are watched.
        sums: module name -> int8, int16 or int32, in the shape of the module's weight.
        count: how many batches they are sums over.
        loss: mean loss of a model on a batch, a scalar; default: ``model(**batch).loss``.
    """

    def __init__(
        self,
        projections: Iterable[Projection],
        sums: Mapping[str, Tensor],
        count: int = 0,
        loss: Loss | None = None,
    ) -> None:
        self.projections = tuple(projections)
        self.sums = dict(sums)
        self.count = count
        self._loss = loss or _own_loss

    @classmethod
    def nothing_yet(
        cls, projections: Iterable[Projection], num_batches: int, loss: Loss | None = None
    ) -> GradientSigns:
        """Zeros for projections, of a type that can hold the sums over ``num_batches``."""
        dtype = next(dtype for dtype in _SUMS if num_batches <= torch.iinfo(dtype).max)
        projections = list(projections)
        zeros = {p.name: torch.zeros(p.weight_shape, dtype=dtype) for p in projections}
        return cls(projections, zeros, 0, loss)

    def add(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Let ``model`` read batches; its weights stay as they are.

        Raises:
            DivergenceError: a loss or gradient that is not finite.
            OutOfMemoryError: too little memory.
        """
        with faster_linear(), self._watching(model):
            for batch in batches:
                with naming_shortage(lambda: f"batch {self.count + 1}"):
                    value = self._loss(model, batch)
                    if not value.isfinite():
                        raise self._broken(f"the loss is {value.item()}")
                    value.backward()
                self.count += 1

    @contextmanager
    def _watching(self, model: nn.Module) -> Iterator[None]:
        """Only the summed weights get gradients, and each is added and freed as soon as it is whole."""
        wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
        with ExitStack() as undo:
            for parameter, before in wanted.items():
                undo.callback(parameter.requires_grad_, before)
                parameter.requires_grad_(False)
            for name, projections in self._by_parameter().items():
                layer = model.get_submodule(projections[0].module)
                if is_quantized(layer):
                    _check_not_transposed(projections[0].module, layer)
                    watch = partial(self._watch_quantized, projections)
                    hook = layer.register_forward_hook(watch)
                else:
                    weight = model.get_parameter(name)
                    weight.requires_grad_(True)
                    take = partial(self._take, projections)
                    hook = weight.register_post_accumulate_grad_hook(take)
                undo.callback(hook.remove)
            yield

    def _by_parameter(self) -> Mapping[str, Sequence[Projection]]:
        """The summed projections by the parameter they are in; experts share one."""
        table: dict[str, list[Projection]] = {}
        for projection in self.projections:
            table.setdefault(projection.parameter, []).append(projection)
        return table

    def _watch_quantized(
        self,
        projections: Sequence[Projection],
        _layer: nn.Module,
        inputs: tuple[Tensor, ...],
        output: Tensor,
    ) -> Tensor:
        anchor = torch.zeros((), requires_grad=True)
        add = partial(self._add, projections)
        watched: Tensor = _WeightGradient.apply(output, inputs[0], anchor, add)
        return watched

    def _take(self, projections: Sequence[Projection], weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        self._add(projections, gradient)

    def _add(self, projections: Sequence[Projection], gradient: Tensor) -> None:
        for projection in projections:
            name, part = projection.name, projection.weight_in(gradient)
            if not part.isfinite().all():
                raise self._broken(f"the gradient of {name} is not finite")
            self.sums[name] += part.sign_().to(self.sums[name])

    def _broken(self, what: str) -> DivergenceError:
        return DivergenceError(
            f"Batch {self.count + 1}: {what}. Look for faulty weights in the base model, or set "
            "model.dtype to float32."
        )

    def scores(self, base: WeightSource) -> NeuronScores:
        """How far the mean signs would turn each neuron; ``base`` is read one matrix at a time."""
        distances = {p.name: self._turns(base, p) for p in self.projections}
        provenance = {
            "method": "gradient",
            "before": base.label,
            "num_batches": self.count,
            "neft": __version__,
        }
        return NeuronScores(self.projections, distances, base.num_parameters, provenance)

    def _turns(self, base: WeightSource, projection: Projection) -> npt.NDArray[np.float64]:
        """``1 - cos`` of each neuron, float64 ``[num_neurons]``."""
        dim = projection.neuron_dim
        sums = self.sums[projection.name]
        parts = []
        for start, vectors in neuron_vectors(base, projection):
            slab = sums.narrow(dim, start, len(vectors)).to(vectors) / self.count
            moves = slab if dim == 0 else slab.T
            squared = vectors.square().sum(1).clamp(min=SMALLEST)
            along = (moves * vectors).sum(1)
            across = moves.square().sum(1) - along.square() / squared
            parts.append(across.clamp(min=0) / (2 * squared))
        return torch.cat(parts).numpy()


def _check_not_transposed(name: str, layer: Any) -> None:
    # transformers notes what a layer was before it was quantized.
    if issubclass(getattr(layer, "source_cls", type(layer)), Conv1D):
        raise ArchitectureError(
            f"{name}: was a Conv1D before it was quantized, and lies otherwise since, so that its "
            "gradient does not tell which neurons. Find them by activation, or without quantization."
        )


class _WeightGradient(torch.autograd.Function):
    """The identity in the output ``y`` of a quantized layer; takes the gradient of its weight.

    Integers have none of their own. The anchor, of no effect, makes the output require a gradient also
    where no trained weight lies below.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, _anchor: Tensor, take: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.take(dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(dy.dtype))
        return dy, None, None, None


def _own_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    found: Tensor | None = model(**batch).loss
    if found is None:
        raise DataError(
            f"The model returns no loss for a batch of {', '.join(batch)}: add labels to the batches, "
            "or give loss=."
        )
    return found


def score_by_gradient(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    modules: Sequence[str] | None = None,
    *,
    axes: Mapping[str, Axis] | None = None,
    loss: Loss | None = None,
) -> NeuronScores:
    """Foretell how far a short full fine-tune would turn each neuron, without updating anything.

    Args:
        model: the original model, without an adapter; its weights stay as they are.
        batches: what the fine-tune would read, each batch a step; with ``labels``, unless ``loss`` is
            given.
        modules: projections to score (see ``find_projections``); default: up and down.
        axes: pattern of module names -> axis, for modules that the architecture table does not know.
        loss: mean loss of a model on a batch, a scalar; default: ``model(**batch).loss``.

    Returns:
        ``1 - cos`` in a run whose learning rates sum to 1, for small angles (see the module).

    Raises:
        AdapterError: the model has an adapter.
        ArchitectureError: projections that the model does not have.
        NeuronError: the weight of one is tied to another's.
        DataError: no batches, or none that the model returns a loss for.
        DivergenceError: a loss or gradient that is not finite.
        OutOfMemoryError: too little memory.
    """
    if not batches:
        raise DataError("There are no batches to read; give at least one.")
    check_plain(model, "and neurons are scored in a plain model")
    projections = find_candidates(model, modules, axes)
    signs = GradientSigns.nothing_yet(projections, len(batches), loss)
    signs.add(model, batches)
    return signs.scores(open_weights(model))
