"""The logit lens against the model's own norms and head, applied to one neuron at a time."""

from __future__ import annotations

import pytest
import torch

from neft.analysis.lens import NORMS, lens, lens_tokens
from neft.checkpoints import open_weights
from neft.errors import ArchitectureError, CheckpointError, NeuronError
from neft.neurons import NeuronSet
from neft.projections import ARCHITECTURES, find_projections

# Where each architecture has its layers, its final norm, and the norm of what a layer's network adds.
PLACES = {
    "llama": ("model.layers", "model.norm", None),
    "phi3": ("model.layers", "model.norm", None),
    "gemma": ("model.layers", "model.norm", None),
    "gemma2": ("model.layers", "model.norm", "post_feedforward_layernorm"),
    "gemma3": (
        "model.language_model.layers",
        "model.language_model.norm",
        "post_feedforward_layernorm",
    ),
    "granite": ("model.layers", "model.norm", None),
    "olmo2": ("model.layers", "model.norm", "post_feedforward_layernorm"),
    "olmo3": ("model.layers", "model.norm", "post_feedforward_layernorm"),
    "gpt2": ("transformer.h", "transformer.ln_f", None),
    "opt": ("model.decoder.layers", "model.decoder.final_layer_norm", None),
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.final_layer_norm", None),
    "mixtral": ("model.layers", "model.norm", None),
    "olmoe": ("model.layers", "model.norm", None),
    "gpt_oss": ("model.layers", "model.norm", None),
    "qwen3_moe": ("model.layers", "model.norm", None),
    "qwen2_moe": ("model.layers", "model.norm", None),
}


def with_random_norms(model):
    """Gains and biases are all alike in a fresh model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                noise = torch.rand(parameter.shape, generator=generator)
                parameter.copy_(noise + 0.2 if name.endswith("weight") else noise)
    return model


def out_neurons(model, indices=(3, 0, 21)) -> NeuronSet:
    downs = find_projections(model, ["down"])
    return NeuronSet(downs, {downs[0].name: indices[:1], downs[-1].name: indices})


@torch.no_grad()
def logits_one_by_one(model, projection, neuron: int) -> torch.Tensor:
    """A norm's scale is positive and its bias no part of a neuron: neither changes the order."""
    layers, final, after_ffn = PLACES[model.config.model_type]
    weight = projection.weight_in(model.get_parameter(projection.parameter))
    vector = weight.select(projection.neuron_dim, neuron)
    norms = [f"{layers}.{projection.layer}.{after_ffn}"] if after_ffn else []
    for name in (*norms, final):
        norm = model.get_submodule(name)
        # Longer than any epsilon.
        vector = norm(vector / vector.norm() * 100)
        vector = vector - norm.bias if hasattr(norm, "bias") else vector
    return model.get_output_embeddings()(vector)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", PLACES)
def test_against_the_model_itself(tiny_model, architecture, tied) -> None:
    model = tiny_model(architecture, seed=1, initializer_range=0.3, tie_word_embeddings=tied)
    model = with_random_norms(model)
    neurons = out_neurons(model)
    found = lens_tokens(open_weights(model), neurons, k=5, num_tokens=128)
    assert list(found) == neurons.modules()
    for name, indices in neurons.items():
        for row, neuron in enumerate(indices):
            order = logits_one_by_one(model, neurons.projections[name], neuron).argsort()
            assert found[name].promoted[row].tolist() == order.flip(0)[:5].tolist()
            assert found[name].suppressed[row].tolist() == order[:5].tolist()


def test_every_architecture_has_its_norms() -> None:
    assert NORMS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("tied", [True, False])
def test_weights_in_a_folder(tiny_model, tmp_path, tied) -> None:
    model = with_random_norms(tiny_model("gpt2", seed=1, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    neurons = out_neurons(model)
    folder, live = (
        lens_tokens(open_weights(source), neurons, k=3, num_tokens=128)
        for source in (tmp_path, model)
    )
    for name in neurons.modules():
        assert torch.equal(folder[name].promoted, live[name].promoted)
        assert torch.equal(folder[name].suppressed, live[name].suppressed)


def test_blocks_of_neurons(tiny_model, monkeypatch) -> None:
    model = tiny_model(seed=1)
    downs = find_projections(model, ["down"])
    neurons = NeuronSet(downs, {down.name: range(64) for down in downs})
    whole = lens_tokens(open_weights(model), neurons, k=3, num_tokens=128)
    monkeypatch.setattr("neft.analysis.lens._BLOCK", 5 * 128)
    blocks = lens_tokens(open_weights(model), neurons, k=3, num_tokens=128)
    for name in neurons.modules():
        assert whole[name].promoted.shape == (64, 3)
        assert torch.equal(blocks[name].promoted, whole[name].promoted)


def test_bfloat16_weights_are_multiplied_in_float32(tiny_model) -> None:
    model = tiny_model(seed=1).to(torch.bfloat16)
    neurons = out_neurons(model)
    found = lens_tokens(open_weights(model), neurons, k=5, num_tokens=128)
    expected = lens_tokens(open_weights(model.float()), neurons, k=5, num_tokens=128)
    for name in neurons.modules():
        assert torch.equal(found[name].promoted, expected[name].promoted)


def test_table_before_and_after(tiny_model, tiny_tokenizer, tmp_path) -> None:
    before, after = (tiny_model(seed=seed) for seed in (1, 2))
    before.save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    up, *_ = find_projections(before, ["up"])
    downs = find_projections(before, ["down"])
    neurons = NeuronSet([up, *downs], {up.name: [1, 2], downs[0].name: [7], downs[1].name: [9, 4]})
    table = lens(open_weights(tmp_path / "model"), open_weights(after), neurons, tokenizer, k=4)
    assert list(table.columns) == [
        *("layer", "index", "promoted_before", "suppressed_before"),
        *("promoted_after", "suppressed_after"),
    ]
    rows = table.rows()
    assert [(row["layer"], row["index"]) for row in rows] == [(0, 7), (1, 4), (1, 9)]
    for row in rows:
        for side, model in {"before": before, "after": after}.items():
            logits = logits_one_by_one(model, downs[row["layer"]], row["index"])
            # The vocabulary of the tokenizer is smaller than the model's.
            order = logits[: len(tokenizer)].argsort().tolist()
            assert len(tokenizer) < len(logits)
            assert row[f"suppressed_{side}"] == [tokenizer.decode([n]) for n in order[:4]]
            assert row[f"promoted_{side}"] == [tokenizer.decode([n]) for n in order[:-5:-1]]
    table.save(tmp_path / "lens.parquet")
    assert table.load(tmp_path / "lens.parquet").rows() == rows


def test_the_trained_side_needs_no_configuration(tiny_model, tiny_tokenizer, tmp_path) -> None:
    model = tiny_model(seed=1)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    row, *_ = lens(
        open_weights(model), open_weights(tmp_path), out_neurons(model), tiny_tokenizer(), k=4
    ).rows()
    assert row["promoted_after"] == row["promoted_before"]


def test_more_tokens_than_there_are(tiny_model) -> None:
    model = tiny_model()
    [first, _] = lens_tokens(open_weights(model), out_neurons(model), k=9, num_tokens=6).values()
    assert sorted(first.promoted[0].tolist()) == list(range(6))


def test_unknown_architecture(tiny_model) -> None:
    model = tiny_model()
    neurons = out_neurons(model)
    model.config.model_type = "other"
    with pytest.raises(ArchitectureError, match=r"'other'.*does not know its final norm.*llama"):
        lens_tokens(open_weights(model), neurons, k=5, num_tokens=128)


def test_model_without_a_final_norm(tiny_model) -> None:
    model = tiny_model("opt", do_layer_norm_before=False)
    with pytest.raises(
        ArchitectureError, match=r"has no final norm model\.decoder\.final_layer_norm"
    ):
        lens_tokens(open_weights(model), out_neurons(model), k=5, num_tokens=128)


def test_model_without_an_unembedding(tiny_model) -> None:
    model = tiny_model().model
    with pytest.raises(ArchitectureError, match="has no unembedding"):
        lens_tokens(open_weights(model), out_neurons(model), k=5, num_tokens=128)


def test_unembedding_of_another_width(tiny_model) -> None:
    model = tiny_model("opt", word_embed_proj_dim=16)
    with pytest.raises(ArchitectureError, match=r"length 16, and neurons have length 32"):
        lens_tokens(open_weights(model), out_neurons(model), k=5, num_tokens=128)


@pytest.mark.parametrize("shape", [{"num_hidden_layers": 3}, {"intermediate_size": 48}])
def test_neurons_of_another_model(tiny_model, shape) -> None:
    neurons = out_neurons(tiny_model(**shape))
    with pytest.raises(NeuronError, match=r"down_proj: .* not of this model"):
        lens_tokens(open_weights(tiny_model()), neurons, k=5, num_tokens=128)


def test_neurons_without_a_lens(tiny_model) -> None:
    model = tiny_model()
    ups = find_projections(model, ["up"])
    neurons = NeuronSet(ups, {ups[0].name: [1, 2, 3]})
    with pytest.raises(NeuronError, match="None of 3 neurons is in a down projection"):
        lens_tokens(open_weights(model), neurons, k=5, num_tokens=128)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj", "model.embed_tokens", "lm_head"])
def test_weights_that_are_not_finite(tiny_model, name) -> None:
    model = tiny_model(tie_word_embeddings=False)
    neurons = out_neurons(model)
    with torch.no_grad():
        model.get_submodule(name).weight[3, 3] = torch.nan
    if name == "model.embed_tokens":  # no part of the lens
        lens_tokens(open_weights(model), neurons, k=5, num_tokens=128)
    else:
        with pytest.raises(CheckpointError, match=rf"{name}\.weight: a weight is not finite"):
            lens_tokens(open_weights(model), neurons, k=5, num_tokens=128)
