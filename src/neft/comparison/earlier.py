"""What an earlier comparison, or something else, left in the output folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from neft.comparison.schema import Comparison
from neft.errors import RecipeError, UsageError
from neft.pipeline.run import COMPARISON, another_recipe
from neft.pipeline.store import RECORD, differing
from neft.recipe import checked, read_fields

# Tables hold whatever rows, seeds and tasks a comparison has, so more or fewer make no other comparison;
# nor do the rates that a row may try, or what is looked at afterwards.
_SHARED = ("model", "data", "warmup", "score", "train", "evaluate")
_MAY_CHANGE = ("name", "learning_rates", "rate_of", "tasks", "analysis")


def check_earlier(output: Path, comparison: Comparison, *, overwrite: bool) -> None:
    """Refuse an output folder whose tables a comparison would replace by those of other settings.

    Args:
        output: the folder.
        comparison: what is to be compared.
        overwrite: let them be replaced.

    Raises:
        UsageError: names the settings that differ; or the folder is that of a run.
    """
    if (output / "prepare" / RECORD).is_file():
        raise UsageError(
            f"{output}: holds a run (it has a prepare/{RECORD}), which a comparison would be mixed up "
            "with. Choose another output folder."
        )
    file = output / COMPARISON
    if overwrite or not file.is_file():
        return
    try:
        there = checked(Comparison, read_fields(file), str(file))
    except RecipeError as error:
        raise UsageError(
            f"{error}\nChoose another output folder, or replace the results in this one with --overwrite."
        ) from error
    tasks = there.tasks.keys() & comparison.tasks.keys()
    rows = {entry.name for entry in there.methods} & {entry.name for entry in comparison.methods}
    settings = (_settings(one, tasks, rows) for one in (there, comparison))
    if reasons := list(differing(*settings)):
        raise another_recipe([output], reasons)


def _settings(
    comparison: Comparison, tasks: Collection[str], rows: Collection[str]
) -> dict[str, Any]:
    """Place -> value of what determines the results of some tasks and rows."""
    fields = comparison.model_dump(mode="json")
    sections = {name: fields[name] for name in _SHARED}
    sections |= {f"tasks.{name}": fields["tasks"][name] for name in tasks}
    for entry in fields["methods"]:
        if entry["name"] in rows:
            fixed = {key: value for key, value in entry.items() if key not in _MAY_CHANGE}
            sections[f"method {entry['name']!r}"] = fixed
    return {place: value for name in sections for place, value in _leaves(name, sections[name])}


def _leaves(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield place, value
        return
    for key, inner in value.items():
        yield from _leaves(f"{place}.{key}", inner)
