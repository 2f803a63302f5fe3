"""From a comparison to its tables: cells one after the other or side by side, each of them resumable."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import yaml

from neft.comparison.cells import Cells, Job
from neft.comparison.earlier import check_earlier
from neft.comparison.plan import Forecast, Plan
from neft.comparison.publish import Compared, publish
from neft.comparison.schema import Comparison
from neft.comparison.work import Workers, no_workers
from neft.errors import DataError, RecipeError, UsageError
from neft.evaluation import METRICS_OF_TASK
from neft.files import write_text
from neft.pipeline.identity import data_identity
from neft.pipeline.prepare import check_data, check_method
from neft.pipeline.run import COMPARISON, LOCK, Say, duration
from neft.pipeline.store import locked
from neft.recipe import Recipe

_WORKERS_LOCK = ".workers.lock"


def compare(
    comparison: Comparison,
    *,
    num_jobs: int = 1,
    retry: bool = False,
    overwrite: bool = False,
    say: Say,
) -> Compared:
    """Bring every cell of a comparison to its end, and write tables and figures.

    What is done already is skipped, what was cut off continues. A cell that fails is reported, and the
    others go on; it is not tried again unless ``retry`` says so.

    Args:
        comparison: what is compared.
        num_jobs: cells at a time: one a GPU, or with an equal share of the cores each.
        retry: try again what failed.
        overwrite: replace the tables of a comparison with other settings.
        say: is told what happens.

    Raises:
        UsageError: a run, or a comparison with other settings, is in the output folder.
        RecipeError: every fault of every cell, before the first one runs.
        RunError: another process works in the output folder.
    """
    cells = Cells(comparison)
    plan = Plan(cells)
    with locked(cells.output / LOCK), _interrupted_by_sigterm():
        check_earlier(cells.output, comparison, overwrite=overwrite)
        with no_workers(cells.output / _WORKERS_LOCK):
            cells.settle()
        if retry:
            cells.forget_failures()
        if _is_open(plan):
            say("checking data, model and budgets of all cells")
            check(comparison)
        write_text(cells.output / COMPARISON, _as_yaml(comparison))
        _work_off(cells, plan, num_jobs, say)
        return publish(cells, plan)


def _is_open(plan: Plan) -> bool:
    try:
        return bool(plan.ready())
    except UsageError:
        return True  # a file that has gone, say: the check tells where it is wanted


def check(comparison: Comparison) -> None:
    """Find out what would stop a cell, for all of them, before the first one runs.

    Raises:
        RecipeError: lists what is wrong, with the first cell where it is.
    """
    faults: dict[str, str] = {}
    seen: set[tuple[object, str]] = set()
    for task, entry in chain(comparison.first_cells(), comparison.lent_cells()):
        recipe = comparison.first_recipe(task, entry)
        for what, about in (
            (_faults_of_data, f"{recipe.data} {recipe.warmup} {recipe.score} {recipe.evaluate}"),
            (_faults_of_method, f"{recipe.train} {recipe.select} {recipe.score} {recipe.warmup}"),
        ):
            if (what, about) in seen:
                continue
            seen.add((what, about))
            for fault in what(recipe):
                faults.setdefault(fault, f"task {task!r}, method {entry.name!r}")
        for fault in _faults_of_figures(comparison, recipe):
            faults.setdefault(fault, f"task {task!r}")
    if faults:
        lines = "\n".join(f"  {place}: {fault}" for fault, place in faults.items())
        raise RecipeError(f"Nothing has been run; some cells cannot:\n{lines}")


def _faults_of_data(recipe: Recipe) -> list[str]:
    return list(_missing_files(recipe)) or _refusal(check_data, recipe)


def _faults_of_method(recipe: Recipe) -> list[str]:
    return _refusal(check_method, recipe)


def _refusal(check: Callable[[Recipe], object], recipe: Recipe) -> list[str]:
    try:
        check(recipe)
    except UsageError as error:
        return [str(error)]
    return []


def _missing_files(recipe: Recipe) -> Iterator[str]:
    """What is wrong with each data file that is not there, by its place in the recipe."""
    sources = {f"data.{split}": getattr(recipe.data, split) for split in ("train", "dev", "test")}
    if recipe.warmup is not None:
        sources |= {"warmup.train": recipe.warmup.train, "warmup.dev": recipe.warmup.dev}
    if recipe.evaluate.general is not None:
        sources["evaluate.general.text"] = recipe.evaluate.general.text
    for place, source in sources.items():
        if source is not None:
            try:
                data_identity(source, place)
            except DataError as error:
                yield str(error)


def _faults_of_figures(comparison: Comparison, recipe: Recipe) -> Iterator[str]:
    metrics = METRICS_OF_TASK[recipe.data.task]
    for figure in comparison.figures:
        if figure.metric is not None and figure.metric not in metrics:
            yield (
                f"figure {figure.file!r}: metric {figure.metric!r} is none of this task's: "
                f"{', '.join(metrics)}"
            )


def _work_off(cells: Cells, plan: Plan, num_jobs: int, say: Say) -> None:
    forecast = Forecast(cells, plan)
    logs = cells.output / "logs" if num_jobs > 1 else None
    with Workers(num_jobs, cells.output / _WORKERS_LOCK, logs) as workers:
        while True:
            running = {job.folder for job in workers.running}
            _release(cells, plan)
            for job in plan.ready():
                if workers.num_idle and job.folder not in running:
                    say(f"{job}: {'continues' if _was_begun(job) else 'starts'}")
                    workers.start(job)
                    running.add(job.folder)
            if not running:
                return
            outcome = workers.next_outcome()
            job = outcome.job
            cells.forget(job)
            if outcome.failure is not None:
                cells.note_failure(job, outcome.failure)
                say(f"{job}: failed: {outcome.failure.reason}")
                continue
            forecast.note(job, outcome.seconds)
            say(f"{job}: done, in {duration(outcome.seconds)}{_left(forecast, plan, num_jobs)}")


def _release(cells: Cells, plan: Plan) -> None:
    if not cells.comparison.keep_models:
        for train in plan.spent():
            cells.release(train)


def _was_begun(job: Job) -> bool:
    return job.folder.with_name(f".{job.folder.name}.partial").exists()


def _left(forecast: Forecast, plan: Plan, num_jobs: int) -> str:
    num_open = len(plan.open())
    if not num_open:
        return ""
    seconds = forecast.seconds_left(num_jobs)
    about = "" if seconds is None else f", about {duration(math.ceil(seconds))}"
    return f"; left: {num_open} stages{about}"


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end a comparison as Ctrl-C does: workers keep what they have done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _as_yaml(comparison: Comparison) -> str:
    return yaml.safe_dump(comparison.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
