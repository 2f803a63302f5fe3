"""What all commands share: their options, and errors as one message and an exit code."""

from __future__ import annotations

import functools
import json
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from neft.errors import NeftError

log = logging.getLogger("neft")
"""Every message of this package goes here."""

Given = ParamSpec("Given")
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting of the recipe; repeatable."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what another recipe left in the output folder.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A YAML file.", show_default=False)
]


def guarded(function: Callable[Given, None]) -> Callable[Given, None]:
    """A command whose errors become one message and an exit code."""

    @functools.wraps(function)
    def guarded(*args: Given.args, **kwargs: Given.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except BrokenPipeError:
            raise  # whoever read our output has seen enough; typer ends quietly
        except (Exception, KeyboardInterrupt) as error:
            raise typer.Exit(_reported(error)) from error

    return guarded


def _reported(error: BaseException) -> int:
    """Tell about an error; returns the exit code."""
    from neft.console import complain

    if log.isEnabledFor(logging.DEBUG):
        traceback.print_exception(error)
    match error:
        case typer.Exit():
            return error.exit_code
        case KeyboardInterrupt():
            complain("interrupted. The same command goes on where it stopped.")
            return 130
        case NeftError():
            complain(str(error))
            return error.exit_code
        case OSError(filename=str(name), strerror=str(reason)):
            complain(f"{name}: {reason}.")
            return 1
        case _:
            complain(
                f"unexpected {type(error).__name__}: {error}\n"
                "Run the command again with --debug to see where it comes from."
            )
            return 1


def print_json(value: Any) -> None:
    """A result for machines, on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
