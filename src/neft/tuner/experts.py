"""The experts of a mixture, of which chosen neurons are trained.

transformers stacks the matrices of all experts of a layer in one parameter of three dimensions. Here each
matrix with chosen neurons becomes a NeFT layer of its own, which writes its vectors through into its part
of that parameter. A pass without gradients writes them and then runs the experts by whatever engine the
model uses; one with gradients goes from expert to expert, as transformers' own ``eager`` engine does, so
that gradients are computed for the vectors alone, and never for the whole stack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from neft.errors import ArchitectureError, UsageError
from neft.neurons import Indices, Projection
from neft.projections import is_stack_of_experts
from neft.tuner.functional import ResidentLayer, write_through
from neft.tuner.layer import EVALUATION, NeftLinear

_STACKS = ("gate_up_proj", "up_proj", "down_proj")


class _Matrix(nn.Module):
    """The matrix of one expert as a linear layer: weight and bias are parts of the stack's parameters."""

    def __init__(self, experts: nn.Module, stack: str, expert: int) -> None:
        nn.Module.__init__(self)
        # In a tuple, or the experts would become a submodule of their own part.
        self._experts = (experts,)
        self._stack = stack
        self._expert = expert

    @property
    def weight(self) -> Tensor:
        parameter: Tensor = getattr(self._experts[0], self._stack)
        return parameter[self._expert]

    @property
    def bias(self) -> Tensor | None:
        experts: Any = self._experts[0]
        return getattr(experts, f"{self._stack}_bias")[self._expert] if experts.has_bias else None


class ExpertLinear(_Matrix, nn.Linear):  # type: ignore[misc, override]
    """One expert's matrix ``[O, I]``."""

    def __init__(self, experts: nn.Module, stack: str, expert: int) -> None:
        super().__init__(experts, stack, expert)
        self.out_features, self.in_features = self.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class ExpertConv1D(_Matrix, Conv1D):
    """One expert's matrix, stored as ``[I, O]``."""

    def __init__(self, experts: nn.Module, stack: str, expert: int) -> None:
        super().__init__(experts, stack, expert)
        self.nx, self.nf = self.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


def _matrix(experts: Any, stack: str, expert: int) -> ExpertLinear | ExpertConv1D:
    kind = ExpertConv1D if experts.is_transposed else ExpertLinear
    return kind(experts, stack, expert)


class NeftExpertMatrix(NeftLinear):
    """The matrix of one expert, with chosen neurons that are trained."""

    def settle(self) -> None:
        """Let the stack hold what a pass without gradients is to use of this matrix."""
        if self.merged:
            if not self.disable_adapters:
                return
            self.unmerge()
        self._load(self._active(), EVALUATION)

    def restore(self) -> None:
        """Put the original values back, unless adapters are merged."""
        if not self.merged:
            self._restore()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # LoRA has no layer for one expert of a stack


class NeftExperts(nn.Module):
    """Wraps the module that holds all experts of a layer; see the module's docstring.

    Its NeFT layers are called by the names of their projections, e.g. ``down_proj.5``.

    Args:
        base_layer: the frozen experts, which ``check_experts_supported`` lets pass.
        name: their module name, for errors.
    """

    _is_replica = False  # nn.DataParallel sets it on its copies

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        for stack in _STACKS:
            if stack in base_layer._parameters:
                self.add_module(stack, nn.ModuleDict())
        self.register_state_dict_pre_hook(_restore)
        # Before the stack is loaded: later, the old values would overwrite the new ones.
        self.register_load_state_dict_pre_hook(_restore)

    def get_base_layer(self) -> nn.Module:
        """The frozen experts, whatever wraps them."""
        inner = getattr(self.base_layer, "get_base_layer", None)
        return inner() if callable(inner) else self.base_layer

    @property
    def _base(self) -> Any:
        return self.get_base_layer()

    def layers(self) -> Iterator[NeftExpertMatrix]:
        """The matrices that have chosen neurons."""
        for stack in self._stacks():
            yield from cast("Iterable[NeftExpertMatrix]", stack.values())

    def _stacks(self) -> Iterator[nn.ModuleDict]:
        for name in _STACKS:
            if isinstance(stack := self._modules.get(name), nn.ModuleDict):
                yield stack

    def update_layer(self, adapter_name: str, chosen: Mapping[Projection, Indices]) -> None:
        """Add an adapter whose vectors start as the experts' own.

        Args:
            adapter_name: of the adapter.
            chosen: the projections of these experts that have chosen neurons, and which.
        """
        for projection, indices in chosen.items():
            stack, expert = projection.name.split(".")[-2:]
            layers = cast("nn.ModuleDict", self.get_submodule(stack))
            if expert not in layers:
                matrix = _matrix(self._base, stack, int(expert))
                layers[expert] = NeftExpertMatrix(matrix, projection.name)
            cast("NeftExpertMatrix", layers[expert]).update_layer(adapter_name, projection, indices)

    def set_adapter(self, adapter_names: str | list[str]) -> None:
        """Make adapters active."""
        for layer in self.layers():
            layer.set_adapter(adapter_names)

    # A graph would have to follow which expert each token goes to.
    @torch.compiler.disable(reason="NeFT runs experts one by one")  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the experts' own.

        Args:
            hidden_states: ``[T, H]``.
            top_k_index: which experts each token goes to, ``[T, k]``.
            top_k_weights: what their outputs are multiplied with, ``[T, k]``.
        """
        self._check_in_one_place()
        if torch.is_grad_enabled():
            self._check_frozen()
            return self._forward_training(hidden_states, top_k_index, top_k_weights)
        for layer in self.layers():
            layer.settle()
        outputs: Tensor = self.base_layer(hidden_states, top_k_index, top_k_weights)
        return outputs

    def _forward_training(self, x_TH: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        base = self._base
        first = "gate_up_proj" if base.has_gate else "up_proj"
        outputs_TH = torch.zeros_like(x_TH)
        # Experts without a token too, if they are trained: their gradient is zero, not absent, which
        # optimizers with momentum tell apart.
        trained = {int(expert) for stack in self._stacks() for expert in stack}
        for expert in sorted(trained.union(experts_Tk.unique().tolist())):
            position, token = torch.nonzero(experts_Tk.T.eq(expert), as_tuple=True)
            inner = self._linear(first, expert, x_TH[token])
            inner = base._apply_gate(inner) if base.has_gate else base.act_fn(inner)
            outer = self._linear("down_proj", expert, inner)
            if base.has_post_expert_norm:
                outer = base.post_expert_norm(outer)
            outer = outer * weights_Tk[token, position, None]
            outputs_TH.index_add_(0, token, outer.to(outputs_TH.dtype))
        return outputs_TH

    def _linear(self, stack: str, expert: int, x: Tensor) -> Tensor:
        layers = cast("nn.ModuleDict", self.get_submodule(stack))
        if str(expert) in layers:
            layer = cast("NeftExpertMatrix", layers[str(expert)])
            if not layer.merged or layer.disable_adapters:
                y: Tensor = layer(x)
                return y
        # Not by autograd's own product: it would keep the stack, and refuse to go on once any expert's
        # vectors were written into it.
        matrix = _matrix(self._base, stack, expert)
        resident = ResidentLayer(
            lambda: matrix.weight, lambda x, _: matrix(x), isinstance(matrix, Conv1D)
        )
        return write_through(x, matrix.bias, resident, [], [])

    def _check_in_one_place(self) -> None:
        if self._is_replica:
            raise UsageError(
                f"{self.name}: nn.DataParallel has copied these experts to several devices, and NeFT "
                "would write to the first only. Launch one process a device with torchrun, or let the "
                "process see one device (CUDA_VISIBLE_DEVICES=0)."
            )
        if any(parameter.is_meta for parameter in self._base.parameters(recurse=False)):
            raise UsageError(
                f"{self.name}: these experts are offloaded to the meta device, where no neurons can be "
                "put into them. Keep this module in memory by the device map."
            )

    def _check_frozen(self) -> None:
        for name, parameter in self._base.named_parameters(recurse=False):
            if name in _STACKS and parameter.requires_grad:
                raise UsageError(
                    f"{self.name}.{name}: requires a gradient, but NeFT trains chosen neurons of frozen "
                    "experts. Set its requires_grad to False."
                )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The experts, with the vectors in their matrices or with their original values."""
        for layer in self.layers():
            layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        experts: nn.Module = self._base
        return experts


def check_experts_supported(experts: nn.Module, parent: nn.Module | None, name: str) -> None:
    """Only experts whose forward pass is known, and is what their parent calls.

    Args:
        experts: what holds all experts of a layer.
        parent: the block around them.
        name: their module name, for errors.

    Raises:
        ArchitectureError: experts that are quantized, spread over processes, of an unknown kind, or that
            a kernel reads past their module.
    """
    kind = f"{type(experts).__module__}.{type(experts).__qualname__}"
    if not is_stack_of_experts(experts):
        raise ArchitectureError(
            f"{name}: NeFT can train neurons of experts as transformers stacks them, these are a {kind}. "
            "Choose other modules."
        )
    for stack in _STACKS:
        parameter = experts._parameters.get(stack)
        if parameter is not None and not _is_plain(parameter):
            raise ArchitectureError(
                f"{name}.{stack}: is held as {type(parameter).__name__} of {parameter.dtype}; NeFT can "
                "train neurons of experts that are not quantized. Load the model dequantized."
            )
    if getattr(experts, "_is_expert_parallel", False):
        raise ArchitectureError(
            f"{name}: these experts are spread over processes (expert parallelism), and NeFT cannot tell "
            "which process has which. Load the model without a plan for them."
        )
    # kernels replaces forward on the instance, and so do accelerate's hooks, which call the old one.
    if parent is not None and "forward" in vars(parent) and not hasattr(parent, "_hf_hook"):
        raise ArchitectureError(
            f"{name}: a kernel stands in for the {type(parent).__name__} around these experts and reads "
            "their weights itself, so NeFT never runs. Load the model with use_kernels=False."
        )


def _is_plain(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter and parameter.dtype.itemsize >= 2


def _restore(experts: NeftExperts, *_: Any) -> None:
    for layer in experts.layers():
        layer.restore()
