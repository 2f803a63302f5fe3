"""Training, by all processes that a launcher started.

The first process does a command as it would alone: it holds the lock, decides what is left to do, and
writes. When it comes to training it gives out a task, which all carry out. The others know nothing but
their tasks, so that whatever is wrong before is found, and told, once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Literal, TypeAlias

from neft import processes
from neft.errors import NeftError, RunError
from neft.pipeline.neuron_sets import load_neurons
from neft.recipe import LoraSection, Recipe

# Seconds for a failure in one process to be known in the others, which it takes down with it.
_PATIENCE = 10
_END = "end"

Kind: TypeAlias = Literal["warmup", "train"]


@dataclass(frozen=True)
class Task:
    """A training run of a recipe."""

    kind: Kind
    recipe: Recipe
    folder: Path
    """Where ``neft.sft.train.train`` works."""
    neurons: Path | None = None
    """File or adapter with the neurons to train, for methods that need them."""

    def to_json(self) -> str:
        """As text, for another process."""
        fields = asdict(self) | {
            "recipe": self.recipe.model_dump(mode="json"),
            "folder": str(self.folder),
            "neurons": self.neurons and str(self.neurons),
        }
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> Task:
        """What ``to_json`` wrote."""
        fields = json.loads(text)
        neurons = fields["neurons"]
        return cls(
            fields["kind"],
            Recipe.model_validate(fields["recipe"]),
            Path(fields["folder"]),
            neurons and Path(neurons),
        )

    def carry_out(self) -> None:
        """Train; errors as in ``neft.sft.train.train``."""
        if self.kind == "warmup":
            _warm_up(self.recipe, self.folder)
        else:
            _train(self.recipe, self.neurons, self.folder)


def _warm_up(recipe: Recipe, folder: Path) -> None:
    from neft.sft.train import train

    options = recipe.warmup
    assert options is not None
    train(
        recipe.model,
        options.data_of(recipe.data),
        options,
        method=options.method,
        lora=LoraSection(rank=options.rank) if options.method == "lora" else None,
        seed=options.seed_of(recipe.seed),
        folder=folder,
        snapshots=options.snapshots,
        distributed=recipe.distributed,
    )


def _train(recipe: Recipe, neurons: Path | None, folder: Path) -> None:
    from neft.pipeline.selection import resolved_lora
    from neft.sft.train import train

    train(
        recipe.model,
        recipe.data,
        recipe.train,
        method=recipe.train.method,
        neurons=None if neurons is None else load_neurons(neurons),
        lora=resolved_lora(recipe),
        seed=recipe.seed,
        folder=folder,
        distributed=recipe.distributed,
    )


_numbers = count()


def carry_out(task: Task) -> None:
    """Carry out a task, with all processes of this launch; called in the first.

    Raises:
        RunError: another process broke down.
        NeftError: as in ``neft.sft.train.train``.
    """
    if processes.num_processes() == 1:
        task.carry_out()
        return
    number = next(_numbers)
    processes.tell(_task(number), task.to_json())
    try:
        with processes.process_group(_task(number)):
            task.carry_out()
    except RuntimeError as error:
        # As torch reports a broken connection too; what broke it is at the other end.
        others = range(1, processes.num_processes())
        for index in others:
            if failure := processes.told(_failure(index), _PATIENCE / len(others)):
                raise RunError(f"Process {index} broke down: {failure}") from error
        raise


@contextmanager
def led() -> Iterator[None]:
    """In the first process, around a command: lets the others go when it is over."""
    processes.check_launch()
    try:
        yield
    finally:
        if processes.num_processes() > 1:
            processes.tell(_task(next(_numbers)), _END)


def follow(complain: Callable[[str], None]) -> None:
    """In every other process: carry out task after task, until the first lets it go.

    Args:
        complain: is told of an error here that the first process does not report.

    Raises:
        SystemExit: after an error.
    """
    for number in count():
        text = processes.told(_task(number))
        assert text is not None
        if text == _END:
            return
        try:
            processes.check_launch()
            with processes.process_group(_task(number)):
                Task.from_json(text).carry_out()
        except Exception as error:
            _give_up(number, error, complain)


def _give_up(number: int, error: Exception, complain: Callable[[str], None]) -> None:
    message = str(error) if isinstance(error, NeftError) else f"{type(error).__name__}: {error}"
    processes.tell(_failure(processes.process_index()), message)
    # As a rule the first process has met the same, or learns of it now. One that waits for this process
    # on an accelerator does not: then the launcher ends it, once this one has gone.
    if processes.told(_task(number + 1), 2 * _PATIENCE) is None:
        complain(f"process {processes.process_index()}: {message}")
    sys.exit(1)


def _task(number: int) -> str:
    return f"task {number}"


def _failure(index: int) -> str:
    return f"failure of {index}"
