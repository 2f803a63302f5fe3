"""Seconds a training step and peak memory of each way to fine-tune, side by side.

    python benchmarks/train_step.py --quick            # under a minute on two cores
    python benchmarks/train_step.py --preset cpu --json out.json

Each method lives in a process of its own, so that its peak memory is its own; on a CPU the processes
step in turn, round by round, so that a slow moment of the machine hits all of them alike. Ratios come
from the rounds, one by one; medians are printed. See README.md beside this file for the protocol.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import llama
from llama import Shape, equal_rank, random_neurons
from measuring import Ratio, ratio, resident_bytes, restart_peak, write_figures
from processes import in_processes

PARTS = ("forward", "backward", "optimizer")
COMPARED = ("floor", "neft", "lora", "shira", "mask", "full")
QUICK = ("floor", "neft", "lora", "mask", "full")


@dataclass(frozen=True)
class Preset(Shape):
    """A Llama shape with random weights, the batch that it trains on, and how."""

    batch_size: int
    sequence_length: int
    rounds: int
    """Counted ones; one before them warms up: memory pools, optimizer state."""
    percent: float = 9.0
    """What NeFT trains, in percent of all parameters, where the method does not say."""
    is_tied: bool = True
    """The output head is the embedding matrix."""
    device: str = "cpu"
    dtype: str = "float32"
    """Of the weights; other than float32, the model runs under autocast, as trainers do."""
    checkpoints_layers: bool = False
    """Activations inside a layer are computed again in the backward pass."""


PRESETS = {
    "quick": Preset(768, 2048, 8, 12, 12, 32000, 4, 128, rounds=2),
    "cpu": Preset(768, 2048, 20, 12, 12, 16384, 4, 128, rounds=7),
    "smollm2": Preset(576, 1536, 30, 9, 3, 49152, 4, 128, rounds=7),
    "gpu-1b": Preset(
        2048, 5632, 22, 32, 4, 32000, 6, 512, 20, is_tied=False, device="cuda", dtype="bfloat16"
    ),
    "gpu-7b": Preset(
        *(4096, 11008, 32, 32, 32, 32000, 6, 512, 20),
        is_tied=False,
        device="cuda",
        dtype="bfloat16",
        checkpoints_layers=True,
    ),
}
# So small that it costs nothing, of the same make.
TINY: dict[str, int] = asdict(llama.TINY) | {"sequence_length": 16}

TARGETS = {
    ("neft", "lora", "step"): 0.85,
    ("neft", "lora", "memory"): 0.80,
    ("neft", "mask", "step"): 0.42,
    ("neft", "floor", "step"): 1.05,
    ("neft", "shira", "step"): 0.75,
}
"""What is promised of the preset ``cpu``."""
OTHER_RATIOS = (
    ("neft", "floor", "memory"),
    ("neft", "shira", "memory"),
    ("neft", "full", "memory"),
    ("lora", "floor", "step"),
    ("lora", "floor", "memory"),
    *((f"neft-{kind}", "neft", "step") for kind in ("rows", "columns", "slices", 1, 3, 20)),
    *(("neft-plain", other, "step") for other in ("floor", "lora", "mask")),
    ("neft", "floor-faster", "step"),
    ("neft", "lora-faster", "step"),
    ("floor-faster", "floor", "step"),
)


@dataclass(frozen=True)
class Step:
    """Seconds of one training step."""

    forward: float
    backward: float
    optimizer: float


def build_model(preset: Preset) -> Any:
    """The same random model in every process."""
    import torch
    from transformers import AutoModelForCausalLM

    config = preset.config
    config.tie_word_embeddings = preset.is_tied
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device(preset.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, preset.dtype))
    if preset.checkpoints_layers:
        model.activation_checkpointing_enable()
    return model


def first_neurons(model: Any, percent: float) -> Any:
    """As many neurons, next to each other: a slice of each weight, as S2FT has it."""
    import numpy as np

    from neft import NeuronSet

    chosen = random_neurons(model, percent)
    projections = chosen.projections
    each = len(chosen) // len(projections)
    return NeuronSet(projections.values(), {name: np.arange(each) for name in projections})


def adapted(model: Any, config: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, config)


def floor(model: Any, _percent: float) -> Any:
    """The least that any method must do that trains something in the lowest layer."""
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model


def neft(model: Any, percent: float, modules: Sequence[str] = ("up", "down")) -> Any:
    from neft import NeftConfig

    return adapted(model, NeftConfig(neurons=random_neurons(model, percent, modules=modules)))


def neft_slices(model: Any, percent: float) -> Any:
    from neft import NeftConfig

    return adapted(model, NeftConfig(neurons=first_neurons(model, percent)))


def lora(model: Any, percent: float) -> Any:
    from peft import LoraConfig

    rank = equal_rank(model, random_neurons(model, percent).num_parameters)
    return adapted(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))


def shira(model: Any, percent: float) -> Any:
    """As many parameters as LoRA of its rank, scattered over the same weights."""
    import torch
    from peft import ShiraConfig

    # The default; torch warns unless it is chosen.
    torch.sparse.check_sparse_tensor_invariants.disable()
    rank = equal_rank(model, random_neurons(model, percent).num_parameters)
    return adapted(model, ShiraConfig(r=rank, random_seed=0, target_modules="all-linear"))


def mask(model: Any, percent: float) -> Any:
    from neft.reference.masked import mask_gradients

    mask_gradients(model, random_neurons(model, percent))
    return model


def full(model: Any, _percent: float) -> Any:
    return model


@dataclass(frozen=True)
class Method:
    """How a model is made ready for training."""

    prepare: Callable[..., Any]
    """Takes a model and a budget in percent of its parameters; returns the model to train."""
    percent: float | None = None
    """The budget; None: the preset's."""
    is_faster: bool = False
    """Steps within ``faster_linear``, as whatever ``neft train`` trains does."""


def rows(model: Any, percent: float) -> Any:
    return neft(model, percent, modules=["up"])


def columns(model: Any, percent: float) -> Any:
    return neft(model, percent, modules=["down"])


METHODS = {
    "floor": Method(floor),
    "floor-faster": Method(floor, is_faster=True),
    "neft": Method(neft, is_faster=True),
    "neft-plain": Method(neft),
    "neft-rows": Method(rows, is_faster=True),
    "neft-columns": Method(columns, is_faster=True),
    "neft-slices": Method(neft_slices, is_faster=True),
    "neft-1": Method(neft, percent=1.0, is_faster=True),
    "neft-3": Method(neft, percent=3.0, is_faster=True),
    "neft-20": Method(neft, percent=20.0, is_faster=True),
    "lora": Method(lora),
    "lora-faster": Method(lora, is_faster=True),
    "shira": Method(shira),
    "mask": Method(mask),
    "full": Method(full),
}


class Training:
    """A model, its optimizer and its batches: what one process holds."""

    def __init__(self, method: str, preset: Preset) -> None:
        import torch

        self._preset = preset
        self._resident_before = resident_bytes("VmRSS")
        restart_peak()
        model = build_model(preset)
        self._num_base = sum(p.numel() for p in model.parameters())
        self._method = METHODS[method]
        percent = self._method.percent or preset.percent
        self._model = self._method.prepare(model, percent).train()
        trainable = [p for p in self._model.parameters() if p.requires_grad]
        self._num_trainable = sum(p.numel() for p in trainable)
        self._optimizer = (
            torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0, fused=True)
            if trainable
            else None
        )
        self._generator = torch.Generator().manual_seed(0)

    def step(self) -> Step:
        """The time of a step that follows another one."""
        if self._preset.device == "cpu":
            # The first of a turn finds the caches as the other methods left them.
            self._step()
        return self._step()

    def _step(self) -> Step:
        import torch

        from neft.products import faster_linear

        preset = self._preset
        shape = (preset.batch_size, preset.sequence_length)
        ids = torch.randint(preset.vocab_size, shape, generator=self._generator).to(preset.device)
        is_low = preset.dtype != "float32"
        times = [self._now()]
        with faster_linear() if self._method.is_faster else nullcontext():
            with torch.autocast(preset.device, torch.bfloat16, enabled=is_low):
                loss = self._model(input_ids=ids, labels=ids).loss
            times.append(self._now())
            loss.backward()
        times.append(self._now())
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad()
        times.append(self._now())
        return Step(*(end - start for start, end in itertools.pairwise(times)))

    def report(self) -> dict[str, Any]:
        import torch

        return {
            "trainable": self._num_trainable,
            "base": self._num_base,
            "peak_bytes": torch.cuda.max_memory_allocated()
            if self._preset.device == "cuda"
            else resident_bytes("VmHWM") - self._resident_before,
        }

    def _now(self) -> float:
        """Seconds on the clock once the device has done what it was given."""
        if self._preset.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()


def warm_training(method: str, preset: Preset) -> Training:
    """A training in a process that has done one step of a tiny model.

    Code and buffers of libraries that the first step of a process loads are not the method's memory.
    """
    Training(method, replace(preset, **TINY)).step()
    gc.collect()
    return Training(method, preset)


def run(
    preset: Preset, methods: Sequence[str], seconds: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """Results of the methods, and why others were skipped.

    On a GPU, whose speed is steady and whose memory is scarce, one method runs after the other.
    """
    outcomes = in_processes(
        {method: partial(warm_training, method, preset) for method in methods},
        preset.rounds,
        preload=["torch", "transformers.models.llama", "peft", "neft.tuner"],
        together=preset.device == "cpu",
        seconds=seconds,
    )
    results = {
        method: report | {"steps": [asdict(step) for step in outcomes.steps[method]]}
        for method, report in outcomes.reports.items()
    }
    return results, outcomes.skipped


def ratios(results: dict[str, Any], targets: Mapping[tuple[str, str, str], float]) -> list[Ratio]:
    """Those of ``TARGETS`` and ``OTHER_RATIOS`` whose two methods ran."""
    return [
        ratio(
            f"{upper} / {lower} {what}",
            figures(results[upper], what),
            figures(results[lower], what),
            targets.get((upper, lower, what)),
        )
        for upper, lower, what in (*TARGETS, *OTHER_RATIOS)
        if upper in results and lower in results
    ]


def figures(result: dict[str, Any], what: str) -> list[float]:
    """Seconds of each round's step, or the one peak of memory."""
    if what == "memory":
        return [result["peak_bytes"]]
    return [sum(step.values()) for step in result["steps"]]


def print_tables(results: dict[str, Any], table: list[Ratio]) -> None:
    print(f"{'method':12} {'trainable':>20} {'step s':>8} {'fwd / bwd / opt':>21} {'peak MB':>9}")
    for method, result in results.items():
        parts = {part: statistics.median(step[part] for step in result["steps"]) for part in PARTS}
        total = statistics.median(figures(result, "step"))
        share = f"{result['trainable']:,} ({100 * result['trainable'] / result['base']:.1f}%)"
        split = " / ".join(f"{parts[part]:.3f}" for part in PARTS)
        print(f"{method:12} {share:>20} {total:8.3f} {split:>21} {result['peak_bytes'] / 1e6:9.0f}")
    print()
    for row in table:
        print(row)


def parsed(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Preset]:
    """The options of the command line, and the preset that they ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--quick", action="store_true", help="--preset quick, and few methods")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny shape, to try a preset on a CPU"
    )
    parser.add_argument("--rounds", type=int, help="counted rounds")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no round, but for one, after as many"
    )
    parser.add_argument(
        "--methods",
        help=f"comma-separated, of {', '.join(METHODS)}; default: {', '.join(COMPARED)}",
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    if options.quick:
        options.preset = "quick"
    if options.methods is None:
        options.methods = ",".join(QUICK if options.quick else COMPARED)
    options.methods = options.methods.split(",")
    if unknown := set(options.methods) - set(METHODS):
        parser.error(f"unknown methods {sorted(unknown)}; choose from {', '.join(METHODS)}")
    preset = PRESETS[options.preset]
    if options.tiny:
        preset = replace(preset, **TINY, device="cpu")
    if options.rounds:
        preset = replace(preset, rounds=options.rounds)
    if preset.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error(
                f"--preset {options.preset} needs a GPU that PyTorch can use; there is none"
            )
    return options, preset


def main(arguments: Sequence[str] | None = None) -> None:
    options, preset = parsed(arguments)
    results, skipped = run(preset, options.methods, options.seconds)
    table = ratios(results, TARGETS if preset == PRESETS["cpu"] else {})
    print_tables(results, table)
    for method, reason in skipped.items():
        print(f"{method} skipped: {reason}")
    if options.json:
        named = {"name": options.preset} | asdict(preset)
        write_figures(options.json, table, preset=named, methods=results, skipped=skipped)


if __name__ == "__main__":
    main()
