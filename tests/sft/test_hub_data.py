"""Data sets of the Hub, in the schemas of those that the paper used.

``datasets`` takes a folder for an id: folders laid out as the repositories are go through the same code,
configurations, splits and slices included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from neft.errors import DataError
from neft.pipeline.identity import data_identity
from neft.recipe import DataSection, GeneralSection, HubData
from neft.sft.data import load_examples, load_texts

Rows = Sequence[Mapping[str, Any]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def make_repository(
    folder: Path, configs: Mapping[str, Mapping[str, Rows]], info: Mapping[str, Any] | None = None
) -> str:
    """Parquet files under a card that lists configurations and splits, as the Hub's sets have them."""
    listed = []
    for config, splits in configs.items():
        (folder / config).mkdir(parents=True)
        for split, rows in splits.items():
            table = pa.Table.from_pylist(list(rows))
            pq.write_table(table, folder / config / f"{split}-00000-of-00001.parquet")
        files = [{"split": split, "path": f"{config}/{split}-*"} for split in splits]
        listed.append({"config_name": config, "data_files": files})
    card = {"configs": listed} | ({"dataset_info": info} if info else {})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n", encoding="utf-8")
    return str(folder)


def section(task: str, source: Mapping[str, Any], **fields: Any) -> DataSection:
    return DataSection.model_validate(
        {"task": task, "train": source, "dev": source, "test": source} | fields
    )


@pytest.fixture
def news_commentary(tmp_path: Path) -> str:
    """Helsinki-NLP/news_commentary: a configuration a pair, one split, nested translations."""

    def rows(*languages: str) -> Rows:
        return [
            {"id": str(i), "translation": {code: f"{code} {i}" for code in languages}}
            for i in range(10)
        ]

    return make_repository(
        tmp_path / "news_commentary",
        {"en-fr": {"train": rows("en", "fr")}, "en-zh": {"train": rows("en", "zh")}},
    )


@pytest.fixture
def flores(tmp_path: Path) -> str:
    """mteb/flores: a file a split, a column a language."""
    folder = tmp_path / "flores"
    folder.mkdir()
    for split in ("dev", "devtest"):
        columns = {code: [f"{split} {code}"] for code in ("eng_Latn", "fra_Latn", "zho_Hans")}
        pq.write_table(
            pa.table({"id": [1], "topic": ["news"]} | columns), folder / f"{split}.parquet"
        )
    files = [{"split": split, "path": f"{split}.parquet"} for split in ("dev", "devtest")]
    card = {"configs": [{"config_name": "default", "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n", encoding="utf-8")
    return str(folder)


def test_training_and_test_data_of_different_sets(news_commentary: str, flores: str) -> None:
    data = DataSection.model_validate(
        {
            "task": "translation",
            "source_language": "English",
            "target_language": "Chinese",
            "fields": {"source": "translation.en", "target": "translation.zh"},
            "train": {"id": news_commentary, "config": "en-zh", "split": "train[:3]"},
            "dev": {"id": news_commentary, "config": "en-zh", "split": "train[-2:]"},
            "test": {
                "id": flores,
                "split": "devtest",
                "fields": {"source": "eng_Latn", "target": "zho_Hans"},
            },
        }
    )
    prompt = "Translate the following text from English to Chinese. "
    texts = {
        split: [(example.prompt, example.target) for example in load_examples(data, split)]
        for split in ("train", "dev", "test")
    }
    assert texts == {
        "train": [(f"{prompt}en {i}", f"zh {i}") for i in (0, 1, 2)],
        "dev": [(f"{prompt}en {i}", f"zh {i}") for i in (8, 9)],
        "test": [(f"{prompt}devtest eng_Latn", "devtest zho_Hans")],
    }


def test_slices_in_the_middle(news_commentary: str) -> None:
    source = {"id": news_commentary, "config": "en-fr", "split": "train[4:6]"}
    fields = {"source": "translation.en", "target": "translation.fr"}
    languages = {"source_language": "English", "target_language": "French"}
    examples = load_examples(section("translation", source, fields=fields, **languages), "train")
    assert [example.target for example in examples] == ["fr 4", "fr 5"]


@pytest.mark.parametrize("fault", [{"config": "en-de"}, {"split": "train[x]"}, {"split": "test"}])
def test_what_a_set_does_not_have(fault: dict[str, str], news_commentary: str) -> None:
    source = {"id": news_commentary, "config": "en-fr", "split": "train"} | fault
    languages = {"source_language": "English", "target_language": "French"}
    with pytest.raises(DataError, match=r"news_commentary: cannot be loaded from the Hub\. Check"):
        load_examples(section("translation", source, **languages), "train")


def test_an_empty_text_is_named_by_set_configuration_and_row(tmp_path: Path) -> None:
    rows = [{"translation": {"en": "a", "fr": target}} for target in ("b", " ")]
    source = {
        "id": make_repository(tmp_path / "set", {"en-fr": {"train": rows}}),
        "config": "en-fr",
        "split": "train",
        "fields": {"source": "translation.en", "target": "translation.fr"},
    }
    languages = {"source_language": "English", "target_language": "French"}
    with pytest.raises(
        DataError, match=r"en-fr \(train\), row 2: field 'translation\.fr' is empty"
    ):
        load_examples(section("translation", source, **languages), "train")


def test_xnli(tmp_path: Path) -> None:
    """facebook/xnli: a configuration a language; labels are numbers, whose names the card holds."""
    names = {"0": "entailment", "1": "neutral", "2": "contradiction"}
    info = {
        "config_name": "fr",
        "features": [
            {"name": "premise", "dtype": "string"},
            {"name": "hypothesis", "dtype": "string"},
            {"name": "label", "dtype": {"class_label": {"names": names}}},
        ],
    }
    rows = [{"premise": f"p{i}", "hypothesis": f"h{i}", "label": i} for i in (2, 0, 1)]
    identifier = make_repository(tmp_path / "xnli", {"fr": {"validation": rows}}, info)
    source = {"id": identifier, "config": "fr", "split": "validation"}
    data = section("classification", source, labels=tuple(names.values()))
    examples = load_examples(data, "dev")
    assert [example.target for example in examples] == ["contradiction", "entailment", "neutral"]
    assert "Premise: p2\nHypothesis: h2" in str(examples[0].prompt)


def test_summaries_of_a_set_with_columns_of_its_own(tmp_path: Path) -> None:
    """The columns of CrossSum."""
    row = {"source_url": "u", "target_url": "v", "text": "Long.", "summary": "Short."}
    identifier = make_repository(tmp_path / "sums", {"english-french": {"test": [row]}})
    source = {
        "id": identifier,
        "config": "english-french",
        "split": "test",
        "fields": {"document": "text"},
    }
    [example] = load_examples(section("summarization", source, target_language="French"), "test")
    assert str(example.prompt).endswith("Article: Long.")
    assert example.target == "Short."


def test_general_text_of_the_hub(flores: str) -> None:
    general = GeneralSection(text=HubData(id=flores, split="dev"), field="eng_Latn")
    assert load_texts(general) == ["dev eng_Latn"]
    with pytest.raises(ValueError, match=r"remove text\.fields"):
        GeneralSection(text=HubData(id=flores, split="dev", fields={"text": "eng_Latn"}))


def test_fields_belong_to_the_identity_of_a_set() -> None:
    plain = HubData(id="org/set", config="en-fr", split="train")
    there, back = (
        HubData(**plain.model_dump(exclude={"fields"}), fields=fields)
        for fields in ({"source": "en", "target": "fr"}, {"source": "fr", "target": "en"})
    )
    assert len({data_identity(source, "data.train") for source in (plain, there, back)}) == 3
    assert data_identity(plain, "data.train") == "org/set@main en-fr train"
