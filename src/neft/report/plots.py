"""The figures of a run by name: each from what the run left behind, with its content in words."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neft.analysis.ranks import unrelated_change
from neft.analysis.table import Column
from neft.errors import UsageError
from neft.neurons import ROLE_ORDER
from neft.report import neuron_figures as figures
from neft.report.figures import save_figure
from neft.report.neuron_table import known_neurons
from neft.report.plot_names import DESCRIPTIONS
from neft.report.run_data import RunData, has_columns
from neft.report.wording import listed, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Stands for the user's own recipe where the run has not kept it yet.
RECIPE = "RECIPE"
_ANALYSIS = "analysis"
_ANALYSIS_ALONE = "analysis={}"
_CAUSAL = "analysis.causal=true"
_OVERLAP = "analysis.overlap_with={NAME: FILE}"


@dataclass(frozen=True)
class Drawn:
    """A figure, and what it says."""

    figure: Figure
    alternative: str
    """The finding's numbers, for those who cannot see the figure."""


@dataclass(frozen=True)
class Plot:
    """A figure that can be asked for by name."""

    description: str
    draw: Callable[[RunData], Drawn | None]
    """``None``: the run does not hold what the figure shows."""
    needs: str = ""
    """Section or option of the recipe that a run needs for it, if not every recipe has it."""


def save_plot(run: RunData, name: str, stem: Path) -> list[Path]:
    """Write one figure of a run as PNG and SVG.

    Args:
        run: see ``read_run``.
        name: one of ``PLOTS``.
        stem: the files' path without suffix.

    Returns:
        The files: ``stem.png`` and ``stem.svg``.

    Raises:
        UsageError: there is no figure of this name, or the run does not hold its data.
    """
    if run.comparison is not None:
        raise UsageError(f"{run.folder}: a comparison; its figures are drawn by neft compare.")
    if name not in PLOTS:
        raise UsageError(f"{name}: no figure of this name. There are: {', '.join(PLOTS)}.")
    drawn = PLOTS[name].draw(run)
    if drawn is None:
        raise UsageError(
            f"{run.folder}: has no data for the figure {name}. To get it: {remedy(run, name)}"
        )
    return save_figure(drawn.figure, stem)


def remedy(run: RunData, name: str) -> str:
    """The command that makes what the figure ``name`` needs."""
    return run_command(run, analysis_setting(run, PLOTS[name].needs))


def analysis_setting(run: RunData, needs: str) -> str:
    """What to set in the recipe, for something that needs ``analysis`` or one of its options."""
    if not needs:
        return ""
    if run.recipe is not None and run.recipe.get("analysis"):
        return needs if "." in needs else ""
    option = needs.partition(".")[2].replace("=", ": ", 1)
    return f"analysis={{{option}}}"


def run_command(run: RunData, setting: str = "") -> str:
    """The command that brings the run to its end, with a setting of its recipe replaced."""
    if setting == _ANALYSIS_ALONE and run.results is not None:
        return shlex.join(["neft", "analyze", "ranks", run.folder])
    recipe = RECIPE if run.recipe_yaml is None else str(Path(run.folder, "prepare", "recipe.yaml"))
    return shlex.join(["neft", "run", recipe, *(["--set", setting] if setting else [])])


def training(run: RunData) -> Drawn | None:
    """Training curves of the warm-up and of the training itself."""
    found = {"warm-up": run.warmup, "training": run.training}
    histories = {title: fields for title, fields in found.items() if fields and "history" in fields}
    if not histories:
        return None
    parts = [_training_words(title, fields) for title, fields in histories.items()]
    return Drawn(figures.draw_training(histories), f"Loss by training step. {' '.join(parts)}")


def _training_words(title: str, fields: Mapping[str, Any]) -> str:
    dev = fields["history"].get("dev", [])
    words = f"{title.capitalize()}: {fields['num_steps']} steps"
    if not dev:
        return f"{words}."
    first, best = dev[0], min(dev, key=lambda entry: entry["loss"])
    return (
        f"{words}; development loss {first['loss']:.2f} at step {first['step']}, lowest "
        f"{best['loss']:.2f} at step {best['step']}."
    )


@dataclass(frozen=True)
class NeuronMap:
    """Neurons by role and layer."""

    roles: Sequence[str]
    layers: Sequence[int]
    num_trained: NDArray[np.int64]
    """``[roles, layers]``."""
    num_candidates: NDArray[np.int64]


def neuron_map(run: RunData) -> NeuronMap | None:
    """Counts of trained neurons and of all; ``None`` where none was chosen."""
    known = known_neurons(run)
    if known is None or not np.any(np.asarray(known["trained"], dtype=bool)):
        return None
    # Modules outside the stack of layers have no place on this map.
    inside = np.array([layer is not None for layer in known["layer"]])
    layers = np.asarray(known["layer"], dtype=object)[inside].astype(np.int64)
    roles = np.asarray(known["role"], dtype=object)[inside].astype(str)
    trained = np.asarray(known["trained"], dtype=bool)[inside]
    names, shown = _in_order(set(roles.tolist())), sorted(set(layers.tolist()))
    counts = np.zeros((2, len(names), len(shown)), dtype=np.int64)
    for row, name in enumerate(names):
        for which, chosen in enumerate((trained & (roles == name), roles == name)):
            counts[which, row] = [np.count_nonzero(chosen & (layers == layer)) for layer in shown]
    return NeuronMap(names, shown, counts[0], counts[1])


def _in_order(roles: set[str]) -> list[str]:
    known = [role for role in ROLE_ORDER if role in roles]
    return known + sorted(roles - set(known))


def neurons(run: RunData) -> Drawn | None:
    """Where the trained neurons are, by layer and projection."""
    found = neuron_map(run)
    if found is None:
        return None
    sums, by_role = found.num_trained.sum(0), found.num_trained.sum(1)
    most, least = int(np.argmax(sums)), int(np.argmin(sums))
    roles = [f"{count:,} in {role}" for count, role in zip(by_role, found.roles, strict=True)]
    words = (
        f"Trained neurons: {listed(roles)}. Most in layer {found.layers[most]} ({sums[most]:,}), fewest "
        f"in layer {found.layers[least]} ({sums[least]:,})."
    )
    figure = figures.draw_neuron_map(
        found.num_trained, found.num_candidates, found.layers, found.roles
    )
    return Drawn(figure, words)


def scores(run: RunData) -> Drawn | None:
    """Histogram of the scores, with the selection in it."""
    known = known_neurons(run)
    if known is None or "distance" not in known:
        return None
    distances = np.asarray(known["distance"], dtype=np.float64)
    trained = np.asarray(known["trained"], dtype=bool)
    threshold = _threshold(distances, trained)
    low, middle, high = np.quantile(distances, [0.05, 0.5, 0.95])
    quantity = "1 - cos" if run.scores is None else run.scores.quantity
    words = (
        f"Histogram of {quantity} of {len(distances):,} neurons: median {middle:.2g}, nine in ten "
        f"between {low:.2g} and {high:.2g}. {np.count_nonzero(trained):,} were trained"
    )
    words += f"; the selection ends at {threshold:.3g}." if threshold is not None else "."
    if num_zero := np.count_nonzero(distances <= 0):
        words += f" {num_zero:,} neurons have 0 and are not shown."
    return Drawn(figures.draw_distances(distances, trained, threshold, quantity), words)


def _threshold(distances: NDArray[np.float64], trained: NDArray[np.bool_]) -> float | None:
    """The last chosen distance, if the chosen ones are all above, or all below, the others."""
    chosen, others = distances[trained], distances[~trained]
    if not len(chosen) or not len(others):
        return None
    if chosen.min() >= others.max():
        return float(chosen.min())
    return float(chosen.max()) if chosen.max() <= others.min() else None


def figure3(run: RunData) -> Drawn | None:
    """Which ranks moved."""
    buckets = run.tables.get("buckets")
    needed = ("role", "low", "high", "mean_rank_change")
    if buckets is None or not has_columns(buckets, needed):
        return None
    # Of an empty bucket the mean is no number; it has no bar.
    rows = [row for row in buckets.rows() if row["role"] == buckets["role"][0]]
    rows = [row for row in rows if row["mean_rank_change"] == row["mean_rank_change"]]
    if not rows:
        return None
    top = max(rows, key=lambda row: row["mean_rank_change"])
    low = min(rows, key=lambda row: row["mean_rank_change"])
    words = (
        f"Mean absolute rank change by percentile of rank before training: most, "
        f"{top['mean_rank_change']:,.0f} ranks, at {top['low']:g} to {top['high']:g}%; least, "
        f"{low['mean_rank_change']:,.0f}, at {low['low']:g} to {low['high']:g}%."
    )
    return Drawn(figures.draw_buckets(buckets), words)


def figure5(run: RunData) -> Drawn | None:
    """Avg(dRank), of all neurons and by projection."""
    table = run.tables.get("neurons")
    if table is None or not has_columns(table, ("role", "rank_change")):
        return None
    changes = np.abs(np.asarray(table["rank_change"], dtype=np.float64))
    groups = _by_role(table["role"])
    values = [float(changes[own].mean()) for own in groups.values()]
    sizes = [int(np.count_nonzero(own)) for own in groups.values()]
    by_chance = [unrelated_change(size) for size in sizes]
    labels = list(groups)
    if len(groups) > 1:
        labels = ["all", *labels]
        values = [float(changes.mean()), *values]
        by_chance = [float(np.average(by_chance, weights=sizes)), *map(float, by_chance)]
    parts = [
        f"{label} {value:,.0f} ({share(value, chance)} of what unrelated orders would give)"
        for label, value, chance in zip(labels, values, by_chance, strict=True)
    ]
    words = f"Average absolute rank change between base and trained model: {listed(parts)}."
    return Drawn(figures.draw_rank_changes(labels, values, by_chance), words)


def _by_role(column: Column) -> dict[str, NDArray[np.bool_]]:
    roles = np.asarray(column, dtype=str)
    return {role: roles == role for role in _in_order(set(roles.tolist()))}


def affected_counts(run: RunData) -> dict[str, int] | None:
    """Figure 6's three types -> number of neurons."""
    table = run.tables.get("neurons")
    flags = ("strong", "suppressed", "indirect")
    if table is None or not has_columns(table, flags):
        return None
    labels = ("strongly affected", "suppressed", "indirectly affected")
    return {
        label: int(np.count_nonzero(np.asarray(table[flag], dtype=bool)))
        for label, flag in zip(labels, flags, strict=True)
    }


def figure6(run: RunData) -> Drawn | None:
    """How many neurons changed their rank a lot."""
    counts = affected_counts(run)
    if counts is None:
        return None
    total = len(run.tables["neurons"])
    parts = [f"{count:,} {label} ({share(count, total)})" for label, count in counts.items()]
    return Drawn(figures.draw_affected(counts), f"Of {total:,} neurons: {listed(parts)}.")


def overlap(run: RunData) -> Drawn | None:
    """Shared neurons of selections."""
    table = run.tables.get("overlap")
    if table is None or not has_columns(table, ("a", "b", "percent", "share", "chance_share")):
        return None
    rows = [row for row in figures.whole_model(table) if row["a"] != row["b"]]
    if not rows:
        return None
    parts = [
        f"{row['a']} and {row['b']}"
        + ("" if row["percent"] is None else f" at {row['percent']:g}%")
        + f" share {share(row['share'], 1)} (chance {share(row['chance_share'], 1)})"
        for row in rows[:12]
    ]
    rest = f" and {len(rows) - 12} more in the table" if len(rows) > 12 else ""
    words = f"Overlap of selections: {'; '.join(parts)}{rest}."
    return Drawn(figures.draw_overlap(table), words)


def causal(run: RunData) -> Drawn | None:
    """What each group of neurons buys."""
    table = run.tables.get("causal")
    if table is None or not has_columns(table, ("group", "kind", "num_neurons", "task_rise")):
        return None
    rows = [row for row in table.rows() if row["num_neurons"] and row["kind"] != "layer"]
    parts = [f"{row['group']}: {_rises(row)}" for row in rows]
    layers = [row for row in table.rows() if row["kind"] == "layer"]
    if layers:
        most = max(layers, key=lambda row: row["task_rise"])
        parts.append(f"of the layers, {most['group']} the most: {_rises(most)}")
    if not parts:
        return None
    words = f"Rise of the loss after restoring {'; '.join(parts)}."
    return Drawn(figures.draw_causal(table), words)


def _rises(row: Mapping[str, Any]) -> str:
    general = row.get("general_rise")
    words = f"{row['task_rise']:+.3f} on the task"
    return (
        words
        if general is None or general != general
        else f"{words}, {general:+.3f} on general text"
    )


_DRAWN: Mapping[str, tuple[Callable[[RunData], Drawn | None], str]] = {
    "training": (training, ""),
    "neurons": (neurons, ""),
    "scores": (scores, ""),
    "figure3": (figure3, _ANALYSIS),
    "figure5": (figure5, _ANALYSIS),
    "figure6": (figure6, _ANALYSIS),
    "overlap": (overlap, _OVERLAP),
    "causal": (causal, _CAUSAL),
}

PLOTS: Mapping[str, Plot] = {
    name: Plot(description, *_DRAWN[name]) for name, description in DESCRIPTIONS.items()
}
"""Name -> figure."""
