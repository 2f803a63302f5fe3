"""Tokens per second with a NeFT adapter active, beside the base model and LoRA of equal size.

    python benchmarks/generate.py --quick              # under a minute on two cores
    python benchmarks/generate.py --json out.json

Greedy decoding with a model of SmolLM2-135M's shape, random weights, float32; no adapter is merged. The
three models generate in turn, round by round, in one process. See README.md beside this file.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llama import SMOLLM2, Shape, random_llama, with_adapters
from measuring import Ratio, in_turn, options_parser, ratio, timed, write_figures

METHODS = ("base", "neft", "lora")
TARGET = 1.02


@dataclass(frozen=True)
class Preset:
    """What is generated, and how often."""

    shape: Shape
    batch_sizes: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    rounds: int
    percent: float = 9.0


PRESETS = {
    "full": Preset(SMOLLM2, (1, 8), prompt_tokens=32, new_tokens=32, rounds=9),
    "quick": Preset(SMOLLM2, (1, 8), prompt_tokens=32, new_tokens=16, rounds=5),
}


def build_models(preset: Preset) -> dict[str, Any]:
    """Method -> a model of its own."""
    base = random_llama(preset.shape)
    # Every continuation has its full length.
    base.generation_config.eos_token_id = None
    base.generation_config.pad_token_id = 0
    return {
        "base": base,
        **{
            method: with_adapters(method, copy.deepcopy(base), preset.percent, ["default"])
            for method in ("neft", "lora")
        },
    }


def generation(model: Any, preset: Preset, batch_size: int) -> Callable[[], None]:
    """What continues ``batch_size`` random prompts greedily."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, preset.prompt_tokens)
    prompts = torch.randint(preset.shape.vocab_size, shape, generator=generator)

    def generate() -> None:
        with torch.no_grad():
            found = model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=preset.new_tokens,
                do_sample=False,
            )
        assert found.shape[1] == preset.prompt_tokens + preset.new_tokens, "generation ended early"

    return generate


def run(preset: Preset) -> dict[int, dict[str, list[float]]]:
    """Batch size -> method -> seconds of each round."""
    models = build_models(preset)
    return {
        size: in_turn(
            {method: timed(generation(models[method], preset, size)) for method in METHODS},
            preset.rounds,
        )
        for size in preset.batch_sizes
    }


def ratios(seconds: dict[int, dict[str, list[float]]]) -> list[Ratio]:
    """Time of each adapter over the base model's, by batch size."""
    return [
        ratio(f"{method} / base, batch {size}", of_size[method], of_size["base"], target)
        for size, of_size in seconds.items()
        for method, target in (("neft", TARGET), ("lora", None))
    ]


def tokens_per_second(preset: Preset, batch_size: int, seconds: list[float]) -> float:
    """New tokens of the whole batch; reading the prompt counts as time, not as tokens."""
    return batch_size * preset.new_tokens / statistics.median(seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_parser(__doc__, "fewer rounds of fewer tokens").parse_args(arguments)
    preset = PRESETS["quick" if options.quick else "full"]
    seconds = run(preset)
    table = ratios(seconds)
    for row in table:
        print(row)
    speeds = {
        size: {method: tokens_per_second(preset, size, of_size[method]) for method in METHODS}
        for size, of_size in seconds.items()
    }
    print(f"\n{'tokens a second':16}" + "".join(f"{method:>8}" for method in METHODS))
    for size, of_size in speeds.items():
        print(f"batch {size:<10}" + "".join(f"{of_size[method]:8.1f}" for method in METHODS))
    if options.json:
        write_figures(
            options.json, table, preset=asdict(preset), tokens_per_second=speeds, seconds=seconds
        )


if __name__ == "__main__":
    main()
