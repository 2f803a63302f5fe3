"""Seconds of utilization and ranks of all neurons of Llama-2-7B, beside the matrix products they need.

    python benchmarks/analysis.py --quick              # under a minute on two cores
    python benchmarks/analysis.py --json out.json

704,512 in and out neurons of length 4096 and the hidden states of 32 layers, both random. ``products``
widens the same matrices to float64 and multiplies each by the hidden states of its own layer and above.
Neither reads files. See README.md beside this file for the protocol.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

from llama import Shape
from measuring import Ratio, in_turn, options_parser, ratio, timed, write_figures
from neft.checkpoints.source import TensorInfo, WeightSource
from processes import peaks

LLAMA_2_7B = Shape(4096, 11008, 32, 32, 32, 32000)


@dataclass(frozen=True)
class Preset:
    """Of which shape, and how often."""

    shape: Shape
    rounds: int

    @property
    def num_neurons(self) -> int:
        """In and out neurons."""
        return 2 * self.shape.num_layers * self.shape.intermediate_size


PRESETS = {
    "full": Preset(LLAMA_2_7B, rounds=1),
    "quick": Preset(replace(LLAMA_2_7B, num_layers=4), rounds=2),
}


class RandomWeights(WeightSource):
    """Up and down projections in bfloat16; the matrices of all layers are the same two.

    They are larger than the caches, so reading one again costs what reading another would.
    """

    label = "random weights"
    config_path = None

    def __init__(self, shape: Shape) -> None:
        import torch

        self._shape = shape
        sizes = {
            "up": (shape.intermediate_size, shape.hidden_size),
            "down": (shape.hidden_size, shape.intermediate_size),
        }
        generator = torch.Generator().manual_seed(0)
        self._matrices = {
            role: (0.02 * torch.randn(size, generator=generator)).bfloat16()
            for role, size in sizes.items()
        }
        self.tensors = {
            f"model.layers.{layer}.mlp.{role}_proj.weight": TensorInfo(size, "bfloat16")
            for layer in range(shape.num_layers)
            for role, size in sizes.items()
        }

    @cached_property
    def network(self) -> Any:
        import torch
        from transformers import LlamaForCausalLM

        with torch.device("meta"):
            return LlamaForCausalLM(self._shape.config)

    def _read(self, name: str, index: int | None) -> Any:
        assert index is None
        return self._matrices["up" if ".up_proj." in name else "down"]


def hidden_states(shape: Shape, seed: int) -> Any:
    """Random ones."""
    import numpy as np

    from neft.analysis.hidden_states import HiddenStates

    means = np.random.RandomState(seed).standard_normal((shape.num_layers, shape.hidden_size))
    return HiddenStates(means, num_texts=1, num_tokens=1)


def products(weights: RandomWeights, hidden: Any) -> None:
    """Every product of a neuron with a hidden state that utilization is about."""
    import torch

    from neft import find_projections

    means = torch.from_numpy(hidden.means)
    for projection in find_projections(weights.network):
        matrix = weights.read(weights.weight_name(projection.name)).double()
        _ = (matrix if projection.neuron_dim == 0 else matrix.T) @ means[projection.layer :].T


def utilization(weights: RandomWeights, hidden: Any) -> Any:
    """Of all up and down neurons."""
    from neft import find_projections
    from neft.analysis.utilization import neuron_utilization

    return neuron_utilization(weights, hidden, find_projections(weights.network), progress=False)


def random_utilization(weights: RandomWeights, seed: int) -> Any:
    """Without the ties that equal matrices would bring."""
    import numpy as np

    from neft import find_projections
    from neft.analysis.utilization import Utilization

    random = np.random.RandomState(seed)
    projections = {p.name: p for p in find_projections(weights.network)}
    values = {name: random.random_sample(p.num_neurons) for name, p in projections.items()}
    peaks = {name: np.full(p.num_neurons, p.layer) for name, p in projections.items()}
    return Utilization(projections, values, peaks)


def rank_difference(before: Any, after: Any) -> None:
    """Ranks in both models and everything that the paper draws from their difference."""
    from neft.analysis.ranks import rank_buckets, rank_changes

    changes = rank_changes(before, after)
    rank_buckets(changes)


def prepared(method: str, shape: Shape) -> Callable[[], object]:
    """``products`` or ``utilization`` with weights and hidden states in memory and imports done."""
    import neft.analysis.utilization  # noqa: F401

    weights = RandomWeights(shape)
    _ = weights.network
    function = {"products": products, "utilization": utilization}[method]
    return partial(function, weights, hidden_states(shape, seed=0))


def run(preset: Preset) -> dict[str, Any]:
    """Method -> seconds of each round and, of those that read weights, peak bytes."""
    weights = RandomWeights(preset.shape)
    hidden = hidden_states(preset.shape, seed=0)
    pair = [random_utilization(weights, seed) for seed in (1, 2)]
    tasks = {
        "products": timed(partial(products, weights, hidden)),
        "utilization": timed(partial(utilization, weights, hidden)),
        "ranks": timed(partial(rank_difference, *pair)),
    }
    seconds = in_turn(tasks, preset.rounds)
    readers = ("products", "utilization")
    peak = peaks({name: partial(prepared, name, preset.shape) for name in readers})
    return {name: {"seconds": seconds[name], "peak_bytes": peak.get(name)} for name in tasks}


def ratios(results: Mapping[str, Any]) -> list[Ratio]:
    """One model's utilization over the products; two models' ranks over the utilization of both."""
    seconds = {name: found["seconds"] for name, found in results.items()}
    both = [2 * value for value in seconds["utilization"]]
    return [
        ratio("utilization / products", seconds["utilization"], seconds["products"]),
        ratio("ranks / utilization, 2 models", seconds["ranks"], both),
    ]


def print_tables(preset: Preset, results: Mapping[str, Any], table: list[Ratio]) -> None:
    for row in table:
        print(row)
    size = f"{preset.num_neurons:,} neurons"
    print(f"\n{size:24} {'seconds':>9} {'peak MB':>9}")
    for name, found in results.items():
        peak = found["peak_bytes"]
        memory = "" if peak is None else f"{peak / 1e6:9.0f}"
        print(f"{name:24} {statistics.median(found['seconds']):9.3f} {memory}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options_parser(__doc__, "four layers, fewer rounds")
    parser.add_argument("--layers", type=int, help="of the model; nothing is extrapolated")
    options = parser.parse_args(arguments)
    preset = PRESETS["quick" if options.quick else "full"]
    if options.layers:
        preset = replace(preset, shape=replace(preset.shape, num_layers=options.layers))
    results = run(preset)
    table = ratios(results)
    print_tables(preset, results, table)
    if options.json:
        sizes = asdict(preset) | {"num_neurons": preset.num_neurons}
        write_figures(options.json, table, preset=sizes, methods=results)


if __name__ == "__main__":
    main()
