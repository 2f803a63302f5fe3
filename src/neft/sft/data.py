"""From rows to examples: a prompt, and the target that answers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, TypeAlias

from neft.errors import DataError
from neft.recipe import DataSection, DataSource, GeneralSection, HubData
from neft.sft.rows import Row, checked_text, read_rows, shown, source_name
from neft.templates import MESSAGES, TARGETS, placeholders

Split: TypeAlias = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """What the model is given, and what it should answer."""

    prompt: str | tuple[Message, ...]
    """The text of the prompt, or the turns before the answer."""
    target: str
    place: str = field(default="", compare=False)
    """Where the example comes from, for error messages: file and line."""


def load_examples(data: DataSection, split: Split) -> list[Example]:
    """Read one split, in the order of its source, up to its limit.

    Args:
        data: sources, task and fields.
        split: which of the three sources to read.

    Raises:
        DataError: names the file, the line or row, and the field at fault.
    """
    source: DataSource = getattr(data, split)
    limit: int | None = getattr(data, f"{split}_limit")
    if isinstance(source, HubData):
        data = data.model_copy(update={"fields": data.fields | source.fields})
    to_example = _from_messages(data) if data.task == "chat" else _from_template(data)
    examples = [to_example(row) for row in islice(read_rows(source), limit)]
    if not examples:
        raise DataError(f"{source_name(source)}: holds no rows; data.{split} needs at least one.")
    return examples


def load_texts(general: GeneralSection) -> list[str]:
    """Read the plain texts on which forgetting is measured.

    Raises:
        DataError: names the file, the line or row, and the field at fault.
    """
    rows = islice(read_rows(general.text), general.limit)
    texts = [row.text(general.field) for row in rows]
    if not texts:
        raise DataError(
            f"{source_name(general.text)}: holds no rows; evaluate.general.text needs at least one."
        )
    return texts


def _from_template(data: DataSection) -> Callable[[Row], Example]:
    constants, template = data.constants, data.prompt_template
    inputs, target = placeholders(template, constants), TARGETS[data.task]
    paths = {name: data.fields.get(name, name) for name in data.row_fields}

    def to_example(row: Row) -> Example:
        texts = {name: row.text(paths[name]) for name in inputs}
        answer = (
            _label(row, paths[target], data.labels)
            if data.task == "classification" and data.labels
            else row.text(paths[target])
        )
        return Example(template.format_map(constants | texts), answer, row.place)

    return to_example


def _label(row: Row, path: str, labels: tuple[str, ...]) -> str:
    """The label's name; whole numbers (in CSV files, digits) count from 0."""
    value = row.value(path)
    if isinstance(value, str):
        if value in labels:
            return value
        value = int(value) if value.isdecimal() else value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
        return labels[value]
    raise DataError(
        f"{row.place}: field {path!r} is {shown(value)}, not one of the labels {', '.join(labels)} "
        f"or their numbers 0..{len(labels) - 1}."
    )


_ROLES = ("system", "user", "assistant")


def _from_messages(data: DataSection) -> Callable[[Row], Example]:
    path = data.fields.get(MESSAGES, MESSAGES)

    def to_example(row: Row) -> Example:
        where = f"{row.place}: field {path!r}"
        turns = row.value(path)
        if not isinstance(turns, list) or len(turns) < 2:
            raise DataError(
                f"{where} must be a list of two or more messages, found {shown(turns)}."
            )
        messages = tuple(
            _message(turn, f"{where}, message {number}") for number, turn in enumerate(turns, 1)
        )
        if messages[-1].role != "assistant":
            raise DataError(
                f"{where}: the last message is the target and must be the assistant's, found role "
                f"{messages[-1].role!r}."
            )
        return Example(messages[:-1], messages[-1].content, row.place)

    return to_example


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
        raise DataError(f"{where} must have a role and a content, found {shown(turn)}.")
    if turn["role"] not in _ROLES:
        raise DataError(f"{where}: role is {turn['role']!r}; choose one of {', '.join(_ROLES)}.")
    return Message(turn["role"], checked_text(turn["content"], f"{where}: content"))
