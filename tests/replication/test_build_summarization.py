"""Reading, choosing and splitting of package descriptions, on handmade index files. No network."""

from __future__ import annotations

import bz2
import hashlib
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import build_summarization
import dataset_folder
from build_summarization import (
    ENGLISH,
    LANGUAGES,
    PACKAGES,
    Candidate,
    Description,
    Row,
    clean_summary,
    common_paragraphs,
    one_a_source,
    read_descriptions,
    read_sources,
    reject,
    split,
    without_near_duplicates,
)
from neft.errors import DataError

FRENCH = LANGUAGES["fr"]
CHINESE = LANGUAGES["zh"]


# --- Read -----------------------------------------------------------------------------------------


def test_descriptions(tmp_path):
    text = """\
Package: toy
Description-md5: 123
Description-fr: jouet : utile
 Un premier
 paragraphe.
 .
 Un second.

Package: top
Description-md5: 456
Description-fr: toupie

 Un reste.
"""
    index = tmp_path / "Translation-fr.bz2"
    index.write_bytes(bz2.compress(text.encode()))
    assert list(read_descriptions(index)) == [
        Description("toy", "123", "jouet : utile", ("Un premier paragraphe.", "Un second.")),
        Description("top", "456", "toupie", ()),
    ]


def test_source_packages(tmp_path):
    text = """\
Package: libtoy1
Source: toy (1.0)
Depends: libc6

Package: top
Version: 1
"""
    index = tmp_path / "Packages.xz"
    index.write_bytes(lzma.compress(text.encode()))
    assert read_sources(index) == {"libtoy1": "toy", "top": "top"}


@pytest.mark.parametrize("content", [b"no archive", bz2.compress(b"a" * 9999)[:30]])
def test_a_broken_index_is_named(tmp_path, content):
    (tmp_path / "Translation-fr.bz2").write_bytes(content)
    with pytest.raises(DataError, match=r"Translation-fr\.bz2: not a compressed index: "):
        list(read_descriptions(tmp_path / "Translation-fr.bz2"))


# --- Clean and reject -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("synopsis", "summary"),
    [
        ("moteur  de jeu - fichiers de données", "moteur de jeu"),
        ("éditeur d\u2019images \u2013 outils", "éditeur d'images"),
        ("lecteur (client)", "lecteur"),
        ("courte-pointe", "courte-pointe"),
        ("(client)", "(client)"),
        ("古代战争游戏\uff08数据文件\uff09", "古代战争游戏"),
    ],
)
def test_clean_summary(synopsis, summary):
    assert clean_summary(synopsis) == summary


DOCUMENT = "A program that shows pictures of many kinds on the screen. " * 5


@pytest.mark.parametrize(
    ("document", "summary", "synopsis", "fault"),
    [
        (DOCUMENT, "visionneuse d'images", "picture viewer", None),
        (DOCUMENT[:100], "visionneuse d'images", "picture viewer", "document short"),
        (DOCUMENT * 5, "visionneuse d'images", "picture viewer", "document long"),
        ("1 2 3 4 5 " * 10, "visionneuse d'images", "picture viewer", "document is not prose"),
        (DOCUMENT, "visionneuse d'images", "transitional package", "no program"),
        (DOCUMENT, "image", "picture viewer", "summary short"),
        (DOCUMENT, "visionneuse " * 10, "picture viewer", "summary long"),
        (DOCUMENT, "visionneuse d'изображение", "picture viewer", "summary in another script"),
        (DOCUMENT, "Picture viewer", "picture viewer - tools", "summary untranslated"),
        (DOCUMENT, "viewer for the pictures", "picture viewer", "summary untranslated"),
    ],
)
def test_reject(document, summary, synopsis, fault):
    assert reject(document, summary, synopsis, FRENCH) == fault


@pytest.mark.parametrize(
    ("summary", "fault"),
    [
        ("GNU 版本的 tar 归档工具", None),
        ("图片 viewer", "summary short"),
        ("图片显示 for GNOME", "summary untranslated"),
        ("图片显示工具 просмотр", "summary in another script"),
    ],
)
def test_reject_in_chinese(summary, fault):
    assert reject(DOCUMENT, summary, "picture viewer", CHINESE) == fault


def test_paragraphs_that_many_sources_use():
    packages = ["a", "b", "c", "d", "e"]
    english = [Description(name, name, "", ("everywhere", f"of {name}")) for name in packages]
    english += [Description(f"a{n}", f"a{n}", "", ("of one source",)) for n in range(9)]
    sources = dict.fromkeys((f"a{n}" for n in range(9)), "a")
    assert common_paragraphs(english, sources) == {"everywhere"}


# --- Choose and split -----------------------------------------------------------------------------


def candidate(source_package: str, package: str = "", document: str = "") -> Candidate:
    return Candidate(Row(document, "résumé", package or source_package), source_package)


def test_one_package_a_source():
    candidates = [
        candidate("toy", "toy-dev"),
        candidate("toy", "toy"),
        candidate("toy", "to"),
        candidate("top", "libtop-dev"),
        candidate("top", "libtop1"),
    ]
    kept = [candidate.row.package for candidate in one_a_source(candidates)]
    assert kept == ["libtop1", "toy"]
    assert one_a_source(reversed(candidates)) == one_a_source(candidates)


def test_near_duplicates_are_dropped():
    alike = "one two three four five six seven eight nine ten"
    candidates = [
        candidate("a", document=alike),
        candidate("b", document=alike.replace("ten", "last")),
        candidate("c", document="one two three four and then something else altogether"),
    ]
    kept = {candidate.source_package for candidate in without_near_duplicates(candidates)}
    assert len(kept) == 2
    assert "c" in kept


def test_split_by_source_package():
    candidates = [candidate(f"package{number}") for number in range(900)]
    splits = split(candidates, held_out=0.1)
    assert 60 < len(splits["dev"]) < 120
    assert 60 < len(splits["test"]) < 120
    assert sum(map(len, splits.values())) == 900
    again = split(candidates[::-1][:300], held_out=0.1)
    for name, rows in again.items():
        assert set(rows) <= set(splits[name]), "depends on the source package alone"


def test_held_out_splits_are_bounded(monkeypatch):
    monkeypatch.setattr(build_summarization, "MAX_HELD_OUT", 5)
    splits = split([candidate(f"package{number}") for number in range(900)], held_out=0.1)
    assert [len(splits[name]) for name in ("dev", "test")] == [5, 5]
    assert splits["train"], "what is over leaves; it does not go to train"
    assert len(splits["train"]) < 850


# --- Build ----------------------------------------------------------------------------------------


def description_of(number: int) -> str:
    chance = random.Random(number)
    letters = "abcdefghijklmnop"
    return " ".join("".join(chance.choices(letters, k=6)) for _ in range(50))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An archive of 120 packages, of which every third has a sibling; its pins beside it."""
    packages, english, french = [], [], []
    for number in range(120):
        names = [f"toy{number}", f"toy{number}-doc"] if number % 3 == 0 else [f"libtoy{number}"]
        for name in names:
            packages.append(f"Package: {name}\nSource: toy{number}\n")
            head = f"Package: {name}\nDescription-md5: md5-{name}\n"
            english.append(
                f"{head}Description-en: toy\n {description_of(number)}\n .\n See below.\n"
            )
            french.append(f"{head}Description-fr: jouet numéro {number} - documents\n Inutile.\n")
    french.append("Package: new\nDescription-md5: unknown\nDescription-fr: nouveau\n")
    pins = {}
    for name, stanzas in {PACKAGES: packages, ENGLISH: english, FRENCH.index: french}.items():
        path = tmp_path / "archive" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        compress = lzma.compress if path.suffix == ".xz" else bz2.compress
        path.write_bytes(compress("\n".join(stanzas).encode()))
        pins[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "debian.lock.json").write_text(json.dumps(pins))
    return tmp_path / "archive"


def build(folder: Path, archive: Path) -> dict:
    return build_summarization.build_summarization(
        folder,
        archive.parent / "cache",
        "fr",
        archive.as_uri(),
        archive.parent / "debian.lock.json",
    )


def test_files_and_report(tmp_path, archive):
    report = build(tmp_path / "out", archive)
    assert report["files"].keys() == {"train.jsonl", "dev.jsonl", "test.jsonl"}
    packages = []
    for name, file in report["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        rows = [json.loads(line) for line in content.decode().splitlines()]
        assert len(rows) == file["rows"] > 0
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
        for row in rows:
            number = int(row["package"].removeprefix("lib").removeprefix("toy"))
            assert row == {
                "document": description_of(number),
                "summary": f"jouet numéro {number}",
                "package": row["package"],
            }
        packages += [row["package"] for row in rows]
    assert len(set(packages)) == len(packages) == 120
    assert report["dropped"]["no English description"] == 1
    assert report["dropped"]["of the same source package"] == 40


def test_a_finished_build_is_not_repeated_but_a_torn_one_is(tmp_path, archive):
    folder = tmp_path / "out"
    report = build(folder, archive)
    archive.rename(tmp_path / "gone")
    (tmp_path / "cache").rename(tmp_path / "gone too")
    assert build(folder, archive) == report, "needs no archive"
    (tmp_path / "gone").rename(archive)
    (folder / "test.jsonl").write_bytes((folder / "test.jsonl").read_bytes()[:100])
    assert build(folder, archive) == report
    digest = hashlib.sha256((folder / "test.jsonl").read_bytes()).hexdigest()
    assert digest == report["files"]["test.jsonl"]["sha256"]


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path, archive, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(path: Path, value: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(dataset_folder, "write_json", kill)
        with pytest.raises(Killed):
            build(tmp_path / "out", archive)
    assert (tmp_path / "out" / "train.jsonl").exists()
    assert not (tmp_path / "out" / "report.json").exists()
    assert build(tmp_path / "out", archive)["files"]


def test_the_same_bytes_under_any_hash_seed(tmp_path, archive):
    script = (
        "import sys; from pathlib import Path; from build_summarization import *\n"
        "out, cache, mirror, lock = sys.argv[1:]\n"
        "build_summarization(Path(out), Path(cache), 'fr', mirror, Path(lock))"
    )
    source = Path(build_summarization.__file__).parent
    for seed in ("1", "2"):
        arguments = [tmp_path / seed, tmp_path / "cache", archive.as_uri()]
        subprocess.run(
            [sys.executable, "-c", script, *arguments, tmp_path / "debian.lock.json"],
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(source)},
        )
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl", "report.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_an_index_with_too_little_in_it(tmp_path, archive):
    path = archive / FRENCH.index
    path.write_bytes(bz2.compress(b"\n"))
    pins = json.loads((tmp_path / "debian.lock.json").read_text())
    pins[FRENCH.index] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "debian.lock.json").write_text(json.dumps(pins))
    with pytest.raises(DataError, match="no French rows are left for train and dev and test"):
        build(tmp_path / "out", archive)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    options = {"output": tmp_path / "out", "cache": tmp_path / "cache", "mirror": "file:///none"}
    monkeypatch.setattr(
        sys, "argv", ["x", *(f"--{name}={value}" for name, value in options.items())]
    )
    assert build_summarization.main() == 2
    message = capsys.readouterr().err
    assert message.startswith("error: file:///none/dists/bookworm/main/")
    assert "cannot be fetched" in message
    assert not (tmp_path / "out").exists()


def test_the_index_of_every_language_is_pinned():
    pins = json.loads(build_summarization.LOCK.read_text())
    assert {PACKAGES, ENGLISH, *(each.index for each in LANGUAGES.values())} <= pins.keys()
