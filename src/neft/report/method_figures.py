"""Figures of a comparison: what each method did to the neurons, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from neft.analysis.table import Table
from neft.report.figures import COLOURS, MARKERS, new_figure, save_figure
from neft.report.neuron_figures import draw_overlap, draw_rank_changes

TYPES = ("strongly affected", "suppressed", "indirectly affected")


def save_bucket_lines(
    stem: Path, edges: Sequence[float], series: Mapping[str, Sequence[float]], unrelated: float
) -> list[Path]:
    """Mean \\|rank change\\| by percentile of the rank before, a line a method (Figure 3).

    Args:
        stem: the files' path without suffix.
        edges: percentiles, one more than buckets.
        series: method -> mean of each bucket, in ranks.
        unrelated: what two unrelated orders would differ by.
    """
    figure = new_figure(1)
    figure.set_size_inches(7.6, 3.6)
    axes = figure.axes[0]
    places = np.arange(len(edges) - 1)
    for number, (name, means) in enumerate(series.items()):
        axes.plot(
            places,
            means,
            label=name,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle="-" if number < len(COLOURS) else "--",
            markersize=4,
            linewidth=1.3,
        )
    axes.axhline(unrelated, color="grey", linestyle=":", linewidth=1.2, label="unrelated orders")
    labels = [f"{low:g}-{high:g}" for low, high in pairwise(edges)]
    axes.set_xticks(places, labels, rotation=20)
    axes.set_xlabel("percentile of rank in the base model (0 = most used)")
    axes.set_ylabel("mean |rank change|")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    return save_figure(figure, stem)


def save_rank_changes(stem: Path, values: Mapping[str, float], unrelated: float) -> list[Path]:
    """Average \\|rank change\\| of pairs of models (Figure 5)."""
    return save_figure(
        draw_rank_changes(list(values), list(values.values()), [unrelated] * len(values)), stem
    )


def save_affected(stem: Path, counts: Mapping[str, Sequence[float]]) -> list[Path]:
    """Neurons of the paper's three types, a group of bars a method (Figure 6).

    Args:
        stem: the files' path without suffix.
        counts: method -> number of each of ``TYPES``.
    """
    figure = new_figure(1)
    figure.set_size_inches(7.6, 1.2 + 0.42 * len(counts))
    axes = figure.axes[0]
    places = np.arange(len(counts))
    for number, kind in enumerate(TYPES):
        heights = [found[number] for found in counts.values()]
        axes.barh(places + (number - 1) * 0.27, heights, 0.25, color=COLOURS[number], label=kind)
    axes.set_yticks(places, list(counts))
    axes.invert_yaxis()
    axes.set_xlabel("neurons")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small")
    return save_figure(figure, stem)


def save_selections(stem: Path, overlap: Table) -> list[Path]:
    """What different warm-ups would choose (Table 5)."""
    return save_figure(draw_overlap(overlap), stem)
