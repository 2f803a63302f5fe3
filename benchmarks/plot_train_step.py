"""A table and a figure of what ``train_step.py`` measured.

    python benchmarks/plot_train_step.py benchmarks/results/train_step_cpu.json

Writes a ``.md`` and a ``.svg`` beside the figures' file; nothing is measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train_step import PARTS


def medians(result: dict[str, Any]) -> list[float]:
    """Seconds of each of ``PARTS``."""
    return [statistics.median(step[part] for step in result["steps"]) for part in PARTS]


def markdown(figures: dict[str, Any]) -> str:
    """The methods, and then the ratios, as tables."""
    lines = [
        "| method | trained | step s | forward / backward / optimizer | peak MB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method, result in figures["methods"].items():
        seconds = statistics.median(sum(step.values()) for step in result["steps"])
        split = " / ".join(f"{part:.3f}" for part in medians(result))
        share = 100 * result["trainable"] / result["base"]
        peak = result["peak_bytes"] / 1e6
        lines.append(f"| `{method}` | {share:.1f}% | {seconds:.3f} | {split} | {peak:.0f} |")
    lines += ["", "| ratio | median | range | target |", "| --- | --- | --- | --- |"]
    for row in figures["ratios"]:
        is_single = row["min"] == row["max"]
        spread = "" if is_single else f"{row['min']:.3f} .. {row['max']:.3f}"
        target = "" if row["target"] is None else f"{row['target']:.2f}"
        lines.append(f"| {row['name']} | {row['median']:.3f} | {spread} | {target} |")
    machine, preset = figures["machine"], figures["preset"]
    num_rounds = min(len(result["steps"]) for result in figures["methods"].values())
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    where = machine["accelerator"] or f"{machine['threads']} cores of {machine['processor']}"
    lines += [
        "",
        f"Preset `{preset['name']}`, {num_rounds} rounds; {where}; {versions}; "
        f"commit {machine['commit']}.",
    ]
    return "\n".join(lines) + "\n"


def draw(figures: dict[str, Any], path: Path) -> None:
    """Bars of seconds, by part of the step, and of peak memory."""
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "neft"
    from matplotlib import pyplot

    methods = list(figures["methods"])
    results = figures["methods"].values()
    height = 1.2 + 0.32 * len(methods)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, height), sharey=True, layout="constrained"
    )
    starts = [0.0] * len(methods)
    for part, seconds in zip(PARTS, zip(*map(medians, results), strict=True), strict=True):
        left.barh(methods, seconds, left=starts, label=part)
        starts = [start + more for start, more in zip(starts, seconds, strict=True)]
    left.invert_yaxis()
    left.set_xlabel("seconds a step (median)")
    left.legend()
    right.barh(methods, [result["peak_bytes"] / 1e9 for result in results], color="tab:gray")
    right.set_xlabel("peak memory, GB")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path, help="what train_step.py --json wrote")
    path = parser.parse_args(arguments).figures
    figures = json.loads(path.read_text())
    path.with_suffix(".md").write_text(markdown(figures))
    draw(figures, path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
