"""Memory that really runs out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from neft.pipeline.estimate import Estimator
from neft.pipeline.shortage import explain_shortage, remedies_of
from neft.recipe import load_recipe

if TYPE_CHECKING:
    from conftest import TinyModel, TinyRecipe

# A little more than it takes to load everything and begin.
_LIMITED = """
import resource, sys
from pathlib import Path
import neft.cli, neft.console, neft.pipeline.run, neft.sft.train
import peft, trl
lines = Path("/proc/self/status").read_text().splitlines()
now = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize:"))
limit = now + 400 * 10**6
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.argv = ["neft", "run", sys.argv[1]]
neft.cli.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_failed_allocation_names_stage_estimate_and_remedy(
    tiny_recipe: TinyRecipe, tiny_model: TinyModel, tmp_path: Path
) -> None:
    target = "A LONG ANSWER, " * 12
    file = tiny_recipe(
        tmp_path, **{"select.which": "random", "select.percent": 0.1, "train.batch_size": 16}
    )
    # The logits of the targets, 16 texts x 180 tokens x 100,000 x 4 bytes, are beyond the limit.
    tiny_model(vocab_size=100_000).save_pretrained(tmp_path / "model")
    rows = "".join(f'{{"source": "{n}", "target": "{target}"}}\n' for n in range(16))
    (tmp_path / "train.jsonl").write_text(rows)
    ended = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(file)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )
    assert ended.returncode == 1, ended.stderr
    assert "error: train: step 1: memory ran out" in ended.stderr
    assert re.search(r"Estimated: [\d,]+ MB at the peak \(weights .*, loss [\d,]+ MB", ended.stderr)
    assert "--set train.batch_size=8 --set train.gradient_accumulation=2" in ended.stderr
    assert re.search(r"The process has [\d,]+ MB, of which [\d,]+ MB are free", ended.stderr)
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run" / "train").exists()


def test_no_estimate_of_one_process_for_several(
    tiny_recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(tiny_recipe(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for stage in ("warmup", "train"):
        told = explain_shortage(recipe, stage)
        assert told.startswith("What 2 processes take together is not estimated.")
        assert "--set" not in told
    assert explain_shortage(recipe, "baseline").startswith("Estimated:")


def test_remedies_lower_the_estimate_by_what_they_say(
    tiny_recipe: TinyRecipe, tiny_model: TinyModel, tmp_path: Path
) -> None:
    file = tiny_recipe(tmp_path, **{"train.batch_size": 16, "train.method": "full"})
    # Beside the libraries, a tiny model is nothing.
    tiny_model(hidden_size=512, intermediate_size=2048).save_pretrained(tmp_path / "model")
    recipe = load_recipe(file)
    estimator = Estimator(recipe)
    now = estimator.stage("train")
    remedies = remedies_of(estimator, now)
    assert remedies
    saved = [remedy.saved_bytes for remedy in remedies]
    assert saved == sorted(saved, reverse=True)
    for remedy in remedies:
        settings = [f"{key}={str(value).lower()}" for key, value in remedy.settings.items()]
        changed = load_recipe(tmp_path / "recipe.yaml", settings)
        less = Estimator(changed).stage("train").peak_bytes
        assert now.peak_bytes - less == pytest.approx(remedy.saved_bytes, rel=0.2)


def test_a_warmup_can_do_without_training(
    tiny_recipe: TinyRecipe, tiny_model: TinyModel, tmp_path: Path
) -> None:
    file = tiny_recipe(tmp_path)
    tiny_model(hidden_size=512, intermediate_size=2048).save_pretrained(tmp_path / "model")
    recipe = load_recipe(file)
    told = explain_shortage(recipe, "warmup")
    assert "--set warmup.method=gradient" in told
    assert "--set warmup.optimizer=adafactor --set warmup.in_backward=true" in told
    assert "train." not in told


def test_a_stage_without_an_estimate_tells_the_machine(
    tiny_recipe: TinyRecipe, tmp_path: Path
) -> None:
    told = explain_shortage(load_recipe(tiny_recipe(tmp_path)), "analysis")
    assert "Estimated" not in told
    assert "MB are free now" in told
