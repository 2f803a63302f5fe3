"""What a comparison found out, from its finished folders: means, spreads, differences, provenance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neft.comparison.cells import Cell, Cells, read_training
from neft.comparison.plan import Plan, Row, RowState
from neft.comparison.tuning import Trial
from neft.evaluation import Paired, Score, significance
from neft.pipeline.evaluate import PREDICTIONS, Evaluation, read_evaluation, read_predictions


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
    num_trainable: int
    folders: Mapping[str, str]
    """Stage -> its folder, relative to the comparison's output."""
    packages: Mapping[str, str]
    commit: str | None


@dataclass(frozen=True)
class Summary:
    """One metric of one row over its seeds."""

    mean: float
    spread: float | None
    """Standard deviation over seeds (n - 1); ``None`` for a single seed."""
    difference: float | None
    """To the reference row."""
    p_value: float | None
    """Of that difference."""
    is_best: bool
    """The highest mean of its task, and significantly above every other row."""


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
    num_parameters: int
    """Of the base model."""
    data: Mapping[str, str]
    """Split -> identity of its content."""
    rows: tuple[RowResult, ...]


def collect(cells: Cells, plan: Plan) -> list[TaskResult]:
    """Everything that is finished; tasks without a single evaluated cell are left out."""
    comparison = cells.comparison
    rows = plan.rows()
    found = []
    for task in comparison.tasks:
        of_task = [row for row in rows if row.task == task]
        seeds = {row.name: _seed_results(cells, row) for row in of_task}
        evaluated = [(row, seeds[row.name]) for row in of_task if seeds[row.name]]
        if evaluated:
            found.append(_task_result(cells, plan, task, of_task, seeds))
    return found


def _task_result(
    cells: Cells,
    plan: Plan,
    task: str,
    rows: Sequence[Row],
    seeds: Mapping[str, tuple[SeedResult, ...]],
) -> TaskResult:
    cell = next(row.cells[0] for row in rows if seeds[row.name])
    baseline, train = cells.job(cell, "baseline"), cells.job(cell, "train")
    assert baseline is not None
    assert train is not None
    base = read_evaluation(baseline.folder)
    metrics = _metrics(cells, task, rows, seeds, list(base.scores))
    return TaskResult(
        task,
        base.num_examples,
        base,
        read_training(train.folder)["num_parameters"],
        {
            split: (train if split != "test" else baseline).record.ingredients[f"data.{split}"]
            for split in ("train", "dev", "test")
        },
        tuple(
            RowResult(
                task,
                row.name,
                row.entry.method,
                plan.state(row),
                row.failure or next(filter(None, map(plan.failure, row.cells)), None),
                row.trials,
                row.rate,
                row.entry.rate_of,
                row.at_edge,
                seeds[row.name],
                metrics.get(row.name, {}),
                _forgetting(base, seeds[row.name]),
            )
            for row in rows
        ),
    )


def _seed_results(cells: Cells, row: Row) -> tuple[SeedResult, ...]:
    return tuple(result for cell in row.cells if (result := _seed_result(cells, cell)) is not None)


def _seed_result(cells: Cells, cell: Cell) -> SeedResult | None:
    job = cells.job(cell, "evaluate")
    record = None if job is None else cells.finished(job)
    if job is None or record is None:
        return None
    evaluation = read_evaluation(job.folder)
    training = read_training(job.inputs["train"])
    return SeedResult(
        cell.seed,
        evaluation.scores,
        evaluation.general_loss,
        training["best_dev_loss"],
        training["best_step"],
        training["num_steps"],
        training["seconds_per_step"],
        training["num_trainable"],
        {
            stage: str(folder.relative_to(cells.output))
            for stage, folder in {**job.inputs, "evaluate": job.folder}.items()
        },
        record.packages,
        record.commit,
    )


def _forgetting(base: Evaluation, seeds: Sequence[SeedResult]) -> float | None:
    losses = [result.general_loss for result in seeds if result.general_loss is not None]
    if base.general_loss is None or not losses:
        return None
    return statistics.fmean(losses) - base.general_loss


def _metrics(
    cells: Cells,
    task: str,
    rows: Sequence[Row],
    seeds: Mapping[str, tuple[SeedResult, ...]],
    metrics: Sequence[str],
) -> dict[str, dict[str, Summary]]:
    """Row -> metric -> its summary."""
    texts = {
        row.name: _predictions(cells, row)
        for row in rows
        if row.cells and len(seeds[row.name]) == len(row.cells)
    }
    found: dict[str, dict[str, Summary]] = {row.name: {} for row in rows if seeds[row.name]}
    for metric in metrics:
        means = {
            name: statistics.fmean(result.scores[metric].score for result in seeds[name])
            for name in found
        }
        to_reference = _tests(cells, task, metric, texts, cells.comparison.reference_row)
        best = max(texts, key=means.__getitem__, default=None)
        to_best = {} if best is None else _tests(cells, task, metric, texts, best)
        level = cells.comparison.significance
        stands_out = bool(to_best) and all(pair.p_value < level for pair in to_best.values())
        for name, mean in means.items():
            values = [result.scores[metric].score for result in seeds[name]]
            paired = to_reference.get(name)
            found[name][metric] = Summary(
                mean,
                statistics.stdev(values) if len(values) > 1 else None,
                None if paired is None else paired.difference,
                None if paired is None else paired.p_value,
                name == best and stands_out,
            )
    return found


def _predictions(cells: Cells, row: Row) -> tuple[list[str], list[str]]:
    """Predictions and references of all seeds, one seed after the other."""
    predictions: list[str] = []
    references: list[str] = []
    for cell in row.cells:
        job = cells.job(cell, "evaluate")
        assert job is not None
        for line in read_predictions(job.folder / PREDICTIONS):
            predictions.append(line.prediction)
            references.append(line.reference)
    return predictions, references


def _tests(
    cells: Cells,
    task: str,
    metric: str,
    texts: Mapping[str, tuple[list[str], list[str]]],
    baseline: str,
) -> Mapping[str, Paired]:
    """Each row against ``baseline``; none if that has no results."""
    if baseline not in texts:
        return {}
    recipe = cells.recipe(next(c for r in Plan(cells).rows() if r.task == task for c in r.cells))
    return significance(
        metric,
        {name: predictions for name, (predictions, _) in texts.items()},
        texts[baseline][1],
        baseline,
        target_language=recipe.data.target_language,
        lowercase=recipe.evaluate.lowercase,
        labels=recipe.data.labels,
        num_runs=len(cells.comparison.seeds),
    )


def as_json(results: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """As plain JSON values; an infinite development loss (training failed) becomes null."""
    from dataclasses import asdict

    return [_finite(asdict(result)) for result in results]


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value


def is_complete(results: Sequence[TaskResult]) -> bool:
    """Whether nothing failed and nothing is left to do."""
    return all(row.state == RowState.DONE for result in results for row in result.rows)
