"""A file's identity follows its content, and nothing else."""

from __future__ import annotations

import os
import shutil

import pytest

from neft import files
from neft.files import file_identity


@pytest.fixture
def large(monkeypatch) -> int:
    """Make files above 64 KiB large; returns a size that is."""
    monkeypatch.setattr(files, "_WHOLE_UP_TO", 2**16)
    monkeypatch.setattr(files, "_NUM_BLOCKS", 8)
    return 2**17


def test_time_and_place_do_not_matter(tmp_path) -> None:
    first, second = tmp_path / "a.bin", tmp_path / "b.bin"
    first.write_bytes(b"neuron" * 100)
    shutil.copy(first, second)
    os.utime(second, (0, 0))
    assert file_identity(first) == file_identity(second)


@pytest.mark.parametrize("position", [0, 5_000, 2**16])
def test_small_file_is_read_whole(tmp_path, large, position) -> None:
    path = tmp_path / "small"
    content = bytearray(2**16)
    path.write_bytes(content)
    before = file_identity(path)
    content[position : position + 1] = b"x"
    path.write_bytes(content)
    assert file_identity(path) != before


def test_large_file_is_sampled_from_end_to_end(tmp_path, large) -> None:
    path = tmp_path / "large"
    original = bytes(large)
    path.write_bytes(original)
    before = file_identity(path)
    assert before.startswith("sampled:")
    for start in (0, large // 2 - large // 8, large - 1):
        stretch = min(large // 8 + 4096, large - start)
        path.write_bytes(original[:start] + b"x" * stretch + original[start + stretch :])
        assert file_identity(path) != before
    path.write_bytes(original + b"\0")
    assert file_identity(path) != before
