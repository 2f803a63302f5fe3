"""NeFT layers in a training loop of one's own, whose model is divided: as a script, one of two processes.

Each way of sharding takes two steps, with a pass of the untouched model between forward and backward, as
in DPO. The first process writes how far it is from the paper's masked training in one process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import ALL
from transformers import AutoModelForCausalLM

from neft import NeftConfig, NeuronSet, processes
from neft.errors import UsageError
from neft.projections import find_projections
from neft.reference.masked import mask_gradients
from neft.scoring import score_neurons
from neft.sft.sharded import gather_trained, whole
from neft.sft.zero import deepspeed_at_work
from neft.tuner.layer import neft_layers


def _sharded(model: Any, *, checkpointed: bool = False, **options: Any) -> Any:
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = plain.model.layers
    for number, layer in enumerate(layers):
        if checkpointed:
            layers[number] = checkpoint_wrapper(layer)
        fully_shard(layers[number], **options)
    return fully_shard(model, **options)


def _zero(model: PeftModel, stage: int, **options: Any) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage} | options,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=_optimizer(model), config=config)
    return engine


_SIXTEEN_BITS = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
WAYS: dict[str, Callable[[PeftModel], Any]] = {
    "ddp": DistributedDataParallel,
    "fsdp2": _sharded,
    "never resharded": lambda model: _sharded(model, reshard_after_forward=False),
    "checkpointed": lambda model: _sharded(model, checkpointed=True),
    "16 bits": lambda model: _sharded(model, mp_policy=_SIXTEEN_BITS),
    "zero2": lambda model: _zero(model, 2),
    # All of a tiny model is below its threshold.
    "zero3, undivided": lambda model: _zero(model, 3),
    "zero3": lambda model: _zero(model, 3, stage3_param_persistence_threshold=0),
}
LIVE = ("fsdp2", "zero3")


def _merge(model: PeftModel) -> None:
    model.merge_adapter()


def _add(model: PeftModel) -> None:
    model.add_adapter("other", NeftConfig(neurons=model.peft_config["default"].neurons))


def _read(model: PeftModel) -> None:
    next(neft_layers(model))[1].weight  # noqa: B018


# What a model cannot do whose weights are divided.
REFUSED: dict[str, Callable[[PeftModel], None]] = {
    "merge": _merge,
    "merge what is whole": _merge,
    "add": _add,
    "read": _read,
}


def _load(folder: str) -> tuple[Any, NeuronSet]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    projections = find_projections(model, ALL)
    indices = {p.name: range(0, p.num_neurons, 3) for p in projections}
    return model, NeuronSet(projections, indices)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=0.5, momentum=0.9)


def _train(model: Any, tokens: Tensor, between: Callable[[Tensor], None] | None = None) -> None:
    """Take a step a batch; ``between`` its forward and its backward pass comes something else."""
    # DeepSpeed's engine is both.
    optimizer = model if hasattr(model, "zero_optimization") else _optimizer(model)
    model.train()
    for ids in tokens:
        loss = model(input_ids=ids, labels=ids).loss
        if between is not None:
            between(ids)
        model.backward(loss) if optimizer is model else loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _masked(folder: str, tokens: Tensor) -> dict[str, Tensor]:
    """Weights after the paper's own way of training the same neurons, in one process."""
    model, neurons = _load(folder)
    mask_gradients(model, neurons)
    _train(model, tokens)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _distances(folder: str, way: str, tokens: Tensor) -> dict[str, float]:
    plain, neurons = _load(folder)
    model = get_peft_model(_load(folder)[0], NeftConfig(neurons=neurons))
    before, expected = dict(plain.named_parameters()), _masked(folder, tokens)
    half = tokens.shape[1] // processes.num_processes()
    start = half * processes.process_index()
    own = tokens[:, start : start + half]
    with processes.process_group(way), deepspeed_at_work():
        wrapped, untouched = WAYS[way](model), []

        def without_adapter(ids: Tensor) -> None:
            with torch.no_grad(), model.disable_adapter():
                untouched.append(wrapped(input_ids=ids).logits)

        _train(wrapped, own, without_adapter)
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


def _live_scores(folder: str, way: str, tokens: Tensor) -> float:
    """How far scores of a sharded model after a full fine-tune are from those of a whole one."""
    reference, model = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    _train(reference, tokens)
    half = tokens.shape[1] // processes.num_processes()
    start = half * processes.process_index()
    with processes.process_group(f"live, {way}"), deepspeed_at_work():
        _train(WAYS[way](model), tokens[:, start : start + half])
        scores = score_neurons(folder, model)
    wanted = score_neurons(folder, reference)
    return max(
        float((abs(scores.distances[name] / distances - 1)).max())
        for name, distances in wanted.distances.items()
    )


def _refusals(folder: str) -> dict[str, str]:
    """What a NeFT model says to that which dividing its weights makes impossible."""
    told = {}
    models = {
        use: get_peft_model(_load(folder)[0], NeftConfig(neurons=_load(folder)[1]))
        for use in (*REFUSED, "pass before")
    }
    # Its vectors are in the weights when these are divided.
    models["pass before"].eval()(input_ids=torch.tensor([[3, 4, 5]]))
    with processes.process_group("refusals"), deepspeed_at_work():
        for use, model in models.items():
            is_whole = use == "merge what is whole"
            engine = WAYS["never resharded" if is_whole else "zero3"](model)
            if is_whole:
                engine(input_ids=torch.tensor([[3]]))  # gathers what then stays
            with pytest.raises(UsageError) as refused:
                REFUSED[use](model) if use in REFUSED else engine(input_ids=torch.tensor([[3]]))
            told[use] = str(refused.value)
    return told


def _main(folder: str, told: Path) -> None:
    torch.set_num_threads(1)
    tokens = torch.randint(3, 100, (2, 4, 12), generator=torch.Generator().manual_seed(0))
    distances: dict[str, Any] = {way: _distances(folder, way, tokens) for way in WAYS}
    distances["live scores"] = {way: _live_scores(folder, way, tokens) for way in LIVE}
    distances["refusals"] = _refusals(folder)
    if processes.is_first():
        told.write_text(json.dumps(distances))


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
