"""Training runs of several processes: as a script, started by torchrun, this file is one of them.

It carries out the cases of a file one after the other, each in a process group of its own, and the first
process writes what became of them.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from subprocess import CompletedProcess, Popen
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from neft import processes
from neft.errors import NeftError
from neft.neurons import NeuronSet
from neft.projections import find_projections
from neft.recipe import DataSection, DistributedSection, LoraSection, ModelSection, TrainingSection
from neft.sft import sharded
from neft.sft.callbacks import StopOnSignal
from neft.sft.methods import METHODS
from neft.sft.train import train

ALL = ["up", "gate", "down", "q", "k", "v", "o"]


@dataclass(frozen=True)
class Case:
    """A call of ``train``, with all it needs as plain values."""

    model: str
    data: dict[str, Any]
    folder: str
    method: str = "neft"
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    distributed: dict[str, Any] = field(default_factory=dict)
    killed_at: int | None = None
    """Fail before this step, then go on."""
    file_bytes: int | None = None
    """Size of the files of a checkpoint."""

    def carry_out(self) -> None:
        neurons = None
        if METHODS[self.method].needs_neurons:
            projections = find_projections(self.model, ALL)
            indices = {p.name: range(0, p.num_neurons, 3) for p in projections}
            neurons = NeuronSet(projections, indices)
        options = {"learning_rate": 1e-2, "batch_size": 6, "evaluate_every": 2, "warmup_steps": 0}
        train(
            ModelSection(path=self.model, dtype=self.dtype),
            DataSection(**self.data),
            TrainingSection(**({"steps": 4} | options | self.options)),
            method=self.method,
            neurons=neurons,
            lora=LoraSection(rank=2) if self.method == "lora" else None,
            seed=1,
            folder=self.folder,
            distributed=DistributedSection(**self.distributed),
        )


class Killed(BaseException):
    """Nothing of the package catches it."""


def by_several(cases: Mapping[str, Case], folder: Path) -> dict[str, str | None]:
    """Carry out cases in two processes; the error of each, if there was one."""
    given, told = folder / "cases.json", folder / "outcomes.json"
    given.write_text(json.dumps({name: asdict(case) for name, case in cases.items()}))
    launch(2, [__file__, str(given), str(told)]).check_returncode()
    return json.loads(told.read_text())


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
# Without GPUs, too; by ``--cpu`` accelerate would start one process. Port 0: any that is free.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
ACCELERATE += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
ACCELERATE += ["--num_processes"]


def launch(
    num_processes: int, command: list[str], launcher: list[str] = TORCHRUN, **options: Any
) -> CompletedProcess[str]:
    """Start a command by a launcher, and wait for its end."""
    launched = launching(num_processes, command, launcher, **options)
    stdout, stderr = launched.communicate(timeout=300)
    return CompletedProcess(command, launched.returncode, stdout, stderr)


def launching(
    num_processes: int, command: list[str], launcher: list[str] = TORCHRUN, **options: Any
) -> Popen[str]:
    """Start a command by a launcher."""
    arguments = [sys.executable, "-m", *launcher, str(num_processes), *command]
    return Popen(arguments, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, **options)


def _carry_out(case: Case) -> str | None:
    with pytest.MonkeyPatch.context() as patched:
        if case.file_bytes is not None:
            patched.setattr(sharded, "_FILE_BYTES", case.file_bytes)
        try:
            if case.killed_at is not None:
                begin(case)
            case.carry_out()
        except NeftError as error:
            return str(error)
    return None


def begin(case: Case) -> None:
    """Carry out a case up to where it is killed."""

    def on_step_begin(self: Any, args: Any, state: Any, *rest: Any, **_: Any) -> None:
        if state.global_step == case.killed_at:
            raise Killed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StopOnSignal, "on_step_begin", on_step_begin)
        with pytest.raises(Killed):
            case.carry_out()


def _check_that_nothing_is_left(name: str, linear: Any) -> None:
    """Of a training: the next is in the same process."""
    assert functional.linear is linear, name
    gc.collect()
    assert not any(issubclass(type(it), PreTrainedModel) for it in gc.get_objects()), name


def _main(given: Path, told: Path) -> None:
    torch.set_num_threads(1)
    linear = functional.linear
    outcomes = {}
    cases: Iterable[tuple[str, Any]] = json.loads(given.read_text()).items()
    for name, fields in cases:
        with processes.process_group(name):
            outcomes[name] = _carry_out(Case(**fields))
        _check_that_nothing_is_left(name, linear)
    if processes.is_first():
        told.write_text(json.dumps(outcomes))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
