"""Tests of differences between rows, kept beside the results: they take seconds each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from neft.comparison.cells import Cell, Cells
from neft.evaluation import Paired, significance
from neft.files import write_json
from neft.pipeline.evaluate import PREDICTIONS, read_predictions

FILE = "tests.json"


class Differences:
    """Paired tests of rows on one task, from what their seeds wrote.

    Args:
        cells: where the predictions are.
        rows: row -> its evaluated cells, as many and of the same seeds for all.
    """

    def __init__(self, cells: Cells, rows: Mapping[str, Sequence[Cell]]) -> None:
        self._cells = cells
        self._rows = rows
        self._file = cells.output / FILE
        self._kept: dict[str, Paired] = {}
        if self._file.is_file():
            fields = json.loads(self._file.read_text(encoding="utf-8"))
            self._kept = {key: Paired(**value) for key, value in fields.items()}

    def from_baseline(self, metric: str, baseline: str) -> dict[str, Paired]:
        """Every other row beside ``baseline``; none if that is not complete."""
        if baseline not in self._rows:
            return {}
        keys = {name: self._key(metric, name, baseline) for name in self._rows if name != baseline}
        missing = [name for name, key in keys.items() if key not in self._kept]
        if missing:
            self._test(metric, baseline, missing, keys)
        return {name: self._kept[key] for name, key in keys.items()}

    def _test(
        self, metric: str, baseline: str, names: Sequence[str], keys: Mapping[str, str]
    ) -> None:
        cell = self._rows[baseline][0]
        recipe = self._cells.recipe(cell)
        references = self._texts(baseline, "reference")
        found = significance(
            metric,
            {name: self._texts(name, "prediction") for name in (baseline, *names)},
            references,
            baseline,
            target_language=recipe.data.target_language,
            lowercase=recipe.evaluate.lowercase,
            labels=recipe.data.labels,
            num_runs=len(self._rows[baseline]),
        )
        self._kept |= {keys[name]: paired for name, paired in found.items()}
        write_json(self._file, {key: asdict(paired) for key, paired in self._kept.items()})

    def _texts(self, row: str, side: str) -> list[str]:
        """Predictions or references of all seeds, one seed after the other."""
        return [
            getattr(line, side)
            for cell in self._rows[row]
            for line in read_predictions(self._cells.jobs(cell)["evaluate"].folder / PREDICTIONS)
        ]

    def _key(self, metric: str, row: str, baseline: str) -> str:
        """Folders are named by their content, so that a test is known by those it read."""
        folders = [
            self._cells.jobs(cell)["evaluate"].folder.name
            for name in (row, baseline)
            for cell in self._rows[name]
        ]
        return hashlib.sha256(" ".join([metric, *folders]).encode()).hexdigest()[:16]
