"""A comparison as Markdown tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neft.comparison.plan import RowState
from neft.comparison.results import RowResult, TaskResult
from neft.comparison.schema import Comparison, FigureEntry
from neft.report.figures import Panel, Point, draw_scores


def markdown(
    comparison: Comparison,
    results: Sequence[TaskResult],
    failures: Sequence[str],
    provenance: Mapping[str, Any],
) -> str:
    """One table a task, the learning rates that were tried, and what the numbers came from."""
    parts = [_task_table(comparison, result) for result in results]
    if failures:
        parts.append("\n".join(["## Failures", "", *(f"- {_one_line(line)}" for line in failures)]))
    return "\n\n".join([*parts, _provenance(comparison, provenance)]) + "\n"


def _task_table(comparison: Comparison, result: TaskResult) -> str:
    metrics = list(result.base.scores)
    with_general = result.base.general_loss is not None
    header = ["method", "trained", "%", "rate", "dev loss", *metrics]
    header += [f"{metrics[0]} - reference (p)"]
    header += ["forgetting"] if with_general else []
    header += ["s a step", "memory"]
    base = ["base model", "-", "-", "-", "-"]
    base += [f"{score.score:.1f}" for score in result.base.scores.values()] + ["-"]
    base += ["-"] if with_general else []
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), [*base, "-", "-"]]
    lines += [_row(row, result, metrics, with_general) for row in result.rows]
    notes = [f"{name}: `{score.signature}`" for name, score in result.base.scores.items()]
    return "\n".join(
        [
            f"## {result.task}",
            "",
            f"{result.num_examples} test examples. {_seeds(comparison)} Reference: "
            f"{comparison.reference_row}; p: {_test(result, metrics[0])}, over the choice of test "
            "examples, not of seeds. Bold: above every other complete row at "
            f"p < {comparison.significance:g}.",
            "",
            *("| " + " | ".join(cells) + " |" for cells in lines),
            "",
            *(f"- {note}" for note in notes),
            *(["- " + _general_note(result)] if with_general else []),
            "",
            *_rates(result),
        ]
    )


def _test(result: TaskResult, metric: str) -> str:
    signatures = [
        row.metrics[metric].test_signature
        for row in result.rows
        if metric in row.metrics and row.metrics[metric].test_signature
    ]
    return f"paired approximate randomization (`{signatures[0]}`)" if signatures else "not tested"


def _seeds(comparison: Comparison) -> str:
    if len(comparison.seeds) == 1:
        return f"One seed ({comparison.seeds[0]})."
    named = ", ".join(map(str, comparison.seeds))
    return f"Mean ± standard deviation over seeds {named}."


def _general_note(result: TaskResult) -> str:
    return (
        "forgetting: rise of the loss on held-out general text, in nats a token; that of the base "
        f"model is {result.base.general_loss:.3f}"
    )


def _row(
    row: RowResult, result: TaskResult, metrics: Sequence[str], with_general: bool
) -> list[str]:
    if not row.seeds:
        why = row.failure or "not finished"
        return [
            _name(row),
            *["-"] * 3,
            f"{row.state}: {_one_line(why)}",
            *["-"] * (len(metrics) + 3),
        ] + (["-"] if with_general else [])
    assert row.rate is not None
    assert row.num_trainable is not None
    losses = [seed.dev_loss for seed in row.seeds]
    cells = [
        _name(row),
        f"{row.num_trainable:,}",
        f"{100 * row.num_trainable / result.num_parameters:.2f}",
        f"{row.rate:g}" + ("†" if row.rate_at_edge else "") + ("‡" if row.rate_of else ""),
        f"{sum(losses) / len(losses):.3f}",
    ]
    for metric in metrics:
        summary = row.metrics[metric]
        text = f"{summary.mean:.1f}" + (
            f" ± {summary.spread:.1f}" if summary.spread is not None else ""
        )
        cells.append(f"**{text}**" if summary.is_best else text)
    first = row.metrics[metrics[0]]
    cells.append(
        "-"
        if first.difference is None or first.p_value is None
        else f"{first.difference:+.1f} ({_p_value(first.p_value)})"
    )
    if with_general:
        cells.append("-" if row.forgetting is None else f"{row.forgetting:+.3f}")
    times = [seed.seconds_per_step for seed in row.seeds]
    return [*cells, f"{sum(times) / len(times):.2f}", _memory(row)]


def _memory(row: RowResult) -> str:
    """The largest peak of its training runs."""
    peaks = [seed.peak_memory_bytes for seed in row.seeds if seed.peak_memory_bytes is not None]
    return f"{max(peaks) / 1e9:.2f} GB" if peaks else "-"


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _name(row: RowResult) -> str:
    """The row's name, with what is missing of it."""
    name = _one_line(row.name)
    if row.state == RowState.DONE or not row.seeds:
        return name
    return f"{name} ({row.state}, {len(row.seeds)} seed{'s' * (len(row.seeds) > 1)})"


def _one_line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def _rates(result: TaskResult) -> list[str]:
    """The grids, so that a reader sees whether every method got its chance."""
    tried = [row for row in result.rows if row.trials]
    lines = [
        f"- {row.name}: "
        + ", ".join(
            f"{trial.rate:g} " + _loss(trial.dev_loss) + ("*" if trial.rate == row.rate else "")
            for trial in row.trials
        )
        for row in tried
    ]
    notes = []
    if any(row.rate_at_edge for row in result.rows):
        notes.append(
            "† the best of the rates tried is the lowest or highest: a better one may lie beyond."
        )
    if any(row.rate_of for row in result.rows):
        notes.append("‡ takes the rate of another row.")
    return [
        *notes,
        *([""] if notes else []),
        "Development loss by learning rate (* chosen):",
        "",
        *lines,
    ]


def _loss(loss: float | None) -> str:
    if loss is None:
        return "..."
    return f"{loss:.3f}" if loss < float("inf") else "failed"


def _provenance(comparison: Comparison, provenance: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in provenance["packages"].items())
    machine = ", ".join(f"{key} {value}" for key, value in provenance["machine"].items())
    return "\n".join(
        [
            "## Where these numbers come from",
            "",
            f"- model: `{comparison.model.path}` ({provenance['model']})",
            f"- machine: {machine}",
            f"- versions: {packages}",
            f"- commit: {provenance['commit'] or 'not run from a git checkout'}",
        ]
    )


def draw_figures(comparison: Comparison, results: Sequence[TaskResult], folder: Path) -> list[Path]:
    """Every figure of a comparison that has at least one finished point."""
    drawn: list[Path] = []
    for entry in comparison.figures:
        panels = [_panel(entry, result) for result in results]
        panels = [panel for panel in panels if any(panel.series.values())]
        if panels:
            drawn += draw_scores(folder / entry.file, panels, entry.title)
    return drawn


def _panel(entry: FigureEntry, result: TaskResult) -> Panel:
    metric = entry.metric or next(iter(result.base.scores))
    rows = {row.name: row for row in result.rows if metric in row.metrics}
    series = {
        name: [_point(rows[row], metric) for row in members if row in rows]
        for name, members in entry.series.items()
    }
    return Panel(result.task, metric, series, result.base.scores[metric].score)


def _point(row: RowResult, metric: str) -> Point:
    summary = row.metrics[metric]
    assert row.num_trainable is not None
    return Point(row.name, row.num_trainable, summary.mean, summary.spread)
