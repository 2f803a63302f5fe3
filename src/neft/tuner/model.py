"""Puts NeFT layers in place of the projections whose neurons are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, onload_layer
from torch import Tensor, nn

from neft.errors import AdapterError, NeuronError, UsageError
from neft.neurons import NeuronSet
from neft.tuner.config import NeftConfig
from neft.tuner.layer import NeftLinear, check_supported, neft_layers
from neft.tuner.registration import PREFIX


class NeftModel(BaseTuner):
    """A model of which chosen neurons are trained; made by ``peft.get_peft_model``.

    Raises:
        NeuronError: neurons that were made for another model; names the module and what differs.
    """

    prefix = PREFIX
    tuner_layer_cls = NeftLinear

    def _prepare_adapter_config(
        self, peft_config: NeftConfig, model_config: dict[str, Any]
    ) -> NeftConfig:
        neurons = peft_config.resolve(self.model)
        _check_fits(neurons, self.model)
        _check_alone(neurons, self.model, peft_config.modules_to_save or [])
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: NeftConfig, key: str) -> bool:
        assert isinstance(peft_config.neurons, NeuronSet)
        return _plain_name(key) in peft_config.neurons

    def _create_and_replace(
        self,
        peft_config: NeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        neurons = peft_config.neurons
        assert isinstance(neurons, NeuronSet)
        name = _plain_name(current_key)
        if name not in neurons:
            raise NeuronError(
                f"{name}: the state dict has vectors for this module, but the configuration chooses no "
                "neuron of it. They belong to different adapters."
            )
        layer = target if isinstance(target, NeftLinear) else NeftLinear(target, name)
        # A base weight that accelerate offloaded is brought in to read the original vectors.
        with onload_layer(layer):
            layer.update_layer(adapter_name, neurons.projections[name], neurons[name])
        if layer is not target:
            # Not PEFT's _replace_module, which would send the vectors to where the weight is offloaded.
            setattr(parent, target_name, layer)
        layer.set_adapter(self.active_adapters)

    # PEFT calls the next two from 0.21 on. Before, an adapter trained under torch.compile does not load
    # without it, and missing vectors are only warned of.

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The name of a tensor in an adapter's file."""
        name: str = super()._remove_adapter_name_from_key(_plain_name(key), adapter_name)
        return name

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: NeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """An adapter's tensors by their names in ``model``; all vectors must be among them."""
        tensors: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        found = {_plain_name(key) for key in tensors}
        vectors = [
            f"{_plain_name(name)}.neft_vectors.{adapter_name}.weight"
            for name, layer in neft_layers(model)
            if adapter_name in layer.neft_vectors
        ]
        if missing := [name for name in vectors if name not in found]:
            raise AdapterError(
                f"{missing[0]}: the adapter's weights lack this and {len(missing) - 1} more of its "
                f"{len(vectors)} tensors. They are damaged, or belong to another model."
            )
        return tensors

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT runs every forward pass inside this; it is where other methods mix adapters in a batch."""
        if kwargs.get("adapter_names") is not None:
            raise UsageError(
                "adapter_names: NeFT cannot mix adapters in one batch, because they share the base "
                "weight. Run one batch per adapter, or convert them by peft.convert_to_lora."
            )
        yield


def _plain_name(key: str) -> str:
    """A name in the model without the wrappers of ``torch.compile``, FSDP and checkpointing."""
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        key = key.replace(wrapper, "")
    return key


def _check_fits(neurons: NeuronSet, model: nn.Module) -> None:
    """Every chosen neuron must exist in ``model``, before anything is replaced."""
    if not len(neurons):
        raise NeuronError("The neuron set is empty: there is nothing to train.")
    modules = {_plain_name(name): module for name, module in model.named_modules()}
    for name in neurons.modules():
        if name not in modules:
            raise NeuronError(
                f"{name}: the neuron set names a module that this {type(model).__name__} does not "
                "have. The set was made for another model, or for the same one under another class."
            )
        module = modules[name]
        layer: Any = module.get_base_layer() if isinstance(module, NeftLinear) else module
        check_supported(layer, name)
        expected = neurons.projections[name].weight_shape
        if tuple(layer.weight.shape) != expected:
            raise NeuronError(
                f"{name}: the weight has shape {tuple(layer.weight.shape)}, but the neurons were chosen "
                f"in one of {expected}. The set was made for another model."
            )


def _check_alone(neurons: NeuronSet, model: nn.Module, modules_to_save: list[str]) -> None:
    """Nothing else may use or train the weights that hold the chosen neurons."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(_plain_name(name).replace(".base_layer.", "."))
    tied = {name: names for names in users.values() for name in names if len(names) > 1}
    for name in neurons.modules():
        weight = f"{name}.weight"
        if weight in tied:
            others = ", ".join(other for other in tied[weight] if other != weight)
            raise NeuronError(
                f"{name}: its weight is tied to {others}, which would change with it. Untie them first "
                "(tie_word_embeddings=False), or choose other modules."
            )
        for saved in modules_to_save:
            if f".{saved}." in f".{name}.":
                raise NeuronError(
                    f"{name}: modules_to_save={saved!r} trains the whole module already. Take it out of "
                    "modules_to_save or out of the neuron set."
                )
