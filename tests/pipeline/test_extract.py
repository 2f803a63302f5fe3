"""Extracted adapters against plain loads of both checkpoints."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from neft.errors import CheckpointError, DataError, NeuronError, UsageError
from neft.neurons import Axis, NeuronSet
from neft.pipeline.adapter import merge_adapter
from neft.pipeline.evaluate import read_evaluation
from neft.pipeline.extract import Extraction, KeptScore
from neft.pipeline.extract import extract as extract_aloud
from neft.pipeline.identity import folder_identity
from neft.pipeline.selection import load_selection
from neft.recipe import load_recipe
from neft.scoring import score_by_norm, score_neurons

FILE = "model.safetensors"
UP_0, DOWN_1 = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def extract(base: Path, finetuned: Path, output: Path, **options) -> Extraction:
    return extract_aloud(str(base), str(finetuned), output, say=lambda line: None, **options)


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def tuned(model: PreTrainedModel) -> PreTrainedModel:
    """Every weight moved a little, some neurons a lot."""
    after = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in after.parameters():
            step = torch.rand(len(parameter), *[1] * (parameter.dim() - 1), generator=generator)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01 * step)
    return after


@pytest.fixture
def base(tiny_model, tiny_tokenizer, tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def finetuned(base, tmp_path) -> Path:
    tuned(plain(base)).save_pretrained(tmp_path / "finetuned")
    return tmp_path / "finetuned"


def replaced(base: Path, finetuned: Path, neurons: NeuronSet) -> PreTrainedModel:
    """The base model with the chosen neurons of the other, one at a time."""
    model, other = plain(base), plain(finetuned)
    with torch.no_grad():
        for name, indices in neurons.items():
            to, source = (m.get_submodule(name).weight for m in (model, other))
            projection = neurons.projections[name]
            rows = (projection.axis is Axis.ROW) != projection.transposed
            for index in indices.tolist():
                place = index if rows else (slice(None), index)
                to[place] = source[place]
    return model


def squared_change(base: PreTrainedModel, other: PreTrainedModel, *parts: str) -> float:
    """Over all parameters whose name holds one of the parts; tied ones count once."""
    others = dict(other.named_parameters())
    return sum(
        (others[name].double() - parameter.double()).square().sum().item()
        for name, parameter in base.named_parameters()
        if not parts or any(part in name for part in parts)
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_adapter_is_what_peft_expects(tiny_model, tmp_path, architecture) -> None:
    base, finetuned, folder = (tmp_path / name for name in ("base", "finetuned", "adapter"))
    tiny_model(architecture).save_pretrained(base)
    tuned(plain(base)).save_pretrained(finetuned)
    extract(base, finetuned, folder, percent=9)
    model = PeftModel.from_pretrained(plain(base), folder)  # pytest makes warnings errors
    neurons = load_selection(folder)
    assert neurons == score_neurons(base, finetuned).select(percent=9)
    assert neurons.provenance["model_identity"] == folder_identity(base)
    expected = replaced(base, finetuned, neurons)
    tokens = torch.arange(1, 30)[None]
    assert torch.equal(model(input_ids=tokens).logits, expected(input_ids=tokens).logits)
    merged = model.merge_and_unload().state_dict()
    for name, weight in expected.state_dict().items():
        assert torch.equal(merged[name], weight), name


def test_the_files_are_those_of_a_trained_adapter(base, finetuned, tmp_path) -> None:
    extract(base, finetuned, tmp_path / "adapter", count=40)
    model = PeftModel.from_pretrained(plain(base), tmp_path / "adapter")
    model.save_pretrained(tmp_path / "saved")
    config, saved = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("adapter", "saved")
    )
    assert config == saved
    assert config["base_model_name_or_path"] == str(base)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("adapter", "saved")]
    tensors, expected = map(load_file, files)
    assert tensors.keys() == expected.keys()
    for name, vectors in tensors.items():
        assert torch.equal(vectors, expected[name])
        assert vectors.dtype == torch.float32
    assert (
        files[0].stat().st_mode & 0o777
        == (tmp_path / "saved/adapter_config.json").stat().st_mode & 0o777
    )


def test_shares_of_the_change(base, finetuned, tmp_path) -> None:
    found = extract(base, finetuned, tmp_path / "adapter", percent=9)
    neurons = load_selection(tmp_path / "adapter")
    before, after = plain(base), plain(finetuned)
    captured = squared_change(before, replaced(base, finetuned, neurons))
    scored = squared_change(before, after, "up_proj", "down_proj")
    everything = squared_change(before, after)
    assert found.share_of_projections == pytest.approx(captured / scored, rel=1e-9)
    assert found.share_of_model == pytest.approx(captured / everything, rel=1e-9)
    assert 0.3 < found.share_of_projections < 1

    total = sum(parameter.numel() for parameter in before.parameters())
    assert found.num_neurons == found.num_changed == len(neurons) == int(0.09 * total / 32)
    assert found.num_parameters == 32 * len(neurons)
    assert found.percent == pytest.approx(100 * 32 * len(neurons) / total)
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert found.num_bytes == sum((tmp_path / "adapter" / name).stat().st_size for name in names)
    written = json.loads((tmp_path / "adapter" / "extraction.json").read_text())
    assert written == found.to_dict()
    assert written["scores"] == written["left_out"] == {}


def test_projections_without_a_chosen_neuron_count_too(base, finetuned, tmp_path) -> None:
    found = extract(base, finetuned, tmp_path / "adapter", count=1)
    before, after = plain(base), plain(finetuned)
    captured = squared_change(
        before, replaced(base, finetuned, load_selection(tmp_path / "adapter"))
    )
    scored = squared_change(before, after, "up_proj", "down_proj")
    assert found.share_of_projections == pytest.approx(captured / scored, rel=1e-9)


def test_all_neurons_of_all_projections(base, finetuned, tmp_path) -> None:
    roles = ["up", "gate", "down", "q", "k", "v", "o"]
    num_neurons = 2 * (3 * 64 + 32 + 16 + 16 + 32)
    found = extract(base, finetuned, tmp_path / "a", modules=roles, count=num_neurons)
    assert found.share_of_projections == pytest.approx(1)
    change = squared_change(plain(base), plain(finetuned), "_proj")
    total = squared_change(plain(base), plain(finetuned))
    assert found.share_of_model == pytest.approx(change / total)


def test_other_scores(base, finetuned, tmp_path) -> None:
    scores = score_neurons(base, finetuned)
    backwards = {name: distances.max() - distances for name, distances in scores.distances.items()}
    type(scores)(scores.projections.values(), backwards, scores.total_parameters).save(
        tmp_path / "scores.safetensors"
    )
    extract(base, finetuned, tmp_path / "a", count=9, scores=tmp_path / "scores.safetensors")
    # The largest of all distances and the largest of one module are not the same: no exact opposite.
    names = {
        name: set(indices.tolist()) for name, indices in load_selection(tmp_path / "a").items()
    }
    for name, indices in names.items():
        assert indices <= set(scores.distances[name].argsort()[:9].tolist())


def edited(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / FILE) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / FILE, {"format": "pt"})


def test_float64_and_16_bit_checkpoints(base, finetuned, tmp_path, caplog) -> None:
    plain(finetuned).to(torch.bfloat16).save_pretrained(finetuned)
    extract(base, finetuned, tmp_path / "adapter", count=50)
    assert "Rounding to bfloat16" in caplog.text
    weight = load_file(finetuned / FILE)[f"{UP_0}.weight"]
    vectors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = vectors[f"base_model.model.{UP_0}.neft_vectors.weight"]
    assert found.dtype == torch.float32
    assert torch.equal(found, weight[load_selection(tmp_path / "adapter")[UP_0]].float())


def test_a_larger_vocabulary_is_left_out(base, finetuned, tmp_path) -> None:
    whole = extract(base, finetuned, tmp_path / "whole", count=9)
    edited(finetuned, **{"lm_head.weight": torch.ones(130, 32)})
    found = extract(base, finetuned, tmp_path / "adapter", count=9)
    assert found.left_out == {"lm_head.weight": "has the shapes [128, 32] and [130, 32]"}
    assert found.share_of_model > whole.share_of_model
    assert found.share_of_projections == whole.share_of_projections


def test_neurons_that_did_not_change_are_told(base, tmp_path, caplog) -> None:
    edited_weights = load_file(base / FILE)
    edited_weights[f"{DOWN_1}.weight"][:, [3, 5]] += 1
    (tmp_path / "finetuned").mkdir()
    save_file(edited_weights, tmp_path / "finetuned" / FILE)
    found = extract(base, tmp_path / "finetuned", tmp_path / "adapter", count=5)
    assert found.num_changed == 2
    assert found.share_of_projections == found.share_of_model == pytest.approx(1)
    assert "only 2 of the 5 chosen neurons differ" in caplog.text


# Scores on data


def test_scores(tiny_recipe, tmp_path) -> None:
    """The fine-tuned model repeats what an adapter with all that changed repeats."""
    recipe = load_recipe(tiny_recipe(tmp_path))
    base, finetuned = tmp_path / "model", tmp_path / "finetuned"
    weights = load_file(base / FILE)
    weights[f"{DOWN_1}.weight"] *= 300
    plain(base).save_pretrained(finetuned)
    save_file(weights, finetuned / FILE, {"format": "pt"})
    scores = score_neurons(base, finetuned)
    moved = {n: (scores.projections[n].name == DOWN_1) + d for n, d in scores.distances.items()}
    type(scores)(scores.projections.values(), moved, scores.total_parameters).save(
        tmp_path / "scores.safetensors"
    )
    lines: list[str] = []
    found = extract_aloud(
        str(base),
        str(finetuned),
        tmp_path / "adapter",
        count=64,
        scores=tmp_path / "scores.safetensors",
        recipe=recipe,
        say=lines.append,
    )
    assert len(lines) == 3
    folders = {
        name: tmp_path / "adapter" / "evaluation" / name for name in KeptScore.__annotations__
    }
    texts = {name: (place / "predictions.jsonl").read_text() for name, place in folders.items()}
    assert texts["adapter"] == texts["finetuned"] != texts["base"]
    assert found.num_examples == 5
    for metric, kept in found.scores.items():
        for name, place in folders.items():
            assert getattr(kept, name) == read_evaluation(place).scores[metric]
    written = json.loads((tmp_path / "adapter" / "extraction.json").read_text())
    assert written == found.to_dict()


@pytest.mark.parametrize(
    ("base", "finetuned", "adapter", "share"),
    [
        (10, 30, 25, 0.75),
        (10, 30, 5, -0.25),
        (10, 30, 40, 1.5),
        (10, 10, 12, None),
        (10, 5, 7, None),
    ],
)
def test_share_of_the_gain(base, finetuned, adapter, share) -> None:
    from neft.evaluation import Score

    assert KeptScore(*(Score(x, "") for x in (base, finetuned, adapter))).share == share


def test_unreadable_data_is_found_first(tiny_recipe, tmp_path) -> None:
    recipe = load_recipe(tiny_recipe(tmp_path))
    (tmp_path / "test.jsonl").write_text('{"source": "a"}\n')
    with pytest.raises(DataError, match=r"test\.jsonl, line 1: no field 'target'"):
        extract(tmp_path / "model", tmp_path / "nowhere", tmp_path / "a", count=9, recipe=recipe)


def test_a_fine_tune_without_configuration_cannot_be_evaluated(
    tiny_recipe, finetuned, tmp_path
) -> None:
    recipe = load_recipe(tiny_recipe(tmp_path))
    (finetuned / "config.json").unlink()
    with pytest.raises(CheckpointError, match="finetuned: has no config"):
        extract(tmp_path / "model", finetuned, tmp_path / "a", count=9, recipe=recipe)
    assert not (tmp_path / "a").exists()


# What cannot be extracted


def drop(name: str):
    return lambda base, finetuned: edited(finetuned, **{name: None})


def reshape(base: Path, finetuned: Path) -> None:
    edited(finetuned, **{f"{UP_0}.weight": torch.ones(48, 32)})


def quantize(base: Path, finetuned: Path) -> None:
    edited(finetuned, **{f"{UP_0}.weight": torch.ones(64, 32, dtype=torch.int8)})


def break_norm(base: Path, finetuned: Path) -> None:
    edited(finetuned, **{"model.norm.weight": torch.full((32,), float("inf"))})


def undo(base: Path, finetuned: Path) -> None:
    (finetuned / FILE).write_bytes((base / FILE).read_bytes())


@pytest.mark.parametrize(
    ("spoil", "options", "error", "message"),
    [
        (reshape, {"count": 9}, CheckpointError, f"{UP_0}.weight has shape [48, 32]"),
        (quantize, {"count": 9}, CheckpointError, "is stored as int8"),
        (drop(f"{UP_0}.weight"), {"count": 9}, CheckpointError, f"has no tensor {UP_0}.weight"),
        (break_norm, {"count": 9}, CheckpointError, "model.norm.weight holds a value that is not"),
        (undo, {"count": 9}, CheckpointError, "no neuron of the 4 scored projections differs"),
        (None, {}, NeuronError, "by "),
        (None, {"percent": 90}, NeuronError, "percent is 90"),
        (None, {"count": 9, "modules": ["gate_up"]}, UsageError, "gate_up"),
        (
            None,
            {"count": 9, "modules": ["up"], "scores": Path("s.safetensors")},
            UsageError,
            "s.safetensors: scores tell the projections",
        ),
        (None, {"count": 9, "scores": Path("nowhere.safetensors")}, NeuronError, "no such file"),
    ],
)
def test_refused(base, finetuned, tmp_path, spoil, options, error, message) -> None:
    if spoil:
        spoil(base, finetuned)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=re.escape(message)):
        extract(base, finetuned, tmp_path / "adapter", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_scores_of_neurons_that_did_not_change(base, finetuned, tmp_path) -> None:
    undo(base, finetuned)
    score_by_norm(base).save(tmp_path / "scores.safetensors")
    with pytest.raises(CheckpointError, match="none of the 9 chosen neurons differs"):
        extract(base, finetuned, tmp_path / "a", count=9, scores=tmp_path / "scores.safetensors")


def test_scores_of_another_model(tiny_model, base, finetuned, tmp_path) -> None:
    others = [tiny_model(intermediate_size=48, seed=seed) for seed in (0, 1)]
    score_neurons(*others).save(tmp_path / "scores.safetensors")
    with pytest.raises(CheckpointError, match="but these neurons need"):
        extract(base, finetuned, tmp_path / "a", count=9, scores=tmp_path / "scores.safetensors")


def test_neurons_of_a_tied_head(tiny_model, tmp_path) -> None:
    for seed in (0, 1):
        tiny_model(tie_word_embeddings=True, seed=seed).save_pretrained(tmp_path / str(seed))
    for seed in (0, 1):
        head = load_file(tmp_path / str(seed) / FILE)["model.embed_tokens.weight"].clone()
        edited(tmp_path / str(seed), **{"lm_head.weight": head})
    with pytest.raises(NeuronError, match="lm_head: its weight is tied"):
        extract(tmp_path / "0", tmp_path / "1", tmp_path / "a", count=9, modules=["lm_head"])


def test_what_is_there_stays(base, finetuned, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="mine: exists already"):
        extract(base, finetuned, tmp_path / "mine", count=9)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_merged_by_this_package(base, finetuned, tmp_path) -> None:
    extract(base, finetuned, tmp_path / "adapter", percent=9)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    expected = replaced(base, finetuned, load_selection(tmp_path / "adapter")).state_dict()
    for name, weight in plain(tmp_path / "merged").state_dict().items():
        assert torch.equal(weight, expected[name]), name
