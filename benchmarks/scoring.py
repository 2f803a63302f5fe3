"""Seconds and peak memory of scoring two checkpoints, beside merely reading them.

    python benchmarks/scoring.py --quick               # under a minute on two cores
    python benchmarks/scoring.py --json out.json

Makes two sharded checkpoints of a Llama shape in a temporary folder, bfloat16 and float32 in turn, and
scores their up and down projections. ``read`` loads the same tensors and sums them in float32: what any
method must do that looks at every weight once. See README.md beside this file for the protocol.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llama import Shape
from measuring import Ratio, in_turn, options_parser, ratio, timed, write_figures
from processes import peaks

DTYPES = ("bfloat16", "float32")
SECONDS_TARGET = 2.0
MEMORY_TARGET = 3.0


@dataclass(frozen=True)
class Preset:
    """Which checkpoints, and how often they are scored."""

    shape: Shape
    shard_bytes: int
    rounds: int
    change: float = 1e-3
    """Of a weight by fine-tuning, as a share of its standard deviation."""


PRESETS = {
    # 1.1 GB in bfloat16: 2.2 GB the pair.
    "full": Preset(Shape(2048, 5632, 11, 16, 4, 32000), 2**28, rounds=7),
    "quick": Preset(Shape(1024, 2816, 6, 16, 4, 8192), 2**25, rounds=3),
}


def write_pair(folder: Path, preset: Preset, dtype: str) -> tuple[Path, Path]:
    """Two checkpoint folders: random weights, and the same after a small random change."""
    import torch

    before, after = folder / f"{dtype}-before", folder / f"{dtype}-after"
    with _ShardedWriter(before, preset) as old, _ShardedWriter(after, preset) as new:
        for seed, (name, shape) in enumerate(_parameters(preset.shape)):
            generator = torch.Generator().manual_seed(seed)
            weight = 0.02 * torch.randn(shape, generator=generator)
            change = 0.02 * preset.change * torch.randn(shape, generator=generator)
            old.add(name, weight.to(getattr(torch, dtype)))
            new.add(name, (weight + change).to(getattr(torch, dtype)))
    return before, after


def _parameters(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config)
    for name, parameter in model.named_parameters():
        yield name, tuple(parameter.shape)


class _ShardedWriter:
    """Writes a checkpoint tensor by tensor: a shard is written when it is full."""

    def __init__(self, folder: Path, preset: Preset) -> None:
        self._folder = folder
        self._preset = preset
        self._shard: dict[str, Any] = {}
        self._weight_map: dict[str, str] = {}

    def __enter__(self) -> _ShardedWriter:
        self._folder.mkdir()
        self._preset.shape.config.save_pretrained(self._folder)
        return self

    def add(self, name: str, tensor: Any) -> None:
        self._shard[name] = tensor
        if sum(held.nbytes for held in self._shard.values()) >= self._preset.shard_bytes:
            self._flush()

    def _flush(self) -> None:
        from safetensors.torch import save_file

        file = f"model-{len(set(self._weight_map.values())):05}.safetensors"
        save_file(self._shard, self._folder / file)
        self._weight_map |= dict.fromkeys(self._shard, file)
        self._shard = {}

    def __exit__(self, *_: object) -> None:
        if self._shard:
            self._flush()
        index = self._folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": self._weight_map}))


def read(before: Path, after: Path) -> None:
    """Load what scoring loads, and sum it in float32."""
    from neft import find_projections
    from neft.checkpoints import open_weights

    sides = open_weights(before), open_weights(after)
    for projection in find_projections(sides[0].network):
        for side in sides:
            side.read(side.weight_name(projection.name)).float().sum()


def score(before: Path, after: Path) -> None:
    """Score all up and down projections."""
    from neft import score_neurons

    # That bfloat16 rounds is not the question here.
    logging.disable(logging.WARNING)
    try:
        score_neurons(before, after, progress=False)
    finally:
        logging.disable(logging.NOTSET)


METHODS: dict[str, Callable[[Path, Path], None]] = {"read": read, "scoring": score}


def prepared(method: str, pair: tuple[Path, Path]) -> Callable[[], None]:
    """The method with all its imports done."""
    from neft import score_neurons  # noqa: F401
    from neft.checkpoints import open_weights

    # Building the network imports its class.
    _ = open_weights(pair[0]).network
    return partial(METHODS[method], *pair)


def run(preset: Preset, folder: Path) -> dict[str, Any]:
    """Dtype -> method -> seconds of each round and peak bytes, and the size of the largest pair."""
    results: dict[str, Any] = {}
    for dtype in DTYPES:
        pair = write_pair(folder, preset, dtype)
        seconds = in_turn(
            {name: timed(partial(method, *pair)) for name, method in METHODS.items()},
            preset.rounds,
        )
        peak = peaks({name: partial(prepared, name, pair) for name in METHODS})
        results[dtype] = {
            "stored_bytes": sum(
                f.stat().st_size for side in pair for f in side.glob("*.safetensors")
            ),
            "largest_pair_bytes": largest_pair(preset.shape, dtype),
            "methods": {
                name: {"seconds": seconds[name], "peak_bytes": peak[name]} for name in METHODS
            },
        }
        for side in pair:
            for file in side.iterdir():
                file.unlink()
    return results


def largest_pair(shape: Shape, dtype: str) -> int:
    """Bytes of one up or down projection on both sides."""
    import torch

    return 2 * shape.hidden_size * shape.intermediate_size * getattr(torch, dtype).itemsize


def ratios(results: dict[str, Any]) -> list[Ratio]:
    """The promises are for bfloat16."""
    table = []
    for dtype, found in results.items():
        read, scoring = (found["methods"][name] for name in METHODS)
        promised = dtype == "bfloat16"
        table += [
            ratio(
                f"scoring / read, {dtype}",
                scoring["seconds"],
                read["seconds"],
                SECONDS_TARGET if promised else None,
            ),
            ratio(
                f"peak / largest pair, {dtype}",
                [scoring["peak_bytes"]],
                [found["largest_pair_bytes"]],
                MEMORY_TARGET if promised else None,
            ),
        ]
    return table


def print_tables(results: dict[str, Any], table: list[Ratio]) -> None:
    for row in table:
        print(row)
    print(f"\n{'':18} {'stored GB':>10} {'seconds':>9} {'peak MB':>9}")
    for dtype, found in results.items():
        for name, method in found["methods"].items():
            median = statistics.median(method["seconds"])
            print(
                f"{dtype:9} {name:8} {found['stored_bytes'] / 1e9:10.2f} {median:9.3f} "
                f"{method['peak_bytes'] / 1e6:9.0f}"
            )


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_parser(__doc__, "smaller checkpoints, fewer rounds").parse_args(arguments)
    preset = PRESETS["quick" if options.quick else "full"]
    with tempfile.TemporaryDirectory() as folder:
        results = run(preset, Path(folder))
    table = ratios(results)
    print_tables(results, table)
    if options.json:
        write_figures(options.json, table, preset=asdict(preset), dtypes=results)


if __name__ == "__main__":
    main()
