"""Adapters on tiny models for the tuner's tests, and what they mean, written out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from neft import Axis, NeftConfig, NeuronSet, find_projections

# Linear without bias, Conv1D (transposed) with bias, Linear with bias.
FAMILIES = ("llama", "gpt2", "opt")
IDS = torch.arange(3, 27).view(2, 12)


def choose(
    model: nn.Module, *, every: int = 3, start: int = 0, modules: Sequence[str] | None = None
) -> NeuronSet:
    """Every ``every``-th in and out neuron (rows and columns)."""
    projections = find_projections(model, modules)
    return NeuronSet(projections, {p.name: range(start, p.num_neurons, every) for p in projections})


def vectors(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The trained vectors by parameter name."""
    ending = f".neft_vectors.{adapter}.weight"
    return {name: p for name, p in model.named_parameters() if name.endswith(ending)}


def move(model: nn.Module, adapter: str = "default", seed: int = 1) -> None:
    """Change the vectors, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vectors(model, adapter).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapted(model: nn.Module, neurons: NeuronSet | None = None) -> PeftModel:
    """``model`` with an adapter "default" that looks trained, in eval mode."""
    wrapped = get_peft_model(model, NeftConfig(neurons=neurons or choose(model)))
    move(wrapped)
    return wrapped.eval()


def with_second(model: PeftModel, neurons: NeuronSet) -> PeftModel:
    """Add an adapter "other" that looks trained; "default" stays active."""
    model.add_adapter("other", NeftConfig(neurons=neurons))
    move(model, "other", seed=2)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=IDS).logits
    return output


def plain_name(name: str) -> str:
    """A parameter's name in the model without PEFT."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The frozen weights as a state dict shows them, by their names in the plain model."""
    state = model.state_dict()
    return {plain_name(name): tensor for name, tensor in state.items() if ".neft_" not in name}


def merged_by_hand(
    state: dict[str, Tensor], model: PeftModel, adapter: str = "default"
) -> dict[str, Tensor]:
    """The plain weights ``state`` with the adapter's neurons replaced one by one."""
    neurons = model.peft_config[adapter].neurons
    merged = {name: tensor.clone() for name, tensor in state.items()}
    for name, values in vectors(model, adapter).items():
        module = plain_name(name).partition(".neft_vectors.")[0]
        projection = neurons.projections[module]
        weight = merged[f"{module}.weight"]
        weight_OI = weight.T if projection.transposed else weight
        for value, index in zip(values.detach(), neurons[module].tolist(), strict=True):
            if projection.axis is Axis.ROW:
                weight_OI[index, :] = value
            else:
                weight_OI[:, index] = value
    return merged


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal names, dtypes and bits (where ``torch.equal`` takes -0.0 for 0.0)."""
    return left.keys() == right.keys() and all(
        tensor.dtype == right[name].dtype
        and torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8))
        for name, tensor in left.items()
    )
