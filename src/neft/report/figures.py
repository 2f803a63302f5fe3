"""Static figures, by matplotlib: PNG to look at, SVG to publish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from neft.files import replaced_atomically

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by most colour-blind readers, as are the markers without colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FORMATS = ("png", "svg")
"""Kinds of files, by their suffixes."""
_PANEL_INCHES = (4.2, 3.4)
_MAX_COLUMNS = 3


@dataclass(frozen=True)
class Point:
    """One row of a table in a figure."""

    label: str
    num_trainable: int
    mean: float
    spread: float | None
    """Standard deviation over seeds."""


@dataclass(frozen=True)
class Panel:
    """One task."""

    title: str
    metric: str
    """Of the vertical axis."""
    series: Mapping[str, Sequence[Point]]
    """Name in the legend -> its points; the same names in all panels, in the same order."""
    base: float | None = None
    """The model before training, as a dotted line."""


def draw_scores(stem: Path, panels: Sequence[Panel], title: str | None) -> list[Path]:
    """A metric against the number of trained parameters (the paper's Figure 2), a panel a task.

    Args:
        stem: the files' path without suffix.
        panels: tasks, in order.
        title: of the whole figure.

    Returns:
        The files: ``stem.png`` and ``stem.svg``.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = new_figure(len(panels))
    for position, panel in enumerate(panels):
        axes: Axes = figure.axes[position]
        for number, (name, points) in enumerate(panel.series.items()):
            if not points:
                continue
            axes.errorbar(
                [point.num_trainable / 1e6 for point in points],
                [point.mean for point in points],
                [point.spread or 0.0 for point in points],
                label=name,
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                linewidth=1.4,
                markersize=5,
                capsize=3,
            )
        if panel.base is not None:
            axes.axhline(panel.base, color="grey", linestyle=":", linewidth=1.2, label="base model")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(panel.title, fontsize="medium")
        axes.set_xlabel("trained parameters (millions)")
        axes.set_ylabel(panel.metric)
        axes.grid(alpha=0.3)
    _draw_legend(figure)
    if title is not None:
        figure.suptitle(title, fontsize="medium")
    return save_figure(figure, stem)


def _draw_legend(figure: Figure) -> None:
    """One legend of all that occurs in any panel."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles=list(handles.values()),
        labels=list(handles),
        loc="outside right center",
        fontsize="small",
    )


def new_figure(num_panels: int) -> Figure:
    """A figure of some panels, none of them drawn yet."""
    # Not pyplot: it keeps state, and wants a display on some machines.
    from matplotlib.figure import Figure

    columns = min(num_panels, _MAX_COLUMNS)
    rows = -(-num_panels // columns)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    for position in range(num_panels):
        figure.add_subplot(rows, columns, position + 1)
    return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.png`` and ``stem.svg``, the same bytes for the same figure."""
    files = [stem.with_name(f"{stem.name}.{suffix}") for suffix in FORMATS]
    for file in files:
        write_figure(figure, file)
    return files


def write_figure(figure: Figure, file: Path) -> None:
    """Write one file, PNG or SVG by its suffix; the same bytes for the same figure."""
    from matplotlib import rc_context

    kind = file.suffix.removeprefix(".")
    assert kind in FORMATS, file
    # Without a date and with fixed ids, the same numbers give the same bytes.
    with replaced_atomically(file) as part, rc_context({"svg.hashsalt": "neft"}):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(part, format=kind, dpi=150, metadata=metadata)
