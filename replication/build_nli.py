"""Build natural language inference data in one language, from XNLI on the Hub.

    python replication/build_nli.py --language en

Writes the first rows of XNLI's own splits, in their order, as data/xnli-en/{train,dev,test}.jsonl, each
row ``{"premise", "hypothesis", "label"}`` with the label's name. XNLI is for non-commercial use (CC BY-NC
4.0); its training pairs are MultiNLI's, for other languages translated by a machine.

Without the Hub, put three files with such rows there yourself: the recipes ask for no more.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import dataset_folder
from dataset_folder import finished_report, program_digest, publish
from neft.errors import DataError
from neft.recipe import HubData
from neft.sft.rows import Row, read_rows

XNLI = "facebook/xnli"
LANGUAGES = ("en", "fr", "de")
LABELS = ("entailment", "neutral", "contradiction")
"""In the order of XNLI's numbers."""
OFFICIAL = {"train": "train", "dev": "validation", "test": "test"}
"""Our splits -> XNLI's."""
ROWS = {"train": 20_000, "dev": 1_000, "test": 5_010}
"""Rows of each split, the first."""


def read_split(dataset: str, language: str, split: str) -> list[dict[str, str]]:
    """The first rows of a split.

    Raises:
        DataError: it cannot be loaded, is empty, or has a row that is none of XNLI's.
    """
    source = HubData(id=dataset, config=language, split=f"{OFFICIAL[split]}[:{ROWS[split]}]")
    rows = [
        {
            "premise": row.text("premise"),
            "hypothesis": row.text("hypothesis"),
            "label": _label_name(row),
        }
        for row in read_rows(source)
    ]
    if not rows:
        raise DataError(f"{dataset}: has no rows in split {OFFICIAL[split]}.")
    return rows


def _label_name(row: Row) -> str:
    number = row.value("label")
    if number not in range(len(LABELS)):
        raise DataError(f"{row.place}: label is {number!r}; XNLI's are 0 to {len(LABELS) - 1}.")
    return LABELS[number]


def build_nli(folder: Path, language: str, dataset: str = XNLI) -> dict[str, Any]:
    """Build ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl`` in ``folder``.

    Args:
        folder: gets the files and, last, ``report.json``.
        language: one of XNLI's.
        dataset: Hub id, or a folder laid out as the repository there.

    Raises:
        DataError: the data set is out of reach, or is not XNLI.
    """
    inputs = {
        "dataset": dataset,
        "language": language,
        "rows": ROWS,
        "program": program_digest(__file__, dataset_folder.__file__),
    }
    if report := finished_report(folder, inputs):
        return report
    try:
        splits = {split: read_split(dataset, language, split) for split in OFFICIAL}
    except DataError as error:
        raise DataError(
            f"{error}\nWithout it, put data of your own at {folder}/{{train,dev,test}}.jsonl: a JSON "
            f"object a line, with premise, hypothesis and label, which is one of {', '.join(LABELS)}."
        ) from error
    labels = {
        f"labels of {split}": Counter(row["label"] for row in rows)
        for split, rows in splits.items()
    }
    return publish(folder, inputs, splits, labels)


def main() -> int:
    """Parse, build, print."""
    parser = dataset_folder.argument_parser(__doc__)
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="of XNLI")
    parser.add_argument("--output", type=Path, help="folder; data/xnli-LANGUAGE if not given")
    parser.add_argument("--dataset", default=XNLI, help="Hub id, or a folder laid out like it")
    options = parser.parse_args()
    folder = options.output or Path("data") / f"xnli-{options.language}"
    return dataset_folder.run(lambda: build_nli(folder, options.language, options.dataset), folder)


if __name__ == "__main__":
    sys.exit(main())
