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


def save_discovery(
    stem: Path,
    metric: str,
    scores: Mapping[str, tuple[float, float | None]],
    *,
    shares: Mapping[str, float],
    chance: Mapping[str, float],
    seconds: Mapping[str, float | None],
    gigabytes: Mapping[str, float | None],
) -> list[Path]:
    """What ways of finding neurons are worth and what they cost, a panel each.

    Args:
        stem: the files' path without suffix.
        metric: what ``scores`` are of.
        scores: way -> mean after training, and its standard deviation over seeds.
        shares: way -> share of its neurons that the reference trains too.
        chance: the same for random neurons.
        seconds: of finding; ``None`` where it takes none.
        gigabytes: peak memory of finding, in 10^9 bytes.
    """
    figure = new_figure(1)
    figure.clear()
    figure.set_size_inches(9.6, 1.4 + 0.3 * len(scores))
    panels = figure.subplots(1, 4, sharey=True)
    places = np.arange(len(scores))
    means, spreads = zip(*scores.values(), strict=True)
    panels[0].barh(places, means, color=COLOURS[0], xerr=[spread or 0.0 for spread in spreads])
    panels[0].set_xlabel(metric)
    panels[0].set_yticks(places, list(scores))
    panels[0].invert_yaxis()
    panels[1].barh(places, [100 * share for share in shares.values()], color=COLOURS[2])
    by_chance = [100 * share for share in chance.values()]
    panels[1].plot(by_chance, places, "|", color="black", markersize=12, label="by chance")
    panels[1].set_xlabel("% of the reference's neurons")
    panels[1].legend(fontsize="x-small", loc="lower right")
    panels[2].barh(places, [value or 0.0 for value in seconds.values()], color=COLOURS[4])
    panels[2].set_xlabel("seconds to find them")
    panels[3].barh(places, [value or 0.0 for value in gigabytes.values()], color=COLOURS[1])
    panels[3].set_xlabel("GB to find them")
    for axes in panels:
        axes.grid(axis="x", alpha=0.3)
    return save_figure(figure, stem)
