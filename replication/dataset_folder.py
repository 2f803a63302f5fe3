"""The folder that a builder makes: JSON Lines files, and ``report.json`` written last.

The report holds what the files were made from, the rows and sha256 of each, and how many candidates each
filter dropped. A folder is finished when its report is there, names the same inputs, and its files have
the hashes that it says.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neft.errors import NeftError
from neft.files import write_json, write_text

REPORT = "report.json"


def fraction(text: str) -> float:
    """A hash of ``text``, uniform in 0..1."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def program_digest(*files: str) -> str:
    """One sha256 of a builder's source files: another program may build other data."""
    digests = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def finished_report(folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of an earlier, whole run with the same inputs."""
    try:
        report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        digests = {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in report["files"]
        }
    except (FileNotFoundError, ValueError, KeyError):  # nothing there, or torn
        return None
    unchanged = all(digests[name] == file["sha256"] for name, file in report["files"].items())
    return report if unchanged and report["inputs"] == inputs else None


def publish(
    folder: Path,
    inputs: Mapping[str, Any],
    files: Mapping[str, Sequence[Mapping[str, str]]],
    counts: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """Write ``{name}.jsonl`` for each of ``files``, then the report, which is returned.

    Args:
        folder: made if it is not there.
        inputs: what determines the files.
        files: the rows of each file, by its name without ending.
        counts: further sections of the report, such as the candidates dropped by each filter.
    """
    # Without its report, a folder that is half old and half new never passes for a finished one.
    (folder / REPORT).unlink(missing_ok=True)
    written = {}
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / f"{name}.jsonl", text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        written[f"{name}.jsonl"] = {"rows": len(rows), "sha256": digest}
    report = {"inputs": dict(inputs), "files": written, **counts}
    write_json(folder / REPORT, report)
    return report


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser described by the first line of a builder's ``__doc__``."""
    return argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def run(build: Callable[[], dict[str, Any]], folder: Path) -> int:
    """Call ``build`` and print the files of ``folder``, or the error; the exit code of the command."""
    try:
        report = build()
    except NeftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name, file in report["files"].items():
        print(f"{folder / name}: {file['rows']:,} rows, sha256 {file['sha256']}")
    return 0
