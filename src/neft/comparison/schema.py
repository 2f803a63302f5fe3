"""The schema of a comparison, and the plain recipes that it stands for.

A comparison is written in the vocabulary of a recipe: its sections hold what all cells share, a task or a
method says what differs. Every cell is an ordinary recipe, checked by the same schema.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from neft.errors import RecipeError
from neft.recipe import (
    CountOrZero,
    ModelSection,
    Rate,
    Recipe,
    Section,
    Seed,
    checked,
    faults_of,
    read_fields,
    refused,
)

Settings = dict[str, Any]


class TaskEntry(Section):
    """A data set with its own settings, laid over the comparison's sections."""

    data: Settings = Field(default_factory=dict)
    warmup: Settings = Field(default_factory=dict)
    train: Settings = Field(default_factory=dict)
    evaluate: Settings = Field(default_factory=dict)


class MethodEntry(Section):
    """One row: a method with its settings, and the learning rates among which it may choose."""

    name: str
    """In tables and figures; unique."""
    method: Literal["full", "embed", "in_out", "lora", "mask", "neft"]
    learning_rates: tuple[Rate, ...] | None = None
    """Rates to try, ascending; give these or ``rate_of``."""
    rate_of: str | None = None
    """Take the rate that another row chose, for a variant of it."""
    select: Settings | None = None
    """The budget and choice of neurons, and the budget that LoRA may match."""
    score: Settings = Field(default_factory=dict)
    warmup: Settings = Field(default_factory=dict)
    lora: Settings | None = None
    train: Settings = Field(default_factory=dict)
    union_with: tuple[str, ...] = ()
    """Tasks whose neurons, chosen in the same way, are joined (NeFT_Union)."""
    intersection_with: tuple[str, ...] = ()
    """Tasks among whose neurons, chosen in the same way, a neuron must be too."""
    tasks: tuple[str, ...] | None = None
    """Only on these tasks; default: all."""

    @model_validator(mode="after")
    def _has_a_rate(self) -> MethodEntry:
        if (self.learning_rates is None) == (self.rate_of is None):
            raise ValueError("give either learning_rates or rate_of")
        rates = self.learning_rates
        if rates is not None and (not rates or list(rates) != sorted(set(rates))):
            raise ValueError("learning_rates should be one or more, ascending and different")
        return self

    @property
    def other_tasks(self) -> tuple[str, ...]:
        """Tasks whose neurons this row needs besides its own."""
        return self.union_with + self.intersection_with


class FigureEntry(Section):
    """A figure beside the table: a metric against the number of trained parameters."""

    file: str
    """Its name without suffix; PNG and SVG are written."""
    series: dict[str, tuple[str, ...]] = Field(min_length=1)
    """Name in the legend -> rows, in order of their size."""
    metric: str | None = None
    """Default: the task's first."""
    title: str | None = None


class Comparison(Section):
    """Methods side by side: on the same data, with the same budgets, tuned by the same rule."""

    output: str
    seeds: tuple[Seed, ...] = (0,)
    """The first tunes the learning rates; all of them train at the rate that is chosen."""
    model: ModelSection
    data: Settings = Field(default_factory=dict)
    tasks: dict[str, TaskEntry]
    warmup: Settings | None = None
    score: Settings = Field(default_factory=dict)
    train: Settings
    evaluate: Settings = Field(default_factory=dict)
    widen: CountOrZero = 2
    """How many further rates a row may try beyond an edge of its grid while the best lies there. A grid
    of one rate is left as it is."""
    reference: str | None = None
    """The row against which differences are tested; default: the first."""
    significance: float = Field(default=0.05, gt=0, lt=1)
    """Level of the tests."""
    methods: tuple[MethodEntry, ...]
    figures: tuple[FigureEntry, ...] = ()
    keep_models: bool = False
    """Keep the whole checkpoints of methods without an adapter once they are evaluated."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Comparison:
        for place in ("seeds", "tasks", "methods"):
            if not getattr(self, place):
                raise ValueError(f"{place} should have at least one")
        rows = [entry.name for entry in self.methods]
        twice = sorted({name for name in rows if rows.count(name) > 1})
        if twice:
            raise ValueError(f"two methods are named {twice[0]!r}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"a seed is given twice: {list(self.seeds)}")
        _known(self.reference, rows, "reference")
        for entry in self.methods:
            _known(entry.rate_of, rows, f"method {entry.name!r}: rate_of")
            for task in (*(entry.tasks or ()), *entry.other_tasks):
                _known(task, list(self.tasks), f"method {entry.name!r}: task")
            if entry.rate_of is not None and self.row(entry.rate_of).learning_rates is None:
                raise ValueError(
                    f"method {entry.name!r}: rate_of names {entry.rate_of!r}, which has no "
                    "learning_rates of its own"
                )
        for figure in self.figures:
            for name in (name for series in figure.series.values() for name in series):
                _known(name, rows, f"figure {figure.file!r}")
        return self

    @property
    def reference_row(self) -> str:
        """The row against which differences are tested."""
        return self.reference or self.methods[0].name

    def row(self, name: str) -> MethodEntry:
        """The row called ``name``."""
        return next(entry for entry in self.methods if entry.name == name)

    def rows_of(self, task: str) -> list[MethodEntry]:
        """The rows of a task, in order."""
        return [entry for entry in self.methods if entry.tasks is None or task in entry.tasks]

    def cell(
        self, task: str, entry: MethodEntry, seed: int, rate: float, sets: NeuronFiles | None = None
    ) -> Recipe:
        """The recipe of one training run.

        Args:
            task: a key of ``tasks``.
            entry: the row.
            seed: one of ``seeds``.
            rate: the learning rate.
            sets: files of the neurons of other tasks, where the row joins them.

        Raises:
            RecipeError: lists every fault.
        """
        where = f"task {task!r}, method {entry.name!r}"
        return checked(Recipe, self._fields(task, entry, seed, rate, sets), where)

    def _fields(
        self, task: str, entry: MethodEntry, seed: int, rate: float, sets: NeuronFiles | None
    ) -> Settings:
        over = self.tasks[task]
        select = dict(entry.select) if entry.select is not None else None
        if select is not None and select.get("which") == "random":
            # Each seed draws its own neurons.
            select.setdefault("seed", seed)
        if select is not None and sets is not None:
            select |= {"union": sets.union, "intersection": sets.intersection}
        train = self.train | over.train | entry.train
        train |= {"method": entry.method, "learning_rate": rate}
        if entry.lora is not None:
            train["lora"] = entry.lora
        fields: Settings = {
            "output": self.output,
            "seed": seed,
            "model": self.model.model_dump(),
            "data": self.data | over.data,
            "score": self.score | entry.score,
            "train": train,
            "evaluate": self.evaluate | over.evaluate,
        }
        if self.warmup is not None:
            fields["warmup"] = self.warmup | over.warmup | entry.warmup
        if select is not None:
            fields["select"] = select
        return fields

    def first_cells(self) -> Iterator[tuple[str, MethodEntry, Recipe]]:
        """The first cell of each row of each task: what is checked before anything runs."""
        for task in self.tasks:
            for entry in self.rows_of(task):
                yield task, entry, self.cell(task, entry, self.seeds[0], self.rates_of(entry)[0])

    def rates_of(self, entry: MethodEntry) -> tuple[float, ...]:
        """The grid of a row, its own or that of the row whose rate it takes."""
        own = self.row(entry.rate_of) if entry.rate_of is not None else entry
        assert own.learning_rates is not None
        return own.learning_rates


@dataclass(frozen=True)
class NeuronFiles:
    """Where the neuron sets of other tasks lie."""

    union: tuple[str, ...]
    intersection: tuple[str, ...]


def _known(name: str | None, names: Sequence[str], where: str) -> None:
    if name is not None and name not in names:
        raise ValueError(f"{where} names {name!r}, which is none of {', '.join(names)}")


def is_comparison(fields: Mapping[str, Any]) -> bool:
    """Whether the fields of a YAML file are a comparison's and not a single run's."""
    return "methods" in fields


def load_comparison(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Comparison:
    """Read a comparison and check every cell of it.

    Args:
        path: a YAML file.
        overrides: as for ``neft.recipe.load_recipe``.

    Raises:
        RecipeError: lists every fault with its place, of the file itself or of the cells.
    """
    fields = read_fields(path, overrides)
    if not is_comparison(fields):
        raise RecipeError(f"{path}: has no methods to compare; it is a recipe for neft run.")
    comparison = checked(Comparison, fields, str(path))
    # Cells share their sections, so that one fault is in many; each is told once, with its first cell.
    places: dict[str, str] = {}
    lenders = {task for entry in comparison.methods for task in entry.other_tasks}
    for task in comparison.tasks:
        if not comparison.rows_of(task) and task not in lenders:
            places[f"tasks.{task}: no method is run on it"] = ""
        for entry in comparison.rows_of(task):
            rate = comparison.rates_of(entry)[0]
            cell = comparison._fields(task, entry, comparison.seeds[0], rate, None)
            for fault in faults_of(Recipe, cell):
                places.setdefault(fault, f" (task {task!r}, method {entry.name!r})")
    if places:
        raise refused(str(path), [f"{fault}{place}" for fault, place in places.items()])
    return comparison
