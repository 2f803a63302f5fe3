"""NeFT layers in a training loop of one's own, sharded by torch: as a script, one of two processes.

Each way of sharding takes two steps, with a pass of the untouched model between forward and backward, as
in DPO. The first process writes how far it is from the paper's masked training in one process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import ALL
from transformers import AutoModelForCausalLM

from neft import NeftConfig, NeuronSet, processes
from neft.projections import find_projections
from neft.reference.masked import mask_gradients
from neft.scoring import score_neurons
from neft.sft.sharded import gather_trained, whole


def _sharded(model: PeftModel, *, checkpointed: bool = False, **options: Any) -> Any:
    layers = model.base_model.model.model.layers
    for number, layer in enumerate(layers):
        if checkpointed:
            layers[number] = checkpoint_wrapper(layer)
        fully_shard(layers[number], **options)
    return fully_shard(model, **options)


_SIXTEEN_BITS = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
WAYS: dict[str, Callable[[PeftModel], Any]] = {
    "ddp": DistributedDataParallel,
    "fsdp2": _sharded,
    "never resharded": lambda model: _sharded(model, reshard_after_forward=False),
    "checkpointed": lambda model: _sharded(model, checkpointed=True),
    "16 bits": lambda model: _sharded(model, mp_policy=_SIXTEEN_BITS),
}


def _load(folder: str) -> tuple[Any, NeuronSet]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    projections = find_projections(model, ALL)
    indices = {p.name: range(0, p.num_neurons, 3) for p in projections}
    return model, NeuronSet(projections, indices)


def _optimizer(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


def _steps(model: Any, plain: PeftModel, tokens: Tensor) -> list[Tensor]:
    """Train; the logits of the untouched model in each step."""
    optimizer = _optimizer([p for p in model.parameters() if p.requires_grad])
    model.train()
    untouched = []
    for ids in tokens:
        loss = model(input_ids=ids, labels=ids).loss
        with torch.no_grad(), plain.disable_adapter():
            untouched.append(model(input_ids=ids).logits)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return untouched


def _masked(folder: str, tokens: Tensor) -> dict[str, Tensor]:
    """Weights after the paper's own way of training the same neurons, in one process."""
    model, neurons = _load(folder)
    mask_gradients(model, neurons)
    optimizer = _optimizer(model.parameters())
    for ids in tokens:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _distances(folder: str, way: str, tokens: Tensor) -> dict[str, float]:
    plain, neurons = _load(folder)
    model = get_peft_model(_load(folder)[0], NeftConfig(neurons=neurons))
    before, expected = dict(plain.named_parameters()), _masked(folder, tokens)
    half = tokens.shape[1] // processes.num_processes()
    start = half * processes.process_index()
    own = tokens[:, start : start + half]
    with processes.process_group(way):
        untouched = _steps(WAYS[way](model), model, own)
        trained = gather_trained(model)
        frozen = {name: whole(p) for name, p in model.named_parameters() if not p.requires_grad}
    vectors = {_module(name): vector for name, vector in trained.items()}
    error = moved = 0.0
    for module in neurons.modules():
        dim = neurons.projections[module].neuron_dim
        indices = torch.from_numpy(neurons[module])
        one, other = (
            weights[f"{module}.weight"].detach().index_select(dim, indices)
            for weights in (before, expected)
        )
        found = vectors[module] if dim == 0 else vectors[module].T
        error += float((found - other).square().sum())
        moved += float((one - other).square().sum())
    with torch.no_grad():
        logits = [plain(input_ids=ids).logits for ids in own]
    return {
        "vectors": (error / moved) ** 0.5,
        "frozen": sum(
            not torch.equal(tensor, before[f"{_module(name)}.weight"])
            for name, tensor in frozen.items()
        ),
        "untouched": max(
            float((one - other).abs().max()) for one, other in zip(untouched, logits, strict=True)
        ),
        "narrow": sum(vector.dtype is not torch.float32 for vector in trained.values()),
    }


def _module(name: str) -> str:
    """Name of a parameter's module in the plain model."""
    for wrapper in ("base_model.model.", "_checkpoint_wrapped_module.", "base_layer."):
        name = name.replace(wrapper, "")
    return name.removesuffix(".weight").removesuffix(".neft_vectors.default")


def _live_scores(folder: str, tokens: Tensor) -> float:
    """How far scores of a sharded model after a full fine-tune are from those of a whole one."""
    reference, model = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    expected = _fully_tuned(reference, tokens)
    half = tokens.shape[1] // processes.num_processes()
    start = half * processes.process_index()
    with processes.process_group("live"):
        for layer in model.model.layers:
            fully_shard(layer)
        found = _fully_tuned(fully_shard(model), tokens[:, start : start + half])
        scores = score_neurons(folder, found)
    wanted = score_neurons(folder, expected)
    return max(
        float((abs(scores.distances[name] / distances - 1)).max())
        for name, distances in wanted.distances.items()
    )


def _fully_tuned(model: Any, tokens: Tensor) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for ids in tokens:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _main(folder: str, told: Path) -> None:
    torch.set_num_threads(1)
    tokens = torch.randint(3, 100, (2, 4, 12), generator=torch.Generator().manual_seed(0))
    distances: dict[str, Any] = {way: _distances(folder, way, tokens) for way in WAYS}
    distances["live scores"] = _live_scores(folder, tokens)
    if processes.is_first():
        told.write_text(json.dumps(distances))


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
