"""Seconds a training step and peak memory of each way to fine-tune, side by side.

    python benchmarks/train_step.py --quick            # under a minute on two cores
    python benchmarks/train_step.py --preset cpu --json out.json

Each method lives in a process of its own, so that its peak memory is its own; the processes step in
turn, round by round, so that a slow moment of the machine hits all of them alike. Ratios come from the
rounds, one by one; medians are printed. See README.md beside this file for the protocol.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from measuring import Ratio, ratio, resident_bytes, restart_peak, write_figures

METHODS = ("floor", "neft", "lora", "mask", "full")
PARTS = ("forward", "backward", "optimizer")
RATIOS = {
    # (numerator, denominator, what): the target
    ("neft", "lora", "step"): 0.92,
    ("neft", "mask", "step"): 0.45,
    ("neft", "floor", "step"): None,
    ("lora", "floor", "step"): None,
    ("neft", "lora", "memory"): 0.85,
    ("neft", "full", "memory"): None,
}


@dataclass(frozen=True)
class Preset:
    """A Llama shape, random weights, float32."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    batch_size: int
    sequence_length: int
    rounds: int
    percent: float = 9.0


PRESETS = {
    "quick": Preset(768, 2048, 10, 12, 32000, 4, 128, rounds=3),
    "cpu": Preset(768, 2048, 20, 12, 16384, 4, 128, rounds=7),
}


@dataclass(frozen=True)
class Step:
    """One training step of one method."""

    forward: float
    backward: float
    optimizer: float

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.optimizer


def build_model(preset: Preset) -> Any:
    """The same random model in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=preset.hidden_size,
            intermediate_size=preset.intermediate_size,
            num_hidden_layers=preset.num_layers,
            num_attention_heads=preset.num_heads,
            vocab_size=preset.vocab_size,
            max_position_embeddings=preset.sequence_length,
            tie_word_embeddings=True,
        )
    )


def random_neurons(model: Any, percent: float, seed: int = 0) -> Any:
    """A random choice of in and out neurons: which ones makes no difference to the speed."""
    import numpy as np

    from neft import NeuronScores, find_projections

    projections = find_projections(model)
    scores = NeuronScores(
        projections,
        {p.name: np.zeros(p.num_neurons) for p in projections},
        total_parameters=sum(p.numel() for p in model.parameters()),
    )
    return scores.select(percent=percent, which="random", seed=seed)


def equal_rank(model: Any, budget: int) -> int:
    """The LoRA rank on all linear layers but the head that comes nearest to ``budget`` parameters."""
    from torch import nn

    per_rank = sum(
        module.in_features + module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    )
    return max(1, round(budget / per_rank))


def prepare(method: str, model: Any, percent: float) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
    """``model`` made ready for ``method``, and what turns token ids into its forward pass's arguments."""
    from peft import LoraConfig, get_peft_model

    from neft import NeftConfig
    from neft.reference.masked import mask_gradients

    neurons = random_neurons(model, percent)
    if method == "floor":
        # The least that any method must do that trains something in the lowest layer.
        model.requires_grad_(False)
        embed = model.get_input_embeddings()
        return model, lambda ids: {"inputs_embeds": embed(ids).requires_grad_()}
    if method == "neft":
        model = get_peft_model(model, NeftConfig(neurons=neurons))
    elif method == "lora":
        rank = equal_rank(model, neurons.num_parameters)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        model = get_peft_model(model, config)
    elif method == "mask":
        mask_gradients(model, neurons)
    return model, lambda ids: {"input_ids": ids}


def run_method(method: str, preset: Preset, pipe: Connection) -> None:
    """Serve training steps on request until told to stop; then report parameters and peak memory."""
    import torch

    before = resident_bytes("VmRSS")
    restart_peak()
    model = build_model(preset)
    num_base_parameters = sum(p.numel() for p in model.parameters())
    model, arguments = prepare(method, model, preset.percent)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0) if trainable else None
    generator = torch.Generator().manual_seed(0)
    pipe.send("ready")
    while pipe.recv() == "step":
        shape = (preset.batch_size, preset.sequence_length)
        ids = torch.randint(preset.vocab_size, shape, generator=generator)
        times = [time.perf_counter()]
        loss = model(**arguments(ids), labels=ids).loss
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        times.append(time.perf_counter())
        pipe.send(Step(*(end - start for start, end in itertools.pairwise(times))))
    pipe.send(
        {
            "trainable": sum(p.numel() for p in trainable),
            "base": num_base_parameters,
            "peak_bytes": resident_bytes("VmHWM") - before,
        }
    )


def run(preset: Preset, methods: tuple[str, ...]) -> dict[str, Any]:
    """All methods in turn, round by round."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.llama", "peft", "neft.tuner"])
    pipes: dict[str, Connection] = {}
    for method in methods:
        pipes[method], theirs = context.Pipe()
        context.Process(target=run_method, args=(method, preset, theirs), daemon=True).start()
        pipes[method].recv()
    steps: dict[str, list[Step]] = {method: [] for method in methods}
    # The first round warms up: memory pools, optimizer state.
    for number in range(preset.rounds + 1):
        for method, pipe in pipes.items():
            pipe.send("step")
            step = pipe.recv()
            if number:
                steps[method].append(step)
        print(f"\rround {number}/{preset.rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    results = {}
    for method, pipe in pipes.items():
        pipe.send("stop")
        results[method] = pipe.recv() | {"steps": [asdict(step) for step in steps[method]]}
    return results


def ratios(results: dict[str, Any]) -> list[Ratio]:
    """Each of ``RATIOS`` whose two methods ran."""
    return [
        ratio(
            f"{upper} / {lower} {what}",
            *(figures(results[m], what) for m in (upper, lower)),
            target,
        )
        for (upper, lower, what), target in RATIOS.items()
        if upper in results and lower in results
    ]


def figures(result: dict[str, Any], what: str) -> list[float]:
    """Seconds of each round's step, or the one peak of memory."""
    if what == "memory":
        return [result["peak_bytes"]]
    return [sum(step.values()) for step in result["steps"]]


def print_tables(results: dict[str, Any], table: list[Ratio]) -> None:
    print(f"{'method':8} {'trainable':>18} {'step s':>8} {'fwd / bwd / opt':>20} {'peak MB':>9}")
    for method, result in results.items():
        parts = {part: statistics.median(step[part] for step in result["steps"]) for part in PARTS}
        total = statistics.median(sum(step.values()) for step in result["steps"])
        share = f"{result['trainable']:,} ({100 * result['trainable'] / result['base']:.1f}%)"
        split = " / ".join(f"{parts[part]:.3f}" for part in PARTS)
        print(f"{method:8} {share:>18} {total:8.3f} {split:>20} {result['peak_bytes'] / 1e6:9.0f}")
    print()
    for row in table:
        print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--quick", action="store_true", help="the same as --preset quick")
    parser.add_argument("--rounds", type=int, help="counted rounds")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    name = "quick" if options.quick else options.preset
    preset = PRESETS[name]
    if options.rounds:
        preset = Preset(**(asdict(preset) | {"rounds": options.rounds}))
    methods = tuple(options.methods.split(","))
    if unknown := set(methods) - set(METHODS):
        parser.error(f"unknown methods {sorted(unknown)}; choose from {', '.join(METHODS)}")
    results = run(preset, methods)
    table = ratios(results)
    print_tables(results, table)
    if options.json:
        write_figures(options.json, table, preset={"name": name} | asdict(preset), methods=results)


if __name__ == "__main__":
    main()
