"""Fingerprints change when, and only when, what determines the result does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from neft.pipeline.stage import Stage


def nothing(working) -> None:
    pass


STAGE = Stage(
    name="train",
    version=1,
    ingredients={"train.learning_rate": 1e-3, "data.train": "sha256:1", "train.steps": None},
    reads=("select",),
    run=nothing,
)
INPUTS = {"select": "f1", "warmup": "f2"}


@pytest.mark.parametrize(
    "changed",
    [
        replace(STAGE, name="evaluate"),
        replace(STAGE, version=2),
        replace(STAGE, ingredients={**STAGE.ingredients, "train.learning_rate": 1.0000001e-3}),
        replace(STAGE, ingredients={**STAGE.ingredients, "train.steps": 1}),
        replace(STAGE, ingredients={**STAGE.ingredients, "seed": 0}),
        replace(STAGE, reads=()),
        replace(STAGE, reads=("select", "warmup")),
    ],
)
def test_fingerprint_changes(changed) -> None:
    assert changed.fingerprint(INPUTS) != STAGE.fingerprint(INPUTS)


def test_fingerprint_follows_the_stages_it_reads() -> None:
    assert STAGE.fingerprint(INPUTS | {"select": "g"}) != STAGE.fingerprint(INPUTS)
    assert STAGE.fingerprint(INPUTS | {"warmup": "g"}) == STAGE.fingerprint(INPUTS)


def test_fingerprint_does_not_change_otherwise() -> None:
    reordered = dict(reversed(STAGE.ingredients.items()))
    same = replace(STAGE, ingredients=reordered, run=print, resumes_from=("*",), derived=True)
    assert same.fingerprint(INPUTS) == STAGE.fingerprint(INPUTS)
    # Recorded folders outlive releases: this value may change only together with their format.
    assert STAGE.fingerprint(INPUTS).startswith("0be52685d037")
