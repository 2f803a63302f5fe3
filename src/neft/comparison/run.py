"""From a comparison to its tables: cells one after the other or side by side, each of them resumable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from neft.comparison.cells import Cells, Job
from neft.comparison.plan import Forecast, Plan, RowState
from neft.comparison.results import TaskResult, as_json, collect
from neft.comparison.schema import Comparison
from neft.comparison.table import draw_figures, markdown
from neft.comparison.work import Workers
from neft.errors import RecipeError, UsageError
from neft.files import write_json, write_text
from neft.pipeline.identity import model_identity
from neft.pipeline.prepare import check_data, check_method
from neft.pipeline.provenance import machine, package_versions, source_commit
from neft.pipeline.run import LOCK, Say, duration
from neft.pipeline.store import locked

RECIPE = "comparison.yaml"
RESULTS = "results.json"
TABLE = "results.md"


@dataclass(frozen=True)
class Compared:
    """How a comparison ended."""

    results: Sequence[TaskResult]
    failures: Sequence[str]
    """One line a row that could not be finished."""
    table: Path
    figures: Sequence[Path]


def compare(
    comparison: Comparison, *, num_jobs: int = 1, retry: bool = False, say: Say
) -> Compared:
    """Bring every cell of a comparison to its end, and write tables and figures.

    What is done already is skipped, what was cut off continues. A cell that fails is reported, and the
    others go on; it is not tried again unless ``retry`` says so.

    Args:
        comparison: what is compared.
        num_jobs: cells at a time: one a GPU, or with an equal share of the cores each.
        retry: try again what failed.
        say: is told what happens.

    Raises:
        RecipeError: every fault of every cell, before the first one runs.
        RunError: another process works in the output folder.
    """
    cells = Cells(comparison)
    plan = Plan(cells)
    with locked(cells.output / LOCK):
        cells.settle()
        if retry:
            cells.forget_failures()
        if plan.ready():
            say("checking data, model and budgets of all cells")
            check(comparison)
        write_text(cells.output / RECIPE, _as_yaml(comparison))
        _work_off(cells, plan, num_jobs, say)
        return _publish(cells, plan)


def check(comparison: Comparison) -> None:
    """Find out what would stop a cell, for all of them, before the first one runs.

    Raises:
        RecipeError: lists what is wrong, with the first cell where it is.
    """
    faults: dict[str, str] = {}
    seen: set[str] = set()
    for task, entry, recipe in comparison.first_cells():
        for what, key in (
            (check_data, f"{recipe.data} {recipe.warmup} {recipe.evaluate}"),
            (check_method, f"{recipe.train} {recipe.select} {recipe.score} {recipe.warmup}"),
        ):
            if key in seen:
                continue
            seen.add(key)
            try:
                what(recipe)
            except UsageError as error:
                faults.setdefault(str(error), f"task {task!r}, method {entry.name!r}")
    if faults:
        lines = "\n".join(f"  {place}: {fault}" for fault, place in faults.items())
        raise RecipeError(f"Nothing has been run; some cells cannot:\n{lines}")


def _work_off(cells: Cells, plan: Plan, num_jobs: int, say: Say) -> None:
    forecast = Forecast(cells, plan)
    logs = cells.output / "logs" if num_jobs > 1 else None
    num_done = 0
    with Workers(num_jobs, logs) as workers:
        while True:
            running = {job.folder for job in workers.running}
            for job in plan.ready():
                if workers.num_idle and job.folder not in running:
                    say(f"{job}: {'continues' if _was_begun(job) else 'starts'}")
                    workers.start(job)
                    running.add(job.folder)
            if not running:
                return
            outcome = workers.next_outcome()
            job = outcome.job
            if outcome.failure is not None:
                cells.note_failure(job, outcome.failure)
                say(f"{job}: failed: {outcome.failure}")
                continue
            num_done += 1
            forecast.note(job, outcome.seconds)
            if not cells.comparison.keep_models:
                for cell in plan.spent():
                    cells.release(cell)
            say(f"{job}: done, in {duration(outcome.seconds)}{_left(forecast, num_jobs)}")


def _was_begun(job: Job) -> bool:
    return job.folder.with_name(f".{job.folder.name}.partial").exists()


def _left(forecast: Forecast, num_jobs: int) -> str:
    seconds = forecast.seconds_left(num_jobs)
    if seconds is None or not seconds:
        return ""
    return f"; about {duration(math.ceil(seconds))} left"


def _publish(cells: Cells, plan: Plan) -> Compared:
    results = collect(cells, plan)
    provenance: dict[str, Any] = {
        "model": model_identity(cells.comparison.model),
        "machine": machine(),
        "packages": package_versions(),
        "commit": source_commit(),
    }
    failures = [
        f"{row.task}, {row.name}: {row.failure or next(filter(None, map(plan.failure, row.cells)))}"
        for row in plan.rows()
        if plan.state(row) is RowState.FAILED
    ]
    write_json(
        cells.output / RESULTS,
        {
            "comparison": cells.comparison.model_dump(mode="json"),
            "provenance": provenance,
            "tasks": as_json(results),
            "failures": failures,
        },
    )
    table = cells.output / TABLE
    write_text(table, markdown(cells.comparison, results, provenance))
    figures = draw_figures(cells.comparison, results, cells.output)
    return Compared(results, failures, table, figures)


def _as_yaml(comparison: Comparison) -> str:
    return yaml.safe_dump(comparison.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
