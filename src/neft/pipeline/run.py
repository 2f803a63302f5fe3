"""From recipe to results: skip what is done, resume what was cut off, do what is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from neft.errors import OutOfMemoryError, UsageError
from neft.memory import naming_shortage, release_free_memory
from neft.pipeline.evaluate import Evaluation, read_evaluation
from neft.pipeline.prepare import recipe_of
from neft.pipeline.results import RESULTS, Results, read_results, trained_artifact
from neft.pipeline.stage import Stage
from neft.pipeline.stages import (
    analysis_stage,
    evaluation_stage,
    stages_of,
    training_stage,
)
from neft.pipeline.store import Record, StageFolder, State, differences, locked, record_of
from neft.recipe import AnalysisSection, Recipe

LOCK = ".lock"
COMPARISON = "comparison.yaml"
"""Stands in the output folder of a comparison."""

Say: TypeAlias = Callable[[str], None]
"""Is told, in a line each, what happens."""


def run(recipe: Recipe, *, overwrite: bool = False, say: Say) -> Results:
    """Do all that a recipe says, in its output folder.

    What is done already is skipped; a run that was killed goes on where it was, inside training too,
    and ends with the same result.

    Args:
        recipe: the whole run.
        overwrite: replace what another recipe left there. Old results stay until new ones are finished.
        say: is told what happens.

    Raises:
        UsageError: input that cannot be used; or the folder holds another recipe's results, or
            something that no run made. Nothing has been changed then.
        RunError: training broke down, or another process works in the folder.
    """
    output = Path(recipe.output).expanduser()
    if (output / COMPARISON).is_file():
        raise UsageError(
            f"{output}: holds a comparison (it has a {COMPARISON}), which a run would be mixed up with. "
            "Choose another output folder."
        )
    stages = stages_of(recipe)
    folders = {stage.name: StageFolder(output / stage.name) for stage in stages}
    run_stages(stages, folders, output / LOCK, overwrite=overwrite, say=say)
    return read_results(folders["evaluate"].path / RESULTS)


def train(
    recipe: Recipe, neurons: Path | None, folder: Path, *, overwrite: bool = False, say: Say
) -> Path:
    """Only train, with the neurons of a file; errors and resumption as in ``run``.

    Returns:
        The adapter or model in ``folder``.
    """
    folder = folder.expanduser().resolve()
    _run_alone(training_stage(recipe, neurons), folder, overwrite=overwrite, say=say)
    return trained_artifact(folder)


def evaluate(
    recipe: Recipe, adapter: Path | None, folder: Path, *, overwrite: bool = False, say: Say
) -> Evaluation:
    """Only evaluate the recipe's model, with or without an adapter; errors as in ``run``."""
    folder = folder.expanduser().resolve()
    _run_alone(evaluation_stage(recipe, adapter), folder, overwrite=overwrite, say=say)
    return read_evaluation(folder)


def analyze(folder: Path, *, say: Say) -> Path:
    """Look at what a finished run did to its neurons; skips what is done already.

    Args:
        folder: the output folder of the run; its recipe's ``analysis`` counts, or the defaults of that.
        say: is told what happens.

    Returns:
        The folder with the tables (see ``neft.pipeline.analyze``).

    Raises:
        UsageError: no run, one that is not finished, or one whose trained weights were deleted.
        RunError: too little memory, or another process works in the folder.
    """
    recipe = recipe_of(folder)
    if recipe.analysis is None:
        recipe = recipe.model_copy(update={"analysis": AnalysisSection()})
    stage = analysis_stage(recipe)
    inputs = {name: StageFolder(folder / name) for name in stage.reads}
    analysis = StageFolder(folder / stage.name)
    with locked(folder / LOCK):
        for place in (*inputs.values(), analysis):
            place.settle()
        records = {name: _whole(place) for name, place in inputs.items()}
        fingerprints = {name: record.fingerprint for name, record in records.items()}
        paths = {name: place.path for name, place in inputs.items()}
        bring_to_finish(stage, record_of(stage, fingerprints), analysis, paths, say)
    return analysis.path


def _whole(place: StageFolder) -> Record:
    record = place.finished()
    if record is None or place.state() is not State.DONE:
        raise UsageError(
            f"{place.path}: is not there, or damaged: the run is not finished. See neft status, and "
            "bring it to its end with neft run."
        )
    if record.released:
        raise UsageError(
            f"{place.path}: the weights were deleted once the comparison had evaluated them. Give it a "
            "section analysis, or keep_models: true, and run it again."
        )
    return record


def _run_alone(stage: Stage, folder: Path, *, overwrite: bool, say: Say) -> None:
    lock = folder.with_name(f".{folder.name}.lock")
    run_stages([stage], {stage.name: StageFolder(folder)}, lock, overwrite=overwrite, say=say)


def run_stages(
    stages: Sequence[Stage],
    folders: Mapping[str, StageFolder],
    lock: Path,
    *,
    overwrite: bool,
    say: Say,
) -> None:
    """Bring every stage to its finished state, in order.

    A stage whose folder holds what it would make is skipped. Nothing is touched before it is certain
    that nothing of another recipe stands in the way.

    Args:
        stages: each after those that it reads.
        folders: stage -> its place.
        lock: held meanwhile.
        overwrite: replace what another recipe made.
        say: is told what happens.
    """
    plan = planned_records(stages)
    with locked(lock):
        for folder in folders.values():
            folder.settle()
        there = {stage.name: _results(stage, folders[stage.name]) for stage in stages}
        if not overwrite:
            _refuse_other_recipe(stages, plan, there)
        for stage in stages:
            inputs = {name: folders[name].path for name in stage.reads}
            bring_to_finish(stage, plan[stage.name], folders[stage.name], inputs, say)


def planned_records(stages: Sequence[Stage]) -> dict[str, Record]:
    """The record, fingerprint and all, that each stage will have."""
    planned: dict[str, Record] = {}
    for stage in stages:
        inputs = {name: planned[name].fingerprint for name in stage.reads}
        planned[stage.name] = record_of(stage, inputs)
    return planned


def bring_to_finish(
    stage: Stage, planned: Record, folder: StageFolder, inputs: Mapping[str, Path], say: Say
) -> None:
    """Skip, resume or run one stage.

    Args:
        stage: what to do.
        planned: the record that it will have.
        folder: its place.
        inputs: the finished folder of each stage that it reads.
        say: is told what happens.

    Raises:
        OutOfMemoryError: names the stage, its estimate by part, and what helps.
    """
    record = folder.finished()
    if record is not None and record.fingerprint == planned.fingerprint and not record.released:
        if folder.state() is State.DONE:
            say(f"{stage.name}: already done, in {duration(record.seconds)}")
            return
        say(f"{stage.name}: {folder.path} is damaged and made again")
    record = folder.begin(planned, resume=bool(stage.resumes_from))
    say(f"{stage.name}: {'continues' if record.attempts > 1 else 'starts'}")
    release_free_memory()
    start = time.perf_counter()
    try:
        with naming_shortage(lambda: stage.name):
            stage.run(folder.working, inputs)
    except BaseException as error:
        if not folder.has_progress(stage):
            folder.discard_working()
        if isinstance(error, OutOfMemoryError) and stage.on_shortage is not None:
            raise OutOfMemoryError(f"{error}\n{stage.on_shortage()}") from error
        raise
    record = folder.finish(record, time.perf_counter() - start)
    say(f"{stage.name}: done, in {duration(record.seconds)}")


def _refuse_other_recipe(
    stages: Sequence[Stage],
    plan: Mapping[str, Record],
    there: Mapping[str, Mapping[Path, Record]],
) -> None:
    at_stake = {
        path: stage.name
        for stage in stages
        if not stage.derived
        for path, record in there[stage.name].items()
        if record.fingerprint != plan[stage.name].fingerprint
    }
    if not at_stake:
        return
    told = {*at_stake.values(), *(name for stage in stages for name in stage.reads)}
    reasons = [
        reason
        for stage in stages
        if stage.name in told
        for record in there[stage.name].values()
        for reason in differences(record, plan[stage.name])
    ]
    raise another_recipe(at_stake, reasons)


def another_recipe(places: Iterable[Path], reasons: Iterable[str]) -> UsageError:
    """The error that results of another recipe are in the way, and in what the recipes differ."""
    return UsageError(
        "Results of another recipe are in the way:\n"
        + "\n".join(f"  {place}" for place in places)
        + "\nThe recipes differ:\n"
        + "\n".join(f"  {reason}" for reason in dict.fromkeys(reasons))
        + "\nChoose another output folder, or replace these results with --overwrite."
    )


def _results(stage: Stage, folder: StageFolder) -> dict[Path, Record]:
    """What would be lost in this place, with its record: a result, progress of an attempt."""
    progress = folder.started() if folder.has_progress(stage) else None
    records = {folder.path: folder.finished(), folder.working: progress}
    return {path: record for path, record in records.items() if record is not None}


def duration(seconds: float) -> str:
    """Seconds for people: ``0.4 s``, ``12 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
