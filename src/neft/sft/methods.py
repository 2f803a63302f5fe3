"""The ways of fine-tuning, in one table: what each trains, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neft.errors import NeuronError, UsageError
from neft.neurons import NeuronSet

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Method:
    """One way of fine-tuning a model."""

    trains: str
    """What is trained, in words."""
    needs_neurons: bool
    makes_adapter: bool
    """The result is a PEFT adapter over frozen weights; otherwise a whole float32 checkpoint."""
    prepare: Callable[[PreTrainedModel, NeuronSet | None], nn.Module]
    """Freezes and wraps the model for training."""


def _full(model: PreTrainedModel, neurons: NeuronSet | None) -> nn.Module:
    assert neurons is None
    trained: nn.Module = model
    return trained.requires_grad_(True)


def _neft(model: PreTrainedModel, neurons: NeuronSet | None) -> nn.Module:
    from peft import get_peft_model

    from neft.tuner import NeftConfig

    tuned: nn.Module = get_peft_model(model, NeftConfig(neurons=neurons, task_type="CAUSAL_LM"))
    return tuned


METHODS: dict[str, Method] = {
    "full": Method("all parameters (FT-full)", False, False, _full),
    "neft": Method("the chosen neurons alone (NeFT)", True, True, _neft),
}


def find_method(name: str) -> Method:
    """Look ``name`` up in the table; raises ``UsageError`` that lists the methods."""
    if name not in METHODS:
        raise UsageError(f"Unknown method {name!r}; choose one of {', '.join(METHODS)}.")
    return METHODS[name]


def check_neurons(name: str, neurons: NeuronSet | None) -> None:
    """Refuse a missing or superfluous neuron set, before anything expensive."""
    if find_method(name).needs_neurons:
        if neurons is None or not len(neurons):
            given = "none were" if neurons is None else "an empty set was"
            raise NeuronError(f"Method {name!r} trains chosen neurons, but {given} given.")
    elif neurons is not None:
        raise NeuronError(f"Method {name!r} takes no neurons; a set of {len(neurons)} was given.")


def prepare(model: PreTrainedModel, method: str, neurons: NeuronSet | None = None) -> nn.Module:
    """Freeze and wrap ``model`` in place for training by ``method``.

    Raises:
        UsageError: an unknown method.
        NeuronError: neurons missing, superfluous, or made for another model.
    """
    check_neurons(method, neurons)
    return find_method(method).prepare(model, neurons)
