"""Ways of finding neurons, side by side: what each costs, and how far its choice is another's.

Everything comes from the folders of finished cells; no model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from neft.analysis.overlap import overlap_table
from neft.comparison.cells import Cell, Cells, Job
from neft.comparison.neurons import PERCENTS
from neft.comparison.results import RowResult, TaskResult
from neft.neurons import NeuronScores, NeuronSet
from neft.pipeline.measure import RECORD as MEASURED
from neft.pipeline.results import TRAINING
from neft.pipeline.scoring import COST
from neft.pipeline.selection import NEURONS, SCORES

_FINDING = ("warmup", "score")


@dataclass(frozen=True)
class Way:
    """How one row finds its neurons, with the first seed."""

    name: str
    seconds: float | None
    """Of the warm-up and the scoring; ``None`` where neither is needed, or one was resumed."""
    peak_memory_bytes: int | None
    """Of the costlier of the two."""
    overlap: Mapping[float, float] | None
    """Percent of all parameters -> share of the reference's choice that this way's scores would choose
    too; ``None`` where there are no scores, or of other projections."""
    share_of_choice: float
    """Share of the neurons that the row trains among those that the reference trains."""
    chance: float
    """The same for neurons that are drawn at random, as many."""


@dataclass(frozen=True)
class Discovery:
    """All ways on one task."""

    task: str
    reference: str
    chance: Mapping[float, float]
    """Percent of all parameters -> overlap that chance gives."""
    ways: tuple[Way, ...]
    rows: Mapping[str, RowResult]
    """Row -> what its training was worth."""


def collect_discovery(cells: Cells, results: Sequence[TaskResult]) -> list[Discovery]:
    """Tasks whose reference trains neurons that are scored, and other rows find theirs otherwise."""
    found = (_task(cells, result) for result in results)
    return [discovery for discovery in found if discovery is not None]


def _task(cells: Cells, result: TaskResult) -> Discovery | None:
    rows = {row.name: row for row in result.rows if row.seeds and row.rate is not None}
    jobs = {name: cells.jobs(_first_cell(row)) for name, row in rows.items()}
    finding = {name: own for name, own in jobs.items() if "select" in own}
    reference = cells.comparison.reference_row
    if "score" not in finding.get(reference, {}):
        return None
    if (
        len({own["select"].inputs.get("score", own["select"]).folder for own in finding.values()})
        < 2
    ):
        return None
    scores = NeuronScores.load(finding[reference]["score"].folder / SCORES)
    percents = [percent for percent in PERCENTS if percent <= scores.max_percent]
    chosen = NeuronSet.load(finding[reference]["select"].folder / NEURONS)
    return Discovery(
        task=result.task,
        reference=reference,
        chance={p: len(scores.select(percent=p)) / len(scores) for p in percents},
        ways=tuple(
            _way(cells, name, own, scores, chosen, percents) for name, own in finding.items()
        ),
        rows={name: rows[name] for name in finding},
    )


def _first_cell(row: RowResult) -> Cell:
    assert row.rate is not None
    return Cell(row.task, row.name, row.seeds[0].seed, row.rate)


def _way(
    cells: Cells,
    name: str,
    jobs: Mapping[str, Job],
    reference: NeuronScores,
    reference_choice: NeuronSet,
    percents: Sequence[float],
) -> Way:
    own = [jobs[stage] for stage in _FINDING if stage in jobs]
    records = [cells.finished(job) for job in own]
    seconds = [record.seconds for record in records if record is not None and record.attempts == 1]
    choice = NeuronSet.load(jobs["select"].folder / NEURONS)
    peaks = [peak for job in own if (peak := _peak(job.folder)) is not None]
    return Way(
        name=name,
        seconds=sum(seconds) if own and len(seconds) == len(own) else None,
        peak_memory_bytes=max(peaks, default=None),
        overlap=_overlap(jobs, reference, percents),
        share_of_choice=choice.overlap(reference_choice),
        chance=len(reference_choice) / choice.num_candidates,
    )


def _peak(folder: Path) -> int | None:
    """What the one record of costs in the folder of a stage says."""
    file = next(file for name in (TRAINING, MEASURED, COST) if (file := folder / name).is_file())
    peak: int | None = json.loads(file.read_text(encoding="utf-8"))["peak_memory_bytes"]
    return peak


def _overlap(
    jobs: Mapping[str, Job], reference: NeuronScores, percents: Sequence[float]
) -> dict[float, float] | None:
    if "score" not in jobs:
        return None
    scores = NeuronScores.load(jobs["score"].folder / SCORES)
    if scores.projections != reference.projections:
        return None
    table = overlap_table({"own": scores, "reference": reference}, percents)
    return {row["percent"]: row["share"] for row in table.rows() if row["a"] == "own"}
