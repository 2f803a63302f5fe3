"""From rows to examples: a prompt, and the target that answers it."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, TypeAlias

from neft.errors import DataError
from neft.recipe import DataSection, DataSource, GeneralSection, HubData
from neft.sft.rows import Row, checked_text, read_rows, shown, source_name

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


_TEMPLATES = {
    # The paper's prompts (section 4.1).
    "translation": "Translate the following text from {source_language} to {target_language}. {source}",
    "summarization": (
        "Given the below {source_language} article, generate a summary in {target_language}.\n"
        "Article: {document}"
    ),
    "classification": (
        "Premise: {premise}\nHypothesis: {hypothesis}\n"
        "How does the hypothesis relate to the premise? Answer with one of: {labels}."
    ),
}
_TARGETS = {
    "translation": "target",
    "summarization": "summary",
    "classification": "label",
    "prompt": "target",
}


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
    constants = _constants(data)
    template = data.template or _default_template(data)
    placeholders = _placeholders(template)
    target = _TARGETS[data.task]
    inputs = [name for name in placeholders if name not in constants]
    paths = _paths(data, [*inputs, target])

    def to_example(row: Row) -> Example:
        texts = {name: row.text(paths[name]) for name in inputs}
        answer = (
            _label(row, paths[target], data.labels)
            if data.task == "classification" and data.labels
            else row.text(paths[target])
        )
        return Example(template.format_map(constants | texts), answer, row.place)

    return to_example


def _default_template(data: DataSection) -> str:
    template = _TEMPLATES[data.task]
    if data.source_language is None:
        template = template.replace("{source_language} ", "")
    return template


def _constants(data: DataSection) -> dict[str, str]:
    """What a template may name beside the fields of a row."""
    values = {
        "source_language": data.source_language,
        "target_language": data.target_language,
        "labels": ", ".join(data.labels) if data.labels else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _placeholders(template: str) -> list[str]:
    """Distinct names of the ``{placeholders}`` of a template, in order."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"data.template: {error}. A literal brace is written twice.") from error
    names: dict[str, None] = {}
    for _, name, format_spec, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or format_spec or conversion:
            raise DataError(
                f"data.template: {{{name}}} is not a plain placeholder such as {{source}}. A literal "
                "brace is written twice."
            )
        names[name] = None
    return list(names)


def _paths(data: DataSection, names: Iterable[str]) -> dict[str, str]:
    """Field name -> where it lies in a row."""
    known = list(dict.fromkeys(names))
    for name in data.fields:
        if name not in known:
            raise DataError(
                f"fields: {name!r} is not a field of this task; it has {', '.join(known)}."
            )
    return {name: data.fields.get(name, name) for name in known}


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
    path = _paths(data, ["messages"])["messages"]

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
