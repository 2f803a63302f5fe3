"""The replication scripts are programs, not a package: tests import them from their folder."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest

REPLICATION = Path(__file__).parents[2] / "replication"
sys.path.insert(0, str(REPLICATION))


class MakeWheel(Protocol):
    def __call__(self, folder: Path, name: str, files: Mapping[str, bytes]) -> dict[str, Any]: ...


@pytest.fixture
def make_wheel() -> MakeWheel:
    """``make_wheel(folder, "toy", {"toy/a.po": b"..."})`` writes toy 1.0; its entry in a lock file."""

    def make(folder: Path, name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-1.0-py3-none-any.whl"
        info = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in files.items():
                archive.writestr(member, content)
            archive.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
            )
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")
        return {
            "requirement": f"{name}==1.0",
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "license": "MIT",
        }

    return make


@pytest.fixture
def write_lock(tmp_path: Path):
    """``write_lock(entries)``: the path of a lock file."""

    def write(entries: list[dict[str, Any]]) -> Path:
        path = tmp_path / "wheels.lock.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        return path

    return write
