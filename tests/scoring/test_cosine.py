"""Scores of whole models, from folders and modules, against the definition."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import neft
from neft.checkpoints import open_weights
from neft.errors import ArchitectureError, CheckpointError, NeuronError
from neft.neurons import Axis, NeuronScores
from neft.scoring import score_neurons
from neft.scoring.rounding import rounding_floor, rounding_turn
from reference.cosine import cosine_distances

if TYPE_CHECKING:
    from conftest import TinyConfig, TinyModel

UP_0, DOWN_1 = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def fine_tuned(model: PreTrainedModel, step: float = 1e-3) -> PreTrainedModel:
    """A copy of which every weight has moved by about ``step`` of the weights' size."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.02 * step * noise).to(parameter.dtype))
    return tuned


def check_scores(scores: NeuronScores, before: PreTrainedModel, after: PreTrainedModel) -> None:
    assert scores.projections
    for name, projection in scores.projections.items():
        weights = [model.get_submodule(name).weight.detach() for model in (before, after)]
        expected = cosine_distances(*weights, projection.neuron_dim)
        assert expected.shape == (projection.num_neurons,)
        np.testing.assert_allclose(scores.distances[name], expected, rtol=1e-11)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("modules", [None, ["o"]])
def test_rows_columns_and_transposed_storage(
    model_type: str, modules: list[str] | None, tiny_model: TinyModel
) -> None:
    before = tiny_model(model_type)
    after = fine_tuned(before)
    scores = score_neurons(before, after, modules)
    assert len(scores.projections) == (4 if modules is None else 2)
    check_scores(scores, before, after)


def test_axes_of_unknown_modules(tiny_model: TinyModel) -> None:
    before = tiny_model()
    after = fine_tuned(before)
    scores = score_neurons(before, after, ["*.v_proj"], axes={"*.0.*.v_proj": Axis.COLUMN})
    axes = {projection.layer: projection.axis for projection in scores.projections.values()}
    assert axes == {0: Axis.COLUMN, 1: Axis.ROW}
    check_scores(scores, before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folders_shards_and_modules_give_equal_scores(
    dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path
) -> None:
    before = tiny_model().to(dtype)
    after = fine_tuned(tiny_model(), step=0.1)
    before.save_pretrained(tmp_path / "before", max_shard_size="20KB")
    after.save_pretrained(tmp_path / "after")
    live = score_neurons(before, after)
    check_scores(live, before, after)
    for left, right in (
        (tmp_path / "before", str(tmp_path / "after")),
        (str(tmp_path / "before"), after),
        (before, tmp_path / "after"),
        (open_weights(before), open_weights(tmp_path / "after")),
    ):
        scores = score_neurons(left, right)
        assert scores.total_parameters == live.total_parameters
        assert scores.projections == live.projections
        for name, distances in live.distances.items():
            assert np.array_equal(scores.distances[name], distances)


def test_percent_is_of_all_parameters(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    total = sum(parameter.numel() for parameter in model.parameters())
    scores = score_neurons(tmp_path, fine_tuned(model))
    assert scores.total_parameters == total
    assert len(scores.select(percent=9)) == int(0.09 * total / 32)


def test_the_moved_neurons_are_found(tiny_model: TinyModel) -> None:
    before = tiny_model()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.get_submodule(UP_0).weight[5] += 0.01 * torch.randn(32)
        after.get_submodule(DOWN_1).weight[:, 9] += 0.01 * torch.randn(32)
    chosen = dict(score_neurons(before, after).lowest(2).items())
    assert {name: indices.tolist() for name, indices in chosen.items()} == {UP_0: [5], DOWN_1: [9]}


def test_peft_wrapped_models(tiny_model: TinyModel) -> None:
    before = tiny_model()
    after = fine_tuned(before)
    expected = score_neurons(before, after)
    config = LoraConfig(target_modules=["up_proj", "down_proj"])
    scores = score_neurons(
        get_peft_model(copy.deepcopy(before), config), get_peft_model(after, config)
    )
    assert scores.total_parameters == expected.total_parameters
    assert scores.projections == expected.projections
    for name, distances in expected.distances.items():
        assert np.array_equal(scores.distances[name], distances)


def test_a_model_of_which_nothing_moved(tiny_model: TinyModel) -> None:
    before = tiny_model()
    adapter = LoraConfig(target_modules=["up_proj"], init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(before), adapter)
    for after in (before, wrapped):
        with pytest.raises(CheckpointError, match=r"no neuron .* differs .*merge_and_unload"):
            score_neurons(before, after)
    with pytest.raises(CheckpointError, match=r"1 scored projections differs .* that were trained"):
        score_neurons(before, wrapped.merge_and_unload(), ["*.0.mlp.down_proj"])
    assert score_neurons(before, wrapped).distances[UP_0].any()


def test_a_checkpoint_without_the_prefix(tiny_model: TinyModel, tmp_path: Path) -> None:
    before = tiny_model("gpt2")
    before.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    save_file(tensors, file)
    after = fine_tuned(before)
    check_scores(score_neurons(tmp_path, after), before, after)
    expected = score_neurons(after, before)
    found = score_neurons(after, tmp_path)
    assert all(np.array_equal(found.distances[n], d) for n, d in expected.distances.items())


def test_provenance(tiny_model: TinyModel, tmp_path: Path) -> None:
    before = tiny_model()
    before.save_pretrained(tmp_path)
    scores = score_neurons(tmp_path, fine_tuned(before))
    assert scores.provenance == {
        "method": "cosine",
        "before": str(tmp_path),
        "after": "LlamaForCausalLM",
        "dtypes": {"before": ["float32"], "after": ["float32"]},
        "neft": neft.__version__,
    }
    scores.save(tmp_path / "scores")
    assert NeuronScores.load(tmp_path / "scores").provenance == scores.provenance


def test_float32_gives_no_warning(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    before = tiny_model()
    score_neurons(before, fine_tuned(before, step=1e-6))
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")  # and no progress bar where there is no terminal


def test_16_bits_are_warned_of(tiny_model: TinyModel, caplog: pytest.LogCaptureFixture) -> None:
    before = tiny_model()
    scores = score_neurons(before, fine_tuned(before).bfloat16())
    floor = rounding_floor("bfloat16")
    share = float(np.mean(np.concatenate([*scores.distances.values()]) <= floor))
    assert 0.0 < share < 1.0
    assert scores.provenance["rounding"] == {
        "dtype": "bfloat16",
        "typical": rounding_turn("bfloat16"),
        "floor": floor,
        "share_below": share,
    }
    assert scores.provenance["dtypes"] == {"before": ["float32"], "after": ["bfloat16"]}
    record = caplog.records[-1]
    assert (record.name, record.levelno) == ("neft.scoring.cosine", logging.WARNING)
    assert record.getMessage() == (
        "LlamaForCausalLM holds bfloat16 weights. Rounding to bfloat16 alone moves a neuron by 1 - cos "
        f"of about 1.1e-06, hardly any by more than 2.5e-06, and {share:.1%} of the neurons moved no "
        "more than that: their order may be noise. Keep and score the float32 weights of the fine-tune."
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_is_above_rounding_where_there_was_nothing_else(
    dtype: torch.dtype, tiny_model: TinyModel
) -> None:
    model = tiny_model(hidden_size=512, intermediate_size=1024)
    scores = score_neurons(model, copy.deepcopy(model).to(dtype), ["*"])
    typical = scores.provenance["rounding"]["typical"]
    distances = np.concatenate([*scores.distances.values()])
    assert (distances > typical).mean() > 0.5
    with pytest.raises(NeuronError, match="hold only 0 neurons"):
        scores.select(count=1, above_rounding=True)


def test_a_16_bit_original_may_be_exact(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    before = tiny_model().half()
    after = fine_tuned(tiny_model().half().float(), step=1e-6)
    scores = score_neurons(before, after)
    assert "rounding" not in scores.provenance
    assert len(scores.select(count=len(scores), above_rounding=True)) == len(scores)
    assert "Rounding to float16 alone moves" in caplog.text
    assert "Disregard this if LlamaForCausalLM was trained from exactly these" in caplog.text
    caplog.clear()
    known = score_neurons(before, after, exact_start=True)
    assert known.provenance == scores.provenance
    assert caplog.text == ""
    score_neurons(before, after.bfloat16(), exact_start=True)
    assert "holds bfloat16 weights" in caplog.text


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite(
    side: str, value: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    before = tiny_model()
    models = {"before": before, "after": fine_tuned(before)}
    with torch.no_grad():
        models[side].get_submodule(DOWN_1).weight[3, 17] = float(value)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    with pytest.raises(CheckpointError) as error:
        score_neurons(tmp_path / "before", tmp_path / "after")
    assert str(error.value).startswith(f"{tmp_path / side}: {DOWN_1}.weight[3, 17] is {value}. ")


def test_where_in_a_large_matrix(tiny_model: TinyModel) -> None:
    before = tiny_model(intermediate_size=700)
    after = fine_tuned(before)
    with torch.no_grad():
        after.get_submodule(UP_0).weight[600, 31] = float("nan")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight\[600, 31\] is nan"):
        score_neurons(before, after)


def test_float64_weights_beyond_squaring(tiny_model: TinyModel) -> None:
    before = tiny_model().double()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.get_submodule(UP_0).weight[0, 1] = 1e200
    with pytest.raises(CheckpointError, match=r"up_proj\.weight\[0, 1\] is 1e\+200"):
        score_neurons(before, after)


def test_other_shapes(tiny_model: TinyModel) -> None:
    before, after = tiny_model(), tiny_model(intermediate_size=72)
    with pytest.raises(
        CheckpointError,
        match=rf"{UP_0}\.weight has shape \[72, 32\], .* these neurons need \[64, 32\]",
    ):
        score_neurons(before, after)


def test_other_names(tiny_model: TinyModel) -> None:
    before, after = tiny_model(num_hidden_layers=3), tiny_model()
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.2\.mlp\.up_proj"):
        score_neurons(before, after)
    with pytest.raises(CheckpointError, match=f"has no tensor {UP_0}"):
        score_neurons(tiny_model(), tiny_model("gpt2"))


def test_a_tied_head_is_refused_before_any_reading(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tiny_model(tie_word_embeddings=True)
    before.save_pretrained(tmp_path)
    for side in (before, tmp_path):
        source = open_weights(side)
        monkeypatch.setattr(source, "read", None)
        with pytest.raises(NeuronError, match=r"tied to model\.embed_tokens\.weight"):
            score_neurons(source, fine_tuned(before), ["up", "lm_head"])
    wrapped = get_peft_model(before, LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(NeuronError, match=r"tied to model\.embed_tokens\.weight"):
        score_neurons(wrapped, wrapped, ["lm_head"])


def test_modules_that_are_not_there(tiny_model: TinyModel) -> None:
    with pytest.raises(ArchitectureError):
        score_neurons(tiny_model(), tiny_model(), ["gate_up"])


def test_quantized_weights(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, file)
    with pytest.raises(CheckpointError, match=rf"{UP_0}\.weight is stored as int8; .*quantized"):
        score_neurons(model, tmp_path)


def test_faults_are_found_before_any_reading(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = tiny_model(num_hidden_layers=3), tiny_model()
    source = open_weights(before)
    reads: list[str] = []
    monkeypatch.setattr(source, "read", lambda name: reads.append(name))
    with pytest.raises(CheckpointError):
        score_neurons(source, after)
    assert reads == []


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Bytes that this process holds, every half millisecond."""
    process, samples, finished = psutil.Process(), [psutil.Process().memory_info().rss], False

    def watch() -> None:
        while not finished:
            samples.append(process.memory_info().rss)
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        finished = True
        thread.join()


@pytest.mark.parametrize("max_shard_size", ["1GB", "20MB"])
def test_memory_is_that_of_a_pair_of_matrices(
    max_shard_size: str, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = tiny_config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
        model.save_pretrained(tmp_path / "before", max_shard_size=max_shard_size)
        model.get_submodule(UP_0).weight[0, 0] = 0.25
        model.save_pretrained(tmp_path / "after", max_shard_size=max_shard_size)
    del model
    pair = 2 * 2 * 1024 * 4096
    on_disk = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert on_disk > 10 * pair
    with watched_memory() as samples:
        scores = score_neurons(tmp_path / "before", tmp_path / "after")
    assert len(samples) > 20
    assert max(samples) - samples[0] < 3 * pair
    assert scores.total_parameters > 4 * 2 * 1024 * 4096
