"""Jobs in processes of their own: one that dies takes one job with it, not the comparison."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

from neft.comparison.cells import Failure, Job, stage_of
from neft.errors import DataError, DivergenceError, NeftError
from neft.libraries import silence_libraries
from neft.pipeline.run import bring_to_finish
from neft.pipeline.shortage import explain_shortage
from neft.pipeline.store import StageFolder
from neft.recipe import Recipe

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    job: Job
    seconds: float
    failure: Failure | None
    """Why it failed; ``None`` where it is done."""


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    slot: int
    job: Job | None = None
    started: float = 0.0


class Workers:
    """A fixed number of processes, each with its own device or share of the cores.

    Args:
        num_workers: jobs at a time. Several take the accelerators in turn, or share the cores.
        lock: a file that every worker holds for as long as it lives.
        logs: where what workers print goes, a file each; ``None``: to the terminal.
    """

    def __init__(self, num_workers: int, lock: Path, logs: Path | None) -> None:
        self._num = num_workers
        self._lock = lock
        self._logs = logs
        self._workers: dict[int, _Worker] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.connection.close()
            if worker.job is not None:
                # Training ends after the step in hand, with a checkpoint; anything else at once.
                worker.process.terminate()
        for worker in self._workers.values():
            worker.process.join()

    @property
    def num_idle(self) -> int:
        """How many more jobs can be started."""
        return self._num - len(self.running)

    @property
    def running(self) -> list[Job]:
        """Jobs that are being done."""
        return [worker.job for worker in self._workers.values() if worker.job is not None]

    def start(self, job: Job) -> None:
        """Give a job to an idle worker."""
        busy = {slot for slot, worker in self._workers.items() if worker.job is not None}
        slot = min(set(range(self._num)) - busy)
        worker = self._workers.get(slot)
        if worker is None or not worker.process.is_alive():
            worker = self._spawn(slot)
        worker.job, worker.started = job, time.perf_counter()
        # A worker that dies at this very moment is found dead when its outcome is waited for.
        with suppress(OSError):
            worker.connection.send(job)

    def next_outcome(self) -> Outcome:
        """Wait for a job to end."""
        busy = {w.connection: w for w in self._workers.values() if w.job is not None}
        connection = next(found for found in wait(list(busy)) if isinstance(found, Connection))
        worker = busy[connection]
        job = worker.job
        assert job is not None
        try:
            failure: Failure | None = connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            failure = Failure(_death(worker.process.exitcode, job), is_divergence=False)
            del self._workers[worker.slot]
        worker.job = None
        return Outcome(job, time.perf_counter() - worker.started, failure)

    def _spawn(self, slot: int) -> _Worker:
        ours, theirs = _SPAWN.Pipe()
        log = None if self._logs is None else self._logs / f"worker-{slot}.log"
        debug = logging.getLogger("neft").isEnabledFor(logging.DEBUG)
        arguments = (theirs, _share(slot, self._num), self._lock, log, debug)
        process = _SPAWN.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, ours, slot)
        self._workers[slot] = worker
        return worker


@contextmanager
def no_workers(lock: Path) -> Iterator[None]:
    """Wait for workers of a comparison that was killed: they end by themselves, in moments."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class _Share:
    """What a worker may use of the machine; ``None``: all of it."""

    gpu: str | None = None
    """As CUDA_VISIBLE_DEVICES names it. The trainer would spread one job over all that it sees."""
    num_threads: int | None = None

    def take(self) -> None:
        if self.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        if self.num_threads is not None:
            import torch

            torch.set_num_threads(self.num_threads)


def _share(slot: int, num_workers: int) -> _Share:
    """The share of one of several workers: a GPU, in turn, or an equal part of the cores."""
    import torch

    num_gpus = torch.cuda.device_count()
    if num_gpus > 1 or (num_gpus and num_workers > 1):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_gpus)))
        return _Share(gpu=visible.split(",")[slot % num_gpus])
    if num_workers > 1 and not num_gpus:
        return _Share(num_threads=max(1, torch.get_num_threads() // num_workers))
    return _Share()


def _death(exit_code: int | None, job: Job) -> str:
    if exit_code == -signal.SIGKILL:
        killed = "its process was killed, as a rule because memory ran out"
        return f"{killed}\n{explain_shortage(Recipe.model_validate(job.recipe), job.stage)}"
    if exit_code is not None and exit_code < 0:
        return f"its process died of {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"


# --- in the worker --------------------------------------------------------------------------------


def _serve(
    connection: Connection, share: _Share, lock: Path, log: Path | None, debug: bool
) -> None:
    """Do jobs until there are no more."""
    # Out of reach of the terminal's Ctrl-C, which the parent passes on, once.
    os.setsid()
    # Held until this process has ended.
    fcntl.flock(os.open(lock, os.O_RDWR | os.O_CREAT, 0o666), fcntl.LOCK_SH)
    _end_with_parent()
    if log is not None:
        _print_into(log)
    share.take()
    logging.basicConfig(format="%(message)s")
    if not debug:
        silence_libraries()
    while True:
        try:
            job: Job = connection.recv()
        except (EOFError, OSError):
            return
        try:
            _do(job)
            failure = None
        except KeyboardInterrupt:
            return  # training was told to stop, and has left a checkpoint
        except NeftError as error:
            failure = Failure(str(error), isinstance(error, DivergenceError))
        except Exception as error:
            traceback.print_exc()
            failure = Failure(f"unexpected {type(error).__name__}: {error}", is_divergence=False)
        connection.send(failure)


def _do(job: Job) -> None:
    stage = stage_of(job)
    inputs = {name: needed.record.fingerprint for name, needed in job.inputs.items()}
    if stage.fingerprint(inputs) != job.record.fingerprint:
        raise DataError("a file that it reads was changed since the comparison was started.")
    folders = {name: needed.folder for name, needed in job.inputs.items()}
    bring_to_finish(stage, job.record, StageFolder(job.folder), folders, _keep_quiet)


def _keep_quiet(_line: str) -> None:
    """The comparison tells what happens."""


def _end_with_parent() -> None:
    """Let no job outlive a comparison that was killed: it would be in the way of the next."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _print_into(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(handle, stream.fileno())
    os.close(handle)
