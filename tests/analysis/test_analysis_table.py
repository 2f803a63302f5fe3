"""Tables: what was saved comes back, and nothing else is taken for a table."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from neft.analysis.table import Table
from neft.errors import DataError

TABLE = Table(
    {
        "module": np.array(["a", "b", "ä"], dtype=object),
        "layer": np.array([0, 1, 2]),
        "trained": np.array([True, False, True]),
        "turn": np.array([0.1, 1e-17, 2.0]),
        "rise": [None, 1.5, 2.5],
        "tokens": [["<", " the"], [], ['"']],
    },
    {"model": "Modell ä", "threshold": 0.25},
)


def test_parquet_keeps_columns_types_and_provenance(tmp_path) -> None:
    TABLE.save(tmp_path / "t.parquet")
    loaded = Table.load(tmp_path / "t.parquet")
    assert list(loaded.columns) == list(TABLE.columns)
    assert loaded.about == TABLE.about
    assert loaded.rows() == TABLE.rows()
    for name in ("layer", "trained", "turn"):
        assert isinstance(loaded[name], np.ndarray)
        assert loaded[name].dtype == TABLE[name].dtype
    assert len(loaded) == len(TABLE) == 3


def test_rows_are_plain_values() -> None:
    first = TABLE.rows()[0]
    assert first == {
        "module": "a",
        "layer": 0,
        "trained": True,
        "turn": 0.1,
        "rise": None,
        "tokens": ["<", " the"],
    }
    assert [type(value) for value in first.values()] == [str, int, bool, float, type(None), list]


def test_csv_with_provenance_beside_it(tmp_path) -> None:
    Table({"role": ["up", 'a,"b"'], "rise": [0.1, None]}, {"texts": 3}).save(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [
            {"role": "up", "rise": "0.1"},
            {"role": 'a,"b"', "rise": ""},
        ]
    assert json.loads((tmp_path / "t.json").read_text()) == {"texts": 3}


def test_table_without_rows(tmp_path) -> None:
    empty = Table({"layer": np.empty(0, dtype=np.int64)}, {"why": "none"})
    assert len(empty) == len(Table({})) == 0
    empty.save(tmp_path / "t.parquet")
    assert Table.load(tmp_path / "t.parquet").rows() == []


def test_columns_of_different_length() -> None:
    with pytest.raises(AssertionError, match=r"'a': 1, 'b': 2"):
        Table({"a": [1], "b": [1, 2]})


def test_loading_what_is_no_table(tmp_path) -> None:
    with pytest.raises(DataError, match=r"none\.parquet: cannot be read"):
        Table.load(tmp_path / "none.parquet")
    torn = tmp_path / "torn.parquet"
    TABLE.save(torn)
    torn.write_bytes(torn.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"torn\.parquet: cannot be read"):
        Table.load(torn)
    foreign = tmp_path / "foreign.parquet"
    parquet.write_table(pa.table({"a": [1]}), foreign)
    with pytest.raises(DataError, match=r"foreign\.parquet: a Parquet file that no analysis"):
        Table.load(foreign)


def test_files_are_replaced_and_not_written_over(tmp_path) -> None:
    path, reader = tmp_path / "t.parquet", tmp_path / "reader.parquet"
    TABLE.save(path)
    reader.hardlink_to(path)
    Table({"a": [1]}).save(path)
    with pytest.raises(pa.ArrowInvalid):
        Table({"mixed": [1, "one"]}).save(path)
    assert Table.load(reader).about == TABLE.about
    assert Table.load(path).rows() == [{"a": 1}]
    assert len(list(tmp_path.iterdir())) == 2
