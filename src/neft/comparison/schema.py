"""The schema of a comparison, and the plain recipes that it stands for.

A comparison is written in the vocabulary of a recipe: its sections hold what all cells share, a task or a
method says what differs. Every cell is an ordinary recipe, checked by the same schema.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

from pydantic import Field, model_validator

from neft.errors import RecipeError
from neft.recipe import (
    CountOrZero,
    MethodName,
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
    method: MethodName
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
    analysis: Settings | Literal[False] = Field(default_factory=dict)
    """Over the comparison's; ``false``: none of this row."""
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
        if self.tasks is not None and not self.tasks:
            raise ValueError("tasks is empty; leave it out to run on all")
        return self

    @model_validator(mode="after")
    def _takes_its_settings(self) -> MethodEntry:
        if self.method in ("neft", "mask"):
            return self
        named = f"method {self.method!r} trains no chosen neurons"
        if self.other_tasks:
            raise ValueError(f"{named}: remove union_with and intersection_with")
        if self.method == "lora":
            if self.select is not None and not (self.lora or {}).get("match"):
                raise ValueError(f"{named}: remove select, or let lora match its budget")
        elif self.select is not None or self.score:
            raise ValueError(f"{named}: remove select and score")
        return self

    @property
    def other_tasks(self) -> tuple[str, ...]:
        """Tasks whose neurons this row needs besides its own."""
        return self.union_with + self.intersection_with


class FigureEntry(Section):
    """A figure beside the table: a metric against the number of trained parameters."""

    file: str = Field(pattern=r"^[\w-][\w.-]*$")
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
    analysis: Settings | None = None
    """Of every cell that is evaluated; default: none."""
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

    def faults(self) -> Iterator[str]:
        """What does not fit together, of names, methods and figures."""
        yield from self._faults_of_names()
        yield from self._faults_of_methods()
        yield from self._faults_of_figures()

    def _faults_of_names(self) -> Iterator[str]:
        for place in ("seeds", "tasks", "methods"):
            if not getattr(self, place):
                yield f"{place} should have at least one"
        rows = [entry.name for entry in self.methods]
        yield from (f"two methods are named {name!r}" for name in _repeated(rows))
        yield from (f"seed {seed} is given twice" for seed in _repeated(self.seeds))
        if self.reference is not None and self.reference not in rows:
            yield f"reference names {self.reference!r}, which is none of {', '.join(rows)}"
        lenders = {task for entry in self.methods for task in entry.other_tasks}
        for task in self.tasks:
            names = [entry.name for entry in self.rows_of(task)]
            if not names and task not in lenders:
                yield f"tasks.{task}: no method is run on it"
            elif names and self.reference in rows and self.reference not in names:
                yield f"reference {self.reference!r} is not run on task {task!r}"
        for place, section in (
            ("train", self.train),
            *((f"tasks.{name}.train", task.train) for name, task in self.tasks.items()),
        ):
            yield from _faults_of_train(place, section)

    def _faults_of_methods(self) -> Iterator[str]:
        rows = {entry.name: entry for entry in self.methods}
        for entry in self.methods:
            place = f"method {entry.name!r}"
            yield from _faults_of_train(f"{place}: train", entry.train)
            tasks = self.tasks if entry.tasks is None else entry.tasks
            for task in (*tasks, *entry.other_tasks):
                if task not in self.tasks:
                    yield f"{place}: task names {task!r}, which is none of {', '.join(self.tasks)}"
            both = [task for task in tasks if task in entry.other_tasks]
            if both:
                yield f"{place}: runs on task {both[0]!r}, with whose neurons it would be joined"
            if entry.analysis and self.analysis is None:
                yield f"{place}: has settings for an analysis, but the comparison has no such section"
            if entry.warmup and self.warmup is None:
                yield f"{place}: has settings for a warmup, but the comparison has no section warmup"
            if entry.rate_of is None:
                continue
            lender = rows.get(entry.rate_of)
            if lender is None:
                yield f"{place}: rate_of names {entry.rate_of!r}, which is none of {', '.join(rows)}"
            elif lender.learning_rates is None:
                yield f"{place}: rate_of names {entry.rate_of!r}, which has no learning_rates itself"
            elif lender.tasks is not None and (missing := set(tasks) - set(lender.tasks)):
                yield (
                    f"{place}: rate_of names {entry.rate_of!r}, which is not run on "
                    f"{', '.join(sorted(missing))}"
                )

    def _faults_of_figures(self) -> Iterator[str]:
        rows = [entry.name for entry in self.methods]
        files = [figure.file for figure in self.figures]
        yield from (f"two figures are named {name!r}" for name in _repeated(files))
        for figure in self.figures:
            for name in (name for series in figure.series.values() for name in series):
                if name not in rows:
                    yield f"figure {figure.file!r} names {name!r}, which is none of {', '.join(rows)}"

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

    def rates_of(self, entry: MethodEntry) -> tuple[float, ...]:
        """The grid of a row, its own or that of the row whose rate it takes."""
        own = self.row(entry.rate_of) if entry.rate_of is not None else entry
        assert own.learning_rates is not None
        return own.learning_rates

    def cell(self, task: str, entry: MethodEntry, seed: int, rate: float) -> Recipe:
        """The recipe of one training run; a row that joins neurons of other tasks does so besides.

        Args:
            task: a key of ``tasks``.
            entry: the row.
            seed: one of ``seeds``.
            rate: the learning rate.

        Raises:
            RecipeError: lists every fault.
        """
        where = f"task {task!r}, method {entry.name!r}"
        return checked(Recipe, self.fields_of(task, entry, seed, rate), where)

    def fields_of(self, task: str, entry: MethodEntry, seed: int, rate: float) -> Settings:
        """The fields of that recipe, unchecked."""
        over = self.tasks[task]
        train = self.train | over.train | entry.train
        train |= {"method": entry.method, "learning_rate": rate, "lora": entry.lora}
        fields: Settings = {
            "output": self.output,
            "seed": seed,
            "model": self.model.model_dump(),
            "data": self.data | over.data,
            "score": self.score | entry.score,
            "train": train,
            "evaluate": self.evaluate | over.evaluate,
        }
        if self.analysis is not None and entry.analysis is not False:
            fields["analysis"] = self.analysis | entry.analysis
        if self.warmup is not None:
            fields["warmup"] = self.warmup | over.warmup | entry.warmup
        if entry.select is not None:
            select = dict(entry.select)
            if select.get("which") == "random":
                # Each seed draws its own neurons.
                select.setdefault("seed", seed)
            fields["select"] = select
        return fields

    def first_cells(self) -> Iterator[tuple[str, MethodEntry]]:
        """The task and row of the first cell of each row of each task, in order."""
        for task in self.tasks:
            for entry in self.rows_of(task):
                yield task, entry

    def lent_cells(self) -> Iterator[tuple[str, MethodEntry]]:
        """The task and row by which neurons are chosen that rows of other tasks join."""
        for entry in self.methods:
            for task in dict.fromkeys(entry.other_tasks):
                yield task, entry

    def first_recipe(self, task: str, entry: MethodEntry) -> Recipe:
        """The recipe of the first cell of a row; errors as of ``cell``."""
        return self.cell(task, entry, self.seeds[0], self.rates_of(entry)[0])


def _repeated(values: Sequence[Any]) -> list[Any]:
    return sorted({value for value in values if values.count(value) > 1})


def _faults_of_train(place: str, section: Settings) -> Iterator[str]:
    """Settings that each method has for itself, and that would be overwritten."""
    for key in ("method", "learning_rate", "lora"):
        if key in section:
            yield f"{place}.{key}: belongs to a method, as {_OF_METHOD[key]}"


_OF_METHOD = {"method": "method", "learning_rate": "learning_rates", "lora": "lora"}


def is_comparison(fields: Mapping[str, Any]) -> bool:
    """Whether the fields of a YAML file are a comparison's and not a single run's."""
    return "methods" in fields


def load_comparison(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Comparison:
    """Read a comparison and check every cell of it.

    Args:
        path: a YAML file.
        overrides: as for ``neft.recipe.load_recipe``.

    Raises:
        RecipeError: lists its faults and those of its cells, each with its place.
    """
    fields = read_fields(path, overrides)
    if not is_comparison(fields):
        raise RecipeError(f"{path}: has no methods to compare; it is a recipe for neft run.")
    comparison = checked(Comparison, fields, str(path))
    faults = [f"recipe: {fault}" for fault in comparison.faults()]
    faults += _faults_of_cells(comparison)
    if faults:
        raise refused(str(path), faults)
    return comparison


def _faults_of_cells(comparison: Comparison) -> list[str]:
    # Cells share their sections, so that one fault is in many; each is told once, with its first cell.
    places: dict[str, str] = {}
    for task, entry in chain(comparison.first_cells(), comparison.lent_cells()):
        if task in comparison.tasks:
            rate = entry.learning_rates[0] if entry.learning_rates else _ANY_RATE
            cell = comparison.fields_of(task, entry, next(iter(comparison.seeds), 0), rate)
            for fault in faults_of(Recipe, cell):
                places.setdefault(fault, f" (task {task!r}, method {entry.name!r})")
    return [f"{fault}{place}" for fault, place in places.items()]


# Of a row that takes another's, which is checked with that one.
_ANY_RATE = 1.0
