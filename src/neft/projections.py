"""Where neurons live: the projections of a model, with layer, role, axis and shape.

What differs between architectures is data, in ``ARCHITECTURES``; to support another family, add a row.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neft.errors import AdapterError, ArchitectureError, CheckpointError, NeuronError
from neft.neurons import ROLE_ORDER, Axis, Projection

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

DEFAULT_MODULES = ("up", "down")
"""The paper's in and out neurons (section 4)."""


@dataclass(frozen=True)
class Architecture:
    """Where one family of models keeps its projections."""

    layers: str
    """Path of the stack of layers; whatever encloses it may come before."""
    roles: Mapping[str, str | tuple[str, ...]]
    """Role -> path inside a layer, or several; that of a parameter where it stacks experts."""


_GATED = {
    "up": "mlp.up_proj",
    "gate": "mlp.gate_proj",
    "down": "mlp.down_proj",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
}
_LLAMA = Architecture("layers", _GATED)
_ATTENTION = {role: path for role, path in _GATED.items() if path.startswith("self_attn.")}
_EXPERTS = {"gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"}
_MIXTURE = Architecture("layers", _EXPERTS | _ATTENTION)

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,  # also SmolLM and SmolLM2
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gemma3": Architecture("language_model.layers", _GATED),  # its vision tower has layers too
    "granite": _LLAMA,
    "olmo2": _LLAMA,
    "olmo3": _LLAMA,
    "smollm3": _LLAMA,
    "mixtral": _MIXTURE,
    "olmoe": _MIXTURE,
    "gpt_oss": _MIXTURE,
    "qwen3_moe": Architecture(  # some layers may be dense
        "layers", _GATED | _EXPERTS | {"down": ("mlp.down_proj", "mlp.experts.down_proj")}
    ),
    "qwen2_moe": Architecture(  # the same, and an expert for all tokens
        "layers",
        _GATED
        | _EXPERTS
        | {
            "up": ("mlp.up_proj", "mlp.shared_expert.up_proj"),
            "gate": ("mlp.gate_proj", "mlp.shared_expert.gate_proj"),
            "down": ("mlp.down_proj", "mlp.shared_expert.down_proj", "mlp.experts.down_proj"),
        },
    ),
    "phi3": Architecture(
        "layers",
        {
            "gate_up": "mlp.gate_up_proj",
            "down": "mlp.down_proj",
            "qkv": "self_attn.qkv_proj",
            "o": "self_attn.o_proj",
        },
    ),
    "gpt2": Architecture(
        "h",
        {"up": "mlp.c_fc", "down": "mlp.c_proj", "qkv": "attn.c_attn", "o": "attn.c_proj"},
    ),
    "opt": Architecture(
        "layers",
        {
            "up": "fc1",
            "down": "fc2",
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.out_proj",
        },
    ),
    "gpt_neox": Architecture(  # Pythia
        "layers",
        {
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
            "qkv": "attention.query_key_value",
            "o": "attention.dense",
        },
    ),
}
"""By the ``model_type`` of a transformers config."""

# Projections that write to the residual stream; all others read from it.
_WRITING_ROLES = ("down", "o")
# What holds the neurons of a role where an architecture has fused its projection with others.
_FUSED_ROLES = {"up": "gate_up", "gate": "gate_up", "q": "qkv", "k": "qkv", "v": "qkv"}


def find_projections(
    model: nn.Module | PreTrainedConfig | str | os.PathLike[str],
    modules: Sequence[str] | None = None,
    axes: Mapping[str, Axis] | None = None,
) -> list[Projection]:
    """List the projections of a model that hold neurons.

    Args:
        model: a module (plain or wrapped by PEFT; names are those of the plain model), a transformers
            config, or a checkpoint folder or Hub id, of which only ``config.json`` is read.
        modules: roles (``up``, ``gate``, ``down``, ``q``, ``k``, ``v``, ``o``, ``gate_up``, ``qkv``),
            module names, or shell-style patterns of module names (``*`` goes across dots), each of
            which must find a linear layer. The output head is taken only by its exact name. Where the
            experts of a mixture are stacked in one parameter, each counts as a linear layer, by the
            parameter's name and its number (``*.experts.down_proj.5``); the parameter's name alone means
            all. Default: up and down, as in the paper; where up is fused with gate, both of them.
        axes: the same kinds of names -> axis; the first that matches counts, before the architecture's
            own. A layer that neither knows has its neurons in rows.

    Returns:
        One projection a matrix, by layer, then role.

    Raises:
        ArchitectureError: a name that finds no linear layer, or an architecture that is not in the
            table and so has no roles; the message shows what there is to choose from.
        CheckpointError: ``model`` is no checkpoint with a readable config.
    """
    network = _Network(as_module(model))
    wanted = network.default_modules() if modules is None else modules
    if isinstance(wanted, str) or not wanted:
        raise ArchitectureError(
            f"modules is {wanted!r}; give a list of roles, module names or patterns, "
            f"e.g. {list(DEFAULT_MODULES)}."
        )
    chosen = {name for pattern in wanted for name in network.find(pattern)}
    given_axes: dict[str, Axis] = {}
    for pattern, axis in (axes or {}).items():
        for name in network.find(pattern):
            given_axes.setdefault(name, _as_axis(pattern, axis))
    projections = (network.projection(name, given_axes.get(name)) for name in chosen)
    return sorted(projections, key=lambda projection: projection.order)


def find_candidates(
    model: nn.Module,
    modules: Sequence[str] | None = None,
    axes: Mapping[str, Axis] | None = None,
) -> list[Projection]:
    """List projections whose neurons can be scored, because they can be trained by themselves.

    Args:
        model: this and the others as for ``find_projections``.
        modules: likewise.
        axes: likewise.

    Raises:
        ArchitectureError: as ``find_projections``.
        NeuronError: a weight that is tied to another.
    """
    projections = find_projections(model, modules, axes)
    parameters = as_module(model).named_parameters(remove_duplicate=False)
    check_untied(
        ((name.replace(".base_layer.", "."), tensor) for name, tensor in parameters), projections
    )
    return projections


def check_untied(
    parameters: Iterable[tuple[str, Tensor]], projections: Iterable[Projection]
) -> None:
    """Check that no other module uses the weights of projections.

    Args:
        parameters: all of the model, by the names of the plain model, tied ones under each of theirs.
        projections: whose weights must stand alone.

    Raises:
        NeuronError: one is tied to another.
    """
    users: dict[int, list[str]] = {}
    for name, parameter in parameters:
        users.setdefault(id(parameter), []).append(name)
    tied = {name: names for names in users.values() for name in names if len(names) > 1}
    for projection in projections:
        weight = projection.parameter
        if others := ", ".join(name for name in tied.get(weight, ()) if name != weight):
            raise NeuronError(
                f"{projection.name}: its weight is tied to {others}, which would change with it. Untie "
                "them first (tie_word_embeddings=False), or choose other modules."
            )


def check_plain(model: nn.Module, reason: str) -> None:
    """Check that a model has no adapter.

    Args:
        model: wrapped by PEFT, or, where transformers adds the adapter, in its layers alone.
        reason: a clause for the error, of what the adapter would do.

    Raises:
        AdapterError: it has one.
    """
    if as_module(model) is not model or any(hasattr(m, "base_layer") for m in model.modules()):
        raise AdapterError(
            f"The model has an adapter, {reason}. Merge it first, by model.merge_and_unload(), or give "
            "the base model."
        )


def check_can_be_watched(projections: Iterable[Projection], remedy: str) -> None:
    """Check that each is a module of its own, whose inputs and outputs a hook sees.

    Args:
        projections: to be watched while a model reads texts.
        remedy: a sentence for the error.

    Raises:
        ArchitectureError: the matrix of an expert.
    """
    for projection in projections:
        if projection.expert is not None:
            raise ArchitectureError(
                f"{projection.name}: activations of experts cannot be watched, because the model "
                f"computes those of a layer in one call. {remedy}"
            )


def _as_axis(pattern: str, axis: str) -> Axis:
    try:
        return Axis(axis)
    except ValueError as error:
        raise ArchitectureError(f"axes[{pattern!r}] is {axis!r}; choose row or column.") from error


def as_module(model: nn.Module | PreTrainedConfig | str | os.PathLike[str]) -> nn.Module:
    from torch import nn

    if isinstance(model, nn.Module):
        inner = getattr(model, "get_base_model", None)  # a PEFT wrapper's
        return inner() if callable(inner) else model
    config = _read_config(model) if isinstance(model, str | os.PathLike) else model
    return _without_weights(config)


def _read_config(source: str | os.PathLike[str]) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        # None, the default, would ask on the terminal.
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        fault = "config.json" if Path(source).is_dir() else "not a folder, and as a Hub model"
        raise CheckpointError(f"{source}: {fault} cannot be used: {_first_line(error)}") from error


def _without_weights(config: PreTrainedConfig) -> nn.Module:
    """The causal language model of ``config`` on the meta device: real names and shapes, no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            # from_config writes into the config that it is given. Which attention kernel it asks for
            # does not matter here, and the kernel need not be installed.
            model: nn.Module = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation="eager", trust_remote_code=False
            )
            return model
    except ValueError as error:
        raise ArchitectureError(
            f"{type(config).__name__} (model_type {config.model_type!r}) describes no causal language "
            f"model that transformers can build: {_first_line(error)} Load the model yourself, and "
            "give the module."
        ) from error


@dataclass(frozen=True)
class _Linear:
    """Shape of a linear layer, which may be one of a stack of experts."""

    num_inputs: int
    num_outputs: int
    transposed: bool = False
    expert: int | None = None
    interleaved: bool = False


def is_stack_of_experts(module: nn.Module) -> bool:
    """Whether a module holds all experts of a layer as transformers stacks them.

    It has parameters of three dimensions, and marks that tell how each expert's matrices lie in them.
    """
    return (
        all(isinstance(getattr(module, mark, None), bool) for mark in _MARKS_OF_EXPERTS)
        and next(_stacked(module), None) is not None
    )


# transformers' use_experts_implementation sets these.
_MARKS_OF_EXPERTS = ("is_transposed", "is_concatenated", "has_bias", "has_gate")


def _stacked(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a module that stack the matrices of experts."""
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        parameter = module._parameters.get(name)
        if parameter is not None and parameter.dim() == 3 and parameter.is_floating_point():
            yield name, parameter


def _experts(module: Any, name: str) -> Iterator[tuple[str, _Linear]]:
    """The matrices of all experts of a module, by the name of their parameter and their number."""
    for attribute, parameter in _stacked(module):
        num_experts, *shape = parameter.shape
        num_inputs, num_outputs = shape if module.is_transposed else reversed(shape)
        interleaved = attribute == "gate_up_proj" and not module.is_concatenated
        for expert in range(num_experts):
            linear = _Linear(num_inputs, num_outputs, module.is_transposed, expert, interleaved)
            yield f"{name}.{attribute}.{expert}", linear


def _as_linear(module: nn.Module) -> _Linear | None:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return _Linear(module.nx, module.nf, transposed=True)
    # Not all quantized layers derive from nn.Linear, but all carry its two sizes; blocks that carry
    # them too have layers inside.
    num_inputs = getattr(module, "in_features", None)
    num_outputs = getattr(module, "out_features", None)
    if not (isinstance(num_inputs, int) and isinstance(num_outputs, int)):
        return None
    if not isinstance(module, nn.Linear) and any(True for _ in module.children()):
        return None
    return _Linear(num_inputs, num_outputs)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The layer of the plain model under PEFT's wrappers."""
    from torch import nn

    for attribute in ("base_layer", "original_module"):
        inner = getattr(module, attribute, None)
        if isinstance(inner, nn.Module):
            return _unwrapped(inner)
    return module


def _walk(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """``module.named_modules()`` as of the plain model; linear layers are leaves."""
    module = _unwrapped(module)
    if module in seen:
        return
    seen.add(module)
    yield name, module
    if _as_linear(module) is None:
        for child_name, child in module.named_children():
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen)


class _Network:
    """A model's modules by name, and what the architecture table knows about them."""

    def __init__(self, model: nn.Module) -> None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        self.title = type(model).__name__ + (f" (model_type {model_type!r})" if model_type else "")
        self.architecture = ARCHITECTURES.get(str(model_type))
        # Of the residual stream.
        self.width = getattr(input_embeddings(model), "embedding_dim", None)
        self.modules = dict(_walk(model, "", set()))
        self.linear = {
            name: linear
            for name, module in self.modules.items()
            if (linear := _as_linear(module)) is not None
        }
        self.experts = {
            expert_name: linear
            for name, module in self.modules.items()
            if is_stack_of_experts(module)
            for expert_name, linear in _experts(module, name)
        }
        self.linear |= self.experts
        self.known = {
            name: place for name in self.linear if (place := self._place(name)) is not None
        }
        head = _output_head(model)
        self.heads = {
            name
            for name in self.linear
            if name.rpartition(".")[2] == "lm_head"
            or (head is not None and self.modules.get(name) is head)
        }

    def _place(self, name: str) -> tuple[int, str] | None:
        """(layer, role) of a linear layer that the architecture table knows."""
        if self.architecture is not None:
            path = _stack_of(name) if name in self.experts else name
            if found := re.fullmatch(
                rf"(?:.*\.)?{re.escape(self.architecture.layers)}\.(\d+)\.(.+)", path
            ):
                layer, inside = found.groups()
                for role in self.architecture.roles:
                    if inside in self._paths(role):
                        return int(layer), role
        return None

    def _paths(self, role: str) -> tuple[str, ...]:
        """Where in a layer the architecture keeps a role."""
        assert self.architecture is not None
        paths = self.architecture.roles[role]
        return (paths,) if isinstance(paths, str) else paths

    def default_modules(self) -> tuple[str, ...]:
        """``DEFAULT_MODULES``, or what they are fused into; both where layers differ in that."""
        present = {role for _, role in self.known.values()}
        chosen: list[str] = []
        for default in DEFAULT_MODULES:
            places = (default, _FUSED_ROLES.get(default, default))
            chosen += [role for role in dict.fromkeys(places) if role in present] or [default]
        return tuple(chosen)

    def projection(self, name: str, axis: Axis | None) -> Projection:
        """Describe linear layer ``name``; ``axis`` goes before the table's."""
        linear = self.linear[name]
        path = name if linear.expert is None else _stack_of(name)
        layer, role = self.known.get(name) or (_first_number(name), path.rpartition(".")[2])
        if axis is None:
            writes = name in self.known and role in _WRITING_ROLES
            axis = Axis.COLUMN if writes else Axis.ROW
        by_row = axis is Axis.ROW
        return Projection(
            name=name,
            layer=layer,
            role=role,
            axis=axis,
            num_neurons=linear.num_outputs if by_row else linear.num_inputs,
            vector_length=linear.num_inputs if by_row else linear.num_outputs,
            transposed=linear.transposed,
            expert=linear.expert,
            interleaved=linear.interleaved,
        )

    def find(self, wanted: str) -> list[str]:
        """Names of the linear layers that a role, module name or pattern means; at least one."""
        if wanted in self.linear:
            return [wanted]
        if wanted in ROLE_ORDER:
            found = [name for name, (_, role) in self.known.items() if role == wanted]
            if not found:
                raise ArchitectureError(self._no_role(wanted))
            return found
        matching = [name for name in self.modules if fnmatch.fnmatchcase(name, wanted)]
        matching += [
            name
            for name in self.experts
            if fnmatch.fnmatchcase(name, wanted) or fnmatch.fnmatchcase(_stack_of(name), wanted)
        ]
        found = [name for name in matching if name in self.linear and name not in self.heads]
        if not found:
            raise ArchitectureError(self._no_linear_layer(wanted, matching))
        return found

    def _no_role(self, role: str) -> str:
        if self.architecture is None:
            return (
                f"{self.title}: this architecture is not in the table, so the role {role!r} has no "
                f"meaning here.{self._candidates()}"
            )
        roles = self.architecture.roles
        if role in _FUSED_ROLES and _FUSED_ROLES[role] in roles:
            fused = _FUSED_ROLES[role]
            return (
                f"{self.title}: {role!r} is fused into {self._paths(fused)[0]!r} here; "
                f"use the role {fused!r}, which takes the whole of it."
            )
        return f"{self.title}: has no projection {role!r}. Roles here: {', '.join(roles)}."

    def _no_linear_layer(self, wanted: str, matching: Sequence[str]) -> str:
        if heads := [name for name in matching if name in self.heads]:
            return (
                f"{self.title}: {wanted!r} matches only the output head, whose weight may be the "
                f"embedding's too; to take it all the same, give its exact name, {heads[0]!r}."
            )
        fault = f"{self.title}: {wanted!r} matches no module."
        if matching:
            kind = type(self.modules[matching[0]]).__name__
            fault = (
                f"{self.title}: {wanted!r} matches no linear layer, but {kind} {matching[0]!r}; "
                "neurons are rows or columns of linear layers."
            )
        near = ", ".join(self._near(wanted))
        return f"{fault} Near it: {near}." if near else fault + self._candidates()

    def _near(self, wanted: str) -> list[str]:
        """Roles and patterns of linear layers with a last part like that of ``wanted``, best first."""
        roles = () if self.architecture is None else self.architecture.roles
        by_tail: dict[str, list[str]] = {}
        for choice in (*roles, *self._groups()):
            by_tail.setdefault(choice.rpartition(".")[2], []).append(choice)
        tail = wanted.rpartition(".")[2]
        close = [tail] if tail in by_tail else difflib.get_close_matches(tail, by_tail, cutoff=0.7)
        return [choice for like in close for choice in by_tail[like]]

    def _groups(self) -> dict[str, list[str]]:
        """Names of linear layers by the pattern that has ``*`` for their numbers."""
        groups: dict[str, list[str]] = {}
        for name in self.linear:
            groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
        return groups

    def _candidates(self) -> str:
        groups = self._groups()
        if not groups:
            return " It has no linear layers."
        reads, writes = self._examples(groups)
        roles = f" Roles here: {', '.join(self.architecture.roles)}." if self.architecture else ""
        lines = (f"  {pattern}  {self._shapes(names)}" for pattern, names in groups.items())
        return (
            f"{roles} Name linear layers, e.g. modules={[reads, writes]}, and in axes those of them that "
            f"write to the residual stream, e.g. axes={{{writes!r}: 'column'}}; the others have their "
            "neurons in rows. Here are (outputs x inputs, how many):\n" + "\n".join(lines)
        )

    def _examples(self, groups: Mapping[str, Sequence[str]]) -> tuple[str, str]:
        """Patterns that probably read from the residual stream and write to it: the widest that fit."""
        body = [p for p, names in groups.items() if self.heads.isdisjoint(names)] or [*groups]
        outputs = {pattern: self.linear[groups[pattern][0]].num_outputs for pattern in body}
        inputs = {pattern: self.linear[groups[pattern][0]].num_inputs for pattern in body}
        # Keys and values of grouped queries narrow too, yet they read: so the width decides, if known.
        width = self.width
        readers = [p for p in body if inputs[p] == (width or inputs[p]) < outputs[p]]
        writers = [p for p in body if outputs[p] == (width or outputs[p]) < inputs[p]]
        reads = max(readers or body, key=outputs.__getitem__)
        writes = max(writers or body[::-1], key=inputs.__getitem__)
        return reads, writes

    def _shapes(self, names: Sequence[str]) -> str:
        linear = [self.linear[name] for name in names]
        shapes = sorted({(layer.num_outputs, layer.num_inputs) for layer in linear})
        return f"{', '.join(f'{outputs} x {inputs}' for outputs, inputs in shapes)} ({len(names)})"


def _output_head(model: Any) -> nn.Module | None:
    """The layer that makes logits, where the model is one of transformers' and has one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return None if head is None else _unwrapped(head)


def input_embeddings(model: Any) -> nn.Module | None:
    """The layer that reads tokens, where the model is one of transformers' and has one."""
    try:
        found: nn.Module | None = model.get_input_embeddings()
    # No model of transformers; one that does not tell.
    except (AttributeError, NotImplementedError):
        return None
    return found


def _stack_of(expert: str) -> str:
    """The name of the parameter that the matrix of an expert is in."""
    return expert.rpartition(".")[0]


def _first_number(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
