"""The memory of a training step, part by part, from shapes alone: no weights are read.

Shape suffixes in comments: ``T`` tokens of the batch, padding included, ``H`` hidden size, ``I`` width of
the feed-forward layer, ``Q`` and ``K`` width of all query and all key heads, ``N`` query heads, ``S``
length of the batch, ``V`` vocabulary, ``n`` scored positions. Sizes are in bytes.

What a layer keeps for the backward pass was counted, tensor by tensor, in a Llama of transformers 5 with
torch's scaled dot-product attention; other families differ in a norm or a bias. See docs/estimate.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from neft.neurons import Axis, NeuronSet, Projection
from neft.projections import find_projections
from neft.recipe import LoraSection, Quantization, TrainingSection
from neft.sft.counting import num_linear
from neft.sft.methods import find_method, lora_projections

if TYPE_CHECKING:
    from torch import nn

TensorShape: TypeAlias = tuple[int, ...]
DType: TypeAlias = Literal["float32", "bfloat16", "float16"]

WIDTHS: dict[DType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a scalar."""
# With its scales: a byte for 64 weights in 4 bits, themselves scaled by four for 256.
_QUANTIZED_BYTES: dict[Quantization, float] = {"4bit": 0.5 + (1 + 4 / 256) / 64, "8bit": 1.0}

_FLOAT32 = 4
# Measured (docs/estimate.md): of what comes and goes in a step, the C library gives little back to the
# system, and holes are filled only by what fits: a CPU process grows beyond its need.
# LoRA throws away three products between any two that it keeps.
_KEPT_BACK = {"neft": 0.3, "lora": 0.7}
_KEPT_BACK_ELSE = 0.4
# oneDNN's code comes to lie among what was free, and a training that follows another takes more anew.
_KEPT_BACK_BY_ONEDNN = _KEPT_BACK | {"neft": 0.65}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that its memory depends on."""

    hidden: int
    intermediate: int
    """Width of the feed-forward layer."""
    queries: int
    """Width of all query heads together; of all key heads, ``keys``."""
    keys: int
    num_heads: int
    """0 where the configuration names none: what such layers keep cannot be estimated."""
    num_layers: int
    vocabulary: int
    is_gated: bool
    """Whether the feed-forward layer multiplies two projections."""
    is_tied: bool
    """Whether the LM head is the embedding."""
    num_parameters: int
    num_linear: int
    """Parameters of all linear layers but the LM head."""
    largest: int
    """Scalars of the largest weight."""
    largest_linear: int
    """Of the largest among these layers."""

    @classmethod
    def of(cls, network: nn.Module) -> Shape:
        """The sizes of a causal language model of transformers; its weights may be on the meta device.

        Raises:
            ArchitectureError: a network without linear layers.
        """
        config: Any = network.config.get_text_config()  # type: ignore[operator, union-attr]
        projections = find_projections(network, ["*"])
        num_heads = getattr(config, "num_attention_heads", 0)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(1, num_heads)
        key_heads = getattr(config, "num_key_value_heads", None) or num_heads
        return cls(
            hidden=config.hidden_size,
            intermediate=max(map(_num_inputs, projections)),
            queries=num_heads * head_dim,
            keys=key_heads * head_dim,
            num_heads=num_heads,
            num_layers=config.num_hidden_layers,
            vocabulary=config.vocab_size,
            is_gated=any("gate" in projection.role for projection in projections),
            is_tied=bool(config.tie_word_embeddings),
            num_parameters=sum(parameter.numel() for parameter in network.parameters()),
            num_linear=num_linear(network),
            largest=max(parameter.numel() for parameter in network.parameters()),
            largest_linear=max(p.num_neurons * p.vector_length for p in projections),
        )


def _num_inputs(projection: Projection) -> int:
    return projection.vector_length if projection.axis is Axis.ROW else projection.num_neurons


@dataclass(frozen=True)
class Batch:
    """The batch of a step that takes most memory."""

    num_texts: int
    length: int
    """Of the longest text, in tokens; the others are padded to it."""
    num_targets: int
    """Tokens whose loss counts; nothing else is projected to the vocabulary."""
    is_padded: bool = True
    """Whether texts differ in length; a mask then goes with each layer."""

    @property
    def num_tokens(self) -> int:
        """Padding included."""
        return self.num_texts * self.length


@dataclass(frozen=True)
class Trained:
    """What is trained, and how."""

    method: str
    dtype: DType
    """``model.dtype`` of the recipe."""
    options: TrainingSection
    tensors: Sequence[TensorShape]
    """Shapes of all tensors that get a gradient."""
    neurons: NeuronSet | None = None
    """For ``neft`` and ``mask``."""
    lora: LoraSection | None = None
    """For ``lora``, with ``rank`` resolved."""
    attention: str | None = None
    """``model.attn_implementation`` of the recipe."""
    quantization: Quantization | None = None
    """``model.quantization`` of the recipe."""

    @property
    def width(self) -> int:
        """Bytes of a scalar in ``dtype``."""
        return WIDTHS[self.dtype]

    @property
    def makes_adapter(self) -> bool:
        """Whether weights are frozen; otherwise they are float32 masters."""
        return find_method(self.method).makes_adapter

    @property
    def trains_norms(self) -> bool:
        """Whether the gradient of every weight is computed."""
        return self.method in ("full", "mask")

    @property
    def num_scalars(self) -> int:
        """Scalars that get a gradient."""
        return sum(map(math.prod, self.tensors))

    @property
    def num_trainable(self) -> int:
        """Scalars that change; under a mask, fewer than get a gradient."""
        return self.num_scalars if self.neurons is None else self.neurons.num_parameters

    @property
    def optimizer_states(self) -> int:
        """Bytes; AdamW: two moments a scalar; Adafactor: a number a row and column of each tensor."""
        if self.options.optimizer == "adamw":
            return 2 * _FLOAT32 * self.num_scalars
        return _FLOAT32 * sum(map(_factored, self.tensors))


@dataclass(frozen=True)
class Footprint:
    """Memory of the step of a training run that takes most, in bytes."""

    weights: int
    """Of the base model; with copies in 16 bits, masks, and a dequantized one, where there are any."""
    vectors: int
    """Tensors trained beside the weights, and originals that they displaced there."""
    gradients: int
    """As far as they exist at one time."""
    optimizer: int
    """States that it keeps, and what it needs to update the largest tensor."""
    activations: int
    """What the layers keep for the backward pass."""
    loss: int
    """Logits of the target positions, and what is made of them."""
    kept_back: int
    """Memory that was freed and not given back to the system; on the CPU alone."""
    peak: int
    """The sum at the worst moment. Gradients come as activations go, so it is less than all parts."""


def trained_tensors(
    network: nn.Module, method: str, neurons: NeuronSet | None, lora: LoraSection | None
) -> list[TensorShape]:
    """Shapes of the tensors that get a gradient.

    Args:
        network: the base model; its parameters may be on the meta device.
        method: a key of ``neft.sft.methods.METHODS``.
        neurons: for ``neft``.
        lora: for ``lora``, with ``rank`` resolved.

    Raises:
        UsageError: a model that cannot be trained by this method.
        ArchitectureError: a model whose projections cannot be found.
    """
    found = find_method(method)
    if found.weights is not None:
        return [tuple(weight.shape) for weight in found.weights(network)]
    if method == "mask":
        return [tuple(weight.shape) for weight in network.parameters()]
    if lora is not None:
        assert lora.rank is not None
        return [
            shape
            for projection in lora_projections(network)
            for shape in (
                (lora.rank, projection.num_neurons),
                (lora.rank, projection.vector_length),
            )
        ]
    assert neurons is not None
    projections = neurons.projections
    return [(len(neurons[name]), projections[name].vector_length) for name in neurons.modules()]


def held_bytes(shape: Shape, trained: Trained) -> int:
    """What training holds from step to step: weights, vectors, gradients and optimizer states."""
    return (
        _weights(shape, trained)
        + vectors_bytes(trained)
        + _gradients(shape, trained)
        + trained.optimizer_states
    )


def footprint(shape: Shape, trained: Trained, batch: Batch, *, on_cpu: bool) -> Footprint:
    """Estimate the memory of the worst step of a training run.

    Args:
        shape: of the model.
        trained: what is trained, and how.
        batch: the largest.
        on_cpu: whether memory is that of a process, and not of an accelerator.
    """
    from neft.products import onednn_is_faster

    weights = _weights(shape, trained) + _dequantized(shape, trained.dtype, trained.quantization)
    vectors = vectors_bytes(trained)
    gradients, optimizer = _gradients(shape, trained), _optimizer(trained)
    kept = activations(shape, trained, batch)
    loss = loss_bytes(shape, batch)
    # Backward begins with all activations and the loss; a trained head's gradient follows at once. It
    # ends with all gradients; that of a tied embedding meets the head's, a masked one its product.
    head = _FLOAT32 * shape.vocabulary * shape.hidden if _trains_head(shape, trained) else 0
    twice = max(head if shape.is_tied else 0, _FLOAT32 * shape.largest * (trained.method == "mask"))
    worst = max(kept + loss, kept + loss // 3 + head, gradients + twice)
    by_onednn = trained.dtype == "float32" and onednn_is_faster()
    shares = _KEPT_BACK_BY_ONEDNN if by_onednn else _KEPT_BACK
    share = shares.get(trained.method, _KEPT_BACK_ELSE) if on_cpu else 0.0
    kept_back = round(share * (kept + loss + gradients))
    return Footprint(
        weights=weights,
        vectors=vectors,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept,
        loss=loss,
        kept_back=kept_back,
        peak=weights + vectors + optimizer + worst + kept_back,
    )


def _weights(shape: Shape, trained: Trained) -> int:
    """Frozen; or float32 masters with copies for products in 16 bits, and a byte a weight for a mask."""
    if trained.makes_adapter:
        return _frozen(shape, trained.dtype, trained.quantization)
    copies = 0 if trained.width == _FLOAT32 else trained.width * shape.num_parameters
    mask = shape.num_parameters if trained.method == "mask" else 0
    return _FLOAT32 * shape.num_parameters + copies + mask


def frozen_weights(shape: Shape, dtype: DType, quantization: Quantization | None) -> int:
    """Bytes of weights that nothing trains; of quantized ones, one is dequantized at a time."""
    return _frozen(shape, dtype, quantization) + _dequantized(shape, dtype, quantization)


def _frozen(shape: Shape, dtype: DType, quantization: Quantization | None) -> int:
    width, num_plain = WIDTHS[dtype], shape.num_parameters - shape.num_linear
    in_linear = width if quantization is None else _QUANTIZED_BYTES[quantization]
    return round(width * num_plain + in_linear * shape.num_linear)


def _dequantized(shape: Shape, dtype: DType, quantization: Quantization | None) -> int:
    return 0 if quantization is None else WIDTHS[dtype] * shape.largest_linear


def vectors_bytes(trained: Trained) -> int:
    """Tensors of the adapter in float32; for NeFT, the originals too, in the dtype of the weight.

    A quantized weight is not written to, so none are displaced there.
    """
    if not trained.makes_adapter:
        return 0
    is_displaced = trained.method == "neft" and trained.quantization is None
    displaced = trained.width if is_displaced else 0
    return (_FLOAT32 + displaced) * trained.num_scalars


def _gradients(shape: Shape, trained: Trained) -> int:
    """In float32; freed in the backward pass, hardly two exist at a time."""
    if not trained.options.in_backward:
        return _FLOAT32 * trained.num_scalars
    largest = sorted((math.prod(tensor) for tensor in trained.tensors), reverse=True)[:2]
    # A tied embedding's waits for its second half while the layers between come and go.
    return _FLOAT32 * (sum(largest) if _trains_head(shape, trained) else largest[0])


def _optimizer(trained: Trained) -> int:
    """Its states; Adafactor's update of a tensor takes two copies of it besides."""
    largest = max(map(math.prod, trained.tensors))
    copies = 0 if trained.options.optimizer == "adamw" else 2 * _FLOAT32 * largest
    return trained.optimizer_states + copies


def _factored(tensor: TensorShape) -> int:
    """Numbers that Adafactor keeps for a tensor: its rows' and columns' means, or all of a vector."""
    if len(tensor) < 2:
        return math.prod(tensor)
    return math.prod(tensor[:-1]) + math.prod(tensor[:-2]) * tensor[-1]


def _trains_head(shape: Shape, trained: Trained) -> bool:
    return trained.trains_norms or (trained.method == "embed" and shape.is_tied)


def loss_bytes(shape: Shape, batch: Batch) -> int:
    """Log-probabilities, their gradient and that of the logits: three times ``[n, V]`` in float32."""
    return 3 * _FLOAT32 * batch.num_targets * shape.vocabulary


# --- activations ----------------------------------------------------------------------------------


def activations(shape: Shape, trained: Trained, batch: Batch) -> int:
    """What the layers keep for the backward pass, the largest amount of it at one time."""
    layer = _layer(shape, trained, batch)
    final_norm = (1 + trained.trains_norms) * _FLOAT32 * batch.num_tokens * shape.hidden
    head = trained.width * batch.num_targets * shape.hidden if _trains_head(shape, trained) else 0
    if trained.options.gradient_checkpointing:
        # Only the layers' inputs are kept; one layer at a time is computed again.
        inputs = trained.width * batch.num_tokens * shape.hidden
        return shape.num_layers * inputs + layer + final_norm + head
    first = layer if _reaches_embedding(trained) else _first_layer(shape, trained, batch)
    return (shape.num_layers - 1) * layer + first + final_norm + head


def _reaches_embedding(trained: Trained) -> bool:
    return trained.trains_norms or trained.method == "embed"


def _layer(shape: Shape, trained: Trained, batch: Batch) -> int:
    """All that a layer keeps whose input has a gradient."""
    per_token = (
        _norms(shape, trained) + _linear_inputs(shape, trained) + _feed_forward(shape, trained)
    )
    return batch.num_tokens * per_token + _attention(shape, trained, batch)


def _first_layer(shape: Shape, trained: Trained, batch: Batch) -> int:
    """The same of the layer below which nothing is trained, for methods that do not train embeddings."""
    if not _only_in_out(trained):
        return _layer(shape, trained, batch) - _FLOAT32 * batch.num_tokens * shape.hidden
    # The gradient goes no further than the inputs of the feed-forward layer.
    factor = trained.width * shape.intermediate if shape.is_gated else 0
    per_token = _linear_inputs(shape, trained) + factor
    return batch.num_tokens * per_token


def _only_in_out(trained: Trained) -> bool:
    """Whether nothing is trained but up and down projections, or neurons of them."""
    neurons = trained.neurons
    if neurons is None:
        return trained.method == "in_out"
    return all(neurons.projections[name].role in ("up", "down") for name in neurons.modules())


def _norms(shape: Shape, trained: Trained) -> int:
    """Bytes a token: the inputs of both norms in float32; trained ones keep what they scale besides."""
    return 2 * (1 + trained.trains_norms) * _FLOAT32 * shape.hidden


def _feed_forward(shape: Shape, trained: Trained) -> int:
    """Bytes a token: inputs of the activation function, and of the product where there is one."""
    return trained.width * shape.intermediate * (3 if shape.is_gated else 1)


def _attention(shape: Shape, trained: Trained, batch: Batch) -> int:
    """Rotated queries, keys, values, their result; a log-sum a head and position; the mask as numbers.

    With a mask, keys and values are repeated for all the heads that share them. The eager kind keeps
    probabilities ``[N, S]`` a token instead, and the result only where the next layer's weight needs it.
    """
    is_eager = trained.attention == "eager"
    keys = shape.queries if batch.is_padded or is_eager else shape.keys
    result = 0 if is_eager and not _needs_result(trained) else shape.queries
    kept = batch.num_tokens * trained.width * (shape.queries + 2 * keys + result)
    positions = batch.num_tokens * shape.num_heads
    if is_eager:
        copy = 0 if trained.width == _FLOAT32 else trained.width
        return kept + positions * batch.length * (_FLOAT32 + copy)
    mask = batch.num_tokens * batch.length * trained.width if batch.is_padded else 0
    return kept + positions * _FLOAT32 + mask


def _needs_result(trained: Trained) -> bool:
    """Whether the output projection has a gradient that reads its input as it is."""
    lora = trained.lora
    as_it_is = lora is not None and trained.width == _FLOAT32 and not lora.dropout
    return trained.trains_norms or as_it_is


def _linear_inputs(shape: Shape, trained: Trained) -> int:
    """Bytes a token of a layer: inputs of linear layers that only the gradients of their weights need."""
    if trained.lora is not None:
        return _lora_inputs(shape, trained.lora, trained.width)
    if trained.method == "neft":
        assert trained.neurons is not None
        return _neuron_inputs(trained.neurons, shape, trained.width)
    if trained.method == "in_out":
        return trained.width * (shape.hidden + shape.intermediate)
    if trained.method == "embed":
        return 0
    # Autocast casts the input anew for each of q, k, v, and of gate and up.
    num_hidden = 2 if trained.width == _FLOAT32 else 4 + shape.is_gated
    return trained.width * (num_hidden * shape.hidden + shape.intermediate)


def _lora_inputs(shape: Shape, lora: LoraSection, width: int) -> int:
    """LoRA reads its input in float32: a copy for each layer where it is cast or has dropout."""
    assert lora.rank is not None
    num_layers = 6 + shape.is_gated
    ranks = _FLOAT32 * num_layers * lora.rank
    if width == _FLOAT32 and not lora.dropout:
        return _FLOAT32 * (2 * shape.hidden + shape.intermediate) + ranks
    inputs = (4 + shape.is_gated) * shape.hidden + shape.queries + shape.intermediate
    # The mask of dropout is as wide as its input on the CPU; an accelerator takes a byte.
    mask = _FLOAT32 if lora.dropout else 0
    return (_FLOAT32 + mask) * inputs + ranks


_READ_TOGETHER = {"q": "attention", "k": "attention", "v": "attention", "qkv": "attention"} | {
    "up": "feed_forward",
    "gate": "feed_forward",
    "gate_up": "feed_forward",
}


def _neuron_inputs(neurons: NeuronSet, shape: Shape, width: int) -> int:
    """Rows need the input of their layer, shared by those that read it; columns only their own part."""
    projections = [neurons.projections[name] for name in neurons.modules() if len(neurons[name])]
    rows = {
        (p.layer, _READ_TOGETHER.get(p.role, p.name)): p.vector_length
        for p in projections
        if p.axis is Axis.ROW
    }
    columns = sum(len(neurons[p.name]) for p in projections if p.axis is Axis.COLUMN)
    return width * (sum(rows.values()) + columns) // shape.num_layers
