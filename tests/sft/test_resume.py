"""Checkpoints on disk: whole, torn, superseded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from neft.sft import resume

FILES = ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")


def checkpoint(folder: Path, step: int, *, best: int | None = None, sealed: bool = True) -> Path:
    made = resume.checkpoint_folder(folder, step)
    made.mkdir()
    for name in FILES:
        (made / name).write_text(f"{name} of step {step}")
    (made / "trainer_state.json").write_text(json.dumps({"best_global_step": best}))
    if sealed:
        resume.seal(made)
    return made


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_last_checkpoint_is_the_last_whole_one(tmp_path: Path) -> None:
    assert resume.last_checkpoint(tmp_path) is None
    for step in (9, 10, 2):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 11, sealed=False)
    assert resume.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def lose(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    os.truncate(file, 5)


@pytest.mark.parametrize("damage", [lose, cut])
@pytest.mark.parametrize("name", [*FILES, "complete.json"])
def test_damaged_checkpoint_is_not_whole(
    tmp_path: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    earlier, last = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    damage(last / name)
    assert resume.last_checkpoint(tmp_path) == earlier
    resume.discard_torn(tmp_path)
    assert names(tmp_path) == {"checkpoint-1"}
    # Without its marker it may have been torn by a kill, which is nothing to speak of.
    is_told = f"{last}: deleted" in caplog.text and f"goes on from {earlier}." in caplog.text
    assert is_told == (last / name != last / "complete.json" or damage is cut)


def test_nothing_goes_on_without_the_best_weights(tmp_path: Path) -> None:
    best = checkpoint(tmp_path, 2, best=2)
    last = checkpoint(tmp_path, 4, best=2)
    resume.discard_superseded(tmp_path, best=2, last=4)
    assert resume.last_checkpoint(tmp_path) == last
    resume.discard_torn(tmp_path)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4"}
    cut(best / "model.safetensors")
    assert resume.last_checkpoint(tmp_path) is None
    resume.discard_torn(tmp_path)
    assert names(tmp_path) == set()


def test_weights_alone_are_nothing_to_go_on_from(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2, best=2)
    last = checkpoint(tmp_path, 4, best=2)
    resume.discard_superseded(tmp_path, best=2, last=4)
    lose(last / "optimizer.pt")
    assert resume.last_checkpoint(tmp_path) is None


def test_torn_checkpoints_go(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2, sealed=False)
    resume.discard_torn(tmp_path)
    assert names(tmp_path) == {"checkpoint-1"}


def test_marker_follows_everything_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    made = checkpoint(tmp_path, 1, sealed=False)

    def sync(path: Path) -> None:
        assert names(made) == set(FILES)
        synced.append(path.name)

    monkeypatch.setattr(resume, "sync", sync)
    resume.seal(made)
    assert sorted(synced) == sorted(["checkpoint-1", *FILES])
    assert resume.last_checkpoint(tmp_path) == made


def test_superseded_checkpoints_go(tmp_path: Path) -> None:
    for step, sealed in ((1, True), (2, True), (3, False), (4, True)):
        checkpoint(tmp_path, step, sealed=sealed)
    resume.discard_superseded(tmp_path, best=2, last=4)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4"}
    marker = names(tmp_path / "checkpoint-4") - set(FILES)
    assert names(tmp_path / "checkpoint-2") == {"model.safetensors"} | marker


def test_half_deleted_checkpoint_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)

    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resume.discard_superseded(tmp_path, best=None, last=2)
    assert (tmp_path / "checkpoint-1").exists()
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert resume.last_checkpoint(tmp_path) is None
