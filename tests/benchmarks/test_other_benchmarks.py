"""Benchmarks of scoring, analysis, adapters and generation at shapes that cost nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open

import adapter
import analysis
import generate
import scoring
from llama import TINY, random_llama, with_adapters
from neft import find_projections
from neft.checkpoints import open_weights
from reference.analysis import utilization

PRESETS = {
    scoring: scoring.Preset(TINY, shard_bytes=2**16, rounds=2),
    analysis: analysis.Preset(TINY, rounds=2),
    adapter: adapter.Preset(TINY, rounds=2),
    generate: generate.Preset(TINY, (1, 2), prompt_tokens=3, new_tokens=2, rounds=2),
}


@pytest.mark.parametrize("script", PRESETS, ids=lambda script: script.__name__)
def test_figures_are_written(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(script.PRESETS, "quick", PRESETS[script])
    script.main(["--quick", "--json", str(tmp_path / "out.json")])
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["machine"]["versions"]["neft"]
    printed = capsys.readouterr().out
    for row in figures["ratios"]:
        assert row["name"] in printed
        assert 0 < row["min"] <= row["median"] <= row["max"]


def test_scored_checkpoints_are_sharded_and_alike(tmp_path: Path) -> None:
    pair = scoring.write_pair(tmp_path, PRESETS[scoring], "bfloat16")
    shards = sorted(pair[0].glob("*.safetensors"))
    assert len(shards) > 2
    with safe_open(shards[0], framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    before, after = map(open_weights, pair)
    assert before.tensors == after.tensors
    assert before.tensors.keys() >= {
        f"{projection.name}.weight" for projection in find_projections(before.network)
    }
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before.read(name), after.read(name))


def test_what_is_analysed_is_utilization() -> None:
    weights = analysis.RandomWeights(TINY)
    hidden = analysis.hidden_states(TINY, seed=0)
    found = analysis.utilization(weights, hidden)
    assert len(found) == PRESETS[analysis].num_neurons
    name = "model.layers.1.mlp.down_proj"
    vectors = weights.read(f"{name}.weight").double().T.numpy()
    expected = [utilization(vector, hidden.means, 1)[0] for vector in vectors]
    np.testing.assert_allclose(found.values[name], expected, rtol=1e-10)


def test_llama_2_has_as_many_neurons_as_the_paper_counts() -> None:
    assert analysis.PRESETS["full"].num_neurons == 704_512


@pytest.mark.parametrize("method", ["neft", "lora"])
def test_adapters_differ_and_change_the_output(method: str) -> None:
    plain = random_llama(TINY)
    tokens = torch.arange(6).reshape(2, 3)
    with torch.no_grad():
        outputs = [plain(tokens).logits]
        model = with_adapters(method, plain, 9.0, ["one", "other"])
        for name in ("one", "other"):
            model.set_adapter(name)
            outputs.append(model(tokens).logits)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(outputs[a], outputs[b])


def test_a_swap_brings_the_other_adapter_in(tmp_path: Path) -> None:
    subject = adapter.Subject("neft", random_llama(TINY), 9.0, tmp_path)
    before = subject._model.active_adapter
    seconds = subject.round()
    assert subject._model.active_adapter != before
    assert seconds.keys() >= set(adapter.OPERATIONS)
    saved = tmp_path / "one" / "adapter_model.safetensors"
    assert saved.stat().st_size < subject.saved_bytes
    assert saved.stat().st_size > 4 * subject.num_trainable


def test_every_prompt_is_continued_by_as_many_tokens() -> None:
    preset = replace(PRESETS[generate], new_tokens=5)
    seconds = generate.run(preset)
    assert {size: {m: len(v) for m, v in found.items()} for size, found in seconds.items()} == {
        size: dict.fromkeys(generate.METHODS, 2) for size in (1, 2)
    }
