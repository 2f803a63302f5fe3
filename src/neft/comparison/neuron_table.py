"""What methods did to the neurons, as Markdown tables and figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from neft.analysis.ranks import EDGES
from neft.analysis.table import Table
from neft.comparison.markdown import table
from neft.comparison.neurons import PERCENTS, TaskNeurons
from neft.comparison.schema import Comparison
from neft.report.method_figures import (
    save_affected,
    save_bucket_lines,
    save_rank_changes,
    save_selections,
)


def neurons_markdown(tasks: Sequence[TaskNeurons]) -> str:
    """Tables of what was found, one section a task."""
    return "\n".join(line for task in tasks for line in _section(task))


def draw_neurons(comparison: Comparison, tasks: Sequence[TaskNeurons], folder: Path) -> list[Path]:
    """Figures 3, 5 and 6 and Table 5 of each task, as far as there is data."""
    drawn: list[Path] = []
    for task in tasks:
        stem = folder / f"{task.task}-neurons"
        buckets = {row.name: row.buckets for row in task.rows}
        drawn += save_bucket_lines(
            stem.with_name(f"{stem.name}-buckets"), EDGES, buckets, task.unrelated
        )
        pairs = dict(_to_reference(comparison, task))
        if pairs:
            drawn += save_rank_changes(stem.with_name(f"{stem.name}-pairs"), pairs, task.unrelated)
        counts = {row.name: (row.strong, row.suppressed, row.indirect) for row in task.rows}
        drawn += save_affected(stem.with_name(f"{stem.name}-affected"), counts)
        if task.selections:
            overlap = Table(_by_column(task.selections))
            drawn += save_selections(stem.with_name(f"{stem.name}-overlap"), overlap)
    return drawn


def _by_column(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _to_reference(comparison: Comparison, task: TaskNeurons) -> Iterator[tuple[str, float]]:
    """Every other method and how far its order lies from that of the reference row."""
    reference = comparison.reference_row
    for pair in task.pairs:
        if reference in (pair.a, pair.b):
            other = pair.b if pair.a == reference else pair.a
            yield other, pair.average_rank_change


def _section(task: TaskNeurons) -> list[str]:
    return [
        f"## {task.task}: neurons",
        "",
        f"{task.num_neurons:,} neurons, ranked by utilization in each projection's own list, against "
        f"the base model; two unrelated orders would differ by {task.unrelated:,.0f} ranks.",
        "",
        *_changes(task),
        *_buckets(task),
        *_pairs(task),
        *_selections(task),
        *_causal(task),
    ]


def _changes(task: TaskNeurons) -> list[str]:
    """Figure 6 and averages."""
    roles = list(task.rows[0].by_role)
    header = ["method", "average rank change", *roles, "strongly affected", "suppressed"]
    return table(
        [*header, "indirectly affected", "change of trained vectors"],
        [
            [
                row.name,
                f"{row.average_rank_change:,.0f}"
                + (f" ± {row.spread:,.0f}" if row.spread is not None else ""),
                *(f"{row.by_role[role]:,.0f}" for role in roles),
                *(f"{count:,.0f}" for count in (row.strong, row.suppressed, row.indirect)),
                f"{100 * row.change:.1f}%",
            ]
            for row in task.rows
        ],
    )


def _buckets(task: TaskNeurons) -> list[str]:
    """Figure 3."""
    percentiles = [f"{low:g}-{high:g}" for low, high in pairwise(EDGES)]
    rows = [[row.name, *(f"{mean:,.0f}" for mean in row.buckets)] for row in task.rows]
    return [
        "Mean |rank change| against the base model, by percentile of rank there:",
        "",
        *table(["method", *percentiles], rows),
    ]


def _pairs(task: TaskNeurons) -> list[str]:
    """Figure 5."""
    if not task.pairs:
        return []
    names = [row.name for row in task.rows]
    found = {frozenset((pair.a, pair.b)): pair.average_rank_change for pair in task.pairs}
    rows = [[a, *(_shown(found.get(frozenset((a, b)))) for b in names)] for a in names]
    return ["Average rank change between methods:", "", *table(["", *names], rows)]


def _selections(task: TaskNeurons) -> list[str]:
    """Table 5."""
    if not task.selections:
        return []
    shares = {(row["a"], row["b"], row["percent"]): row for row in task.selections}
    rows = [
        [
            f"{a}, {b}",
            *(
                f"{100 * shares[a, b, percent]['share']:.0f}% "
                f"({100 * shares[a, b, percent]['chance_share']:.0f}%)"
                for percent in PERCENTS
            ),
        ]
        for a, b in combinations(dict.fromkeys(row["a"] for row in task.selections), 2)
    ]
    return [
        "Overlap of what the warm-ups would choose, and by chance:",
        "",
        *table(["warm-ups", *(f"{percent}%" for percent in PERCENTS)], rows),
    ]


def _causal(task: TaskNeurons) -> Iterator[str]:
    for name, groups in task.causal.items():
        yield f"Loss of {name} with groups of its neurons put back to what they were:"
        yield ""
        losses = [column for column in groups[0] if column not in ("group", "kind", "num_neurons")]
        yield from table(
            ["group", "neurons", *(column.replace("_", ", ") for column in losses)],
            [
                [
                    group["group"],
                    f"{group['num_neurons']:,}",
                    *(
                        f"{group[column]:+.3f}"
                        if column.endswith("rise")
                        else f"{group[column]:.3f}"
                        for column in losses
                    ),
                ]
                for group in groups
            ],
        )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
