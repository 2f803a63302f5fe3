"""Figures of one run: what training did to which neurons. A function a figure; nothing is saved here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neft.analysis.table import Table
from neft.report.figures import COLOURS, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _VERMILION, _GREEN, _PINK = COLOURS[:4]
_WIDTH = 7.6
_NUM_BINS = 60
# A cell of the colour map that is this dark, in 0..1, gets a white number.
_DARK = 0.55
# Characters that fit beside one another in a row of the colour map: two each of 50 layers.
_NUM_CHARACTERS_A_ROW = 100
_NUM_TICKS = 16


def draw_neuron_map(
    num_trained: NDArray[np.int64],
    num_candidates: NDArray[np.int64],
    layers: Sequence[int],
    roles: Sequence[str],
) -> Figure:
    """Where the chosen neurons are: percent of the neurons of each layer and projection.

    Args:
        num_trained: ``[roles, layers]``.
        num_candidates: the same of all neurons; 0 where a layer lacks a projection.
        layers: indices of layers.
        roles: names of projections.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        percent = np.ma.masked_invalid(100.0 * num_trained / num_candidates)
    texts = [[_short(value) for value in row] for row in percent]
    return _draw_map(percent, texts, layers, roles, label="% trained")


def draw_change_map(
    change: NDArray[np.float64], layers: Sequence[int], roles: Sequence[str]
) -> Figure:
    """How far fine-tuning moved each layer's projections.

    Args:
        change: ``|after - before| / |before|``, ``[roles, layers]``; NaN where a layer lacks one.
        layers: indices of layers.
        roles: names of projections.
    """
    percent = np.ma.masked_invalid(100.0 * change)
    num_decimals = _num_decimals(percent)
    texts = [[_short(value, num_decimals) for value in row] for row in percent]
    if num_decimals:
        # .13 for 0.13: there is little room.
        texts = [[text.removeprefix("0") for text in row] for row in texts]
    return _draw_map(percent, texts, layers, roles, label="change in %")


def _draw_map(
    percent: np.ma.MaskedArray[Any, np.dtype[np.float64]],
    texts: Sequence[Sequence[str]],
    layers: Sequence[int],
    roles: Sequence[str],
    label: str,
) -> Figure:
    """Cells of roles by layers, each with its number while there is room for it."""
    figure = _figure(_WIDTH, 0.9 + 0.45 * len(roles))
    axes = figure.add_subplot()
    # Cells as shapes, not as a picture: sharp at any size.
    mesh = axes.pcolormesh(percent, cmap="cividis", vmin=0, edgecolors="none", linewidth=0)
    widest = max((len(text) for row in texts for text in row), default=0)
    if len(layers) * max(widest, 2) <= _NUM_CHARACTERS_A_ROW:
        _write_in_cells(axes, percent, texts, top=float(percent.filled(0.0).max()) or 1.0)
    step = _tick_step(len(layers))
    axes.set_xticks(np.arange(0, len(layers), step) + 0.5, [str(n) for n in layers[::step]])
    axes.set_yticks(np.arange(len(roles)) + 0.5, roles)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer")
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=8)
    bar.set_label(label)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    # Its gradient as a picture inside the SVG; hundreds of shapes would show hairlines.
    bar.solids.set_rasterized(True)
    return figure


def _tick_step(count: int) -> int:
    """Every how many labels still fit below the axis."""
    return -(-count // _NUM_TICKS)


def _short(value: Any, num_decimals: int = 0) -> str:
    return "" if value is np.ma.masked else f"{value:.{num_decimals}f}"


def _num_decimals(values: np.ma.MaskedArray[Any, np.dtype[np.float64]]) -> int:
    """Enough to tell the largest value by two digits."""
    top = float(values.filled(0.0).max())
    return max(0, 1 - math.floor(math.log10(top))) if top > 0 else 0


def _write_in_cells(
    axes: Axes,
    values: NDArray[np.float64],
    texts: Sequence[Sequence[str]],
    top: float,
    size: float = 7,
) -> None:
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            is_dark = text and values[row, column] / top < _DARK
            colour = "#fefefe" if is_dark else "#010101"
            axes.text(
                column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=size
            )


def draw_distances(
    distances: NDArray[np.float64],
    trained: NDArray[np.bool_],
    threshold: float | None = None,
    quantity: str = "1 - cos",
) -> Figure:
    """Histogram of the scores of all neurons (log axis), and the selection in it.

    Args:
        distances: of every neuron; those that are 0 have no place on the axis and are left out.
        trained: which ones were chosen.
        threshold: the distance at which the choice ends, if one distance separates it from the rest.
        quantity: what the distances are.
    """
    figure = _figure(_WIDTH, 3.1)
    axes = figure.add_subplot()
    positive = distances > 0
    if positive.any():
        low, high = distances[positive].min(), distances[positive].max()
        bins = np.geomspace(low, high * 1.0001, _NUM_BINS + 1)
        axes.hist(
            [distances[positive & trained], distances[positive & ~trained]],
            bins=bins.tolist(),
            stacked=True,
            histtype="stepfilled",
            color=[_VERMILION, _BLUE],
            label=["trained", "not trained"],
        )
    if threshold is not None and threshold > 0:
        label = f"selection ends at {threshold:.3g}"
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1.2, label=label)
    axes.set_xscale("log")
    axes.set_xlabel(quantity)
    axes.set_ylabel("neurons")
    _tidy(axes)
    _legend_above(axes)
    return figure


def draw_buckets(buckets: Table) -> Figure:
    """Mean \\|rank change\\| by percentile of the rank before training (the paper's Figure 3)."""
    figure = _figure(_WIDTH, 3.1)
    axes = figure.add_subplot()
    rows = buckets.rows()
    roles = list(dict.fromkeys(row["role"] for row in rows))
    for number, role in enumerate(roles):
        own = [row for row in rows if row["role"] == role]
        labels = [f"{row['low']:g}-{row['high']:g}" for row in own]
        places = np.arange(len(own)) + (number - (len(roles) - 1) / 2) * 0.8 / len(roles)
        heights = [row["mean_rank_change"] for row in own]
        colour = COLOURS[number % len(COLOURS)]
        axes.bar(places, heights, 0.8 / len(roles), color=colour, label=role)
        axes.set_xticks(np.arange(len(own)), labels)
    axes.set_xlabel("percentile of rank before training (0 = most used)")
    axes.set_ylabel("mean |rank change|")
    _tidy(axes)
    _legend_above(axes)
    return figure


def draw_rank_changes(
    labels: Sequence[str], values: Sequence[float], by_chance: Sequence[float]
) -> Figure:
    """Average \\|rank change\\| of pairs of models (the paper's Figure 5), beside unrelated orders.

    Args:
        labels: what was compared.
        values: Avg(dRank), in ranks.
        by_chance: what two unrelated orders of as many neurons would differ by.
    """
    figure = _figure(_WIDTH, 0.9 + 0.42 * len(labels))
    axes = figure.add_subplot()
    places = np.arange(len(labels))
    axes.barh(places, values, 0.6, color=_BLUE)
    axes.scatter(by_chance, places, marker="|", s=220, color="black", label="unrelated orders")
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            f"{value:,.0f}", (value, place), (4, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max([*values, *by_chance, 1]))
    axes.set_xlabel("average |rank change|")
    _tidy(axes, grid="x")
    _legend_above(axes)
    return figure


def draw_affected(counts: Mapping[str, int]) -> Figure:
    """Neurons that were strongly affected, suppressed, indirectly affected (the paper's Figure 6)."""
    figure = _figure(_WIDTH, 0.6 + 0.45 * len(counts))
    axes = figure.add_subplot()
    colours = (_BLUE, _VERMILION, _GREEN)
    places = np.arange(len(counts))
    bars = axes.barh(places, list(counts.values()), 0.6, color=colours[: len(counts)])
    axes.bar_label(bars, [f"{count:,}" for count in counts.values()], padding=4)
    axes.set_yticks(places, list(counts))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max([*counts.values(), 1]))
    axes.set_xlabel("neurons")
    _tidy(axes, grid="x")
    return figure


def draw_overlap(overlap: Table) -> Figure:
    """Shared neurons of pairs of selections, and what chance would give (the paper's Table 5).

    A matrix at the largest budget; where there are several budgets, the share by budget beside it.
    """
    rows = whole_model(overlap)
    percents = sorted({row["percent"] for row in rows if row["percent"] is not None})
    figure = _figure(_WIDTH, 4.2 if len(percents) > 1 else 3.2)
    axes = figure.subplots(1, 2 if len(percents) > 1 else 1, squeeze=False)[0]
    largest = [row for row in rows if not percents or row["percent"] == percents[-1]]
    _draw_matrix(axes[0], largest)
    if percents:
        axes[0].set_title(f"shared % at a budget of {percents[-1]:g}%", fontsize="medium")
    if len(percents) > 1:
        _draw_shares(axes[1], rows)
    return figure


def whole_model(overlap: Table) -> list[dict[str, Any]]:
    """Rows of an overlap table on two selections that are not empty, and not of one layer alone."""
    rows = map(_without_nan, overlap.rows())
    return [row for row in rows if row.get("layer") in (None, "") and row["share"] is not None]


def _without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if value != value else value for name, value in row.items()}


def _draw_matrix(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """A row for each first selection of a pair, a column for each second one."""
    order = list(dict.fromkeys(name for row in rows for name in (row["a"], row["b"])))
    names = [name for name in order if any(row["a"] == name for row in rows)]
    others = [name for name in order if any(row["b"] == name for row in rows)]
    shares = np.ma.masked_all((len(names), len(others)))
    texts = [["" for _ in others] for _ in names]
    for row in rows:
        place = names.index(row["a"]), others.index(row["b"])
        shares[place] = 100 * row["share"]
        texts[place[0]][place[1]] = (
            f"{_short(shares[place])}\nchance {100 * row['chance_share']:.0f}"
        )
    axes.pcolormesh(shares, cmap="cividis", vmin=0, vmax=100)
    _write_in_cells(axes, shares, texts, top=100, size=8)
    axes.set_xticks(np.arange(len(others)) + 0.5, others, rotation=20, ha="right")
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.tick_params(length=0, labelsize="small")
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)


def _draw_shares(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    pairs = _unordered(rows)
    for number, pair in enumerate(pairs):
        own = sorted(
            (row for row in rows if (row["a"], row["b"]) == pair), key=lambda row: row["percent"]
        )
        budgets = [row["percent"] for row in own]
        colour = COLOURS[number % len(COLOURS)]
        shares = [100 * row["share"] for row in own]
        marker = MARKERS[number % len(MARKERS)]
        label = " / ".join(pair)
        axes.plot(budgets, shares, marker=marker, markersize=4, color=colour, label=label)
        chance = [100 * row["chance_share"] for row in own]
        of_chance = "chance" if number == len(pairs) - 1 else None
        axes.plot(budgets, chance, linestyle=":", color="black", linewidth=1.2, label=of_chance)
    axes.set_xlabel("budget (% of all parameters)")
    axes.set_ylabel("shared %")
    axes.set_ylim(0, 105)
    _tidy(axes)
    axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="x-small")


def _unordered(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of selections; each once where both are of one size, as they share the same part then."""
    pairs: dict[object, tuple[str, str]] = {}
    for row in rows:
        pair = row["a"], row["b"]
        if row["a"] != row["b"]:
            same = frozenset(pair) if row["num_a"] == row["num_b"] else pair
            pairs.setdefault(same, pair)
    return list(pairs.values())


def draw_training(trainings: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Loss by step, on training batches and on the development set, a panel a training.

    Args:
        trainings: title -> the content of its ``training.json``.
    """
    figure = _figure(_WIDTH, 3.1)
    panels = figure.subplots(1, len(trainings), squeeze=False, sharey=True)[0]
    for axes, (title, training) in zip(panels, trainings.items(), strict=True):
        train, dev = (training["history"].get(split, []) for split in ("train", "dev"))
        axes.plot(*_losses(train), color=_BLUE, linewidth=1, label="training batch")
        axes.plot(*_losses(dev), color=_VERMILION, marker="o", markersize=5, label="development")
        best = training.get("best_step")
        if best is not None and dev:
            label = f"kept: step {best}"
            axes.axvline(best, color="black", linestyle=":", linewidth=1, label=label)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("step")
        axes.legend(frameon=False, fontsize="small")
        _tidy(axes)
    panels[0].set_ylabel("loss (nats a token)")
    return figure


def _losses(history: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
    return [entry["step"] for entry in history], [entry["loss"] for entry in history]


def draw_causal(causal: Table) -> Figure:
    """Rise of the loss when groups of neurons get their original values back; layers one by one below."""
    rows = [_without_nan(row) for row in causal.rows()]
    layers = [row for row in rows if row["kind"] == "layer"]
    groups = [row for row in rows if row["kind"] != "layer" and row["num_neurons"]]
    heights = [0.6 + 0.55 * len(groups)] * bool(groups) + [2.4] * bool(layers)
    figure = _figure(_WIDTH, sum(heights))
    panels = list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    if groups:
        axes = panels.pop(0)
        _draw_rises(axes, groups, horizontal=True)
        axes.set_yticks(np.arange(len(groups)), [row["group"] for row in groups])
        axes.invert_yaxis()
        axes.set_xlabel("rise of the loss (nats a token)")
        _tidy(axes, grid="x")
        _legend_above(axes)
    if layers:
        axes = panels.pop(0)
        _draw_rises(axes, layers, horizontal=False)
        names = [_span(str(row["group"])) for row in layers]
        step = _tick_step(len(names))
        axes.set_xticks(np.arange(0, len(names), step), names[::step])
        axes.set_xlabel("layers whose neurons are restored")
        axes.set_ylabel("rise of the loss")
        _tidy(axes)
    return figure


def _span(group: str) -> str:
    """``3`` of ``layer 3``, ``0-2`` of ``layers 0-2``."""
    return group.removeprefix("layers ").removeprefix("layer ")


def _draw_rises(axes: Axes, rows: Sequence[Mapping[str, Any]], *, horizontal: bool) -> None:
    series = {"task text": ("task_rise", _BLUE), "general text": ("general_rise", _VERMILION)}
    present = {
        name: (column, colour)
        for name, (column, colour) in series.items()
        if any(row.get(column) is not None for row in rows)
    }
    thickness = 0.8 / max(len(present), 1)
    draw = axes.barh if horizontal else axes.bar
    for number, (name, (column, colour)) in enumerate(present.items()):
        places = np.arange(len(rows)) + (number - (len(present) - 1) / 2) * thickness
        draw(places, [row[column] or 0.0 for row in rows], thickness, color=colour, label=name)
    (axes.axvline if horizontal else axes.axhline)(0, color="black", linewidth=0.8)


def _figure(width: float, height: float) -> Figure:
    # Not pyplot: it keeps state, and wants a display on some machines.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _legend_above(axes: Axes) -> None:
    """Where it covers no data."""
    num_entries = len(axes.get_legend_handles_labels()[1])
    axes.legend(
        frameon=False,
        fontsize="small",
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.1,
        ncols=max(num_entries, 1),
    )


def _tidy(axes: Axes, grid: str = "y") -> None:
    axes.grid(axis=grid, alpha=0.3)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
