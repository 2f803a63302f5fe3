"""Runs of three small stages: skipped, resumed, refused, killed.

As a script this file is such a run, which stops, to be killed, at the step named on its command line
(``copy:2`` is in stage copy, after two of its four steps); or, told ``every change``, many runs, the n-th
of which is killed just before it changes a name on disk for the n-th time.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from neft.errors import RunError, UsageError
from neft.pipeline import store
from neft.pipeline.run import duration, run_stages
from neft.pipeline.stage import Stage
from neft.pipeline.store import RECORD, StageFolder, State, is_locked, locked

NUM_STEPS = 4


def stop_at(moment: str, wanted: str) -> None:
    if moment == wanted:
        print("ready", flush=True)
        time.sleep(60)


def stages(
    text: str = "ab", num_steps: int = NUM_STEPS, label: str = "n", stop: str = ""
) -> list[Stage]:
    def write(working: Path, _inputs: Mapping[str, Path]) -> None:
        (working / "text").write_text(text)

    def copy(working: Path, inputs: Mapping[str, Path]) -> None:
        steps, twin = working / "steps", working / "twin"
        done = steps.read_text() if steps.exists() else ""
        assert not done or twin.exists(), "resumed from something that was being removed"
        for step in range(len(done), num_steps):
            stop_at(f"copy:{step}", stop)
            done += str(step)
            twin.write_text(done)
            steps.write_text(done)
            with (working.parent / "log").open("a") as log:
                log.write(str(step))
        (working / "copied").write_text((inputs["write"] / "text").read_text() * num_steps)

    def count(working: Path, inputs: Mapping[str, Path]) -> None:
        (working / label).write_text(str(len((inputs["copy"] / "copied").read_text())))

    return [
        Stage("write", 1, {"write.text": text}, (), write),
        Stage("copy", 1, {"copy.steps": num_steps}, ("write",), copy, resumes_from=("steps",)),
        Stage("count", 1, {"count.label": label}, ("copy",), count, derived=True),
    ]


def run_into(
    output: Path,
    stages: Sequence[Stage],
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    folders = {stage.name: StageFolder(output / stage.name) for stage in stages}
    run_stages(stages, folders, output / ".lock", overwrite=overwrite, say=say)


def die_before_change(number: int) -> None:
    """Let this process be killed just before its n-th change of a name on disk."""
    changes = iter(range(1, number))

    def audit(event: str, args: tuple[object, ...]) -> None:
        if event in ("os.rename", "os.remove", "os.rmdir") and next(changes, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def die_at_every_change(output: Path) -> None:
    """Runs in ``output / "1"``, ``output / "2"``, ..., up to the first that lives to its end.

    Each starts from a copy of ``output / "start"``, and replaces what another recipe has left there.
    """
    for number in itertools.count(1):
        folder = shutil.copytree(output / "start", output / str(number))
        child = os.fork()
        if child == 0:
            die_before_change(number)
            run_into(folder, stages(), overwrite=True)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
            return


if __name__ == "__main__":
    folder, stop, steps = sys.argv[1:]
    if stop == "every change":
        die_at_every_change(Path(folder))
    else:
        run_into(Path(folder), stages(num_steps=int(steps), stop=stop))
    sys.exit()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


def run(output: Path, *, overwrite: bool = False, **recipe) -> list[str]:
    """What the run says, without durations."""
    lines: list[str] = []
    run_into(output, stages(**recipe), overwrite=overwrite, say=lines.append)
    return [line.partition(",")[0] for line in lines]


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def results(output: Path) -> dict[str, str]:
    """The content of all results, without records (which hold times) and the lock."""
    aside = {RECORD, ".lock"}
    return {name: text for name, text in tree(output).items() if Path(name).name not in aside}


ALL = ["write: starts", "write: done", "copy: starts", "copy: done", "count: starts", "count: done"]
NOTHING = ["write: already done", "copy: already done", "count: already done"]
RESULTS = {
    "write/text": "ab",
    "copy/steps": "0123",
    "copy/twin": "0123",
    "copy/copied": "ab" * 4,
    "count/n": "8",
}


def test_runs_once(output) -> None:
    assert run(output) == ALL
    before = tree(output)
    assert results(output) == RESULTS | {"log": "0123"}
    assert run(output) == NOTHING
    assert tree(output) == before


def test_record_says_what_the_folder_holds(output) -> None:
    run(output)
    record = json.loads((output / "copy" / RECORD).read_text())
    write = json.loads((output / "write" / RECORD).read_text())
    assert record["ingredients"] == {"copy.steps": 4}
    assert record["reads"] == {"write": write["fingerprint"]}
    assert record["files"] == {"copied": 8, "steps": 4, "twin": 4}
    assert record["attempts"] == 1
    assert {"neft", "torch", "transformers"} <= record["packages"].keys()


def test_a_moved_run_is_still_done(output, tmp_path) -> None:
    run(output)
    moved = output.rename(tmp_path / "moved")
    assert run(moved) == NOTHING


@pytest.mark.parametrize("name", ["write", "copy", "count"])
def test_a_removed_stage_is_made_again(output, name) -> None:
    run(output)
    before = results(output)
    for path in (output / name).iterdir():
        path.unlink()
    (output / name).rmdir()
    said = run(output)
    assert [line for line in said if "already" not in line] == [f"{name}: starts", f"{name}: done"]
    assert results(output).items() >= (before.items() - {("log", "0123")})


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("a")])
def test_a_damaged_stage_is_made_again(output, damage) -> None:
    run(output)
    damage(output / "copy" / "copied")
    assert StageFolder(output / "copy").state() is State.DAMAGED
    run(output)
    assert results(output).items() >= RESULTS.items()


@pytest.mark.parametrize(
    ("recipe", "lines", "lost"),
    [
        ({"text": "abc"}, ["  write.text is ab there, abc in this recipe"], ["write", "copy"]),
        ({"num_steps": 2}, ["  copy.steps is 4 there, 2 in this recipe"], ["copy"]),
        (
            {"num_steps": 2, "label": "m", "text": "a"},
            [
                "  write.text is ab there, a in this recipe",
                "  copy.steps is 4 there, 2 in this recipe",
            ],
            ["write", "copy"],
        ),
    ],
)
def test_results_of_another_recipe_are_kept(output, recipe, lines, lost) -> None:
    run(output)
    before = tree(output)
    with pytest.raises(UsageError) as caught:
        run(output, **recipe)
    assert str(caught.value).splitlines() == [
        "Results of another recipe are in the way:",
        *[f"  {output / name}" for name in lost],
        "The recipes differ:",
        *lines,
        "Choose another output folder, or replace these results with --overwrite.",
    ]
    assert tree(output) == before


def test_overwrite_replaces_what_differs(output) -> None:
    run(output)
    assert run(output, num_steps=2, overwrite=True) == ["write: already done", *ALL[2:]]
    assert results(output) == {
        "write/text": "ab",
        "copy/steps": "01",
        "copy/twin": "01",
        "copy/copied": "abab",
        "count/n": "4",
        "log": "012301",
    }


def test_derived_stage_is_replaced_without_asking(output) -> None:
    run(output)
    assert run(output, label="m") == [*NOTHING[:2], *ALL[4:]]
    assert not (output / "count" / "n").exists()
    assert (output / "count" / "m").read_text() == "8"


def test_a_new_version_of_a_stage_is_another_recipe(output, monkeypatch) -> None:
    run(output)
    changed = [Stage("write", 2, {"write.text": "ab"}, (), print), *stages()[1:]]
    with pytest.raises(
        UsageError, match="version 1 of stage write there, version 2 in this release"
    ):
        run_into(output, changed)


def test_foreign_folder_is_never_touched(output) -> None:
    mine = output / "copy" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"copy: is in the way: no stage of a run made it"):
            run(output, overwrite=overwrite)
    assert tree(output) == {"copy/thesis.txt": "years of work"}


def test_old_results_stay_until_new_ones_are_finished(output) -> None:
    run(output)
    broken = stages(num_steps=2)

    def fail(working: Path, _inputs: Mapping[str, Path]) -> None:
        raise RunError("no space left")

    broken[1] = Stage("copy", 1, {"copy.steps": 2}, ("write",), fail, resumes_from=("steps",))
    with pytest.raises(RunError):
        run_into(output, broken, overwrite=True)
    assert results(output).items() >= RESULTS.items()


def test_failed_stage_leaves_nothing(output) -> None:
    def fail(working: Path, _inputs: Mapping[str, Path]) -> None:
        (working / "half").write_text("half")
        raise RunError("broken")

    with pytest.raises(RunError, match="broken"):
        run_into(output, [Stage("write", 1, {}, (), fail)])
    assert not output.exists()


# Killed


def start(output: Path, stop: str, num_steps: int = NUM_STEPS) -> subprocess.Popen[str]:
    """A run in another process, which has got to ``stop``."""
    command = [sys.executable, __file__, str(output), stop, str(num_steps)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("step", [0, 2])
def test_killed_run_goes_on_where_it_was(output, step) -> None:
    kill(start(output, f"copy:{step}"))
    assert StageFolder(output / "copy").state() is State.PARTIAL
    assert run(output) == [
        "write: already done",
        "copy: continues",
        "copy: done",
        "count: starts",
        "count: done",
    ]
    # The log shows that no step was done twice.
    assert results(output) == RESULTS | {"log": "0123"}


def killed_at_every_change(start: Path) -> list[Path]:
    """Folders that began like ``start``, each left behind by a run that was killed one change later."""
    outputs = start.parent
    command = [sys.executable, __file__, str(outputs), "every change", str(NUM_STEPS)]
    subprocess.run(command, check=True)
    return [path for path in outputs.iterdir() if path != start]


def check_state(output: Path) -> None:
    """Whatever stands in a stage's place is whole."""
    states = {StageFolder(output / stage.name).state() for stage in stages()}
    assert State.DAMAGED not in states


def check_end(output: Path, expected: dict[str, str]) -> None:
    assert results(output).items() >= expected.items()
    assert [path.name for path in output.iterdir() if path.name.startswith(".")] == []


def test_killed_at_any_moment(tmp_path) -> None:
    (tmp_path / "start").mkdir()
    outputs = killed_at_every_change(tmp_path / "start")
    assert len(outputs) > 10
    for output in outputs:
        check_state(output)
        run(output)
        check_end(output, RESULTS | {"log": "0123"})


def test_killed_at_any_moment_of_an_overwrite(tmp_path) -> None:
    run(tmp_path / "start", text="old", num_steps=2)
    for output in killed_at_every_change(tmp_path / "start"):
        check_state(output)
        run(output, overwrite=True)
        check_end(output, RESULTS)


def test_killed_while_another_recipes_work_is_removed(tmp_path) -> None:
    kill(start(tmp_path / "start", "copy:2", num_steps=5))
    for output in killed_at_every_change(tmp_path / "start"):
        run(output, num_steps=5, overwrite=True)
        check_end(output, {"copy/steps": "01234", "copy/twin": "01234"})


def test_failed_training_goes_on_where_it_was(output) -> None:
    failing = stages()

    def fail_after_two_steps(working: Path, inputs: Mapping[str, Path]) -> None:
        (working / "steps").write_text("01")
        (working / "twin").write_text("01")
        raise RunError("the loss is not finite")

    failing[1] = replace(failing[1], run=fail_after_two_steps)
    with pytest.raises(RunError):
        run_into(output, failing)
    assert run(output)[1] == "copy: continues"
    assert results(output) == RESULTS | {"log": "23"}


def test_interrupted_work_of_another_recipe_is_kept(output) -> None:
    kill(start(output, "copy:2"))
    before = results(output)
    with pytest.raises(UsageError, match=r"copy\.steps is 4 there, 3 in this recipe") as caught:
        run(output, num_steps=3)
    assert str(caught.value).splitlines()[1] == f"  {output / '.copy.partial'}"
    assert results(output) == before
    run(output, num_steps=3, overwrite=True)
    assert (output / "copy" / "steps").read_text() == "012"
    assert (output / "log").read_text() == "01" + "012"


def test_attempt_that_left_nothing_is_nobodys(output) -> None:
    kill(start(output, "copy:0"))
    run(output, num_steps=3)
    assert (output / "copy" / "steps").read_text() == "012"


def test_attempts_are_counted(output) -> None:
    kill(start(output, "copy:1"))
    kill(start(output, "copy:3"))
    run(output)
    record = StageFolder(output / "copy").finished()
    assert record is not None
    assert record.attempts == 3


# One at a time


def test_second_process_is_refused(output) -> None:
    first = start(output, "copy:1")
    before = tree(output)
    assert is_locked(output / ".lock")
    with pytest.raises(RunError, match=rf"another process \(id {first.pid}\) is working here"):
        run(output)
    assert tree(output) == before
    kill(first)
    assert not is_locked(output / ".lock")
    assert run(output)[1] == "copy: continues"


def test_lock_of_a_run_that_has_just_ended(tmp_path, monkeypatch) -> None:
    """Its holder removes the file between our opening and locking it."""
    lock, real = tmp_path / ".lock", store._try_lock
    removals = iter([lock.unlink])

    def late(handle: int, kind: int) -> bool:
        next(removals, lambda: None)()
        return real(handle, kind)

    monkeypatch.setattr(store, "_try_lock", late)
    with locked(lock):
        monkeypatch.undo()
        assert is_locked(lock)


def test_lock_is_gone_after_a_failure(tmp_path) -> None:
    def fail_locked() -> None:
        with locked(tmp_path / "new" / ".lock"):
            raise RunError("broken")

    with pytest.raises(RunError):
        fail_locked()
    assert list(tmp_path.iterdir()) == []


def test_a_look_at_the_lock_does_not_stop_a_run(output) -> None:
    import fcntl
    import threading

    output.mkdir(parents=True)
    with (output / ".lock").open("w") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        threading.Timer(0.1, look.close).start()
        assert run(output) == ALL


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (59.6, "1 min 0 s"),
        (61, "1 min 1 s"),
        (3599.7, "1 h 0 min"),
        (7830, "2 h 10 min"),
    ],
)
def test_duration(seconds, text) -> None:
    assert duration(seconds) == text
