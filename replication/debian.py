"""Files of the Debian archive, pinned: fetched from a mirror, checked, never installed."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import tarfile
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from neft.errors import DataError
from neft.files import replaced_atomically

MIRROR = "https://deb.debian.org/debian"
CACHE = Path("data/debian")
LOCK = Path(__file__).with_name("debian.lock.json")


def read_debian_lock(path: Path, names: Sequence[str]) -> dict[str, str]:
    """The sha256 of each of ``names`` in a lock file: a JSON object, path in the archive to sha256.

    Raises:
        DataError: the file cannot be read, is something else, or does not pin one of ``names``.
    """
    try:
        pins = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a list of pinned archive files: {error}") from error
    if not (isinstance(pins, dict) and all(isinstance(pin, str) for pin in pins.values())):
        raise DataError(
            f"{path}: not a list of pinned archive files: it must be an object, path to sha256."
        )
    if missing := [name for name in names if name not in pins]:
        raise DataError(f"{path}: {' and '.join(missing)} must be pinned here, and are not.")
    return {name: pins[name] for name in names}


def fetch_archive_files(pins: Mapping[str, str], mirror: str, cache: Path) -> dict[str, Path]:
    """Where each of ``pins`` lies in ``cache``; what is missing is downloaded from ``mirror``.

    A file enters the cache only once its hash is right, so a killed download leaves no trace there.

    Args:
        pins: path in the archive to sha256.
        mirror: address of the archive: what comes before ``/dists`` and ``/pool``.
        cache: folder of downloaded files, laid out as the archive is.

    Raises:
        DataError: the mirror cannot be reached, or a file is not the pinned one.
    """
    paths = {name: cache / name for name in pins}
    for name, path in paths.items():
        if not path.exists():
            _download(f"{mirror.rstrip('/')}/{name}", path, pins[name])
        _check(path, path.read_bytes(), pins[name])
    return paths


def _download(address: str, path: Path, sha256: str) -> None:
    print(f"Downloading {address}", flush=True)
    try:
        with urllib.request.urlopen(address, timeout=60) as response:
            content = response.read()
    except (OSError, ValueError) as error:  # URLError is an OSError; ValueError: no address at all
        raise DataError(
            f"{address}: cannot be fetched: {error}. Check the connection, give another --mirror, "
            f"or put the file at {path}."
        ) from error
    _check(address, content, sha256)
    with replaced_atomically(path) as part:
        part.write_bytes(content)


def _check(place: str | Path, content: bytes, sha256: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(
            f"{place}: sha256 is {found}, but {sha256} is pinned. The file is torn (delete it and try "
            "again) or the archive has moved on (https://snapshot.debian.org keeps each of its states: "
            "give one of them as --mirror)."
        )


def read_package(deb: Path) -> dict[str, bytes]:
    """The files in a binary package, by their paths.

    Raises:
        DataError: not a package, or one whose data are not a ``data.tar.xz``.
    """
    for name, content in _members(deb):
        if name == "data.tar.xz":
            try:
                with tarfile.open(fileobj=io.BytesIO(content), mode="r:xz") as archive:
                    regular = [member for member in archive if member.isfile()]
                    files = [(member.name, archive.extractfile(member)) for member in regular]
                    return {path: file.read() for path, file in files if file}
            except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
                raise DataError(f"{deb}: {name}: not a compressed archive: {error}") from error
    raise DataError(f"{deb}: not a Debian package with a data.tar.xz.")


def _members(deb: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an ``ar`` archive: a magic line, then 60 bytes ahead of each content."""
    content = deb.read_bytes()
    offset = len(b"!<arch>\n")
    while content.startswith(b"!<arch>\n") and offset < len(content):
        head = content[offset : offset + 60].decode("latin-1")
        size = head[48:58].strip()
        if not size.isdecimal():
            return
        start = offset + 60
        yield head[:16].rstrip().rstrip("/"), content[start : start + int(size)]
        offset = start + int(size) + int(size) % 2  # contents start at even offsets


def paragraphs_of(lines: Iterable[str]) -> list[str]:
    """The paragraphs of a long description, given the lines of its control field.

    Wrapped text is joined; a list item, and a line that is indented further, stands for itself.
    """
    paragraphs: list[list[str]] = []
    open_for_more = False
    for line in lines:
        text = line.strip()
        if text == ".":
            open_for_more = False
            continue
        starts_anew = line.startswith("  ") or text[:2] in ("* ", "- ", "o ")
        if open_for_more and not starts_anew:
            paragraphs[-1].append(text)
        else:
            paragraphs.append([text])
        open_for_more = True
    return [" ".join(paragraph) for paragraph in paragraphs]
