"""Ways of finding neurons as Markdown tables and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from neft.comparison.discovery import Discovery, Way
from neft.comparison.markdown import table
from neft.comparison.results import RowResult
from neft.report.method_figures import save_discovery


def discovery_markdown(found: Sequence[Discovery]) -> str:
    """One section a task."""
    return "\n".join(line for discovery in found for line in _section(discovery))


def _section(found: Discovery) -> list[str]:
    metrics = list(next(iter(found.rows.values())).metrics)
    header = [
        "neurons by",
        "seconds",
        "memory",
        *(f"{percent:g}%" for percent in found.chance),
        "of the choice (chance)",
        "dev loss",
        *metrics,
        "forgetting",
    ]
    chance = ["chance", "-", "-", *(_percent(share) for share in found.chance.values())]
    rows = [[*chance, *["-"] * (len(header) - len(chance))]]
    rows += [_row(found, way, found.rows[way.name]) for way in found.ways]
    return [
        f"## {found.task}: finding the neurons",
        "",
        "Seconds and peak memory of warm-up and scoring. By budget in percent of all parameters: how "
        f"much of what its scores choose {found.reference!r} would choose too. How much of what was "
        "trained that row trains too, and by chance. Then what training was worth, means over seeds.",
        "",
        *table(header, rows),
    ]


def _row(found: Discovery, way: Way, row: RowResult) -> list[str]:
    overlap = way.overlap or {}
    return [
        way.name,
        "-" if way.seconds is None else f"{way.seconds:,.0f}",
        "-" if way.peak_memory_bytes is None else f"{way.peak_memory_bytes / 1e9:.2f} GB",
        *(_percent(overlap.get(percent)) for percent in found.chance),
        f"{_percent(way.share_of_choice)} ({_percent(way.chance)})",
        f"{statistics.fmean(seed.dev_loss for seed in row.seeds):.3f}",
        *(
            f"{summary.mean:.1f}" + ("" if summary.spread is None else f" ± {summary.spread:.1f}")
            for summary in row.metrics.values()
        ),
        "-" if row.forgetting is None else f"{row.forgetting:+.3f}",
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def draw_discovery(found: Sequence[Discovery], folder: Path) -> list[Path]:
    """What each way costs beside what it is worth, a figure a task."""
    drawn: list[Path] = []
    for discovery in found:
        metric = next(iter(next(iter(discovery.rows.values())).metrics))
        scores = {
            way.name: (
                discovery.rows[way.name].metrics[metric].mean,
                discovery.rows[way.name].metrics[metric].spread,
            )
            for way in discovery.ways
        }
        drawn += save_discovery(
            folder / f"{discovery.task}-discovery",
            metric,
            scores,
            shares={way.name: way.share_of_choice for way in discovery.ways},
            chance={way.name: way.chance for way in discovery.ways},
            seconds={way.name: way.seconds for way in discovery.ways},
            gigabytes={
                way.name: None if way.peak_memory_bytes is None else way.peak_memory_bytes / 1e9
                for way in discovery.ways
            },
        )
    return drawn
