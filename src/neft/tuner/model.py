"""Puts NeFT layers in place of the projections whose neurons are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, check_adapters_to_merge, onload_layer
from torch import Tensor, nn

from neft.errors import AdapterError, NeuronError, UsageError
from neft.neurons import NeuronSet, Projection
from neft.projections import check_untied
from neft.quantized import check_gradients_pass, is_quantized, keep_format, keep_plain
from neft.tuner.config import NeftConfig
from neft.tuner.experts import NeftExperts, check_experts_supported
from neft.tuner.layer import NeftLinear, check_supported, features, neft_layers
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
        keep_format(self.model)
        if not peft_config.inference_mode:
            check_gradients_pass(self.model)
        return peft_config

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put the layers of an adapter in place; see PEFT's. One of this name is replaced."""
        if state_dict is not None:
            # PEFT reads the modules to adapt off the tensors' names; experts share one.
            state_dict = _named_by_module(state_dict, self.peft_config[adapter_name].neurons)
        super().inject_adapter(
            model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
        )
        neurons = self.peft_config[adapter_name].neurons
        for _, layer in neft_layers(model):
            if layer.name not in neurons.projections:
                layer.drop(adapter_name)

    @staticmethod
    def _check_target_module_exists(peft_config: NeftConfig, key: str) -> bool:
        assert isinstance(peft_config.neurons, NeuronSet)
        return _plain_name(key) in peft_config.neurons.by_module

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
        if name not in neurons.by_module:
            raise NeuronError(
                f"{name}: the state dict has vectors for this module, but the configuration chooses no "
                "neuron of it. They belong to different adapters."
            )
        projections = neurons.by_module[name]
        layer = _as_neft_layer(target, name, projections[0])
        # A base weight that accelerate offloaded is brought in to read the original vectors.
        with onload_layer(layer):
            if isinstance(layer, NeftExperts):
                layer.update_layer(adapter_name, {p: neurons[p.name] for p in projections})
            else:
                layer.update_layer(adapter_name, projections[0], neurons[name])
        if layer is not target:
            # Not PEFT's _replace_module, which would send the vectors to where the weight is offloaded.
            setattr(parent, target_name, layer)
        layer.set_adapter(self.active_adapters)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(child, NeftExperts):
            # PEFT's version hands over a weight, which experts do not have.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

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

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Leave the vectors in the weights until ``unmerge_adapter``: in all layers, or in none."""
        self._check_mergeable(safe_merge, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_mergeable(
        self, safe_merge: bool, adapter_names: list[str] | None, *, dequantizes: bool = False
    ) -> None:
        for _, layer in neft_layers(self.model):
            with onload_layer(layer):
                layer.check_mergeable(safe_merge, adapter_names, dequantizes=dequantizes)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """The model with the vectors in its weights, without PEFT.

        Quantized layers that get some become plain ones of the model's dtype: quantized again, the weight
        would hold the vectors rounded to 4 or 8 bits.
        """
        self._check_mergeable(safe_merge, adapter_names, dequantizes=True)
        self._dequantize_merged(adapter_names)
        plain: nn.Module = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        return plain

    def _dequantize_merged(self, adapter_names: list[str] | None) -> None:
        names = []
        for name, layer in neft_layers(self.model):
            if not is_quantized(layer.get_base_layer()):
                continue
            if any(n in layer.neft_vectors for n in check_adapters_to_merge(layer, adapter_names)):
                layer.dequantize(getattr(self.model, "dtype", None))
                names.append(_plain_name(name))
        keep_plain(self.model, names)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT runs every forward pass inside this; it is where other methods mix adapters in a batch."""
        if kwargs.get("adapter_names") is not None:
            raise UsageError(
                "adapter_names: NeFT cannot mix adapters in one batch, because they share the base "
                "weight. Run one batch per adapter, or convert them by peft.convert_to_lora."
            )
        yield


def _named_by_module(
    state_dict: dict[str, Tensor], neurons: NeuronSet | object
) -> dict[str, Tensor]:
    """An adapter's tensors by names that begin with those of modules."""
    if not isinstance(neurons, NeuronSet):
        return state_dict
    modules = {name: projection.module for name, projection in neurons.projections.items()}
    named = {}
    for key, tensor in state_dict.items():
        name, _, rest = key.rpartition(f".{PREFIX}")
        named[f"{modules.get(_plain_name(name), name)}.{PREFIX}{rest}"] = tensor
    return named


def _as_neft_layer(
    target: nn.Module, name: str, projection: Projection
) -> NeftLinear | NeftExperts:
    if isinstance(target, (NeftLinear, NeftExperts)):
        return target
    return NeftLinear(target, name) if projection.expert is None else NeftExperts(target, name)


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
    for name, projections in neurons.by_module.items():
        if name not in modules:
            raise NeuronError(
                f"{name}: the neuron set names a module that this {type(model).__name__} does not "
                "have. The set was made for another model, or for the same one under another class."
            )
        layer = _plain_layer(modules[name])
        if projections[0].expert is None:
            check_supported(layer, name)
            # Of a quantized weight, which is packed, only the layer's sizes tell.
            num_inputs, num_outputs = features(layer)
            _check_sizes(projections[0], (num_outputs, num_inputs))
        else:
            check_experts_supported(layer, modules.get(name.rpartition(".")[0]), name)
            for projection in projections:
                _check_expert(projection, layer)


def _plain_layer(module: nn.Module) -> nn.Module:
    if isinstance(module, (NeftLinear, NeftExperts)):
        base: nn.Module = module.get_base_layer()
        return base
    return module


def _check_sizes(projection: Projection, found: tuple[int, int]) -> None:
    """``found``: outputs and inputs of the layer."""
    expected = _logical_shape(projection)
    if found != expected:
        raise _other_shape(projection, found, expected)


def _check_expert(projection: Projection, experts: nn.Module) -> None:
    attribute = projection.parameter.removeprefix(f"{projection.module}.")
    shape = tuple(getattr(experts, attribute).shape)
    if not projection.fits(shape):
        raise _other_shape(projection, shape, projection.weight_shape)


def _other_shape(
    projection: Projection, found: tuple[int, ...], expected: tuple[int, ...]
) -> NeuronError:
    return NeuronError(
        f"{projection.name}: the weight has shape {found}, but the neurons were chosen in one of "
        f"{expected}. The set was made for another model."
    )


def _logical_shape(projection: Projection) -> tuple[int, int]:
    """Number of outputs and inputs."""
    shape = projection.weight_shape
    return (shape[1], shape[0]) if projection.transposed else shape


def _check_alone(neurons: NeuronSet, model: nn.Module, modules_to_save: list[str]) -> None:
    """Nothing else may use or train the weights that hold the chosen neurons."""
    parameters = model.named_parameters(remove_duplicate=False)
    check_untied(
        ((_plain_name(name).replace(".base_layer.", "."), tensor) for name, tensor in parameters),
        [neurons.projections[name] for name in neurons.modules()],
    )
    for name in neurons.modules():
        for saved in modules_to_save:
            if f".{saved}." in f".{name}.":
                raise NeuronError(
                    f"{name}: modules_to_save={saved!r} trains the whole module already. Take it out of "
                    "modules_to_save or out of the neuron set."
                )
