"""A linear layer of which chosen neurons are trained.

The layer *writes through*: it puts the trained vectors into the frozen base weight and runs the base
layer itself, so a forward pass costs what the base costs. The base weight is shared by all adapters
and by the untouched model, so the layer keeps a record of whose vectors are *resident* in it, and the
original values that they displaced, to put back.

A quantized base weight cannot hold them: training dequantizes it, one layer at a time, and writes through
that; inference runs the quantized layer and *overlays* the vectors on its output.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from itertools import combinations
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from neft.checkpoints.module import is_zero3, whole_shape
from neft.errors import ArchitectureError, NeuronError, UsageError
from neft.neurons import Axis, Indices, Projection
from neft.quantized import compute_dtype, dequantized, is_quantized
from neft.tuner.functional import ResidentLayer, Selection, overlay, without_columns, write_through


class MasterVectors(nn.Module):
    """The trained vectors of one adapter, in float32 or float64.

    ``model.half()`` or ``.to(torch.bfloat16)`` would round them, and updates below half a unit in the
    last place would be lost from then on; such casts move them but leave their dtype.

    Args:
        vectors: initial values ``[K, L]``.
        owner: layer and adapter, for warnings.
    """

    # A module, and its parameter is called weight, because trainers look for ".<adapter>." in parameter
    # names (TRL does to copy a trained adapter into DPO's reference).
    def __init__(self, vectors: Tensor, owner: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(vectors)
        self._owner = owner

    def widen(self) -> None:
        """Undo a cast of ``weight.data`` (TRL's over a quantized base) as far as possible, and warn."""
        # What FSDP gathers in 16 bits for a pass comes from shares that keep their dtype.
        if _is_master(self.weight.dtype) or _is_sharded(self):
            return
        warnings.warn(
            f"{self._owner}: something cast the trained vectors to {self.weight.dtype}, which rounded "
            "them once and would lose small updates; they are float32 again from here on.",
            stacklevel=2,
        )
        self.weight.data = self.weight.data.float()

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As any module's; DDP and FSDP ask each module for its own before they lay out buffers."""
        self.widen()
        return super().named_parameters(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MasterVectors:
        def without_narrowing(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if _is_master(result.dtype) else tensor.to(result.device)

        super()._apply(without_narrowing, recurse)
        return self

    def extra_repr(self) -> str:
        count, length = whole_shape(self.weight)
        return f"{count} neurons of length {length}, {self.weight.dtype}"


class NeuronIndices(BufferDict):
    """Indices of the chosen neurons by adapter name; they come from the configuration, not a checkpoint.

    ``to_empty()`` and the meta device would lose them for good, so they only ever move between real
    devices.
    """

    def __init__(self) -> None:
        super().__init__(persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NeuronIndices:
        for name, indices in self.items():
            device = fn(indices).device
            self[name] = indices if device.type == "meta" else indices.to(device)
        return self


@dataclass(frozen=True)
class _Place:
    """Where a module keeps its weight, and which state of which tensor was found there."""

    parameters: dict[str, nn.Parameter | None]
    """The module's own. The tensor itself is not held: offloading must be able to free it."""
    identity: int
    address: int
    version: int

    @classmethod
    def now(cls, module: nn.Module) -> _Place:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return cls(module._parameters, id(weight), weight.data_ptr(), weight._version)

    def is_unchanged(self) -> bool:
        weight = self.parameters.get("weight")
        return (
            weight is not None
            and id(weight) == self.identity
            and weight._version == self.version
            and weight.data_ptr() == self.address
        )


@dataclass(frozen=True)
class _Settled:
    """What an evaluation pass left; while it stands, the next has nothing to write."""

    stamp: object
    """The layer's, which is another once anybody else wrote to the base weight."""
    active: str | list[str]
    places: tuple[_Place, ...]
    """Of the base weight and of the vectors in it."""


class NeftLinear(nn.Module, BaseTunerLayer):
    """Wraps ``nn.Linear``, ``Conv1D`` or a quantized layer; see the module's docstring.

    The base weight read directly (``base_layer.weight``) is what the last forward pass used, but where
    processes work together the original one; through ``state_dict()`` it is always that. Write to it by
    ``load_state_dict()``, or after a pass with adapters disabled: what is written otherwise while vectors
    are resident may lack them until the mode changes, and gets the old weight's values in their places
    when they leave.

    In evaluation the vectors are written once and again whenever their version counter or the mode
    (``train()``, ``eval()``) changes. A write to ``vectors.data`` changes neither: call ``model.eval()``
    after one, if no training step comes between.

    Args:
        base_layer: the frozen layer, one that ``check_supported`` lets pass.
        name: its module name, for errors.
    """

    adapter_layer_names = ("neft_vectors",)
    other_param_names = ("neft_indices", "neft_projections")
    # nn.DataParallel sets it on its copies; here, because looking up what is missing takes a module long.
    _is_replica = False

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.in_features, self.out_features = features(self._base)
        # Asked once: a compiled graph cannot, and every token would pay for it.
        self._quantized = is_quantized(self._base)
        self.neft_vectors = nn.ModuleDict()
        self.neft_indices = NeuronIndices()
        self.neft_projections: dict[str, Projection] = {}
        # Pairs of adapters, in both orders; found out once, because a compiled graph cannot ask.
        self._overlapping: set[tuple[str, str]] = set()
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        # Adapters whose vectors the base weight holds now, with the original values in their places. Read
        # when the vectors move in, not when the adapter is made: until then, weights may be loaded.
        self._resident: dict[str, Tensor] = {}
        self._resident_in_shares = False
        # What the resident vectors were when they were written, and for whom.
        self._stamp: object = None
        self._settled: _Settled | None = None
        self.register_state_dict_pre_hook(_restore_before_saving)
        self.register_load_state_dict_pre_hook(_restore_before_loading)

    @property
    def _base(self) -> nn.Linear | Conv1D:
        """The frozen layer itself, whatever wraps it."""
        base: nn.Linear | Conv1D = BaseTunerLayer.get_base_layer(self)
        return base

    def update_layer(self, adapter_name: str, projection: Projection, indices: Indices) -> None:
        """Add an adapter whose vectors start as the base layer's own; one of this name is replaced."""
        self.drop(adapter_name)
        weight = self._original_weight()
        self.neft_projections[adapter_name] = projection
        device = torch.device("cpu") if weight.is_meta else weight.device
        self.neft_indices[adapter_name] = torch.from_numpy(indices).to(device)
        originals = self._selection(adapter_name).read(weight)
        # 16-bit updates below half a unit in the last place would be lost: at least float32.
        master_dtype = torch.promote_types(weight.dtype, torch.float32)
        self.neft_vectors[adapter_name] = MasterVectors(
            originals.to(master_dtype, copy=True), f"{self.name}, adapter {adapter_name!r}"
        )
        others = [name for name in self.neft_vectors if name != adapter_name]
        self._overlapping = {pair for pair in self._overlapping if adapter_name not in pair}
        for other in others:
            if self._overlap(adapter_name, other):
                self._overlapping |= {(adapter_name, other), (other, adapter_name)}

    def drop(self, adapter_name: str) -> None:
        """Forget an adapter, if there is one of this name; which names are active stays as it is."""
        if adapter_name not in self.neft_vectors:
            return
        if adapter_name in self._resident:
            # What tells where its original values belong is about to go.
            if self.merged:
                self.unmerge()
            else:
                self._restore()
        for kept in (self.neft_vectors, self.neft_indices, self.neft_projections):
            del kept[adapter_name]

    def _selection(self, adapter_name: str) -> Selection:
        projection = self.neft_projections[adapter_name]
        # As the weight is stored here: a Conv1D becomes a Linear when it is quantized.
        neuron_dim = int((projection.axis is Axis.COLUMN) != isinstance(self._base, Conv1D))
        return Selection(projection.axis, neuron_dim, self.neft_indices[adapter_name])

    def _vectors(self, adapter_name: str) -> Tensor:
        vectors = self.neft_vectors[adapter_name].weight
        assert isinstance(vectors, Tensor)
        return vectors

    def _active(self) -> tuple[str, ...]:
        """Names of the adapters that take part in a forward pass now."""
        if self.disable_adapters:
            return ()
        return tuple(name for name in self.active_adapters if name in self.neft_vectors)

    def _check_disjoint(self, names: tuple[str, ...]) -> None:
        """Adapters active together must not claim the same scalars: neither value would be right."""
        for pair in combinations(names, 2):
            if pair in self._overlapping:
                raise NeuronError(
                    f"{self.name}: adapters {pair[0]!r} and {pair[1]!r} train some of the same neurons, "
                    "so they cannot be active or merged together. Activate one at a time."
                )

    def _overlap(self, name: str, other: str) -> bool:
        if self.neft_projections[name].axis is not self.neft_projections[other].axis:
            return True
        return bool(torch.isin(self.neft_indices[name], self.neft_indices[other]).any())

    @torch.no_grad()
    def _load(self, names: tuple[str, ...], user: object) -> Tensor:
        """The base weight, holding exactly the vectors of ``names`` and else the original values.

        Args:
            names: adapters.
            user: who loads. The weight is trusted to hold still what the same user wrote last, as far
                as version counters tell; they do not see writes to ``vectors.data``.
        """
        try:
            return self._written(names, user)
        except NotImplementedError as error:  # torchao's
            if not is_quantized(self._base):
                raise
            raise UsageError(
                f"{self.name}: its weight has become a {type(self._base.weight).__name__} since the "
                "adapter was added, and cannot hold vectors. Quantize first, then add the adapter."
            ) from error

    def _written(self, names: tuple[str, ...], user: object) -> Tensor:
        if names != tuple(self._resident):
            self._restore()
        weight: Tensor = self._base.weight
        if not names:
            return weight
        stamp = self._stamp_of(names, user)
        if stamp is not None and stamp == self._stamp:
            return weight
        if not self._resident:
            self._check_disjoint(names)
            # Recorded before the first write, so that an interrupted one is still put back.
            self._resident = {name: self._selection(name).read(weight) for name in names}
            self._resident_in_shares = _is_sharded(self._base)
        self._stamp = None
        for name in names:
            self._selection(name).write(weight, self._vectors(name))
        self._stamp = stamp
        return weight

    def _stamp_of(self, names: tuple[str, ...], user: object) -> object:
        """Changes with the vectors and with the weight they are in; None if that cannot be told."""
        if _is_distributed():
            self._check_not_sharded_since()
            # Sharded weights are gathered anew, maybe at the same address, and count no version.
            return None
        vectors = [self._vectors(name) for name in names]
        if any(vector.is_inference() for vector in vectors):
            return None
        return user, self._base.weight.data_ptr(), [(v.data_ptr(), v._version) for v in vectors]

    @torch.no_grad()
    def _restore(self) -> None:
        """Put the original values back."""
        self._check_not_sharded_since()
        if self._is_whole():
            self._put_back(self._base.weight)
        self._resident = {}
        self._stamp = None
        self._settled = None

    def _release(self) -> None:
        """Put the original values back at once where the weight or the layer may be for this use alone.

        Whoever gathers weights (FSDP, ZeRO) decides when they go, or come anew, and does not tell. Kept
        until then, the originals would also take memory in all layers at a time, in every process. A
        replica of ``nn.DataParallel`` may share the weight, and is thrown away with what it remembers.
        """
        if self._is_replica or _is_distributed():
            self._restore()

    def _replicate_for_data_parallel(self) -> NeftLinear:
        # The weights have been copied already, with whatever is resident in them. Every replica puts that
        # back, and one of them into the weight of this layer, which must not rely on it any longer.
        self._stamp = self._settled = None
        if self.disable_adapters:
            self.merged_adapters = []
        replica: NeftLinear = super()._replicate_for_data_parallel()
        return replica

    def _is_whole(self) -> bool:
        """The base weight itself is here; a shard (FSDP, ZeRO) or a name on meta never held vectors."""
        weight = self._base.weight
        if weight.is_meta or weight.numel() != self.in_features * self.out_features:
            return False
        return not _is_divided(weight)

    def _check_not_sharded_since(self) -> None:
        """The original values can be put into a whole weight or a gathered one, not into shards."""
        if self._resident and not self._resident_in_shares and _is_sharded(self._base):
            raise UsageError(
                f"{self.name}: its weight held the vectors of {list(self._resident)} when it was "
                "sharded, and the originals cannot be put back into shards. Build the model anew and "
                "call model.state_dict(), or unmerge_adapter() if merged, before dividing it."
            )

    def _check_undivided(self, *, for_good: bool = False) -> None:
        """Refuse a weight of which processes hold parts.

        Args:
            for_good: the weight is to be changed, so it must be whole even between passes.
        """
        if _is_divided(self._base.weight) or (for_good and _is_sharded(self._base)):
            raise UsageError(
                f"{self.name}: its weight is divided among processes. Add adapters before dividing it; "
                "to merge one, save it and merge it in one process (neft merge ADAPTER --base MODEL)."
            )

    def _put_back(self, weight: Tensor) -> None:
        for name, originals in self._resident.items():
            self._selection(name).write(weight, originals.to(weight.device))

    @torch.no_grad()
    def _original_weight(self) -> Tensor:
        """The base weight without vectors; a copy if it holds some, or is quantized."""
        if self._quantized:
            return dequantized(self._base)
        self._check_undivided()
        weight: Tensor = self._base.weight.detach()
        if self._resident:
            weight = weight.clone()
            self._put_back(weight)
        return weight

    def _run(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self._is_settled():
            return self._run(x)
        if self.merged:
            if not self.disable_adapters:
                return self._run(x)
            self.unmerge()
        names = self._active()
        if torch.is_grad_enabled():
            self._prepare_training(names)
        if self._out_of_reach():
            return self._forward_overlay(x, names)
        if self._quantized:
            return self._forward_quantized(x, names)
        if torch.is_grad_enabled():
            return self._forward_training(x, names)
        self._load(names, EVALUATION)
        self._settle(names)
        y = self._run(x)
        self._release()
        return y

    def _is_settled(self) -> bool:
        """Whether this is an evaluation pass and the last one left the weight as it needs it."""
        # The layers of a small model take turns every few hundred microseconds, so generation would
        # notice the properties of PEFT and the attributes of modules that the full way looks up.
        settled = self._settled
        return (
            settled is not None
            and settled.stamp is self._stamp
            and settled.active == self._active_adapter
            and not self._disable_adapters
            and not torch.is_grad_enabled()
            and all(place.is_unchanged() for place in settled.places)
        )

    def _settle(self, names: tuple[str, ...]) -> None:
        self._settled = None
        # Inference tensors count no versions.
        if self._stamp is not None and not self._base.weight.is_inference():
            vectors = [self.neft_vectors[name] for name in names]
            self._settled = _Settled(
                self._stamp,
                copy(self._active_adapter),
                tuple(_Place.now(module) for module in (self._base, *vectors)),
            )

    def _out_of_reach(self) -> bool:
        """The base weight must be left alone: it is offloaded, or part of a graph being compiled."""
        return torch.compiler.is_compiling() or self._base.weight.is_meta

    def _prepare_training(self, names: tuple[str, ...]) -> None:
        """The base weight must be frozen, and the vectors wide enough for small updates."""
        if self._base.weight.requires_grad:
            raise UsageError(
                f"{self.name}: the base weight requires a gradient, but NeFT trains chosen neurons "
                "of a frozen weight. Set requires_grad of the base weight to False, or train the "
                "whole layer by modules_to_save instead."
            )
        # Where processes work together it was done before, see MasterVectors; DDP has buffers of the
        # vectors' dtype by now, and would no longer share their gradients.
        for name in names if not _is_distributed() else ():
            if not _is_master(self._vectors(name).dtype):
                cast("MasterVectors", self.neft_vectors[name]).widen()

    def _forward_training(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        base_layer = self._base
        # Optimizers may write to the vectors behind their version counters, so each forward pass loads
        # them anew; its backward pass need not if nobody came between.
        this_pass = object()

        def load() -> Tensor:
            if self.merged:
                raise UsageError(
                    f"{self.name}: adapters {self.merged_adapters} were merged between a forward pass "
                    "and its backward pass. Merge after the backward pass."
                )
            return self._load(names, this_pass)

        return write_through(
            x,
            base_layer.bias,
            ResidentLayer(
                load, lambda x, _: self._run(x), isinstance(base_layer, Conv1D), self._release
            ),
            [self._selection(name) for name in names],
            [self._vectors(name) for name in names],
        )

    def _forward_quantized(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        if not names:
            return self._run(x)
        if not torch.is_grad_enabled():
            return self._forward_overlay(x, names)
        self._check_disjoint(names)
        base_layer = self._base
        selections = [self._selection(name) for name in names]
        vectors = [self._vectors(name) for name in names]
        dtype = compute_dtype(base_layer, x)

        @torch.no_grad()
        def load() -> Tensor:
            # Again in the backward pass: kept from the forward pass, it would cost what quantizing saves.
            weight = dequantized(base_layer).to(dtype)
            for selection, values in zip(selections, vectors, strict=True):
                selection.write(weight, values)
            return weight

        def run(x: Tensor, weight: Tensor) -> Tensor:
            bias = base_layer.bias
            return F.linear(x, weight, None if bias is None else bias.to(dtype))

        resident = ResidentLayer(load, run, transposed=False)
        return write_through(x.to(dtype), base_layer.bias, resident, selections, vectors).to(
            x.dtype
        )

    def _forward_overlay(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        if self._resident:
            self._restore()
        self._check_disjoint(names)
        base_layer = self._base
        dtype = compute_dtype(base_layer, x) if self._quantized else base_layer.weight.dtype
        selections = [self._selection(name) for name in names]
        y = self._run(without_columns(x, selections))
        for name, selection in zip(names, selections, strict=True):
            vectors = self._vectors(name)
            if vectors.is_meta:
                raise UsageError(
                    f"{self.name}: the trained vectors are offloaded to the meta device. Dispatch the "
                    "base model first and add the adapter afterwards; the vectors then stay in memory."
                )
            if (
                base_layer.bias is not None
                and base_layer.bias.is_meta
                and selection.axis is Axis.ROW
            ):
                raise UsageError(
                    f"{self.name}: the bias of trained rows is offloaded to the meta device, where it "
                    "cannot be read. Keep this module in memory by the device map."
                )
            y = overlay(y, x, base_layer.bias, selection, vectors, dtype)
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
        self.check_mergeable(safe_merge, names)
        self._load((*self.merged_adapters, *names), user=object())
        self.merged_adapters.extend(names)

    def check_mergeable(
        self, safe_merge: bool, adapter_names: list[str] | None, *, dequantizes: bool = False
    ) -> None:
        """Whether ``merge`` would go through; a model asks all its layers before it changes any.

        Args:
            safe_merge: check that the vectors are finite.
            adapter_names: default: the active adapters.
            dequantizes: a quantized layer will have been replaced by a plain one.

        Raises:
            NeuronError: adapters that overlap, or hold values that are not finite.
            UsageError: a weight that cannot hold vectors.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = [n for n in wanted if n in self.neft_vectors and n not in self.merged_adapters]
        if not names:
            return
        if self._quantized and not dequantizes:
            raise UsageError(
                f"{self.name}: its quantized weight cannot hold the vectors of {names} unrounded. "
                "merge_and_unload() puts a dequantized layer in its place; to merge into the 16-bit "
                "base, run neft merge ADAPTER --base MODEL."
            )
        self._check_undivided(for_good=True)
        self._check_disjoint((*self.merged_adapters, *names))
        for name in names if safe_merge else ():
            if not torch.isfinite(self._vectors(name)).all():
                raise NeuronError(
                    f"{self.name}: NaNs detected in the merged weights. The adapter {name} seems to be "
                    "broken: some of its vectors hold NaN or infinite values. Nothing was merged."
                )

    def unmerge(self) -> None:
        """Put the original values back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore()
        self.merged_adapters.clear()

    def dequantize(self, dtype: torch.dtype | None) -> None:
        """Put a plain layer of the same values in the place of a quantized one.

        Args:
            dtype: of its weight; default: that from which it was quantized, or float32 if nobody knows.
        """
        base_layer = self._base
        weight = dequantized(base_layer).to(dtype)
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = base_layer.bias
        self.base_layer = plain.train(base_layer.training)
        self._quantized = False

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the vectors in its weight or with its original values."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not self.merged:
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
        if self.merged or self._out_of_reach() or self._quantized:
            weight: Tensor = self._base.weight
            return weight
        self._check_undivided()
        return self._load(self._active(), user=object())

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter adds to the base weight, as a dense tensor of the stored weight's shape."""
        originals = self._original_weight()
        delta = torch.zeros_like(
            originals, dtype=torch.promote_types(originals.dtype, torch.float32)
        )
        if adapter_name in self.neft_vectors:
            vectors = self._vectors(adapter_name)
            selection = self._selection(adapter_name)
            selection.write(delta, vectors - selection.read(originals))
        return delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def train(self, mode: bool = True) -> NeftLinear:
        self._stamp = None
        return super().train(mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # Moved as tensors of their own dtypes: PEFT's version would cast the vectors to the base's. An
        # offloaded base leaves them where they are.
        target = device or self._base.weight.device
        if adapter_name not in self.neft_vectors:
            return
        if "meta" in (target.type, self._vectors(adapter_name).device.type):
            return
        self.neft_vectors[adapter_name].to(target)
        self.neft_indices[adapter_name] = self.neft_indices[adapter_name].to(target)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NeftLinear:
        # What moves or casts the weight does the same to what is to be put back into it.
        self._resident = {name: fn(originals) for name, originals in self._resident.items()}
        self._stamp = None
        super()._apply(fn, recurse)
        return self

    def __repr__(self) -> str:
        return "neft." + super().__repr__()


def check_supported(layer: nn.Module, name: str) -> None:
    """Only layers whose whole forward pass is the product with a weight, quantized or not, plus ``bias``.

    Raises:
        ArchitectureError: any other layer.
    """
    kind = type(layer)
    # accelerate's hooks wrap forward on the instance; the class still tells what it computes.
    plain = isinstance(layer, Conv1D) or getattr(kind, "forward", None) is nn.Linear.forward
    # MultiheadAttention reads the weight of its out_proj and never calls it.
    bypassed = isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if not (plain or is_quantized(layer)) or bypassed:
        raise ArchitectureError(
            f"{name}: NeFT can train neurons of torch.nn.Linear, transformers' Conv1D and layers that "
            "bitsandbytes or torchao quantized, this layer is a "
            f"{kind.__module__}.{kind.__qualname__}. Choose other modules."
        )


EVALUATION = "evaluation"
"""The user of a weight who wrote its vectors in a pass without gradients."""


def _is_distributed() -> bool:
    """Whether several processes may share the weights."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_sharded(module: nn.Module) -> bool:
    """Whether FSDP or ZeRO-3 has the module's parameters, be they gathered just now or not."""
    if vars(module).get("_is_fsdp_managed_module"):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and is_zero3(weight)


def _is_divided(weight: Tensor) -> bool:
    """Whether each process holds a part of it, outside of the passes that gather it."""
    if is_zero3(weight):
        return weight.numel() == 0
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def _is_master(dtype: torch.dtype) -> bool:
    return torch.promote_types(dtype, torch.float32) == dtype


def features(layer: nn.Linear | Conv1D) -> tuple[int, int]:
    """Number of input and output features."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return layer.in_features, layer.out_features


def _restore_before_saving(layer: NeftLinear, _prefix: str, _keep_vars: bool) -> None:
    # A state dict of the model must hold the base weights, not whose vectors happen to be resident.
    if not layer.merged:
        layer._restore()


def _restore_before_loading(layer: NeftLinear, *_: Any) -> None:
    if not layer.merged:
        layer._restore()


def neft_layers(model: nn.Module) -> Iterator[tuple[str, NeftLinear]]:
    """(module name, layer) of every NeFT layer of a model."""
    for name, module in model.named_modules():
        if isinstance(module, NeftLinear):
            yield name, module
