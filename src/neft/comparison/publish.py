"""What a comparison leaves to read: tables, figures, and the numbers behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neft.analysis.ranks import EDGES
from neft.comparison.cells import Cells
from neft.comparison.discovery import collect_discovery
from neft.comparison.discovery_table import discovery_markdown, draw_discovery
from neft.comparison.neuron_table import draw_neurons, neurons_markdown
from neft.comparison.neurons import collect_neurons
from neft.comparison.plan import Plan, Row
from neft.comparison.results import TaskResult, collect, plain
from neft.comparison.table import draw_figures, markdown
from neft.files import write_json, write_text
from neft.pipeline.identity import model_identity
from neft.pipeline.provenance import machine, package_versions, source_commit


@dataclass(frozen=True)
class Compared:
    """How a comparison ended."""

    results: Sequence[TaskResult]
    failures: Sequence[str]
    """One line a row that could not be finished."""
    table: Path
    figures: Sequence[Path]


def publish(cells: Cells, plan: Plan) -> Compared:
    """Write what is finished into the output folder: ``results`` of all rows; ``neurons`` where they were
    analysed, and ``discovery`` where rows found theirs in different ways; each as JSON and Markdown, and
    the figures.
    """
    comparison, folder = cells.comparison, cells.output
    provenance: dict[str, Any] = {
        "model": model_identity(comparison.model),
        "machine": machine(),
        "packages": package_versions(),
        "commit": source_commit(),
    }
    results = collect(cells, plan)
    failures = [_failure_line(row) for row in plan.rows() if row.failure is not None]
    shared: dict[str, Any] = {"provenance": provenance, "failures": failures}
    found: dict[str, Any] = {
        "comparison": comparison.model_dump(mode="json"),
        "tasks": plain(results),
    }
    text = markdown(comparison, results, failures, provenance)
    table = _write(folder / "results", shared | found, text)
    figures = draw_figures(comparison, results, folder)
    if neurons := collect_neurons(cells, plan):
        found = {"tasks": plain(neurons), "percentiles": EDGES}
        _write(folder / "neurons", shared | found, neurons_markdown(neurons))
        figures += draw_neurons(comparison, neurons, folder)
    if discovery := collect_discovery(cells, results):
        found = {"tasks": plain(discovery)}
        _write(folder / "discovery", shared | found, discovery_markdown(discovery))
        figures += draw_discovery(discovery, folder)
    return Compared(results, failures, table, figures)


def _write(stem: Path, content: Mapping[str, Any], text: str) -> Path:
    """Numbers as JSON, and a table to read; returns the table."""
    write_json(stem.with_suffix(".json"), content)
    table = stem.with_suffix(".md")
    write_text(table, text)
    return table


def _failure_line(row: Row) -> str:
    return f"{row.task}, {row.name}: {row.failure}"
