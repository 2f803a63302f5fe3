"""The paper's data from small archives in the schemas of the real ones; the recipes read them."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

import build_paper_data
from build_paper_data import build_cross_sum, build_news_commentary
from neft.comparison.schema import load_comparison
from neft.errors import DataError
from neft.recipe import DataSource
from neft.sft.data import load_examples

ROOT = Path(__file__).parents[2]


def write_news(mirror: Path, pair: str, num_articles: int = 20) -> None:
    """Articles of three lines, apart by a line with nothing on either side."""
    first, second = pair.split("-")
    lines = [
        f'{first} "{a}.{i}\t{second} {a}.{i}\n' if i < 3 else "\t\n"
        for a in range(num_articles)
        for i in range(4)
    ]
    path = mirror / f"news-commentary-v16.{pair}.tsv.gz"
    path.write_bytes(gzip.compress("".join(lines).encode()))


def write_summaries(mirror: Path, pair: str, splits: Mapping[str, int]) -> None:
    with tarfile.open(mirror / f"{pair}_CrossSum.tar.bz2", "w:bz2") as archive:
        for split, num_rows in splits.items():
            rows = [
                {
                    "source_url": f"https://example.org/{i}",
                    "target_url": f"https://example.org/zh/{i}",
                    "summary": f"{split} \u6458\u8981 {i}",
                    "text": f"{split} article {i}",
                }
                for i in range(num_rows)
            ]
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
            member = tarfile.TarInfo(f"./{pair}_{split}.jsonl")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_news_commentary(tmp_path: Path) -> None:
    write_news(tmp_path, "hi-zh")
    report = build_news_commentary(
        tmp_path / "out", tmp_path / "cache", "hi", "zh", tmp_path.as_uri()
    )
    train, dev = (read(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "dev"))
    # 60 pairs, of which the last 5% are development data, in their order.
    assert dev == [{"source": f'hi "19.{i}', "target": f"zh 19.{i}"} for i in range(3)]
    assert sorted(row["target"] for row in train) == sorted(
        f"zh {a}.{i}" for a in range(19) for i in range(3)
    )
    assert train != sorted(train, key=lambda row: row["target"])  # in hashed order
    assert report["dropped"] == {"one side empty": 20}
    assert set(report["files"]) == {"train.jsonl", "dev.jsonl"}


def test_a_pair_is_one_file_for_both_directions(tmp_path: Path) -> None:
    write_news(tmp_path, "fr-hi")
    build_news_commentary(tmp_path / "out", tmp_path / "cache", "hi", "fr", tmp_path.as_uri())
    first = read(tmp_path / "out" / "dev.jsonl")[0]
    assert (first["source"], first["target"]) == ("hi 19.0", 'fr "19.0')


def test_large_and_small_training_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_paper_data, "SMALL", 10)
    monkeypatch.setattr(build_paper_data, "LARGE", 30)
    write_news(tmp_path, "en-zh")
    build_news_commentary(tmp_path / "out", tmp_path / "cache", "en", "zh", tmp_path.as_uri())
    train = read(tmp_path / "out" / "train.jsonl")
    assert len(train) == 30
    assert read(tmp_path / "out" / "train_20k.jsonl") == train[:10]


def test_what_development_holds_is_not_trained_on() -> None:
    pairs = [("a", "b"), ("c", "d"), ("c", "d")] * 10
    splits = build_paper_data.split_pairs(pairs)
    assert splits == {"train": [("a", "b")], "dev": [("c", "d")]}


def test_summaries(tmp_path: Path) -> None:
    pair = "english-chinese_simplified"
    write_summaries(tmp_path, pair, {"train": 3, "val": 2, "test": 1})
    build_cross_sum(tmp_path / "out", tmp_path / "cache", *pair.split("-"), tmp_path.as_uri())
    rows = {split: read(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "dev", "test")}
    assert {split: len(of) for split, of in rows.items()} == {"train": 3, "dev": 2, "test": 1}
    assert rows["dev"][1] == {"document": "val article 1", "summary": "val \u6458\u8981 1"}


def test_the_same_archive_is_read_once(tmp_path: Path) -> None:
    write_news(tmp_path, "hi-zh")
    out, cache = tmp_path / "out", tmp_path / "cache"
    report = build_news_commentary(out, cache, "hi", "zh", tmp_path.as_uri())
    stamp = (out / "train.jsonl").stat().st_mtime_ns
    (tmp_path / "news-commentary-v16.hi-zh.tsv.gz").unlink()  # the cache has it
    assert build_news_commentary(out, cache, "hi", "zh", tmp_path.as_uri()) == report
    assert (out / "train.jsonl").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("news-commentary-v16.hi-zh.tsv.gz", b"<html>", "not a gzipped UTF-8 text"),
        (
            "news-commentary-v16.hi-zh.tsv.gz",
            gzip.compress(b"a\tb\tc\n", mtime=0),
            "line 1: 3 columns",
        ),
        ("news-commentary-v16.hi-zh.tsv.gz", gzip.compress(b"a\tb\n", mtime=0), "too few pairs"),
        ("news-commentary-v16.hi-zh.tsv.gz", None, "cannot be fetched: .*--mirror"),
    ],
)
def test_faulty_corpora(name: str, content: bytes | None, fault: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*{fault}"):
        build_news_commentary(tmp_path / "out", tmp_path / "cache", "hi", "zh", tmp_path.as_uri())
    assert not (tmp_path / "out").exists()


def test_faulty_archives(tmp_path: Path) -> None:
    pair = ("hindi", "chinese_simplified")

    def build(cache: str) -> None:
        build_cross_sum(tmp_path / "out", tmp_path / cache, *pair, tmp_path.as_uri())

    write_summaries(tmp_path, "-".join(pair), {"train": 1, "val": 1})
    with pytest.raises(DataError, match=r"holds no rows in hindi-chinese_simplified_test\.jsonl"):
        build("a")
    (tmp_path / "hindi-chinese_simplified_CrossSum.tar.bz2").write_bytes(b"<html>")
    with pytest.raises(DataError, match="not an archive of CrossSum"):
        build("b")
    assert not (tmp_path / "out").exists()


def test_recipes_read_what_the_commands_in_their_headers_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build_paper_data, "SMALL", 10)
    for pair in ("en-zh", "fr-zh", "hi-zh", "fr-hi"):
        write_news(tmp_path, pair)
    for language in ("english", "french", "hindi"):
        write_summaries(
            tmp_path, f"{language}-chinese_simplified", {"train": 2, "val": 1, "test": 1}
        )
    commands = [("news-commentary", *pair.split()) for pair in ("en zh", "fr zh", "hi zh", "hi fr")]
    commands += [
        ("cross-sum", name, "chinese_simplified") for name in ("english", "french", "hindi")
    ]
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["build", *command, "--mirror", tmp_path.as_uri()])
        assert build_paper_data.main() == 0

    def is_built(source: DataSource | None) -> bool:
        return isinstance(source, str) and source.startswith("data/paper/")

    read_files = set()
    for name in ("table2", "table3", "table4"):
        comparison = load_comparison(ROOT / "recipes" / "paper" / f"{name}.yaml")
        for task in comparison.tasks:
            recipe = comparison.cell(task, comparison.row("NeFT 9%"), 0, 2e-5)
            assert recipe.warmup is not None
            for data in (recipe.data, recipe.warmup.data_of(recipe.data)):
                for split in ("train", "dev", "test"):
                    if is_built(source := getattr(data, split)):
                        assert load_examples(data, split)
                        read_files.add(Path(source))
    written = set(Path("data/paper").rglob("*.jsonl"))
    # Of the small corpora of Hindi there is no use for a part.
    unused = {
        path for path in written if path.name == "train_20k.jsonl" and "hi-" in path.parent.name
    }
    assert read_files == written - unused
