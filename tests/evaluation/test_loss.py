"""Loss on texts and on targets against transformers' own loss, one text at a time."""

from __future__ import annotations

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from neft.errors import DataError, RunError
from neft.evaluation import target_loss, text_loss
from neft.sft.prompts import IGNORED

TEXTS = ["the other thing", "x", "", "hello", "a b c d e f g h i j k l m n", "no"]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return tiny_tokenizer()


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", seed=2, initializer_range=0.5)


def one_by_one(model, tokenizer, max_length: int) -> tuple[float, int]:
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"][:max_length]], dtype=torch.long)
        predicted = ids.shape[1] - 1
        if predicted > 0:
            with torch.no_grad():
                total += model(input_ids=ids, labels=ids).loss.item() * predicted
            count += predicted
    return total / count, count


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("max_length", [100, 6])
def test_mean_over_all_tokens(tiny_model, tokenizer, architecture, batch_size, max_length) -> None:
    model = tiny_model(architecture, seed=2, initializer_range=0.5)
    found = text_loss(model, tokenizer, TEXTS, max_length=max_length, batch_size=batch_size)
    loss, num_tokens = one_by_one(model, tokenizer, max_length)
    assert found.num_tokens == num_tokens
    assert found.loss == pytest.approx(loss, rel=1e-5)


def test_bos_of_the_tokenizer_is_context(model, tiny_tokenizer) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    found = text_loss(model, tokenizer, TEXTS, max_length=100, batch_size=4)
    assert found.num_tokens == sum(len(ids) - 1 for ids in tokenizer(TEXTS)["input_ids"])
    assert found.loss == pytest.approx(one_by_one(model, tokenizer, 100)[0], rel=1e-5)


def test_losses_of_a_16_bit_model_are_not_rounded_to_16_bits(model, tokenizer) -> None:
    model.to(torch.bfloat16)
    found = text_loss(model, tokenizer, TEXTS, max_length=100, batch_size=1)
    assert found.loss == pytest.approx(one_by_one(model, tokenizer, 100)[0], rel=1e-5)


def test_adapter_counts_and_mode_is_kept(model, tokenizer) -> None:
    from peft import LoraConfig, get_peft_model

    base = text_loss(model, tokenizer, TEXTS, max_length=100, batch_size=4)
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["down_proj"], lora_dropout=0.5, init_lora_weights=False)
    wrapped = get_peft_model(model, config).train()
    found = text_loss(wrapped, tokenizer, TEXTS, max_length=100, batch_size=4)
    assert wrapped.training
    assert found.loss != pytest.approx(base.loss, rel=1e-3)
    merged = wrapped.merge_and_unload()
    expected = text_loss(merged, tokenizer, TEXTS, max_length=100, batch_size=4)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize(
    ("texts", "max_length"), [([], 100), (["", "x"], 100), (["two tokens"], 1)]
)
def test_nothing_to_predict(model, tokenizer, texts, max_length) -> None:
    with pytest.raises(DataError, match=f"None of {len(texts)} texts.* max_length = {max_length}"):
        text_loss(model, tokenizer, texts, max_length=max_length, batch_size=4)


def test_loss_that_is_not_finite(model, tokenizer) -> None:
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(RunError, match="loss on 6 texts is nan"):
        text_loss(model, tokenizer, TEXTS, max_length=100, batch_size=4)


def test_too_little_memory(model, tokenizer) -> None:
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.forward = full
    with pytest.raises(RunError, match=r"2 texts of up to 27 tokens.*evaluate\.batch_size"):
        text_loss(model, tokenizer, TEXTS, max_length=100, batch_size=2)


# Prompt and target; one target ends early, one is all prompt, one counts from the very first token.
EXAMPLES = [
    ([5, 6, 7, 8, 9, 10], [IGNORED, IGNORED, IGNORED, 8, 9, 10]),
    ([11, 12, 13], [IGNORED, 12, IGNORED]),
    ([14, 15, 16, 17], [IGNORED] * 4),
    ([18, 19, 20, 21, 22], [18, 19, 20, 21, 22]),
    ([23], [23]),
]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_mean_over_target_tokens(tiny_model, architecture, batch_size) -> None:
    model = tiny_model(architecture, seed=2, initializer_range=0.5)
    total, count = 0.0, 0
    for ids, labels in EXAMPLES:
        predicted = sum(label != IGNORED for label in labels[1:])
        if predicted:
            inputs, expected = torch.tensor([ids]), torch.tensor([labels])
            with torch.no_grad():
                total += model(input_ids=inputs, labels=expected).loss.item() * predicted
            count += predicted
    found = target_loss(model, *zip(*EXAMPLES, strict=True), batch_size=batch_size)
    assert found.num_tokens == count == 8
    assert found.loss == pytest.approx(total / count, rel=1e-5)


def test_texts_are_examples_that_are_all_target(model, tokenizer) -> None:
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    expected = text_loss(model, tokenizer, TEXTS, max_length=100, batch_size=3)
    assert target_loss(model, ids, ids, batch_size=3) == expected


@pytest.mark.parametrize("examples", [[], [([5, 6], [IGNORED, IGNORED]), ([7], [7]), ([], [])]])
def test_no_target_to_predict(model, examples) -> None:
    ids, labels = zip(*examples, strict=True) if examples else ([], [])
    with pytest.raises(DataError, match=f"None of {len(examples)} examples has a target token"):
        target_loss(model, ids, labels, batch_size=4)


def test_labels_that_do_not_fit(model) -> None:
    with pytest.raises(DataError, match="Example 2 has 3 tokens, but 2 labels"):
        target_loss(model, [[5, 6], [7, 8, 9]], [[5, 6], [7, 8]], batch_size=4)
    with pytest.raises(DataError, match="2 examples, but labels of 1"):
        target_loss(model, [[5, 6], [7, 8, 9]], [[5, 6]], batch_size=4)
