"""Token ids and labels: the prompt is a prefix, the target is what is learnt, EOS ends it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from neft.errors import DataError
from neft.recipe import DataSection
from neft.sft.data import Example, Message
from neft.sft.prompts import encode, encode_all, prompt_ids

if TYPE_CHECKING:
    from conftest import TinyTokenizer


def section(task: str = "prompt", **fields: Any) -> DataSection:
    template = {"template": "{source}"} if task == "prompt" else {}
    return DataSection(task=task, train="a", dev="b", test="c", **(template | fields))


EXAMPLE = Example("Say t", "hi")
TURNS = (Message("system", "Be brief."), Message("user", "One?"))


def test_plain_prompts(tiny_tokenizer: TinyTokenizer) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    data = section(style="plain")
    # "t" + "hi" would merge across the boundary, and train on what generation never starts from.
    assert tokenizer.tokenize("Say thi")[-2:] == ["th", "i"]
    assert tokenizer.convert_ids_to_tokens(prompt_ids(EXAMPLE, tokenizer, data)) == list("Say t")
    input_ids, labels = encode(EXAMPLE, tokenizer, data)
    assert tokenizer.convert_ids_to_tokens(input_ids) == [*"Say t", "h", "i", "</s>"]
    assert labels == [-100] * 5 + input_ids[5:]


@pytest.mark.parametrize(
    ("example", "task", "prompt"),
    [
        (EXAMPLE, "prompt", "<s>user:Say t</s><s>assistant:"),
        (Example(TURNS, "Two"), "chat", "<s>system:Be brief.</s><s>user:One?</s><s>assistant:"),
    ],
)
def test_chat_prompts(
    example: Example, task: str, prompt: str, tiny_tokenizer: TinyTokenizer
) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    data = section(task)
    start = prompt_ids(example, tokenizer, data)
    assert tokenizer.decode(start) == prompt
    # As the template itself would have it tokenised.
    turns = example.prompt if isinstance(example.prompt, tuple) else [Message("user", "Say t")]
    rendered = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in turns],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert start == rendered
    input_ids, labels = encode(example, tokenizer, data)
    assert input_ids[: len(start)] == start
    assert tokenizer.decode(input_ids[len(start) :]) == example.target + "</s>"
    assert labels == [-100] * len(start) + input_ids[len(start) :]


def test_plain_prompts_get_the_special_tokens_that_start_a_text(
    tiny_tokenizer: TinyTokenizer,
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    input_ids, _ = encode(EXAMPLE, tokenizer, section())
    assert tokenizer.decode(input_ids) == "<s>Say thi</s>"
    assert tokenizer.decode(prompt_ids(EXAMPLE, tokenizer, section())) == "<s>Say t"


@pytest.mark.parametrize(("style", "chat"), [("auto", True), ("auto", False), ("chat", True)])
def test_style(style: str, chat: bool, tiny_tokenizer: TinyTokenizer) -> None:
    start = prompt_ids(EXAMPLE, tiny_tokenizer(chat=chat), section(style=style))
    assert (start[0] == 1) == chat


@pytest.mark.parametrize("fields", [{"style": "chat"}, {"task": "chat"}])
def test_chat_without_template(fields: dict[str, str], tiny_tokenizer: TinyTokenizer) -> None:
    with pytest.raises(DataError, match="no chat template"):
        prompt_ids(EXAMPLE, tiny_tokenizer(), section(**fields))


def test_refused_messages_are_placed(tiny_tokenizer: TinyTokenizer) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    example = Example(TURNS, "Two", "chats.jsonl, line 7")
    with pytest.raises(DataError, match=r"chats\.jsonl, line 7: .*System role not supported"):
        encode(example, tokenizer, section("chat"))


def test_no_end_of_text(tiny_tokenizer: TinyTokenizer) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        encode(EXAMPLE, tokenizer, section())


# Lengths in tokens with EOS: 4, 8 (prompt of 6), 9 (prompt of 5).
LENGTHS = [Example("ab", "c"), Example("abcdef", "c"), Example("abcde", "fgx")]


def test_overlong_examples_are_dropped(tiny_tokenizer: TinyTokenizer) -> None:
    encoded = encode_all(LENGTHS, tiny_tokenizer(), section(max_length=8))
    assert [len(ids) for ids in encoded.input_ids] == [4, 8]
    assert (encoded.num_dropped, encoded.num_truncated) == (1, 0)
    assert encoded.labels[1][-2:] == encoded.input_ids[1][-2:]


def test_overlong_examples_are_truncated(tiny_tokenizer: TinyTokenizer) -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode_all(LENGTHS, tokenizer, section(max_length=6, overlong="truncate"))
    # Of the second nothing but the prompt would be left.
    assert (len(encoded), encoded.num_dropped, encoded.num_truncated) == (2, 1, 1)
    assert tokenizer.decode(encoded.input_ids[1]) == "abcdef"
    assert encoded.labels[1] == [-100] * 5 + encoded.input_ids[1][5:]


def test_nothing_left(tiny_tokenizer: TinyTokenizer) -> None:
    with pytest.raises(DataError, match=r"All 3 examples are longer than data\.max_length = 3"):
        encode_all(LENGTHS, tiny_tokenizer(), section(max_length=3))


def test_splits_are_encoded_as_single_examples(tiny_tokenizer: TinyTokenizer) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    encoded = encode_all(LENGTHS, tokenizer, section())
    assert list(zip(encoded.input_ids, encoded.labels, strict=True)) == [
        encode(example, tokenizer, section()) for example in LENGTHS
    ]
