"""Pinned wheels: what enters the cache is what was pinned. pip runs for real, with a folder as index."""

from __future__ import annotations

from pathlib import Path

import pytest

from neft.errors import DataError
from wheels import Wheel, fetch_wheels, read_lock


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the only package index."""
    folder = tmp_path / "index"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_missing_wheels_are_downloaded_once(tmp_path, index, make_wheel):
    wheels = [Wheel(**make_wheel(index, name, {f"{name}.txt": b"!"})) for name in ("toy", "top")]
    cache = tmp_path / "cache"
    paths = fetch_wheels(wheels, cache)
    assert [path.name for path in paths] == [wheel.file for wheel in wheels]
    assert sorted(cache.iterdir()) == sorted(paths)
    for path in index.iterdir():
        path.unlink()
    assert fetch_wheels(wheels, cache) == paths


def test_another_file_than_the_pinned_one_never_enters_the_cache(tmp_path, index, make_wheel):
    entry = make_wheel(index, "toy", {"a.txt": b"published"})
    wheel = Wheel(**entry | {"sha256": "0" * 64})
    with pytest.raises(DataError, match=rf"sha256 is {entry['sha256']}.*pinned to 0000"):
        fetch_wheels([wheel], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_altered_in_the_cache_is_refused(tmp_path, make_wheel):
    wheel = Wheel(**make_wheel(tmp_path, "toy", {"a.txt": b"published"}))
    with (tmp_path / wheel.file).open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"toy-1\.0.*delete it and try again"):
        fetch_wheels([wheel], tmp_path)


def test_a_wheel_that_pip_cannot_find(tmp_path, index):
    index.mkdir()
    wheel = Wheel("nowhere==1.0", "nowhere-1.0-py3-none-any.whl", "0" * 64, "MIT")
    with pytest.raises(DataError, match=r"could not download nowhere==1\.0 \(exit code 1"):
        fetch_wheels([wheel], tmp_path / "cache")


@pytest.mark.parametrize("content", [None, "[", "{}x", '[{"requirement": "toy==1.0"}]', "[1]"])
def test_what_is_no_lock_file(tmp_path, content):
    path = tmp_path / "some.lock.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"some\.lock\.json: not a list of pinned wheels: "):
        read_lock(path)


def test_the_lock_of_the_project_is_complete():
    from build_translation import LANGUAGES, LOCK

    wheels = read_lock(LOCK)
    assert {language for wheel in wheels for language in wheel.languages} == LANGUAGES.keys()
    for wheel in wheels:
        assert "==" in wheel.requirement
        assert wheel.file.endswith("-none-any.whl"), "would depend on the machine"
        assert len(wheel.sha256) == 64
        assert wheel.languages, "nobody reads it"
    # Permissive licences only, so that the data may be passed on.
    assert {wheel.license for wheel in wheels} <= {
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "MIT",
        "ZPL-2.1",
    }
