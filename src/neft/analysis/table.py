"""Tables as columns of plain arrays, with what they were computed from; Parquet or CSV on disk."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from neft.errors import DataError
from neft.files import replaced_atomically, write_json, write_text

Column: TypeAlias = NDArray[Any] | Sequence[Any]

_ABOUT = b"neft"


@dataclass(frozen=True)
class Table:
    """Columns of equal length, by name."""

    columns: Mapping[str, Column]
    about: Mapping[str, Any] = field(default_factory=dict)
    """What it was computed from, and how: plain JSON values."""

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.columns.items()}
        assert len(set(lengths.values())) <= 1, f"columns of different length: {lengths}"

    def __len__(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, name: str) -> Column:
        """Column ``name``."""
        return self.columns[name]

    def rows(self) -> list[dict[str, Any]]:
        """Rows of plain Python values."""
        plain = [_plain(column) for column in self.columns.values()]
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*plain, strict=True)]

    def save(self, path: Path) -> None:
        """Write Parquet, with ``about`` in its metadata, or CSV, with ``about`` in JSON beside it.

        Args:
            path: ends in ``.parquet``, which keeps types and lists, or ``.csv``, for short tables of
                numbers and names.
        """
        if path.suffix == ".csv":
            self._save_csv(path)
        else:
            self._save_parquet(path)

    @classmethod
    def load(cls, path: Path) -> Table:
        """Read a file that ``save`` wrote; what a CSV file leaves empty is NaN among numbers.

        Raises:
            DataError: it is missing or cannot be read.
        """
        return cls._load_csv(path) if path.suffix == ".csv" else cls._load_parquet(path)

    @classmethod
    def _load_csv(cls, path: Path) -> Table:
        try:
            # With its own line ends, which a quoted field may hold.
            with path.open(encoding="utf-8", newline="") as lines:
                header, *rows = csv.reader(lines)
            about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            texts = zip(*rows, strict=True) if rows else ((),) * len(header)
            columns = dict(zip(header, map(_from_texts, texts), strict=True))
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        return cls(columns, about)

    @classmethod
    def _load_parquet(cls, path: Path) -> Table:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            found = parquet.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        about = (found.schema.metadata or {}).get(_ABOUT)
        if about is None:
            raise DataError(f"{path}: a Parquet file that no analysis of neft wrote.")
        columns = {name: _from_arrow(found.column(name)) for name in found.column_names}
        return cls(columns, json.loads(about))

    def _save_parquet(self, path: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.table({name: _to_arrow(column) for name, column in self.columns.items()})
        about = json.dumps(self.about, ensure_ascii=False).encode()
        with replaced_atomically(path) as part:
            parquet.write_table(
                table.replace_schema_metadata({_ABOUT: about}), part, compression="zstd"
            )

    def _save_csv(self, path: Path) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(row.values() for row in self.rows())
        write_text(path, text.getvalue())
        write_json(path.with_suffix(".json"), dict(self.about))


def _from_texts(texts: Sequence[str]) -> Column:
    """Numbers where all are numbers or empty."""
    for kind in (np.int64, np.float64):
        with suppress(ValueError):
            return np.array([text or "nan" for text in texts]).astype(kind)
    return list(texts)


def _plain(column: Column) -> list[Any]:
    return column.tolist() if isinstance(column, np.ndarray) else list(column)


def _to_arrow(column: Column) -> Any:
    import pyarrow as pa

    if isinstance(column, np.ndarray):
        return pa.array(column)
    return pa.array(list(column))


def _from_arrow(column: Any) -> Column:
    import pyarrow as pa

    kind = column.type
    if column.null_count == 0 and (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    ):
        array: NDArray[Any] = column.to_numpy()
        return array
    values: list[Any] = column.to_pylist()
    return values
