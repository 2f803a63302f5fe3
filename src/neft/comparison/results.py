"""What a comparison found out, from its finished folders: means, spreads, differences, provenance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from neft.comparison.cells import Cell, Cells, read_training
from neft.comparison.differences import Differences
from neft.comparison.plan import Plan, Row, RowState
from neft.comparison.tuning import Trial
from neft.evaluation import Paired, Score
from neft.pipeline.evaluate import Evaluation, read_evaluation
from neft.pipeline.store import Record


@dataclass(frozen=True)
class Provenance:
    """What made a number."""

    finished: str | None
    """When, in UTC."""
    packages: Mapping[str, str]
    commit: str | None
    machine: Mapping[str, str | int]


@dataclass(frozen=True)
class SeedResult:
    """One training run that was evaluated."""

    seed: int
    scores: Mapping[str, Score]
    general_loss: float | None
    dev_loss: float
    best_step: int
    num_steps: int
    seconds_per_step: float
    peak_memory_bytes: int | None
    """Of training, where it is known (see ``TrainingResult``)."""
    num_trainable: int
    folders: Mapping[str, str]
    """Stage -> its folder, relative to the comparison's output."""
    neurons_data: Mapping[str, str]
    """Split -> identity of the content on which the neurons were found; empty without a warm-up."""
    trained: Provenance
    evaluated: Provenance


@dataclass(frozen=True)
class Summary:
    """One metric of one row over its seeds."""

    mean: float
    spread: float | None
    """Standard deviation over seeds (n - 1); ``None`` for a single seed."""
    difference: float | None
    """Of the mean to that of the reference row."""
    p_value: float | None
    """Of that difference, over the choice of test examples."""
    test_signature: str | None
    """How that was tested."""
    is_best: bool
    """The highest mean of its task, and significantly above every other complete row."""


@dataclass(frozen=True)
class RowResult:
    """One method on one task."""

    task: str
    name: str
    method: str
    state: str
    failure: str | None
    trials: tuple[Trial, ...]
    rate: float | None
    rate_of: str | None
    """The row whose rate this one took."""
    rate_at_edge: bool
    """Whether the best rate is the lowest or highest of those tried: a better one may lie beyond."""
    seeds: tuple[SeedResult, ...]
    metrics: Mapping[str, Summary]
    forgetting: float | None
    """Mean change of the loss on general text, in nats a token; positive: forgotten."""

    @property
    def num_trainable(self) -> int | None:
        """Trained parameters."""
        return self.seeds[0].num_trainable if self.seeds else None


@dataclass(frozen=True)
class TaskResult:
    """All methods on one task."""

    task: str
    num_examples: int
    """Of the test split."""
    base: Evaluation
    base_evaluated: Provenance
    num_parameters: int
    """Of the base model."""
    data: Mapping[str, str]
    """Split, or ``general`` text -> identity of its content."""
    rows: tuple[RowResult, ...]


def collect(cells: Cells, plan: Plan) -> list[TaskResult]:
    """Everything that is finished; tasks without a single evaluated cell are left out."""
    rows = plan.rows()
    found = []
    for task in cells.comparison.tasks:
        of_task = [row for row in rows if row.task == task]
        if any(cells.is_evaluated(cell) for row in of_task for cell in row.cells):
            found.append(_task_result(cells, task, of_task))
    return found


def _task_result(cells: Cells, task: str, rows: Sequence[Row]) -> TaskResult:
    evaluated = {row.name: [c for c in row.cells if cells.is_evaluated(c)] for row in rows}
    jobs = cells.jobs(next(cell for found in evaluated.values() for cell in found))
    base = read_evaluation(jobs["baseline"].folder)
    seeds = {
        name: tuple(_seed_result(cells, cell) for cell in found)
        for name, found in evaluated.items()
    }
    metrics = _metrics(cells, rows, seeds, list(base.scores))
    return TaskResult(
        task=task,
        num_examples=base.num_examples,
        base=base,
        base_evaluated=_provenance(_record(cells, jobs["baseline"])),
        num_parameters=read_training(jobs["train"])["num_parameters"],
        data=_data(_record(cells, jobs["train"]), ("train", "dev"))
        | _data(_record(cells, jobs["baseline"]), ("test",))
        | _general_text(_record(cells, jobs["baseline"])),
        rows=tuple(
            RowResult(
                task=task,
                name=row.name,
                method=row.entry.method,
                state=row.state,
                failure=row.failure,
                trials=row.trials,
                rate=row.rate,
                rate_of=row.entry.rate_of,
                rate_at_edge=row.at_edge,
                seeds=seeds[row.name],
                metrics=metrics.get(row.name, {}),
                forgetting=_forgetting(base, seeds[row.name]),
            )
            for row in rows
        ),
    )


def _seed_result(cells: Cells, cell: Cell) -> SeedResult:
    jobs = cells.jobs(cell)
    evaluation = read_evaluation(jobs["evaluate"].folder)
    training = read_training(jobs["train"])
    warmup = jobs.get("warmup")
    return SeedResult(
        seed=cell.seed,
        scores=evaluation.scores,
        general_loss=evaluation.general_loss,
        dev_loss=training["best_dev_loss"],
        best_step=training["best_step"],
        num_steps=training["num_steps"],
        seconds_per_step=training["seconds_per_step"],
        peak_memory_bytes=training.get("peak_memory_bytes"),
        num_trainable=training["num_trainable"],
        folders={
            name: job.folder.relative_to(cells.output).as_posix() for name, job in jobs.items()
        },
        neurons_data={} if warmup is None else _data(warmup.record, ("train", "dev")),
        trained=_provenance(_record(cells, jobs["train"])),
        evaluated=_provenance(_record(cells, jobs["evaluate"])),
    )


def _record(cells: Cells, job: Any) -> Record:
    record = cells.finished(job)
    assert record is not None, job
    return record


def _provenance(record: Record) -> Provenance:
    return Provenance(record.finished, record.packages, record.commit, record.machine)


def _data(record: Record, splits: Sequence[str]) -> dict[str, str]:
    return {split: record.ingredients[f"data.{split}"] for split in splits}


def _general_text(record: Record) -> dict[str, str]:
    general = record.ingredients.get("evaluate.general")
    return {} if general is None else {"general": general["text"]}


def _forgetting(base: Evaluation, seeds: Sequence[SeedResult]) -> float | None:
    losses = [result.general_loss for result in seeds if result.general_loss is not None]
    if base.general_loss is None or not losses:
        return None
    return statistics.fmean(losses) - base.general_loss


def _metrics(
    cells: Cells,
    rows: Sequence[Row],
    seeds: Mapping[str, tuple[SeedResult, ...]],
    metrics: Sequence[str],
) -> dict[str, dict[str, Summary]]:
    """Row -> metric -> its summary, of the rows with results."""
    complete = {row.name: row.cells for row in rows if row.state is RowState.DONE}
    differences = Differences(cells, complete)
    found: dict[str, dict[str, Summary]] = {name: {} for name, results in seeds.items() if results}
    reference = cells.comparison.reference_row
    for metric in metrics:
        values = {name: [result.scores[metric].score for result in seeds[name]] for name in found}
        means = {name: statistics.fmean(scores) for name, scores in values.items()}
        tests = differences.from_baseline(metric, reference)
        best = _stands_out(differences, metric, means, complete, cells.comparison.significance)
        for name, scores in values.items():
            test: Paired | None = tests.get(name)
            found[name][metric] = Summary(
                mean=means[name],
                spread=statistics.stdev(scores) if len(scores) > 1 else None,
                difference=None if test is None else means[name] - means[reference],
                p_value=None if test is None else test.p_value,
                test_signature=None if test is None else test.signature,
                is_best=name == best,
            )
    return found


def _stands_out(
    differences: Differences,
    metric: str,
    means: Mapping[str, float],
    complete: Mapping[str, object],
    level: float,
) -> str | None:
    """The complete row with the highest mean, if it is significantly above every other."""
    if len(complete) < 2:
        return None
    best = max(complete, key=means.__getitem__)
    tests = differences.from_baseline(metric, best).values()
    return best if all(test.p_value < level for test in tests) else None


def plain(value: Any) -> Any:
    """Results as JSON values: a loss that is infinite, where training failed, becomes ``null``."""
    return _finite([asdict(item) for item in value])


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value
