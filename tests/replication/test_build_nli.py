"""NLI data from a folder laid out as XNLI's repository; the recipe reads them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import build_nli
from neft.comparison.schema import load_comparison
from neft.errors import DataError
from neft.sft.data import load_examples

ROOT = Path(__file__).parents[2]
SPLITS = {"train": 7, "validation": 4, "test": 5}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def pairs(language: str, split: str, num_rows: int) -> list[dict[str, Any]]:
    return [
        {"premise": f"{language} {split} {i}", "hypothesis": f"\u00e9 {i}", "label": (i + 2) % 3}
        for i in range(num_rows)
    ]


def write_xnli(
    folder: Path, language: str, splits: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    """facebook/xnli: a configuration a language; labels are numbers, whose names the card holds."""
    names = {str(number): name for number, name in enumerate(build_nli.LABELS)}
    features = [
        {"name": "premise", "dtype": "string"},
        {"name": "hypothesis", "dtype": "string"},
        {"name": "label", "dtype": {"class_label": {"names": names}}},
    ]
    (folder / language).mkdir(parents=True)
    for split, rows in splits.items():
        pq.write_table(pa.Table.from_pylist(list(rows)), folder / language / f"{split}.parquet")
    files = [{"split": split, "path": f"{language}/{split}.parquet"} for split in splits]
    card = {
        "configs": [{"config_name": language, "data_files": files}],
        "dataset_info": {"config_name": language, "features": features},
    }
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n", encoding="utf-8")
    return str(folder)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def xnli(tmp_path: Path) -> str:
    return write_xnli(
        tmp_path / "xnli", "fr", {split: pairs("fr", split, n) for split, n in SPLITS.items()}
    )


def test_the_first_rows_of_the_official_splits(
    xnli: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_nli, "ROWS", {"train": 3, "dev": 2, "test": 100})
    report = build_nli.build_nli(tmp_path / "out", "fr", xnli)
    labels = ["contradiction", "entailment", "neutral"]
    for split, official, num_rows in (
        ("train", "train", 3),
        ("dev", "validation", 2),
        ("test", "test", 5),
    ):
        assert read(tmp_path / "out" / f"{split}.jsonl") == [
            {"premise": f"fr {official} {i}", "hypothesis": f"\u00e9 {i}", "label": labels[i % 3]}
            for i in range(num_rows)
        ]
        assert report["files"][f"{split}.jsonl"]["rows"] == num_rows
    assert report["labels of test"] == {"contradiction": 2, "entailment": 2, "neutral": 1}


def test_what_is_there_is_not_built_again(xnli: str, tmp_path: Path) -> None:
    report = build_nli.build_nli(tmp_path / "out", "fr", xnli)
    stamp = (tmp_path / "out" / "train.jsonl").stat().st_mtime_ns
    assert build_nli.build_nli(tmp_path / "out", "fr", xnli) == report
    assert (tmp_path / "out" / "train.jsonl").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("language", "label", "fault"),
    [
        ("de", 0, "cannot be loaded"),
        ("fr", -1, r"row 2: label is -1; XNLI's are 0 to 2"),
    ],
)
def test_without_xnli_it_says_what_data_to_bring(
    language: str, label: int, fault: str, tmp_path: Path
) -> None:
    rows = pairs("fr", "train", 3)
    rows[1]["label"] = label
    dataset = write_xnli(tmp_path / "xnli", "fr", dict.fromkeys(SPLITS, rows))
    out = tmp_path / "out"
    with pytest.raises(DataError, match=fault) as caught:
        build_nli.build_nli(out, language, dataset)
    remedy = str(caught.value).splitlines()[-1]
    assert f"{out}/{{train,dev,test}}.jsonl" in remedy
    assert "premise, hypothesis and label, which is one of entailment, neutral" in remedy
    assert not out.exists()


def test_the_recipe_reads_what_the_command_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = write_xnli(
        tmp_path / "xnli", "en", {split: pairs("en", split, n) for split, n in SPLITS.items()}
    )
    monkeypatch.setattr(sys, "argv", ["build", "--dataset", dataset])
    assert build_nli.main() == 0
    comparison = load_comparison(ROOT / "replication" / "small" / "nli.yaml")
    files = {split: f"data/xnli-en/{split}.jsonl" for split in ("train", "dev", "test")}
    data = comparison.first_recipe("sick", comparison.methods[0]).data.model_copy(update=files)
    examples = {split: load_examples(data, split) for split in ("train", "dev", "test")}
    assert {split: len(found) for split, found in examples.items()} == {
        "train": 7,
        "dev": 4,
        "test": 5,
    }
    assert examples["dev"][0].prompt == "en validation 0\nTherefore: \u00e9 0\nAnswer:"
    assert examples["dev"][0].target == "contradiction"
