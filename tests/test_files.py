from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from neft.files import replaced_atomically, write_json, write_text


def test_writes_text_and_json(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "text", "naïve\n")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "naïve\n".encode()
    write_json(tmp_path / "value.json", {"é": [1, None]})
    assert (tmp_path / "value.json").read_text(encoding="utf-8") == (
        '{\n  "é": [\n    1,\n    null\n  ]\n}\n'
    )


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    final = tmp_path / "file"
    with replaced_atomically(final) as part:
        part.write_text("half")
        assert part.parent == tmp_path  # the same file system, so that the rename is atomic
        assert not final.exists()
        part.write_text("whole")
    assert final.read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_who_has_the_old_file_open_keeps_it(tmp_path: Path) -> None:
    final = tmp_path / "file"
    final.write_text("old")
    with final.open() as reader:
        write_text(final, "new")
        assert reader.read() == "old"
    assert final.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    final = tmp_path / "file"
    final.write_text("old")

    def write() -> None:
        with replaced_atomically(final) as part:
            part.write_text("ne")
            raise error

    with pytest.raises(error):
        write()
    assert final.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_names_the_file_and_not_its_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_text(tmp_path / "folder", "text")
    assert error.value.filename == str(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "plain", "")
        with replaced_atomically(tmp_path / "renamed") as part:
            # Some writers put a private file of their own into the place of the one they are given.
            other = tmp_path / "other"
            other.touch(0o600)
            other.replace(part)
    finally:
        assert os.umask(before) == umask
    for name in ("plain", "renamed"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


WRITER = """
import sys
from neft.files import replaced_atomically
with replaced_atomically(sys.argv[1]) as part, part.open("wb", buffering=0) as file:
    file.write(b"n" * 100_000)
    print("half", flush=True)
    sys.stdin.read()
"""


def test_killed_mid_write(tmp_path: Path) -> None:
    final = tmp_path / "file"
    final.write_text("old")
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(final)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL
    assert final.read_text() == "old"
    write_text(final, "new")
    assert final.read_text() == "new"
