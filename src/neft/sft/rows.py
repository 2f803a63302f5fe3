"""Reading rows from files and the Hub, each with the place that an error must name.

Text files are read line by line here rather than by ``datasets``, whose readers guess types (a column
of ISO dates becomes timestamps, the word "None" a missing value) and lose the line. Parquet files and
Hub data sets carry their types with them, and are read by ``datasets``.
"""

from __future__ import annotations

import csv
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neft.errors import DataError
from neft.recipe import DataSource, HubData, ParallelFiles

# Halves of UTF-16 pairs; JSON's escapes can spell one alone.
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One row of a source."""

    place: str
    """File and line, or data set and row."""
    values: Mapping[str, Any]

    def value(self, path: str) -> Any:
        """What lies at ``path``; dots go into nested rows unless a column bears the whole name."""
        if path in self.values:
            return self.values[path]
        found: Any = self.values
        for part in path.split("."):
            if not isinstance(found, Mapping) or part not in found:
                raise DataError(
                    f"{self.place}: no field {path!r}; the row has {', '.join(self.values) or 'none'}. "
                    "Say under data.fields where it lies."
                )
            found = found[part]
        return found

    def text(self, path: str) -> str:
        """The text at ``path``, which must hold more than white space."""
        return checked_text(self.value(path), f"{self.place}: field {path!r}")


def checked_text(value: Any, where: str) -> str:
    """``value`` if it is text that holds more than white space; ``where`` names it in the error."""
    if not isinstance(value, str):
        raise DataError(f"{where} must be text, found {shown(value)}.")
    if not value.strip():
        raise DataError(f"{where} is empty.")
    if surrogate := _SURROGATE.search(value):
        raise DataError(
            f"{where} holds half a character ({surrogate[0]!r}, at position {surrogate.start() + 1}): "
            "the text was cut in the middle of an emoji or the like. Remove it, or cut elsewhere."
        )
    return value


def shown(value: Any) -> str:
    """Type and value, short enough for a message."""
    text = "nothing (null)" if value is None else f"{type(value).__name__} {value!r}"
    return text if len(text) <= 60 else text[:57] + "..."


def source_name(source: DataSource) -> str:
    """The source as the user knows it."""
    if isinstance(source, ParallelFiles):
        return f"{source.source} + {source.target}"
    if isinstance(source, HubData):
        return f"{' '.join(filter(None, (source.id, source.config)))} ({source.split})"
    return source


def read_rows(source: DataSource) -> Iterator[Row]:
    """All rows in order, read as they are asked for.

    Parallel files give rows with the fields ``source`` and ``target``.

    Raises:
        DataError: a file that cannot be read, or a malformed line, with its place.
    """
    if isinstance(source, ParallelFiles):
        return _read_parallel(source)
    if isinstance(source, HubData):
        return _read_hub(source)
    ending = Path(source).suffix.lower()
    if ending not in _READERS:
        raise DataError(
            f"{source}: unknown file ending {ending!r}; choose one of {', '.join(_READERS)}, two "
            "parallel files {source: ..., target: ...}, or a Hub data set {id: ..., split: ...}."
        )
    return _READERS[ending](Path(source).expanduser())


def _read_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file with their ends; nothing but a line feed ends a line."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                # A byte-order mark, which some editors write, belongs to no line.
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 text ({error.reason}).") from error


def _read_parallel(files: ParallelFiles) -> Iterator[Row]:
    sources, targets = (
        list(_read_lines(Path(path).expanduser())) for path in (files.source, files.target)
    )
    # Checked before the first pair: files of different length are out of step from somewhere on.
    if len(sources) != len(targets):
        raise DataError(
            f"{files.source} has {len(sources)} lines, {files.target} has {len(targets)}; line n of one "
            "must belong to line n of the other."
        )
    for number, (source, target) in enumerate(zip(sources, targets, strict=True), 1):
        yield Row(
            f"{source_name(files)}, line {number}",
            {"source": source.rstrip("\r\n"), "target": target.rstrip("\r\n")},
        )


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_read_lines(path), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{place}: malformed JSON at column {error.colno} ({error.msg}); each line is one object."
            ) from error
        if not isinstance(values, dict):
            raise DataError(f"{place}: each line must be a JSON object, found {shown(values)}.")
        yield Row(place, values)


def _read_csv(path: Path) -> Iterator[Row]:
    return _read_table(path, ",")


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_table(path, "\t")


def _read_table(path: Path, delimiter: str) -> Iterator[Row]:
    """Rows under a header; quoted cells may span lines, and the last one places the row."""
    csv.field_size_limit(
        sys.maxsize
    )  # the module's own limit of 128 KiB is less than some articles
    reader = csv.reader(_read_lines(path), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}, line 1: a column name occurs twice: {', '.join(header)}.")
        for cells in reader:
            if cells:
                place = f"{path}, line {reader.line_num}"
                yield Row(place, _by_column(header, cells, place))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: malformed row: {error}.") from error


def _by_column(header: list[str], cells: list[str], place: str) -> dict[str, str]:
    if len(cells) != len(header):
        raise DataError(
            f"{place}: {len(cells)} cells, but the header has {len(header)} columns "
            f"({', '.join(header)})."
        )
    return dict(zip(header, cells, strict=True))


def _read_parquet(path: Path) -> Iterator[Row]:
    from datasets import load_dataset

    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    # Streaming, and a cache of one's own: the shared one knows a file by its time stamp, and would bring
    # back the old rows of one that was replaced.
    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = load_dataset(
                "parquet", data_files=str(path), split="train", streaming=True, cache_dir=cache
            )
            yield from _numbered(rows, str(path))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def _read_hub(source: HubData) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.id, source.config, split=source.split, revision=source.revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source.id}: cannot be loaded from the Hub. Check the id, config ({source.config}), split "
            f"({source.split}) and the network. ({error})"
        ) from error
    yield from _numbered(rows, source_name(source))


def _numbered(rows: Iterable[Mapping[str, Any]], where: str) -> Iterator[Row]:
    for number, values in enumerate(rows, 1):
        yield Row(f"{where}, row {number}", values)


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
