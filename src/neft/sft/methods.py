"""The ways of fine-tuning, in one table: what each trains, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from neft.errors import NeuronError, UsageError
from neft.neurons import NeuronSet, Projection
from neft.recipe import LoraSection

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Weights: TypeAlias = "Callable[[nn.Module], list[nn.Parameter]]"
Prepare: TypeAlias = "Callable[[PreTrainedModel, NeuronSet | None, LoraSection | None], nn.Module]"


@dataclass(frozen=True)
class Method:
    """One way of fine-tuning a model."""

    trains: str
    """What is trained, in words."""
    prepare: Prepare
    """Freezes and wraps the model for training."""
    weights: Weights | None = None
    """The model's own tensors that are trained whole, for methods that train such."""
    needs_neurons: bool = False
    makes_adapter: bool = False
    """The result is a PEFT adapter over frozen weights; otherwise a whole float32 checkpoint."""


def _all_weights(network: nn.Module) -> list[nn.Parameter]:
    return list(network.parameters())


def _embedding_weights(network: Any) -> list[nn.Parameter]:
    from torch import nn

    from neft.projections import input_embeddings

    embeddings = input_embeddings(network)
    weight = getattr(embeddings, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        kind = "none" if embeddings is None else f"{type(embeddings).__name__} without such weights"
        raise UsageError(
            f"Method 'embed' trains the input embeddings, but {type(network).__name__} has {kind} "
            "that can be trained. Choose another method."
        )
    return [weight]


def _in_out_weights(network: nn.Module) -> list[nn.Parameter]:
    from neft.projections import find_projections

    names = dict.fromkeys(projection.parameter for projection in find_projections(network))
    return [network.get_parameter(name) for name in names]


def _of_weights(trains: str, weights: Weights) -> Method:
    """A method that trains some of the model's own tensors, each as a whole."""

    def prepare(
        model: PreTrainedModel, neurons: NeuronSet | None, lora: LoraSection | None
    ) -> nn.Module:
        assert neurons is None
        assert lora is None
        network: nn.Module = model
        trained = weights(network)
        network.requires_grad_(False)
        for weight in trained:
            weight.requires_grad_(True)
        return network

    return Method(trains, prepare, weights)


def lora_projections(network: nn.Module) -> list[Projection]:
    """What LoRA adapts: every linear layer but the LM head; experts that are stacked in one parameter
    are none.

    Raises:
        ArchitectureError: the network has no linear layers.
    """
    from neft.projections import find_projections

    return [p for p in find_projections(network, ["*"]) if p.expert is None]


def _lora(model: PreTrainedModel, neurons: NeuronSet | None, lora: LoraSection | None) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    assert neurons is None
    assert lora is not None
    assert lora.rank is not None
    projections = lora_projections(model)
    alpha: Any = lora.alpha or lora.rank  # any number, though PEFT annotates int
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=[projection.name for projection in projections],
        fan_in_fan_out=any(projection.transposed for projection in projections),
        task_type="CAUSAL_LM",
    )
    tuned: nn.Module = get_peft_model(model, config)
    return tuned


def _mask(model: PreTrainedModel, neurons: NeuronSet | None, lora: LoraSection | None) -> nn.Module:
    from neft.reference.masked import mask_gradients

    assert neurons is not None
    assert lora is None
    network: nn.Module = model
    mask_gradients(network, neurons)
    return network


def _neft(model: PreTrainedModel, neurons: NeuronSet | None, lora: LoraSection | None) -> nn.Module:
    from peft import get_peft_model

    from neft.tuner import NeftConfig

    assert lora is None
    tuned: nn.Module = get_peft_model(model, NeftConfig(neurons=neurons, task_type="CAUSAL_LM"))
    return tuned


METHODS: dict[str, Method] = {
    "full": _of_weights("all parameters (FT-full)", _all_weights),
    "embed": _of_weights(
        "the input embeddings alone (FT-embed); where the LM head is tied to them, it is the same "
        "tensor and learns with them",
        _embedding_weights,
    ),
    "in_out": _of_weights(
        "the weights of the up and down projections (FT-{in|out}); where up is fused with gate, of "
        "both",
        _in_out_weights,
    ),
    "lora": Method(
        "low-rank updates of all linear layers but the LM head (LoRA)", _lora, makes_adapter=True
    ),
    "mask": Method(
        "the chosen neurons by masked full gradients (NeFT as in the paper)",
        _mask,
        needs_neurons=True,
    ),
    "neft": Method(
        "the chosen neurons alone (NeFT)", _neft, needs_neurons=True, makes_adapter=True
    ),
}


def find_method(name: str) -> Method:
    """Look ``name`` up in the table; raises ``UsageError`` that lists the methods."""
    if name not in METHODS:
        raise UsageError(f"Unknown method {name!r}; choose one of {', '.join(METHODS)}.")
    return METHODS[name]


def check_inputs(name: str, neurons: NeuronSet | None, lora: LoraSection | None) -> None:
    """Refuse what a method lacks or has no use for, before anything expensive.

    Raises:
        UsageError: an unknown method; LoRA settings missing or superfluous.
        NeuronError: neurons missing or superfluous.
    """
    if find_method(name).needs_neurons:
        if neurons is None or not len(neurons):
            given = "none were" if neurons is None else "an empty set was"
            raise NeuronError(f"Method {name!r} trains chosen neurons, but {given} given.")
    elif neurons is not None:
        raise NeuronError(f"Method {name!r} takes no neurons; a set of {len(neurons)} was given.")
    if (lora is not None) != (name == "lora"):
        given = "none were" if lora is None else "some were"
        raise UsageError(
            f"Method 'lora' and LoRA settings go together; with method {name!r}, {given} given."
        )


def prepare(
    model: PreTrainedModel,
    method: str,
    neurons: NeuronSet | None = None,
    lora: LoraSection | None = None,
) -> nn.Module:
    """Freeze and wrap ``model`` in place for training by ``method``.

    Args:
        model: the base model; in float32 for methods that make no adapter.
        method: a key of ``METHODS``.
        neurons: for ``neft`` and ``mask``.
        lora: for ``lora``; its ``rank`` is resolved.

    Raises:
        UsageError: an unknown method, one that this model cannot be trained by, or LoRA settings
            missing or superfluous.
        NeuronError: neurons missing, superfluous, or made for another model.
        ArchitectureError: a model whose projections cannot be found.
    """
    check_inputs(method, neurons, lora)
    return find_method(method).prepare(model, neurons, lora)
