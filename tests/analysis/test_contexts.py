"""Strongest tokens of units against a sort of all activations; their contexts as text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from unit_activations import TEXTS, unit_activations

from neft.analysis.contexts import contexts, top_tokens
from neft.analysis.decoding import Decoder
from neft.errors import DataError, NeuronError, RunError
from neft.neurons import NeuronSet
from neft.projections import find_projections

NUM_TOKENS = sum(map(len, TEXTS))


def strongest(by_text, unit: int) -> list[tuple[float, int, int]]:
    """(activation, text, position) of all tokens on which the unit is not 0, strongest first."""
    found = [
        (float(a), number, position)
        for number, rows in enumerate(by_text)
        for position, a in enumerate(rows[:, unit])
        if a
    ]
    return sorted(found, key=lambda row: (-abs(row[0]), row[1], row[2]))


def kept(top, layer: int, unit: int) -> list[tuple[float, int, int]]:
    name = list(top.projections)[layer]
    columns = (top.activations[name][unit], top.texts[name][unit], top.positions[name][unit])
    return [
        (float(a), int(text), int(position)) for a, text, position in zip(*columns, strict=True)
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4, 9])
@pytest.mark.parametrize("tokens_at_once", [2, 512])
def test_against_a_sort(tiny_model, monkeypatch, architecture, batch_size, tokens_at_once) -> None:
    monkeypatch.setattr("neft.analysis.contexts._TOKENS", tokens_at_once)
    model = tiny_model(architecture, seed=1, initializer_range=0.3)
    top = top_tokens(model, TEXTS, k=4, batch_size=batch_size)
    for layer, by_text in enumerate(unit_activations(model, TEXTS)):
        for unit in range(0, 64, 7):
            found, expected = kept(top, layer, unit), strongest(by_text, unit)[:4]
            assert [row[1:] for row in found] == [row[1:] for row in expected]
            np.testing.assert_allclose(
                [row[0] for row in found], [row[0] for row in expected], rtol=1e-4
            )


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_of_equal_activations_the_first_in_the_texts_counts(tiny_model, batch_size) -> None:
    model = tiny_model(seed=1, initializer_range=0.3)
    # Whole numbers, and few of them: many are equal, whatever the rounding of a batch.
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Identity()
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.register_forward_hook(lambda _module, _inputs, y: y.round())
    top = top_tokens(model, TEXTS, k=6, batch_size=batch_size)
    num_ties = 0
    for layer, by_text in enumerate(unit_activations(model, TEXTS)):
        for unit in range(64):
            expected = strongest(by_text, unit)
            num_ties += abs(expected[5][0]) == abs(expected[6][0])
            assert kept(top, layer, unit) == expected[:6]
    assert num_ties > 20


def test_a_unit_at_rest_has_no_strongest_token(tiny_model, tiny_tokenizer) -> None:
    model = tiny_model(seed=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0.0
    top = top_tokens(model, TEXTS, k=NUM_TOKENS + 5, batch_size=4)
    assert kept(top, 0, 3) == [(0.0, -1, -1)] * (NUM_TOKENS + 5)
    # As many as there are tokens.
    assert [text for _, text, _ in kept(top, 0, 4)].count(-1) == 5
    downs = find_projections(model, ["down"])
    table = contexts({"before": top}, NeuronSet(downs, {downs[0].name: [3]}), tiny_tokenizer())
    assert len(table) == 0
    assert "activation" in table.columns


def test_an_adapter_counts(tiny_model) -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    wrapped = get_peft_model(tiny_model(seed=1, initializer_range=0.3), config)
    top = top_tokens(wrapped, TEXTS, k=3, batch_size=4)
    merged = wrapped.merge_and_unload()
    expected = strongest(unit_activations(merged, TEXTS)[1], 5)[:3]
    assert [row[1:] for row in kept(top, 1, 5)] == [row[1:] for row in expected]


def test_contexts_of_chosen_units(tiny_model, tiny_tokenizer, tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    written = ["the <other> thing is here", "a", "hello, world"]
    texts = [tokenizer(text)["input_ids"] for text in written]
    models = {
        side: tiny_model(seed=seed, initializer_range=0.3)
        for side, seed in {"before": 1, "after": 2}.items()
    }
    tops = {side: top_tokens(model, texts, k=3, batch_size=2) for side, model in models.items()}
    up0, down0, up1, q0 = _projections(models["before"])
    # Row 5 of up and column 5 of down are one unit; queries have none.
    neurons = NeuronSet(
        [up0, down0, up1, q0], {up0.name: [9, 5], down0.name: [5], up1.name: [2], q0.name: [1]}
    )
    table = contexts(tops, neurons, tokenizer, width=4)
    assert list(table.columns) == [
        *("layer", "index", "model", "rank", "activation", "left", "token", "right")
    ]
    rows = table.rows()
    assert [tuple(row.values())[:4] for row in rows] == [
        (layer, index, side, rank)
        for layer, index in [(0, 5), (0, 9), (1, 2)]
        for side in ("before", "after")
        for rank in (1, 2, 3)
    ]
    activations = {side: unit_activations(model, texts) for side, model in models.items()}
    for row in rows:
        expected = strongest(activations[row["model"]][row["layer"]], row["index"])
        activation, number, position = expected[row["rank"] - 1]
        assert row["activation"] == pytest.approx(activation, rel=1e-4)
        assert row["left"] == tokenizer.decode(texts[number][max(0, position - 4) : position])
        assert row["token"] == tokenizer.decode([texts[number][position]])
        assert row["right"] == tokenizer.decode(texts[number][position + 1 : position + 5])
        assert row["left"] + row["token"] + row["right"] in written[number]
    table.save(tmp_path / "contexts.parquet")
    assert table.load(tmp_path / "contexts.parquet").rows() == rows


def _projections(model):
    by_name = {p.name: p for p in find_projections(model, ["up", "down", "q"])}
    return [
        by_name[f"model.layers.{place}_proj"]
        for place in ("0.mlp.up", "0.mlp.down", "1.mlp.up", "0.self_attn.q")
    ]


def test_units_of_gate_and_up_that_are_fused(tiny_model, tiny_tokenizer) -> None:
    model = tiny_model("phi3")
    top = top_tokens(model, TEXTS, k=1, batch_size=4)
    fused = find_projections(model, ["gate_up"])
    neurons = NeuronSet(fused, {fused[1].name: [3, 64 + 3, 64 + 7]})
    table = contexts({"after": top}, neurons, tiny_tokenizer())
    assert [(row["layer"], row["index"]) for row in table.rows()] == [(1, 3), (1, 7)]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """Of a tokenizer that drops the space before the first word, as Llama-2's does."""
    words = ["<unk>", "▁a", "▁the", "the", "▁cat", "s", "▁"]
    core = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert tokenizer.decode([2]) == "the"
    return Decoder(tokenizer)


def test_a_token_keeps_its_space(decoder) -> None:
    assert [decoder.token(n) for n in (2, 3, 4, 5)] == [" the", "the", " cat", "s"]


def test_a_context_reads_as_the_text(decoder) -> None:
    ids = [2, 4, 5, 2, 4]
    assert decoder.context(ids, 0, 2) == ("", "the", " cats")
    assert decoder.context(ids, 2, 1) == ("cat", "s", " the")
    assert decoder.context(ids, 4, 9) == ("the cats the", " cat", "")


def test_characters_of_several_tokens(tiny_tokenizer) -> None:
    core = Tokenizer(WordLevel({"Ã": 0, "©": 1, "x": 2, "a": 3}, unk_token="x"))
    core.decoder = decoders.ByteLevel()
    decoder = Decoder(PreTrainedTokenizerFast(tokenizer_object=core))
    # Two bytes of one letter: neither is text by itself.
    assert decoder.context([2, 0, 1, 2], 0, 5) == ("", "x", "éx")
    assert decoder.context([2, 0, 1, 2], 1, 5) == ("x", "\ufffd", "\ufffdx")
    assert decoder.token(0) == "\ufffd"


def test_neurons_without_units(tiny_model, tiny_tokenizer) -> None:
    model = tiny_model()
    top = top_tokens(model, TEXTS, k=1, batch_size=4)
    queries = find_projections(model, ["q"])
    neurons = NeuronSet(queries, {queries[0].name: [1, 2]})
    with pytest.raises(NeuronError, match="None of 2 neurons is in a feed-forward network"):
        contexts({"before": top}, neurons, tiny_tokenizer())


@pytest.mark.parametrize("role", ["up", "down"])
@pytest.mark.parametrize(
    "shape", [{"num_hidden_layers": 3}, {"intermediate_size": 48}, {"hidden_size": 64}]
)
def test_neurons_of_another_model(tiny_model, tiny_tokenizer, role, shape) -> None:
    top = top_tokens(tiny_model(), TEXTS, k=1, batch_size=4)
    others = find_projections(tiny_model(**shape), [role])
    neurons = NeuronSet(others, {others[-1].name: [1]})
    with pytest.raises(NeuronError, match=rf"{role}_proj: .* not of the model 'before'"):
        contexts({"before": top}, neurons, tiny_tokenizer())


@pytest.mark.parametrize(("texts", "message"), [([], "no texts"), ([[5], []], "Text 2 of 2")])
def test_empty_texts(tiny_model, texts, message) -> None:
    with pytest.raises(DataError, match=message):
        top_tokens(tiny_model(), texts, k=1, batch_size=4)


def test_no_tokens_to_keep(tiny_model) -> None:
    with pytest.raises(DataError, match="k is 0"):
        top_tokens(tiny_model(), TEXTS, k=0, batch_size=4)


def test_activation_that_is_not_finite(tiny_model) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[5] = torch.inf
    with pytest.raises(RunError, match=r"layers\.0\.mlp\.down_proj: an activation is not finite"):
        top_tokens(model, TEXTS, k=1, batch_size=4)
