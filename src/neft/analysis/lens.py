"""Logit lens of out neurons: the tokens that a neuron's vector speaks for and against (beyond the paper).

What a unit writes to the residual stream, its activation times its out neuron, reaches the logits along
two ways: through later layers, and directly, through the final norm and the unembedding. The lens looks
at the direct way alone. There, but for a positive factor that the norm gives all tokens alike, the vector
raises some logits and lowers others; where the activation is negative, the two change places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from neft.analysis.decoding import Decoder
from neft.analysis.table import Table
from neft.checkpoints import WeightSource
from neft.errors import ArchitectureError, CheckpointError, NeuronError
from neft.neurons import NeuronSet, Projection
from neft.projections import as_module, find_projections
from neft.scoring.weights import check_weights, read_weight

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# Logits that are held at once.
_BLOCK = 2**24


@dataclass(frozen=True)
class Norms:
    """The norms between a down projection and the logits, as far as their gain goes."""

    final: str
    """Its name beside the stack of layers."""
    after_ffn: str | None = None
    """Name in a layer of the norm of what the feed-forward network adds to the residual stream."""
    offset: float = 0.0
    """The gain is this plus the norm's weight."""
    centred: bool = False
    """The final norm takes the mean off the hidden state (LayerNorm; RMSNorm does not)."""


_RMS = Norms("norm")
_OLMO = Norms("norm", after_ffn="post_feedforward_layernorm")
_GEMMA = Norms("norm", after_ffn="post_feedforward_layernorm", offset=1.0)

NORMS: Mapping[str, Norms] = {
    "llama": _RMS,
    "mistral": _RMS,
    "qwen2": _RMS,
    "qwen3": _RMS,
    "smollm3": _RMS,
    "phi3": _RMS,
    "mixtral": _RMS,
    "olmoe": _RMS,
    "gpt_oss": _RMS,
    "qwen3_moe": _RMS,
    "qwen2_moe": _RMS,
    "gemma": Norms("norm", offset=1.0),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3": _GEMMA,
    "granite": _RMS,
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "gpt2": Norms("ln_f", centred=True),
    "opt": Norms("final_layer_norm", centred=True),
    "gpt_neox": Norms("final_layer_norm", centred=True),
}
"""By the ``model_type`` of a transformers config, as ``neft.projections.ARCHITECTURES``."""


@dataclass(frozen=True)
class LensTokens:
    """Token ids ``[neurons, k]``, strongest first, of the chosen neurons of one projection."""

    promoted: Tensor
    suppressed: Tensor


def lens_tokens(
    source: WeightSource,
    neurons: NeuronSet,
    *,
    k: int,
    num_tokens: int,
    network: nn.Module | None = None,
    progress: bool = True,
) -> dict[str, LensTokens]:
    """The ``k`` tokens whose logits each out neuron raises most, and those that it lowers most.

    The logits are ``U (g * w)``, with U the unembedding, w the neuron's vector and g the gain of the
    final norm (and, in models that norm what a feed-forward network adds, of that norm too); a LayerNorm
    first takes the mean off w. Computed in float32, a block of neurons at a time; in memory are the
    unembedding and one down projection.

    Args:
        source: the model's weights.
        neurons: those of down projections count, the others have no lens.
        k: tokens on either side.
        num_tokens: of the vocabulary, which may be less than the unembedding has rows.
        network: the model's modules, where ``source`` has no configuration; default: ``source.network``.
        progress: whether to show a progress bar on stderr, if that is a terminal.

    Returns:
        Module name -> the tokens of its chosen neurons, in the order of their indices.

    Raises:
        ArchitectureError: a model without a row in ``NORMS``, or without that norm or an unembedding.
        NeuronError: neurons of another model, or none in a down projection.
        CheckpointError: weights that are missing, of another shape, quantized or not finite.
    """
    path = _Path.find(source.network if network is None else network)
    chosen = _out_neurons(neurons, path.downs)
    check_weights(source, chosen)
    # The final gain belongs to every neuron, so it goes into the unembedding once.
    unembedding = path.unembedding(source, chosen[0].vector_length, num_tokens)
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    found = {}
    for projection in track(chosen, "Lens", console=console, transient=True, disable=hidden):
        indices = torch.from_numpy(neurons[projection.name])
        vectors = read_weight(source, projection).index_select(projection.neuron_dim, indices)
        vectors = (vectors if projection.neuron_dim == 0 else vectors.T).float()
        found[projection.name] = _extremes(
            path.normed(source, projection, vectors),
            unembedding,
            k,
            f"{source.label}: {source.matrix(projection).name}",
        )
    return found


def lens(
    before: WeightSource,
    after: WeightSource,
    neurons: NeuronSet,
    tokenizer: PreTrainedTokenizerBase,
    *,
    k: int = 10,
    progress: bool = True,
) -> Table:
    """The logit lens of out neurons before and after fine-tuning, one row a neuron, by layer.

    Args:
        before: the base model.
        after: the same model, trained, adapter merged; it needs no configuration.
        neurons: those of down projections count, the others have no lens.
        tokenizer: of the models.
        k: tokens on either side.
        progress: whether to show a progress bar on stderr, if that is a terminal.

    Returns:
        ``layer``, ``index``, ``promoted_before``, ``suppressed_before``, ``promoted_after``,
        ``suppressed_after``: lists of token strings as they stand in a text, strongest first; and
        ``expert``, where there are any.

    Raises:
        ArchitectureError, NeuronError, CheckpointError: as ``lens_tokens``.
    """
    columns: dict[str, list[object]] = {"layer": [], "expert": [], "index": []}
    for name, indices in neurons.items():
        projection = neurons.projections[name]
        if projection.role == "down":
            columns["layer"] += [projection.layer] * len(indices)
            columns["expert"] += [projection.expert] * len(indices)
            columns["index"] += indices.tolist()
    if not any(expert is not None for expert in columns["expert"]):
        del columns["expert"]
    string = cache(Decoder(tokenizer).token)
    for side, source in {"before": before, "after": after}.items():
        found = lens_tokens(
            source,
            neurons,
            k=k,
            num_tokens=len(tokenizer),
            network=before.network,
            progress=progress,
        ).values()
        columns[f"promoted_{side}"] = [
            list(map(string, row)) for tokens in found for row in tokens.promoted.tolist()
        ]
        columns[f"suppressed_{side}"] = [
            list(map(string, row)) for tokens in found for row in tokens.suppressed.tolist()
        ]
    return Table(columns, {"before": before.label, "after": after.label, "k": k})


@dataclass(frozen=True)
class _Path:
    """From out neurons to logits: names of modules."""

    downs: Mapping[str, Projection]
    stack: str
    norms: Norms
    final: str
    head: str

    @classmethod
    def find(cls, model: nn.Module) -> _Path:
        network: Any = as_module(model)
        config = getattr(network, "config", None)
        model_type = str(getattr(config, "model_type", None))
        if model_type not in NORMS:
            raise ArchitectureError(
                f"{type(network).__name__} (model_type {model_type!r}): the logit lens does not know its "
                f"final norm. It knows those of {', '.join(NORMS)}."
            )
        downs = {projection.name: projection for projection in find_projections(network, ["down"])}
        name, first = next(iter(downs.items()))
        stack = name.partition(f".{first.layer}.")[0]
        norms = NORMS[model_type]
        around = stack.rpartition(".")[0]
        final = f"{around}.{norms.final}" if around else norms.final
        names = {module: name for name, module in network.named_modules()}
        if final not in names.values():
            raise ArchitectureError(
                f"{type(network).__name__} (model_type {model_type!r}): has no final norm {final}, which "
                "the logit lens looks through."
            )
        head = (
            network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
        )
        if head is None:
            raise ArchitectureError(
                f"{type(network).__name__}: has no unembedding, so no token can be read off its neurons. "
                "Give the model with its language modelling head."
            )
        embeddings = network.get_input_embeddings()
        # Files hold weights that are tied once, as those of the embedding.
        tied = embeddings is not None and embeddings.weight is head.weight
        return cls(downs, stack, norms, final, names[embeddings if tied else head])

    def unembedding(self, source: WeightSource, width: int, num_tokens: int) -> Tensor:
        """``[tokens, width]``, each row times the gain of the final norm, centred where it centres."""
        name = source.weight_name(self.head)
        rows = source.read(name)[:num_tokens]
        if rows.shape[1] != width:
            raise ArchitectureError(
                f"{source.label}: {name} reads vectors of length {rows.shape[1]}, and neurons have "
                f"length {width}: a projection lies between, which the logit lens does not know."
            )
        scaled = rows.float() * self._gain(source, self.final)
        if self.norms.centred:
            # To take the mean off a vector, or off all that it is multiplied by, is the same.
            scaled -= scaled.mean(1, keepdim=True)
        if not scaled.isfinite().all():
            raise _not_finite(_at(source, self.head))
        return scaled

    def normed(self, source: WeightSource, projection: Projection, vectors: Tensor) -> Tensor:
        """``vectors`` as the layer adds them to the residual stream, but for a factor."""
        if self.norms.after_ffn is None:
            return vectors
        norm = f"{self.stack}.{projection.layer}.{self.norms.after_ffn}"
        return vectors * self._gain(source, norm)

    def _gain(self, source: WeightSource, norm: str) -> Tensor:
        return source.read(source.weight_name(norm)).float() + self.norms.offset


def _out_neurons(neurons: NeuronSet, downs: Mapping[str, Projection]) -> list[Projection]:
    """The down projections that have a chosen neuron, by layer."""
    chosen = [
        neurons.projections[name]
        for name in neurons.modules()
        if neurons.projections[name].role == "down"
    ]
    if not chosen:
        raise NeuronError(
            f"None of {len(neurons)} neurons is in a down projection, and only what those write can be "
            "read as tokens."
        )
    for projection in chosen:
        if downs.get(projection.name) != projection:
            raise NeuronError(
                f"{projection.name}: with {projection.num_neurons} neurons of length "
                f"{projection.vector_length}, it is not of this model. Give neurons that were chosen in "
                "it."
            )
    return chosen


def _extremes(vectors: Tensor, unembedding: Tensor, k: int, place: str) -> LensTokens:
    k = min(k, len(unembedding))
    sides = [
        (logits.topk(k).indices, logits.topk(k, largest=False).indices)
        for logits in _logits(vectors, unembedding, place)
    ]
    promoted, suppressed = (torch.cat(parts) for parts in zip(*sides, strict=True))
    return LensTokens(promoted, suppressed)


def _logits(vectors: Tensor, unembedding: Tensor, place: str) -> Iterator[Tensor]:
    """``[neurons, tokens]``, some neurons at a time."""
    for block in vectors.split(max(1, _BLOCK // len(unembedding))):
        logits = block @ unembedding.T
        if not logits.isfinite().all():
            raise _not_finite(place)
        yield logits


def _at(source: WeightSource, module: str) -> str:
    return f"{source.label}: {source.weight_name(module)}"


def _not_finite(place: str) -> CheckpointError:
    return CheckpointError(
        f"{place}: a weight is not finite, or too large. The training run that wrote it broke down; "
        "give an earlier checkpoint."
    )
