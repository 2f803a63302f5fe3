"""Puts NeFT layers in place of the projections whose neurons are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from torch import nn

from neft.errors import NeuronError, UsageError
from neft.neurons import NeuronSet
from neft.tuner.config import NeftConfig
from neft.tuner.layer import NeftLinear
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
        layer = target if isinstance(target, NeftLinear) else NeftLinear(target, name)
        # A base weight that accelerate offloaded is brought in to read the original vectors.
        with onload_layer(layer):
            layer.update_layer(adapter_name, neurons.projections[name], neurons[name])
        if layer is not target:
            # Not PEFT's _replace_module, which would send the vectors to where the weight is offloaded.
            setattr(parent, target_name, layer)
        layer.set_adapter(self.active_adapters)

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
    """A module's name without the wrappers of ``torch.compile``."""
    return key.replace("_orig_mod.", "")


def _check_fits(neurons: NeuronSet, model: nn.Module) -> None:
    """Every chosen neuron must exist in ``model``, before anything is replaced."""
    if not len(neurons):
        raise NeuronError("The neuron set is empty: there is nothing to train.")
    modules = {_plain_name(name): module for name, module in model.named_modules()}
    for name in neurons.modules():
        module: Any = modules.get(name)
        if module is None:
            raise NeuronError(
                f"{name}: the neuron set names a module that this {type(model).__name__} does not "
                "have. The set was made for another model, or for the same one under another class."
            )
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        shape = getattr(getattr(module, "weight", None), "shape", None)
        expected = neurons.projections[name].weight_shape
        if shape is not None and shape.numel() and tuple(shape) != expected:
            raise NeuronError(
                f"{name}: the weight has shape {tuple(shape)}, but the neurons were chosen in one of "
                f"{expected}. The set was made for another model."
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
