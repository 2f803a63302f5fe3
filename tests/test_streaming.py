"""One pass of a model over texts: what collectors see, and what is left behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from neft.errors import ArchitectureError, DataError, RunError, UsageError
from neft.streaming import layers_of, stream

TEXTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [5, 6, 7]]


class Recorder:
    """Keeps batches, and the output of the last layer for each."""

    def __init__(self) -> None:
        self.batches, self.outputs = [], []

    def watch(self, model):
        last = list(layers_of(model).values())[-1]
        return [last.register_forward_hook(lambda *call: self.outputs.append(call[2]))]

    def begin(self, batch) -> None:
        self.batches.append(batch)


def read(model, texts=TEXTS, batch_size=2, *collectors):
    stream(model, texts, collectors, batch_size=batch_size, title="Test")


def num_hooks(model) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_every_text_is_read_once(tiny_model, batch_size) -> None:
    recorder = Recorder()
    read(tiny_model(), TEXTS, batch_size, recorder)
    seen = {}
    for batch in recorder.batches:
        assert len(batch.texts) <= batch_size
        for position, ids, mask in zip(batch.texts, batch.input_ids, batch.mask, strict=True):
            assert position not in seen
            seen[int(position)] = ids[mask].tolist()
            length = int(mask.sum())
            assert mask[:length].all()  # the text starts at the left
            assert not ids[length:].any()
    assert [seen[position] for position in range(len(TEXTS))] == TEXTS


def test_hooks_run_between_begin_and_the_next_batch_for_all_collectors(tiny_model) -> None:
    first, second = Recorder(), Recorder()
    read(tiny_model(), TEXTS, 2, first, second)
    assert len(first.batches) == 3
    for batch, output, same in zip(first.batches, first.outputs, second.outputs, strict=True):
        assert output.shape == (*batch.input_ids.shape, 32)
        assert output is same  # one pass for both
        assert not output.requires_grad


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2"])
def test_padding_changes_nothing(tiny_model, architecture) -> None:
    model = tiny_model(architecture, initializer_range=0.3)
    together, alone = Recorder(), Recorder()
    read(model, TEXTS, 5, together)
    read(model, TEXTS, 1, alone)
    by_text = {
        int(batch.texts[0]): output[0]
        for batch, output in zip(alone.batches, alone.outputs, strict=True)
    }
    for position, row, mask in zip(
        together.batches[0].texts, together.outputs[0], together.batches[0].mask, strict=True
    ):
        torch.testing.assert_close(row[mask], by_text[int(position)])


def test_logits_are_not_computed(tiny_model) -> None:
    model = tiny_model()
    calls = []
    with model.lm_head.register_forward_hook(lambda *call: calls.append(call)):
        read(model)
    assert not calls


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(tiny_model, training) -> None:
    model = tiny_model(attention_dropout=0.5).train(training)
    a, b = Recorder(), Recorder()
    read(model, TEXTS, 5, a)
    read(model, TEXTS, 5, b)
    assert torch.equal(a.outputs[0], b.outputs[0])  # no dropout
    assert model.training is training
    assert num_hooks(model) == 0


class Failing(Recorder):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def watch(self, model):
        def fail(*call) -> None:
            raise self.error

        return [model.get_submodule("model.layers.1").register_forward_hook(fail)]


def test_hooks_are_removed_after_a_failure_too(tiny_model) -> None:
    model = tiny_model().train()
    with pytest.raises(RuntimeError, match="broken"):
        read(model, TEXTS, 2, Recorder(), Failing(RuntimeError("broken")))
    assert num_hooks(model) == 0
    assert model.training


def test_too_little_memory_says_what_to_lower(tiny_model) -> None:
    error = torch.OutOfMemoryError("no memory")
    with pytest.raises(RunError, match=r"2 texts of up to 5 tokens at once. Lower the batch size"):
        read(tiny_model(), TEXTS, 2, Failing(error))


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "no texts"), ([[1], [], [2]], r"Text 2 of 3 has no tokens")],
)
def test_nothing_to_read(tiny_model, texts, message) -> None:
    recorder = Recorder()
    with pytest.raises(DataError, match=message):
        read(tiny_model(), texts, 2, recorder)
    assert not recorder.batches


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_a_text_beyond_the_context(tiny_model, architecture) -> None:
    model = tiny_model(architecture)
    whole = get_peft_model(
        tiny_model(architecture),
        LoraConfig(target_modules="all-linear", fan_in_fan_out=architecture == "gpt2"),
    )
    for reader in (model, whole):
        read(reader, [[5] * 256, [6]], 2)
        with pytest.raises(DataError, match=r"Text 2 of 2 has 257 tokens, more than the 256 of"):
            read(reader, [[6], [5] * 257], 2)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_of_nothing(tiny_model, batch_size) -> None:
    with pytest.raises(UsageError, match=f"batch_size is {batch_size}; it must be at least 1"):
        read(tiny_model(), TEXTS, batch_size)


def test_texts_as_arrays(tiny_model) -> None:
    recorder = Recorder()
    read(tiny_model(), [np.array([3, 4]), np.array([5])], 1, recorder)
    assert [batch.input_ids.tolist() for batch in recorder.batches] == [[[3, 4]], [[5]]]


@pytest.mark.parametrize(
    ("architecture", "stack"),
    [("llama", "model.layers"), ("gpt2", "transformer.h"), ("opt", "model.decoder.layers")],
)
def test_layers_by_index(tiny_model, architecture, stack) -> None:
    model = tiny_model(architecture, num_hidden_layers=11)
    layers = layers_of(model)
    assert list(layers) == list(range(11))
    assert list(layers.values()) == list(model.get_submodule(stack))


def test_layers_of_a_wrapped_model(tiny_model) -> None:
    model = tiny_model()
    plain = list(model.model.layers)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["up_proj"], r=2))
    assert list(layers_of(wrapped).values()) == plain
    recorder = Recorder()
    read(wrapped, TEXTS, 5, recorder)
    assert recorder.outputs[0].shape == (5, 5, 32)


def test_a_model_without_known_layers(tiny_model) -> None:
    model = tiny_model()
    model.config = LlamaConfig()
    model.config.model_type = "unheard of"
    with pytest.raises(ArchitectureError, match="unheard of"):
        layers_of(model)
