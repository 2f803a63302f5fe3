"""Work that runs in processes of its own, in turns."""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Protocol

from measuring import resident_bytes, restart_peak


class Work(Protocol):
    """What one process holds."""

    def step(self) -> Any:
        """One round; what it measured."""

    def report(self) -> dict[str, Any]:
        """What there is to say after the last round."""


class Peak:
    """Work whose report is the peak memory of a task: ``peak_bytes``.

    Args:
        prepare: makes the task. What it imports and holds does not count.
    """

    def __init__(self, prepare: Callable[[], Callable[[], object]]) -> None:
        self._task = prepare()
        self._bytes = 0

    def step(self) -> None:
        """Run the task; the last run counts."""
        before = resident_bytes("VmRSS")
        restart_peak()
        self._task()
        self._bytes = resident_bytes("VmHWM") - before

    def report(self) -> dict[str, int]:
        return {"peak_bytes": self._bytes}


def peaks(prepared: Mapping[str, Callable[[], Callable[[], object]]]) -> dict[str, int]:
    """Peak memory in bytes of each task, run once in a process of its own; see ``Peak``."""
    works = {name: partial(Peak, prepare) for name, prepare in prepared.items()}
    outcomes = in_processes(works, rounds=0, preload=["torch", "transformers"], together=False)
    return {name: report["peak_bytes"] for name, report in outcomes.reports.items()}


@dataclass(frozen=True)
class OutOfMemory:
    """The accelerator's memory did not suffice."""

    reason: str


@dataclass(frozen=True)
class Outcomes:
    """What all processes measured."""

    steps: dict[str, list[Any]]
    """One entry a counted round."""
    reports: dict[str, dict[str, Any]]
    skipped: dict[str, str]
    """Work that did not fit into memory, and the error; it is in neither of the others."""


def in_processes(
    works: Mapping[str, Callable[[], Work]],
    rounds: int,
    preload: Iterable[str],
    together: bool,
    seconds: float = math.inf,
) -> Outcomes:
    """Make each work in a process of its own and let them step.

    Args:
        works: by name; sent to the process, so picklable.
        rounds: counted ones. One before them warms up.
        preload: modules that all need; imported once.
        together: all processes live at once and step in turn, round by round. Else one process after
            the other has the machine, and its memory, for itself.
        seconds: once they have passed, no more rounds are begun, but for one that counts.

    Raises:
        RuntimeError: a process died; its error is on standard error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload])
    outcomes = Outcomes({}, {}, {})
    end = time.monotonic() + seconds
    for names in [list(works)] if together else [[name] for name in works]:
        workers = [_Worker(context, name, works[name], outcomes) for name in names]
        for number in range(rounds + 1):
            if number > 1 and time.monotonic() > end:
                break
            for worker in workers:
                worker.step(is_counted=number > 0)
            print(f"\r{' '.join(names)}: round {number}/{rounds}", end="", file=sys.stderr)
        print(file=sys.stderr)
        for worker in workers:
            worker.stop()
    return outcomes


class _Worker:
    """The asking side of one process. Once that ran out of memory, it is not asked any more."""

    def __init__(
        self, context: Any, name: str, make: Callable[[], Work], outcomes: Outcomes
    ) -> None:
        self._name = name
        self._outcomes = outcomes
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, theirs), daemon=True)
        self._process.start()
        # Else the pipe would not end when the process does.
        theirs.close()
        self._outcomes.steps[name] = []
        self._answer()

    def step(self, is_counted: bool) -> None:
        step = self._ask("step")
        if is_counted and step is not None:
            self._outcomes.steps[self._name].append(step)

    def stop(self) -> None:
        report = self._ask("stop")
        if report is not None:
            self._outcomes.reports[self._name] = report
        self._process.join()

    def _ask(self, request: str) -> Any:
        """The answer; None once memory ran out."""
        if self._name in self._outcomes.skipped:
            return None
        with suppress(BrokenPipeError):  # of a process that died; there will be no answer
            self._pipe.send(request)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise RuntimeError(
                f"{self._name}: its process ended with exit code {self._process.exitcode}; -9 says that "
                "the system ran out of memory. Choose fewer methods."
            ) from None
        if isinstance(answer, OutOfMemory):
            self._outcomes.skipped[self._name] = answer.reason
            del self._outcomes.steps[self._name]
            print(f"\n{self._name} skipped: {answer.reason}", file=sys.stderr)
            return None
        return answer


def _serve(make: Callable[[], Work], pipe: Connection) -> None:
    """The answering side: step on request until told to stop; then report."""
    import torch

    try:
        work = make()
        pipe.send("ready")
        while pipe.recv() == "step":
            pipe.send(work.step())
        pipe.send(work.report())
    except torch.OutOfMemoryError as error:
        pipe.send(OutOfMemory(str(error).split("\n")[0]))
