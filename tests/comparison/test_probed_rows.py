"""Rows whose neurons are found by probes, beside rows that need a warm-up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from neft.comparison.run import compare
from neft.comparison.schema import load_comparison

LABELS = ["yes", "no"]


def test_a_row_without_warmup(tiny_comparison, tmp_path: Path) -> None:
    select: dict[str, Any] = {"percent": 9}
    file = tiny_comparison(
        tmp_path,
        data={
            "task": "classification",
            "labels": LABELS,
            "template": "{premise}/{hypothesis}",
            **{split: str(tmp_path / f"{split}.jsonl") for split in ("train", "dev", "test")},
        },
        methods=[
            {
                "name": "probe",
                "method": "neft",
                "select": select,
                "score": {"method": "probe", "probe": {"folds": 2}},
                "learning_rates": [1e-2],
            },
            {"name": "cosine", "method": "neft", "select": select, "learning_rates": [1e-2]},
        ],
    )
    for split, num_rows in {"train": 12, "dev": 4, "test": 4}.items():
        rows = (
            {"premise": "aa" if n % 2 else "zz", "hypothesis": str(n), "label": n % 2}
            for n in range(num_rows)
        )
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = compare(load_comparison(file), say=lambda _: None)
    assert not result.failures
    by_name = {row.name: row.seeds[0].folders for row in result.results[0].rows}
    assert "warmup" in by_name["cosine"]
    assert "warmup" not in by_name["probe"]
    assert by_name["probe"]["score"] != by_name["cosine"]["score"]
    stages = [path.name.partition("-")[0] for path in (tmp_path / "compared" / "stages").iterdir()]
    assert (stages.count("warmup"), stages.count("score")) == (1, 2)
