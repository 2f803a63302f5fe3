"""Generation against transformers' own, one prompt at a time and without padding."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from neft.errors import DataError, RunError
from neft.evaluation import generate
from neft.recipe import EvaluateSection

PAD, END = 0, 2
NUM_TOKENS = 101


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == NUM_TOKENS
    return tokenizer


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    torch.manual_seed(0)
    lengths = [3, 9, 1, 5, 5, 12, 2, 7, 5]
    return [torch.randint(4, NUM_TOKENS, (length,)).tolist() for length in lengths]


@pytest.fixture
def model(tiny_model) -> PreTrainedModel:
    model = tiny_model("llama", seed=4, initializer_range=0.5, vocab_size=NUM_TOKENS)
    # With several end tokens, some texts of a batch end early.
    model.generation_config.eos_token_id = [END, *range(10, 20)]
    return model.to(torch.float64)


def one_by_one(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    **options: int,
) -> list[str]:
    texts = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        full = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            pad_token_id=PAD,
            **options,
        )
        texts.append(tokenizer.decode(full[0, len(prompt) :], skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"no_repeat_ngram_size": 2}])
def test_batches_change_nothing(model, tokenizer, prompts, options, batch_size) -> None:
    section = EvaluateSection(batch_size=batch_size, max_new_tokens=10, **options)
    expected = one_by_one(model, tokenizer, prompts, max_new_tokens=10, **options)
    assert generate(model, tokenizer, prompts, section, progress=False) == expected
    assert len({len(text) for text in expected}) > 1


def test_order_of_prompts_is_kept(model, tokenizer, prompts) -> None:
    section = EvaluateSection(batch_size=4, max_new_tokens=5)
    forward = generate(model, tokenizer, prompts, section, progress=False)
    backward = generate(model, tokenizer, prompts[::-1], section, progress=False)
    assert backward == forward[::-1]


def test_batches_are_the_same_whatever_the_order(model, tokenizer, prompts) -> None:
    seen: list[list[torch.Tensor]] = []
    original = model.generate

    def recording(**arguments):
        seen[-1].append(arguments["input_ids"])
        return original(**arguments)

    model.generate = recording
    section = EvaluateSection(batch_size=4, max_new_tokens=1)
    for order in (prompts, prompts[::-1]):
        seen.append([])
        generate(model, tokenizer, order, section, progress=False)
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))
    assert [batch.shape[1] for batch in seen[0]] == [12, 5, 1]


HABITS = [
    {"do_sample": True, "temperature": 3.0, "top_k": 7},
    {"repetition_penalty": 5.0, "num_beams": 3},
    {"min_new_tokens": 8},
    {"guidance_scale": 3.0},
    {"encoder_repetition_penalty": 1.5},
    {"forced_eos_token_id": 50},
    {"sequence_bias": [[[33], 50.0]]},
    {"suppress_tokens": list(range(20, 60))},
    {"exponential_decay_length_penalty": [1, 5.0]},
    {"stop_strings": ["a", "e"]},
    {"max_time": 0.0},
]


@pytest.mark.parametrize("with_adapter", [False, True])
def test_checkpoint_has_no_say_in_how_texts_are_generated(
    with_adapter, model, tokenizer, prompts
) -> None:
    from peft import LoraConfig, get_peft_model

    section = EvaluateSection(batch_size=4, max_new_tokens=10)
    subject = model
    if with_adapter:
        subject = get_peft_model(model, LoraConfig(target_modules=["down_proj"]))
    expected = generate(subject, tokenizer, prompts, section, progress=False)
    plain = copy.deepcopy(model.generation_config)
    for habits in HABITS:
        model.generation_config = copy.deepcopy(plain)
        model.generation_config.update(**habits)
        own = model.generation_config.to_dict()
        assert generate(subject, tokenizer, prompts, section, progress=False) == expected, habits
        assert model.generation_config.to_dict() == own


def test_every_end_token_ends_a_text(model, tokenizer, prompts) -> None:
    section = EvaluateSection(batch_size=9, max_new_tokens=10)
    model.generation_config.eos_token_id = None
    texts = generate(model, tokenizer, prompts, section, progress=False)
    end = texts[0][3]
    assert end not in texts[0][:3]
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(end)
    stopped = generate(model, tokenizer, prompts, section, progress=False)
    assert stopped[0] == texts[0][:4]


def test_mode_of_model_is_kept_and_dropout_off(tiny_model, tokenizer, prompts) -> None:
    model = tiny_model("gpt2", seed=1, vocab_size=NUM_TOKENS)
    section = EvaluateSection(batch_size=4, max_new_tokens=4)
    expected = generate(model, tokenizer, prompts, section, progress=False)
    model.train()
    assert generate(model, tokenizer, prompts, section, progress=False) == expected
    assert model.training


def test_adapter(model, tokenizer, prompts) -> None:
    from peft import LoraConfig, get_peft_model

    section = EvaluateSection(batch_size=4, max_new_tokens=6)
    base = generate(model, tokenizer, prompts, section, progress=False)
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["down_proj"], init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    texts = generate(wrapped, tokenizer, prompts, section, progress=False)
    assert texts != base
    merged = wrapped.merge_and_unload()
    assert texts == generate(merged, tokenizer, prompts, section, progress=False)


def test_no_prompts(model, tokenizer) -> None:
    assert generate(model, tokenizer, [], EvaluateSection(), progress=False) == []


def test_too_little_memory(model, tokenizer, prompts) -> None:
    def generate_on_a_full_device(**arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.generate = generate_on_a_full_device
    with pytest.raises(RunError, match=r"4 prompts of up to 12 tokens.*evaluate\.batch_size"):
        generate(model, tokenizer, prompts, EvaluateSection(batch_size=4), progress=False)


def test_empty_prompt_is_refused(model, tokenizer) -> None:
    with pytest.raises(DataError, match="Prompt 2 of 2 has no tokens"):
        generate(model, tokenizer, [[5], []], EvaluateSection(), progress=False)
