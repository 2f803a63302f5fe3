"""The replication scripts are programs, not a package: tests import them from their folder."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
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
            "languages": ["fr"],
        }

    return make


class MakePackage(Protocol):
    def __call__(self, path: Path, files: Mapping[str, bytes]) -> str: ...


@pytest.fixture
def make_package() -> MakePackage:
    """``make_package(path, {"./usr/a.mo": b"..."})`` writes a Debian package; its sha256."""

    def member(name: str, content: bytes) -> bytes:
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
        return head.encode() + content + b"\n" * (len(content) % 2)

    def make(path: Path, files: Mapping[str, bytes]) -> str:
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:xz") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        path.parent.mkdir(parents=True, exist_ok=True)
        members = [
            ("debian-binary", b"2.0\n"),
            ("control.tar.xz", b"odd"),
            ("data.tar.xz", data.getvalue()),
        ]
        path.write_bytes(b"!<arch>\n" + b"".join(member(*each) for each in members))
        return hashlib.sha256(path.read_bytes()).hexdigest()

    return make


@pytest.fixture
def write_lock(tmp_path: Path):
    """``write_lock(entries)``: the path of a lock file."""

    def write(entries: list[dict[str, Any]]) -> Path:
        path = tmp_path / "wheels.lock.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        return path

    return write
