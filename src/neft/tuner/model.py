"""Puts NeFT layers in place of the projections whose neurons are trained."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from torch import nn

from neft.errors import NeuronError
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
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: NeftConfig, key: str) -> bool:
        assert isinstance(peft_config.neurons, NeuronSet)
        return key.removeprefix("_orig_mod.") in peft_config.neurons

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
        name = current_key.removeprefix("_orig_mod.")
        layer = target if isinstance(target, NeftLinear) else NeftLinear(target, name)
        # A base weight that accelerate offloaded is brought in to read the original vectors.
        with onload_layer(layer):
            layer.update_layer(adapter_name, neurons.projections[name], neurons[name])
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        layer.set_adapter(self.active_adapters)


def _check_fits(neurons: NeuronSet, model: nn.Module) -> None:
    """Every chosen neuron must exist in ``model``, before anything is replaced."""
    if not len(neurons):
        raise NeuronError("The neuron set is empty: there is nothing to train.")
    modules = dict(model.named_modules())
    for name in neurons.modules():
        module: Any = modules.get(name, modules.get(f"_orig_mod.{name}"))
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
