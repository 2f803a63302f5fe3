"""A comparison of tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml

GRID = [1e-2, 3e-2]
METHODS: list[dict[str, Any]] = [
    {"name": "neft", "method": "neft", "select": {"percent": 9}, "learning_rates": GRID},
    {"name": "full", "method": "full", "learning_rates": [1e-3]},
    {
        "name": "lora",
        "method": "lora",
        "lora": {"match": "neft"},
        "select": {"percent": 9},
        "rate_of": "neft",
    },
    {
        "name": "random",
        "method": "neft",
        "select": {"percent": 9, "which": "random"},
        "rate_of": "neft",
    },
]


class TinyComparison(Protocol):
    def __call__(self, folder: Path, **changes: Any) -> Path: ...


@pytest.fixture(scope="session")
def tiny_comparison(tiny_recipe) -> TinyComparison:
    """``tiny_comparison(tmp_path, seeds=[0, 1])``: a file; its output is ``folder / "compared"``.

    Dots in a keyword's name go into sections; tasks are ``upper`` and, with the same data but for
    training's order of rows, ``other``.
    """

    def make(folder: Path, **changes: Any) -> Path:
        single = yaml.safe_load(tiny_recipe(folder).read_text())
        rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
        (folder / "other.jsonl").write_text("".join(reversed(rows)))
        (folder / "general.jsonl").write_text(
            "".join(json.dumps({"text": f"some text, number {n}"}) + "\n" for n in range(3))
        )
        train = single["train"] | {"steps": 2}
        del train["learning_rate"]
        fields: dict[str, Any] = {
            "output": str(folder / "compared"),
            "model": single["model"],
            "data": single["data"],
            "tasks": {"upper": {}},
            "warmup": single["warmup"] | {"steps": 4, "seed": 0, "snapshots": [2]},
            "train": train,
            "evaluate": single["evaluate"] | {"general": {"text": str(folder / "general.jsonl")}},
            "widen": 0,
            "methods": METHODS,
        }
        for place, value in changes.items():
            *sections, key = place.split(".")
            section = fields
            for name in sections:
                section = section.setdefault(name, {})
            section[key] = value
        comparison = folder / "comparison.yaml"
        comparison.write_text(yaml.safe_dump(fields, sort_keys=False))
        return comparison

    return make
