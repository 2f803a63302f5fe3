"""What happens beside training: whole checkpoints, a clean stop, times, and a progress display."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from neft import processes
from neft.memory import peak_memory, reset_peak_memory
from neft.sft.resume import checkpoint_folder, discard_superseded, link_weights, seal


class SealCheckpoints(TrainerCallback):
    """Marks every checkpoint as whole once it is, and only then deletes what it supersedes.

    Args:
        snapshots: steps whose weights are kept for good -> the folder to keep them in.
    """

    def __init__(self, snapshots: Mapping[int, Path]) -> None:
        self._snapshots = snapshots

    def on_save(
        self, args: TrainingArguments, state: TrainerState, _control: Any, **_: Any
    ) -> None:
        # Every process writes its own part.
        processes.wait_for_all()
        if state.is_world_process_zero:
            checkpoints = Path(args.output_dir)
            checkpoint = checkpoint_folder(checkpoints, state.global_step)
            # First, so that the snapshot of a whole checkpoint is never missing, whatever is killed when.
            if state.global_step in self._snapshots:
                link_weights(checkpoint, self._snapshots[state.global_step])
            seal(checkpoint)
            discard_superseded(checkpoints, state.best_global_step, state.global_step)


class MeasureSteps(TrainerCallback):
    """Writes ``seconds`` and ``peak_bytes`` of every optimizer step beside its loss in the history."""

    def on_step_begin(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        reset_peak_memory()
        self._begun = time.perf_counter()

    def on_step_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        self._seconds = time.perf_counter() - self._begun
        self._peak = peak_memory()

    def on_log(
        self, _args: Any, state: TrainerState, _control: Any, logs: dict[str, float], **_: Any
    ) -> None:
        if "loss" in logs:
            state.log_history[-1]["seconds"] = self._seconds
            if self._peak is not None:
                state.log_history[-1]["peak_bytes"] = self._peak


class StopEarly(TrainerCallback):
    """Ends training after so many steps, or after the third if that took long enough.

    Args:
        num_steps: at most.
        patience: seconds after which no more steps are begun.
    """

    def __init__(self, num_steps: int, patience: float) -> None:
        self._num_steps = num_steps
        self._patience = patience

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(
        self, _args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        is_late = time.perf_counter() - self._begun > self._patience
        if state.global_step >= (3 if is_late else self._num_steps):
            control.should_training_stop = True


class StopOnSignal(TrainerCallback):
    """Within ``with``: the first SIGINT or SIGTERM ends training after the step, with a checkpoint.

    A second one acts as it would have without us.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._is_agreed = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        # Python lets only the main thread handle signals.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _request(self, _number: int, _frame: FrameType | None) -> None:
        self.stopped = True
        self._restore()
        # Not by print: a signal may come in the middle of one.
        os.write(2, b"Stopping after this step, with a checkpoint. Once more to stop at once.\n")

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def on_step_end(self, _args: Any, _state: Any, control: TrainerControl, **_: Any) -> None:
        # Signals come to several processes at different moments, and they must stop after the same step.
        # One that comes between here and the save counts at the next step, when all have heard of it.
        self._is_agreed = processes.any_process(self.stopped)
        if self._is_agreed:
            control.should_save = True

    def on_save(self, _args: Any, _state: Any, control: TrainerControl, **_: Any) -> None:
        if self._is_agreed:
            control.should_training_stop = True


class ShowProgress(TrainerCallback):
    """Within ``with``: a progress bar on stderr, and one line a measurement of the development loss.

    Of several processes, the first shows it.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True, quiet=not processes.is_first())
        self._progress = Progress(
            TextColumn("Training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", loss="...")
        self._loss = float("nan")

    def __enter__(self) -> ShowProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def on_log(
        self, _args: Any, state: TrainerState, _control: Any, logs: dict[str, float], **_: Any
    ) -> None:
        if "loss" in logs:
            self._loss = logs["loss"]
            self._progress.update(
                self._task,
                total=state.max_steps,
                completed=state.global_step,
                loss=f"{self._loss:.3f}",
            )
        if "eval_loss" in logs:
            is_best = state.best_metric is None or logs["eval_loss"] < state.best_metric
            self._console.print(
                f"step {state.global_step}/{state.max_steps}  training loss {self._loss:.3f}  "
                f"development loss {logs['eval_loss']:.3f}{'  best' if is_best else ''}",
                highlight=False,
                soft_wrap=True,
            )
