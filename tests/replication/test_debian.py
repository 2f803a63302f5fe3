"""Pinned files of the Debian archive: what enters the cache is what was pinned. No network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from debian import LOCK, fetch_archive_files, paragraphs_of, read_debian_lock, read_package
from neft.errors import DataError

NAME = "dists/stable/main/i18n/Translation-fr.bz2"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An archive of one file."""
    path = tmp_path / "archive" / NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(b"published")
    return tmp_path / "archive"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_missing_file_is_downloaded_once(tmp_path, archive):
    pins = {NAME: sha256(b"published")}
    files = fetch_archive_files(pins, f"{archive.as_uri()}/", tmp_path / "cache")
    assert files == {NAME: tmp_path / "cache" / NAME}
    assert files[NAME].read_bytes() == b"published"
    assert fetch_archive_files(pins, "file:///nowhere", tmp_path / "cache") == files


def test_another_file_than_the_pinned_one_never_enters_the_cache(tmp_path, archive):
    with pytest.raises(DataError, match=r"Translation-fr.*0000 is pinned.*snapshot\.debian\.org"):
        fetch_archive_files({NAME: "0" * 64}, archive.as_uri(), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_file_altered_in_the_cache_is_refused(tmp_path, archive):
    path = archive / NAME
    path.write_bytes(b"altered")
    with pytest.raises(DataError, match=r"Translation-fr\.bz2: sha256 is .*delete it and try"):
        fetch_archive_files({NAME: sha256(b"published")}, "file:///nowhere", archive)


@pytest.mark.parametrize("mirror", ["http://127.0.0.1:9", "file:///nowhere", "nowhere"])
def test_an_archive_that_cannot_be_reached(tmp_path, mirror):
    with pytest.raises(DataError, match=rf"^{mirror}/{NAME}: cannot be fetched: .* --mirror"):
        fetch_archive_files({NAME: "0" * 64}, mirror, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [None, "{", "[]", '{"a": 1}'])
def test_what_is_no_lock_file(tmp_path, content):
    path = tmp_path / "some.lock.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"some\.lock\.json: not a list of pinned archive files: "):
        read_debian_lock(path, ["a"])


def test_only_what_is_asked_for_is_read_from_the_lock(tmp_path):
    path = tmp_path / "some.lock.json"
    path.write_text('{"a": "1", "b": "2"}')
    assert read_debian_lock(path, ["b"]) == {"b": "2"}
    with pytest.raises(DataError, match=r"some\.lock\.json: c and d must be pinned here"):
        read_debian_lock(path, ["c", "a", "d"])


def test_the_lock_of_the_project_is_of_a_released_suite():
    for name, pin in json.loads(LOCK.read_text()).items():
        assert name.startswith(("dists/bookworm/", "pool/main/"))
        assert len(pin) == 64


def test_files_of_a_package(tmp_path, make_package):
    files = {"./usr/share/a.mo": b"odd", "./usr/share/b.txt": b"even"}
    make_package(tmp_path / "a.deb", files)
    assert read_package(tmp_path / "a.deb") == files


@pytest.mark.parametrize("content", [b"", b"no package", b"!<arch>\n", b"!<arch>\n" + b"x" * 70])
def test_what_is_no_package(tmp_path, content):
    (tmp_path / "a.deb").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.deb: not a Debian package"):
        read_package(tmp_path / "a.deb")


def test_a_torn_package(tmp_path, make_package):
    make_package(tmp_path / "a.deb", {"./a": bytes(range(256)) * 40})
    content = (tmp_path / "a.deb").read_bytes()
    (tmp_path / "a.deb").write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"a\.deb: data\.tar\.xz: not a compressed archive"):
        read_package(tmp_path / "a.deb")


def test_paragraphs_and_list_items():
    description = """\
 A first paragraph that is
 wrapped.
 .
 Features:
  * one item that
    stands alone
  - another
 * third
 that goes on"""
    assert paragraphs_of(description.splitlines()) == [
        "A first paragraph that is wrapped.",
        "Features:",
        "* one item that",
        "stands alone",
        "- another",
        "* third that goes on",
    ]
