"""A linear layer of which chosen neurons are trained.

The layer *writes through*: it puts the trained vectors into the frozen base weight and runs the base
layer itself, so a forward pass costs what the base costs. The base weight is shared by all adapters
and by the untouched model, so the layer keeps a record of whose vectors are *resident* in it, and the
original values of every adapter's neurons to put back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from neft.errors import ArchitectureError, NeuronError
from neft.neurons import Indices, Projection
from neft.tuner.functional import ResidentLayer, Selection, overlay, write_through


class MasterVectors(nn.ParameterDict):
    """Trained vectors by adapter name, kept in at least the precision they were made with.

    ``model.half()`` or ``.to(torch.bfloat16)`` would round them, and updates below half a unit in the
    last place would be lost from then on; such casts move them but leave their dtype.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MasterVectors:
        def without_narrowing(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if torch.promote_types(tensor.dtype, result.dtype) == result.dtype:
                return result
            return tensor.to(result.device)

        super()._apply(without_narrowing, recurse)
        return self


class NeftLinear(nn.Module, BaseTunerLayer):
    """Wraps ``nn.Linear`` or ``Conv1D``; see the module's docstring.

    Args:
        base_layer: the frozen layer.
        name: its module name, for errors.

    Raises:
        ArchitectureError: a layer whose forward pass is not a plain product with its weight.
    """

    adapter_layer_names = ("neft_vectors",)
    other_param_names = ("neft_indices", "neft_originals", "neft_projections")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        _check_supported(base_layer, name)
        self.base_layer = base_layer
        self.name = name
        self.neft_vectors: Any = MasterVectors()
        self.neft_indices: Any = BufferDict(persistent=False)
        self.neft_originals: Any = BufferDict(persistent=False)
        self.neft_projections: dict[str, Projection] = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        # Adapters whose vectors the base weight holds now, and a stamp of their values at that time.
        self._resident: tuple[str, ...] = ()
        self._stamp: object = None
        self.register_state_dict_pre_hook(_restore_before_saving)
        self.register_load_state_dict_pre_hook(_restore_before_loading)
        self.register_load_state_dict_post_hook(_read_originals_after_loading)

    @property
    def _base(self) -> nn.Linear | Conv1D:
        """The frozen layer itself, whatever wraps it."""
        base: nn.Linear | Conv1D = BaseTunerLayer.get_base_layer(self)
        return base

    def update_layer(self, adapter_name: str, projection: Projection, indices: Indices) -> None:
        """Add an adapter whose vectors start as the base layer's own."""
        self._restore()
        weight = self._base.weight
        if tuple(weight.shape) != projection.weight_shape:
            raise NeuronError(
                f"{self.name}: the weight has shape {tuple(weight.shape)}, but the neurons were chosen "
                f"in one of {projection.weight_shape}. They were made for another model."
            )
        self.neft_projections[adapter_name] = projection
        self.neft_indices[adapter_name] = torch.from_numpy(indices).to(weight.device)
        originals = self._selection(adapter_name).read(weight.detach())
        self.neft_originals[adapter_name] = originals
        # 16-bit updates below half a unit in the last place would be lost: at least float32.
        master_dtype = torch.promote_types(weight.dtype, torch.float32)
        self.neft_vectors[adapter_name] = nn.Parameter(originals.to(master_dtype, copy=True))

    def _selection(self, adapter_name: str) -> Selection:
        projection = self.neft_projections[adapter_name]
        return Selection(projection.axis, projection.neuron_dim, self.neft_indices[adapter_name])

    def _active(self) -> tuple[str, ...]:
        """Names of the adapters that take part in a forward pass now."""
        if self.disable_adapters:
            return ()
        return tuple(name for name in self.active_adapters if name in self.neft_vectors)

    def _check_disjoint(self, names: tuple[str, ...]) -> None:
        """Adapters active together must not claim the same scalars: neither value would be right."""
        for position, name in enumerate(names):
            for other in names[:position]:
                same_axis = self.neft_projections[name].axis is self.neft_projections[other].axis
                if not same_axis or _intersect(self.neft_indices[name], self.neft_indices[other]):
                    raise NeuronError(
                        f"{self.name}: adapters {other!r} and {name!r} train some of the same neurons, "
                        "so they cannot be active or merged together. Activate one at a time."
                    )

    @torch.no_grad()
    def _load(self, names: tuple[str, ...], reuse: bool = False) -> Tensor:
        """The base weight, holding exactly the vectors of ``names`` and else the original values.

        Args:
            names: adapters.
            reuse: trust the stamp, which does not see writes to ``vectors.data``.
        """
        if names != self._resident:
            self._restore()
        weight: Tensor = self._base.weight
        if not names:
            return weight
        stamp = None
        if reuse:
            vectors = [self.neft_vectors[name] for name in names]
            stamp = (weight.data_ptr(), [(v.data_ptr(), v._version) for v in vectors])
            if stamp == self._stamp:
                return weight
        if len(names) > 1 and names != self._resident:
            self._check_disjoint(names)
        # Recorded before the first write, so that an interrupted one is still put back.
        self._resident = names
        self._stamp = None
        for name in names:
            self._selection(name).write(weight, self.neft_vectors[name])
        self._stamp = stamp
        return weight

    @torch.no_grad()
    def _restore(self) -> None:
        """Put the original values back."""
        weight = self._base.weight
        for name in self._resident:
            self._selection(name).write(weight, self.neft_originals[name])
        self._resident = ()
        self._stamp = None

    def _run(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            if not self.disable_adapters:
                return self._run(x)
            self.unmerge()
        names = self._active()
        if torch.compiler.is_compiling() or self._base.weight.is_meta:
            return self._forward_overlay(x, names)
        if torch.is_grad_enabled():
            return self._forward_training(x, names)
        self._load(names, reuse=True)
        return self._run(x)

    def _forward_training(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        base_layer = self._base
        if base_layer.weight.requires_grad:
            raise RuntimeError(
                f"{self.name}: the base weight requires a gradient, but NeFT trains chosen neurons "
                "of a frozen weight. Set requires_grad of the base weight to False, or train the "
                "whole layer by modules_to_save instead."
            )
        self._widen(names)
        # An optimizer step may follow that writes to the vectors behind their version counter.
        self._stamp = None
        return write_through(
            x,
            base_layer.bias,
            ResidentLayer(
                load=lambda: self._load(names),
                run=self._run,
                transposed=isinstance(base_layer, Conv1D),
            ),
            [self._selection(name) for name in names],
            [self.neft_vectors[name] for name in names],
        )

    def _widen(self, names: tuple[str, ...]) -> None:
        """Undo a cast of the trained vectors to 16 bits that happened behind the layer's back."""
        for name in names:
            vectors = self.neft_vectors[name]
            if torch.finfo(vectors.dtype).bits < 32:
                warnings.warn(
                    f"{self.name}: something cast the trained vectors of adapter {name!r} to "
                    f"{vectors.dtype}, which rounded them once and would lose small updates; they are "
                    "float32 again from here on.",
                    stacklevel=2,
                )
                vectors.data = vectors.data.float()

    def _forward_overlay(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        """Leaves the base weight alone: it cannot be written, or is part of a compiled graph."""
        if self._resident:
            _restore_eagerly(self)
        y = self._run(x)
        self._check_disjoint(names)
        for name in names:
            vectors = self.neft_vectors[name]
            if vectors.is_meta:
                raise RuntimeError(
                    f"{self.name}: the trained vectors are offloaded to the meta device. Dispatch the "
                    "base model first and add the adapter afterwards; the vectors then stay in memory."
                )
            y = overlay(
                y,
                x,
                self._base.bias,
                self._selection(name),
                vectors,
                self.neft_originals[name],
            )
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Leave the vectors in the base weight for good (until ``unmerge``).

        Args:
            safe_merge: first check that the vectors are finite.
            adapter_names: default: the active adapters.
        """
        names = [
            name
            for name in check_adapters_to_merge(self, adapter_names)
            if name in self.neft_vectors
        ]
        if not names:
            return
        together = (*self.merged_adapters, *names)
        self._check_disjoint(together)
        for name in names if safe_merge else ():
            if not torch.isfinite(self.neft_vectors[name]).all():
                raise ValueError(
                    f"{self.name}: NaN or infinite values in the vectors of adapter {name!r}; "
                    "nothing was merged into this layer."
                )
        self._load(together)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original values back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore()
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the vectors in its weight or with its original values."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif not self.merged:
            self._restore()
        return self._base

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; the original values return."""
        if adapter_name in self._resident:
            self._restore()
        super().delete_adapter(adapter_name)

    @property
    def weight(self) -> Tensor:
        """The weight that a forward pass would use now (some models read it directly)."""
        weight: Tensor = self._base.weight if self.merged else self._load(self._active())
        return weight

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter adds to the base weight, as a dense ``[O, I]`` tensor."""
        projection = self.neft_projections[adapter_name]
        vectors = self.neft_vectors[adapter_name]
        delta: Tensor = vectors.new_zeros(projection.weight_shape)
        difference = vectors - self.neft_originals[adapter_name].to(vectors.dtype)
        self._selection(adapter_name).write(delta, difference)
        return delta.T if projection.transposed else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def train(self, mode: bool = True) -> NeftLinear:
        self._stamp = None
        return super().train(mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # Moved as tensors of their own dtypes: PEFT's version would cast the vectors to the base's.
        target = device or self._base.weight.device
        for entries in (self.neft_indices, self.neft_originals, self.neft_vectors):
            if adapter_name in entries and not entries[adapter_name].is_meta:
                entries[adapter_name] = entries[adapter_name].to(target)

    def __repr__(self) -> str:
        return "neft." + super().__repr__()


def _check_supported(layer: nn.Module, name: str) -> None:
    """Only layers whose whole forward pass is the product with ``weight``, plus ``bias``."""
    # accelerate's hooks wrap forward on the instance; the class still tells what it computes.
    plain = isinstance(layer, Conv1D) or type(layer).forward is nn.Linear.forward
    # MultiheadAttention reads the weight of its out_proj and never calls it.
    bypassed = isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if not plain or bypassed:
        raise ArchitectureError(
            f"{name}: NeFT can train neurons of nn.Linear and transformers' Conv1D, this layer is a "
            f"{type(layer).__name__}. Choose other modules."
        )


def _intersect(left: Tensor, right: Tensor) -> bool:
    return bool(torch.isin(left, right).any())


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _restore_eagerly(layer: NeftLinear) -> None:
    layer._restore()


def _restore_before_saving(layer: NeftLinear, _prefix: str, _keep_vars: bool) -> None:
    # A state dict of the model must hold the base weights, not whose vectors happen to be resident.
    if not layer.merged:
        layer._restore()


def _restore_before_loading(layer: NeftLinear, *_: Any) -> None:
    if not layer.merged:
        layer._restore()


def _read_originals_after_loading(layer: NeftLinear, _incompatible: Any) -> None:
    # Base weights may have been loaded; what is to be put back is what they are now.
    weight = layer._base.weight
    if layer.merged or weight.is_meta:
        return
    for name in layer.neft_originals:
        layer.neft_originals[name] = layer._selection(name).read(weight.detach())


def neft_layers(model: nn.Module) -> Iterator[tuple[str, NeftLinear]]:
    """(module name, layer) of every NeFT layer of a model."""
    for name, module in model.named_modules():
        if isinstance(module, NeftLinear):
            yield name, module
