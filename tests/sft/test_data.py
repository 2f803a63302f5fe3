"""Examples from every kind of source, and errors that name the place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neft.errors import DataError
from neft.recipe import DataSection
from neft.sft.data import Example, Message, load_examples

# Words that readers which guess types turn into something else: dates, nothing, numbers.
ROWS = [
    {"source": "2020-01-01", "target": "2021-12-31"},
    {"source": "None", "target": "Aucun"},
    {"source": "NA", "target": "007"},
    {"source": 'say "a\u2028b",\tnow', "target": "1.50 \u4f60\u597d"},
]


def section(source: Any, task: str = "translation", **fields: Any) -> DataSection:
    languages = {"source_language": "English", "target_language": "French"}
    return DataSection(task=task, train=source, dev=source, test=source, **(languages | fields))


def write_lines(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def write_jsonl(path: Path, *rows: Any) -> str:
    return write_lines(path, *(json.dumps(row, ensure_ascii=False) for row in rows))


def write_table(path: Path, delimiter: str) -> str:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [delimiter.join(map(cell, row.values())) for row in ROWS]
    return write_lines(path, delimiter.join(ROWS[0]), *lines)


def make_jsonl(folder: Path) -> Any:
    return write_jsonl(folder / "rows.jsonl", *ROWS)


def make_csv(folder: Path) -> Any:
    return write_table(folder / "rows.csv", ",")


def make_tsv(folder: Path) -> Any:
    return write_table(folder / "rows.tsv", "\t")


def make_parquet(folder: Path) -> Any:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def make_parallel(folder: Path) -> Any:
    return {
        side: write_lines(folder / f"rows.{side}", *(row[side] for row in ROWS))
        for side in ("source", "target")
    }


SOURCES = [make_jsonl, make_csv, make_tsv, make_parquet, make_parallel]


@pytest.mark.parametrize("make", SOURCES)
def test_texts_arrive_as_they_stand(make: Any, tmp_path: Path) -> None:
    examples = load_examples(section(make(tmp_path)), "train")
    assert [(example.prompt, example.target) for example in examples] == [
        (f"Translate the following text from English to French. {row['source']}", row["target"])
        for row in ROWS
    ]


@pytest.mark.parametrize("make", SOURCES)
def test_limits_take_the_first_rows(make: Any, tmp_path: Path) -> None:
    data = section(make(tmp_path), dev_limit=2)
    assert load_examples(data, "dev") == load_examples(data, "train")[:2]


def test_same_path_with_new_content_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    for target in ("eins", "zwei"):
        pq.write_table(pa.table({"source": ["one"], "target": [target]}), path)
        os.utime(path, (0, 0))
        assert load_examples(section(str(path)), "train")[0].target == target


def test_windows_line_ends_and_byte_order_marks_are_no_part_of_a_text(tmp_path: Path) -> None:
    for side, text in (("source", "a\r\nb\r\n"), ("target", "x\r\ny")):
        (tmp_path / side).write_bytes(b"\xef\xbb\xbf" + text.encode())
    files = {side: str(tmp_path / side) for side in ("source", "target")}
    examples = load_examples(section(files, "prompt", template="{source}"), "train")
    assert [(example.prompt, example.target) for example in examples] == [("a", "x"), ("b", "y")]


def test_summaries(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", {"document": "Long.", "summary": "Short."})
    data = section(source, "summarization", target_language="Chinese")
    assert load_examples(data, "train") == [
        Example(
            "Given the below English article, generate a summary in Chinese.\nArticle: Long.",
            "Short.",
        )
    ]
    data = section(source, "summarization", source_language=None)
    assert "the below article" in str(load_examples(data, "train")[0].prompt)


@pytest.mark.parametrize("label", ["neutral", 1, "1"])
def test_labels_by_name_or_number(label: Any, tmp_path: Path) -> None:
    row = {"premise": "It rains.", "hypothesis": "It pours.", "label": label}
    data = section(
        write_jsonl(tmp_path / "rows.jsonl", row),
        "classification",
        labels=["entailment", "neutral", "contradiction"],
    )
    [example] = load_examples(data, "train")
    assert example.target == "neutral"
    assert "Premise: It rains.\nHypothesis: It pours." in str(example.prompt)
    assert "entailment, neutral, contradiction" in str(example.prompt)


def test_template_fields_and_nested_rows(tmp_path: Path) -> None:
    rows = [{"pair": {"en": "one {x}", "de": "eins"}, "meta.kind": "number"}]
    data = section(
        write_jsonl(tmp_path / "rows.jsonl", *rows),
        "prompt",
        template="{{{kind}}} in {target_language}: {text}",
        fields={"text": "pair.en", "target": "pair.de", "kind": "meta.kind"},
        target_language="German",
    )
    assert load_examples(data, "train") == [Example("{number} in German: one {x}", "eins")]


def test_last_assistant_turn_is_the_target(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = {"talk": [*messages, {"role": "assistant", "content": "Farewell"}]}
    data = section(write_jsonl(tmp_path / "rows.jsonl", row), "chat", fields={"messages": "talk"})
    assert load_examples(data, "train") == [
        Example(tuple(Message(*turn) for turn in turns), "Farewell")
    ]


GOOD = {"source": "a", "target": "b"}


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([GOOD, {"source": "a"}], "line 2: no field 'target'; the row has source"),
        ([GOOD, {"source": "a", "target": "  "}], "line 2: field 'target' is empty"),
        ([{"source": 5, "target": "b"}], "line 1: field 'source' must be text, found int 5"),
        ([{"source": None, "target": "b"}], "field 'source' must be text, found nothing"),
        ([GOOD, ["a", "b"]], "line 2: each line must be a JSON object, found list"),
        ([], "holds no rows"),
    ],
)
def test_faulty_rows(rows: list[Any], fault: str, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(DataError, match=r"rows\.jsonl.*" + fault):
        load_examples(section(source), "train")


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        (
            "rows.jsonl",
            b'{"source": "a", "target": "b"}\n\n{"source": "a",\n',
            "line 3: malformed JSON",
        ),
        ("rows.jsonl", b'{"source": "\xff"}\n', "line 1: not UTF-8"),
        (
            "rows.jsonl",
            b'{"source": "a", "target": "b"}\n{"source": "a", "target": "b \\ud83d"}\n',
            r"line 2: field 'target' holds half a character \('\\ud83d', at position 3\)",
        ),
        ("rows.csv", b"source,target\na,b\nc\n", "line 3: 1 cells, but the header has 2 columns"),
        ("rows.csv", b'source,target\n"a\nb",c\nd,"e\n', "line 4: malformed row"),
        ("rows.csv", b"source,source\na,b\n", "line 1: a column name occurs twice"),
        ("rows.tsv", b"source\ttarget\n", "holds no rows"),
        ("rows.csv", b"", "holds no rows"),
        ("rows.parquet", b"PAR1 torn", "not a readable Parquet file"),
        (
            "rows.json",
            b"[]",
            "unknown file ending '.json'; choose one of .jsonl, .csv, .tsv, .parquet",
        ),
    ],
)
def test_faulty_files(name: str, content: bytes, fault: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{fault}"):
        load_examples(section(str(tmp_path / name)), "train")


@pytest.mark.parametrize("name", ["none.jsonl", "none.csv", "none.parquet", "folder.jsonl"])
def test_unreadable_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=rf"{name}: (cannot be read|no such file)"):
        load_examples(section(str(tmp_path / name)), "train")


def test_parallel_files_of_different_length(tmp_path: Path) -> None:
    files = {
        "source": write_lines(tmp_path / "a.en", "one", "two"),
        "target": write_lines(tmp_path / "a.fr", "un"),
    }
    with pytest.raises(DataError, match=r"a\.en has 2 lines, .*a\.fr has 1"):
        load_examples(section(files, train_limit=1), "train")


def test_parallel_files_name_the_line_of_an_empty_text(tmp_path: Path) -> None:
    files = {
        "source": write_lines(tmp_path / "a.en", "one", "two"),
        "target": write_lines(tmp_path / "a.fr", "un", ""),
    }
    with pytest.raises(DataError, match=r"a\.fr, line 2: field 'target' is empty"):
        load_examples(section(files), "train")


@pytest.mark.parametrize("label", ["maybe", 3, -1, True, 1.0, None, "3"])
def test_unknown_labels(label: Any, tmp_path: Path) -> None:
    row = {"premise": "a", "hypothesis": "b", "label": label}
    source = write_jsonl(tmp_path / "rows.jsonl", row)
    data = section(source, "classification", labels=["yes", "no", "both"])
    with pytest.raises(
        DataError, match=r"line 1: field 'label' is .*not one of the labels yes, no"
    ):
        load_examples(data, "train")


@pytest.mark.parametrize(
    ("turns", "fault"),
    [
        ("hello", "must be a list of two or more messages, found str"),
        ([["assistant", "Hi"]], "must be a list of two or more"),
        (
            [["user", "Hi"], ["user", "Hi"]],
            "last message is the target and must be the assistant's",
        ),
        ([["user", "Hi"], ["robot", "Hi"]], "message 2: role is 'robot'"),
        ([["user", ""], ["assistant", "Hi"]], "message 1: content is empty"),
        ([["user", "Hi"], ["assistant", None]], "message 2: content must be text, found nothing"),
    ],
)
def test_faulty_chats(turns: Any, fault: str, tmp_path: Path) -> None:
    if isinstance(turns, list):
        turns = [{"role": role, "content": content} for role, content in turns]
    source = write_jsonl(tmp_path / "rows.jsonl", {"messages": turns})
    with pytest.raises(DataError, match=f"line 1: field 'messages'.*{fault}"):
        load_examples(section(source, "chat"), "train")


def test_hub_data_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = {"id": "nobody/nothing", "split": "train"}
    with pytest.raises(DataError, match="nobody/nothing: cannot be loaded from the Hub"):
        load_examples(section(source), "train")


def test_hub_data_by_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``datasets`` takes a folder for an id, which stands in for the Hub here."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", GOOD)
    write_jsonl(tmp_path / "set" / "test.jsonl", GOOD, {"source": "c", "target": ""})
    source = {"id": str(tmp_path / "set"), "split": "train"}
    assert load_examples(section(source), "train")[0].target == "b"
    with pytest.raises(DataError, match=r"\(test\), row 2: field 'target' is empty"):
        load_examples(section(source | {"split": "test"}), "train")
    with pytest.raises(DataError, match="cannot be loaded from the Hub"):
        load_examples(section(source | {"split": "none"}), "train")
