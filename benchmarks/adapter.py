"""Seconds and bytes of saving, loading, swapping, merging and unmerging a NeFT adapter, beside LoRA's.

    python benchmarks/adapter.py --quick               # under a minute on two cores
    python benchmarks/adapter.py --json out.json

The model has SmolLM2-135M's shape, random weights, float32; LoRA is of equal size. Both methods do the
same in turn, round by round, in one process, each on a model of its own. See README.md beside this file.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama import SMOLLM2, Shape, random_llama, with_adapters
from measuring import Ratio, in_turn, options_parser, ratio, timed, write_figures

METHODS = ("neft", "lora")
OPERATIONS = ("save", "load", "swap", "merge", "unmerge")
SWAP_TARGET_SECONDS = 0.050
# Both are in the model at once and have neurons of their own.
ADAPTERS = ("one", "other")


@dataclass(frozen=True)
class Preset:
    """Which model, and how often."""

    shape: Shape
    rounds: int
    percent: float = 9.0


PRESETS = {"full": Preset(SMOLLM2, rounds=15), "quick": Preset(SMOLLM2, rounds=4)}

Seconds = Mapping[str, float]
"""Operation -> seconds."""


class Subject:
    """One method's models, on which its operations are timed."""

    def __init__(self, method: str, base: Any, percent: float, folder: Path) -> None:
        import torch

        self._folder = folder
        self._fresh = copy.deepcopy(base)
        self._model = with_adapters(method, base, percent, ADAPTERS)
        self._token = torch.zeros(1, 1, dtype=torch.long)

    def round(self) -> Seconds:
        """Each operation once."""
        swap = self._swap()
        return {"save": self._save(), "load": self._load(), **swap, **self._merge()}

    @property
    def num_trainable(self) -> int:
        """Parameters of one adapter."""
        return sum(p.numel() for p in self._model.parameters() if p.requires_grad)

    @property
    def saved_bytes(self) -> int:
        """All files of one saved adapter but its model card."""
        files = (self._folder / ADAPTERS[0]).glob("adapter_*")
        return sum(file.stat().st_size for file in files)

    def _save(self) -> float:
        return timed(
            lambda: self._model.save_pretrained(self._folder, selected_adapters=[ADAPTERS[0]])
        )()

    def _load(self) -> float:
        """Into a model that was never adapted."""
        from peft import PeftModel

        loaded: list[Any] = []
        seconds = timed(
            lambda: loaded.append(
                PeftModel.from_pretrained(self._fresh, self._folder / ADAPTERS[0])
            )
        )()
        self._fresh = loaded[0].unload()
        return seconds

    def _swap(self) -> Seconds:
        """``swap``: until the other adapter is in use, which is more than until it is set.

        A NeFT adapter writes its vectors into the weights in its first forward pass, so what that takes
        longer than a second one counts.
        """
        other = next(name for name in ADAPTERS if name != self._model.active_adapter)
        self._forward()
        set_adapter = timed(lambda: self._model.set_adapter(other))()
        first, *others = (timed(self._forward)() for _ in range(4))
        steady = statistics.median(others)
        return {
            "swap": set_adapter + max(0.0, first - steady),
            "set_adapter": set_adapter,
            "first forward": first,
            "steady forward": steady,
        }

    def _forward(self) -> None:
        import torch

        with torch.no_grad():
            self._model(input_ids=self._token, use_cache=False)

    def _merge(self) -> Seconds:
        """From the state between forward passes, as when a model is put into service."""
        self._forward()
        return {
            "merge": timed(self._model.merge_adapter)(),
            "unmerge": timed(self._model.unmerge_adapter)(),
        }


def run(preset: Preset, folder: Path) -> dict[str, Any]:
    """Method -> seconds of each round by operation, bytes of the saved adapter, parameters."""
    base = random_llama(preset.shape)
    subjects = {
        method: Subject(method, copy.deepcopy(base), preset.percent, folder / method)
        for method in METHODS
    }
    rounds = in_turn({method: subject.round for method, subject in subjects.items()}, preset.rounds)
    return {
        method: {
            "seconds": {name: [r[name] for r in rounds[method]] for name in rounds[method][0]},
            "saved_bytes": subject.saved_bytes,
            "trainable": subject.num_trainable,
        }
        for method, subject in subjects.items()
    }


def ratios(results: Mapping[str, Any]) -> list[Ratio]:
    """NeFT over LoRA for each operation, and the promised time of a swap."""
    neft, lora = (results[method] for method in METHODS)
    swaps = neft["seconds"]["swap"]
    return [
        ratio("neft swap / 50 ms", swaps, [SWAP_TARGET_SECONDS] * len(swaps), 1.0),
        *(
            ratio(f"neft / lora {name}", neft["seconds"][name], lora["seconds"][name])
            for name in OPERATIONS
        ),
        ratio("neft / lora bytes", [neft["saved_bytes"]], [lora["saved_bytes"]]),
    ]


def print_tables(results: Mapping[str, Any], table: list[Ratio]) -> None:
    for row in table:
        print(row)
    print(f"\n{'milliseconds':16}" + "".join(f"{method:>10}" for method in METHODS))
    for name in results[METHODS[0]]["seconds"]:
        medians = (statistics.median(results[method]["seconds"][name]) for method in METHODS)
        print(f"{name:16}" + "".join(f"{1e3 * median:10.1f}" for median in medians))
    for name in ("trainable", "saved_bytes"):
        print(f"{name:16}" + "".join(f"{results[method][name] / 1e6:9.2f}M" for method in METHODS))


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_parser(__doc__, "fewer rounds").parse_args(arguments)
    preset = PRESETS["quick" if options.quick else "full"]
    with tempfile.TemporaryDirectory() as folder:
        results = run(preset, Path(folder))
    table = ratios(results)
    print_tables(results, table)
    if options.json:
        write_figures(options.json, table, preset=asdict(preset), methods=results)


if __name__ == "__main__":
    main()
