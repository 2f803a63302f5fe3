"""What lies in the folder of a run or comparison, as far as it is there: plain files, no model.

A run that is not finished is read too; what is missing stays ``None``, and so does what was made from an
earlier result than the one that stands beside it now.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from neft.analysis import files
from neft.analysis.table import Table
from neft.errors import DataError, UsageError
from neft.neurons import NeuronScores, NeuronSet

Fields: TypeAlias = Mapping[str, Any]

STAGES = (
    "prepare",
    "baseline",
    "warmup",
    "score",
    "select",
    "train",
    "evaluate",
    "analysis",
)
"""Stages of a run, in order; each one fills a folder of its name."""

TABLES = {
    "neurons": files.NEURONS,
    "buckets": files.BUCKETS,
    "activity": files.ACTIVITY,
    "lens": files.LENS,
    "contexts": files.CONTEXTS,
    "causal": files.CAUSAL,
    "overlap": files.OVERLAP,
}
"""Analysis -> its file in the folder ``analysis``."""

_RECORD = "stage.json"
_COMPARISON = ("comparison.yaml", "results.json")


@dataclass(frozen=True)
class Sample:
    """One test example before and after training."""

    prompt: str
    reference: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class ComparisonData:
    """What ``neft compare`` wrote."""

    results: Fields
    """The content of ``results.json``."""
    neurons: Fields | None = None
    """The content of ``neurons.json``."""
    figures: Mapping[str, bytes] = field(default_factory=dict)
    """File name -> PNG."""
    recipe_yaml: str = ""


@dataclass(frozen=True)
class RunData:
    """What was read from one folder; every part may be missing."""

    folder: str
    """As the user named it."""
    recipe: Fields | None = None
    recipe_yaml: str | None = None
    results: Fields | None = None
    """The content of ``evaluate/results.json``."""
    base: Fields | None = None
    """The content of ``baseline/scores.json``."""
    trained: Fields | None = None
    """The content of ``evaluate/scores.json``."""
    samples: Sequence[Sample] = ()
    """Test examples in their order, before and after training."""
    warmup: Fields | None = None
    """The content of ``warmup/training.json``."""
    training: Fields | None = None
    """The content of ``train/training.json``."""
    scores: NeuronScores | None = None
    neurons: NeuronSet | None = None
    tables: Mapping[str, Table] = field(default_factory=dict)
    """Name as in ``TABLES`` -> what an analysis found."""
    records: Mapping[str, Fields] = field(default_factory=dict)
    """Stage -> the content of its ``stage.json``."""
    stale: Sequence[str] = ()
    """Stages that were left out, as they were made from earlier results than those that stand now."""
    comparison: ComparisonData | None = None


def read_run(folder: Path) -> RunData:
    """Read the output folder of ``neft run`` or ``neft compare``.

    Raises:
        UsageError: it is the folder of neither.
        DataError: a file in it is damaged.
        NeuronError: the scores or the neuron set in it are damaged.
    """
    if all((folder / name).is_file() for name in _COMPARISON):
        return RunData(str(folder), comparison=_read_comparison(folder))
    records = {stage: record for stage in STAGES if (record := _record(folder / stage))}
    if not records and not any((folder / f".{stage}.partial").exists() for stage in STAGES):
        raise UsageError(
            f"{folder}: no folder of a run or comparison (no stage in it has a {_RECORD}, and there is "
            f"no {' with '.join(_COMPARISON)}). Give the output folder of a recipe."
        )
    stale = list(_stale(records))
    return _read_parts(folder, {s: r for s, r in records.items() if s not in stale}, stale)


def _read_parts(folder: Path, records: Mapping[str, Fields], stale: Sequence[str]) -> RunData:
    def path(stage: str, name: str) -> Path | None:
        file = folder / stage / name
        return file if stage in records and file.is_file() else None

    recipe_file = path("prepare", "recipe.yaml")
    recipe_yaml = None if recipe_file is None else recipe_file.read_text(encoding="utf-8")
    scores, neurons = path("score", "scores.safetensors"), path("select", "neurons.json")
    return RunData(
        folder=str(folder),
        recipe=_recipe(records),
        recipe_yaml=recipe_yaml,
        results=_optional_json(path("evaluate", "results.json")),
        base=_optional_json(path("baseline", "scores.json")),
        trained=_optional_json(path("evaluate", "scores.json")),
        samples=_samples(
            path("baseline", "predictions.jsonl"), path("evaluate", "predictions.jsonl")
        ),
        warmup=_optional_json(path("warmup", "training.json")),
        training=_optional_json(path("train", "training.json")),
        scores=None if scores is None else NeuronScores.load(scores),
        neurons=None if neurons is None else NeuronSet.load(neurons),
        tables={
            name: Table.load(file)
            for name, file_name in TABLES.items()
            if (file := path("analysis", file_name))
        },
        records=records,
        stale=stale,
    )


def _record(folder: Path) -> Fields | None:
    file = folder / _RECORD
    return _read_json(file) if file.is_file() else None


def _stale(records: Mapping[str, Fields]) -> Iterator[str]:
    """Stages whose inputs have been made anew, or were stale themselves, since they read them."""
    found: set[str] = set()
    for stage, record in records.items():
        for name, fingerprint in record.get("reads", {}).items():
            now = records.get(name)
            if name in found or (now is not None and now["fingerprint"] != fingerprint):
                found.add(stage)
    yield from (stage for stage in records if stage in found)


def _recipe(records: Mapping[str, Fields]) -> Fields | None:
    recipe: Fields | None = records.get("prepare", {}).get("ingredients", {}).get("recipe")
    return recipe


def _samples(before: Path | None, after: Path | None) -> list[Sample]:
    old = [] if before is None else _read_lines(before)
    new = [] if after is None else _read_lines(after)
    if old and new and len(old) != len(new):
        raise DataError(
            f"{after}: {len(new)} predictions, but {len(old)} of the base model in {before}. Run the "
            "recipe again."
        )
    return [
        Sample(
            prompt=(new or old)[position]["prompt"],
            reference=(new or old)[position]["reference"],
            before=old[position]["prediction"] if old else None,
            after=new[position]["prediction"] if new else None,
        )
        for position in range(max(len(old), len(new)))
    ]


def _read_comparison(folder: Path) -> ComparisonData:
    return ComparisonData(
        results=_read_json(folder / "results.json", _WRITE_AGAIN),
        neurons=(
            _read_json(neurons, _WRITE_AGAIN)
            if (neurons := folder / "neurons.json").is_file()
            else None
        ),
        figures={file.name: file.read_bytes() for file in sorted(folder.glob("*.png"))},
        recipe_yaml=(folder / "comparison.yaml").read_text(encoding="utf-8"),
    )


def _optional_json(file: Path | None) -> Fields | None:
    return None if file is None else _read_json(file)


_RUN_AGAIN = "Move its stage's folder away, and run the recipe again."
_WRITE_AGAIN = "Run neft compare again, which writes it anew."


def _read_json(file: Path, remedy: str = _RUN_AGAIN) -> Fields:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: damaged: {error}. {remedy}") from error
    if not isinstance(fields, dict):
        fault = f"it holds a {type(fields).__name__}, not an object"
        raise DataError(f"{file}: damaged: {fault}. {remedy}")
    return fields


def _read_lines(file: Path) -> list[dict[str, str]]:
    # Not str.splitlines, which also splits at separators that JSON leaves inside a text.
    try:
        with file.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: damaged: {error}. {_RUN_AGAIN}") from error


def has_columns(table: Table | None, names: Collection[str]) -> bool:
    """Whether there is a table that has rows and all these columns."""
    return table is not None and len(table) > 0 and set(names) <= table.columns.keys()
