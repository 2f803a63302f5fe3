"""The prompts of tasks, and the fields that they take from a row."""

from __future__ import annotations

import string
from collections.abc import Collection

TEMPLATES = {
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
"""Task -> its prompt, where a recipe has none of its own."""
TARGETS = {
    "translation": "target",
    "summarization": "summary",
    "classification": "label",
    "prompt": "target",
}
"""Task -> the field with what is learnt; a chat has it among its messages."""
MESSAGES = "messages"
"""The one field of a chat."""


def placeholders(template: str, constants: Collection[str] = ()) -> list[str]:
    """Distinct names of the ``{placeholders}`` of a template but for ``constants``, in order.

    Raises:
        ValueError: a brace without its other, or more than a name between them.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}. A literal brace is written twice") from error
    names: dict[str, None] = {}
    for _, name, format_spec, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or format_spec or conversion:
            raise ValueError(
                f"{{{name}}} is not a plain placeholder such as {{source}}. A literal brace is written "
                "twice"
            )
        names[name] = None
    return [name for name in names if name not in constants]
