"""What all commands share: their options, and errors as one message and an exit code."""

from __future__ import annotations

import functools
import json
import logging
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from neft import processes
from neft.errors import NeftError, UsageError
from neft.files import check_folder

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


def guarded(function: Callable[Given, None], *, trains: bool = False) -> Callable[Given, None]:
    """A command whose errors become one message and an exit code.

    Args:
        function: does it.
        trains: whether several processes can share its work.
    """
    launched = _by_all if trains else _by_one

    @functools.wraps(function)
    def guarded(*args: Given.args, **kwargs: Given.kwargs) -> None:
        try:
            launched(functools.partial(function, *args, **kwargs))
        except BrokenPipeError:
            raise  # whoever read our output has seen enough; typer ends quietly
        except (Exception, KeyboardInterrupt) as error:
            raise typer.Exit(_reported(error)) from error

    return guarded


def _by_one(command: Callable[[], None]) -> None:
    """Run a command that is for one process."""
    if (num_processes := processes.num_processes()) == 1:
        command()
    elif processes.is_first():
        raise UsageError(
            f"This command is for one process, and {num_processes} were started. Several can share neft "
            "run, neft train and neft score."
        )


def _by_all(command: Callable[[], None]) -> None:
    """Run a command in the first process of a launch; the others join in its training."""
    if processes.num_processes() == 1:
        processes.leave_launcher()
        command()
        return
    from neft.console import complain
    from neft.pipeline.together import follow, led

    if processes.is_first():
        with led():
            command()
    else:
        if not log.isEnabledFor(logging.DEBUG):
            # What it would tell, the first process tells too.
            log.setLevel(logging.ERROR)
        follow(complain)


def _reported(error: BaseException) -> int:
    """Tell about an error; returns the exit code."""
    from neft.console import complain

    if log.isEnabledFor(logging.DEBUG):
        traceback.print_exception(error)
    match error:
        case typer.Exit():
            return error.exit_code
        case KeyboardInterrupt() if not processes.is_first():
            return 130
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


def check_output(path: Path, suffixes: Sequence[str], inputs: Iterable[str | Path]) -> None:
    """Refuse a file that cannot be written, or must not be, before any work is done for it.

    Args:
        path: the file; one that is there already is replaced.
        suffixes: those that such a file may have.
        inputs: what the command reads: files, or folders of which every file counts.

    Raises:
        UsageError: another suffix, a folder, an input, or a place where nothing can be written.
    """
    if path.suffix not in suffixes:
        raise UsageError(f"{path}: the output should end in {' or '.join(suffixes)}.")
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name a file in it with --output.")
    for given in inputs:
        if path.exists() and _is_part(path, Path(given).expanduser()):
            raise UsageError(
                f"{path}: belongs to what this command reads ({given}), and would be replaced. Choose "
                "another output."
            )
    check_folder(path.parent)


def _is_part(file: Path, given: Path) -> bool:
    """Whether ``file`` is ``given``, or lies in that folder."""
    if given.is_dir():
        folder = file.parent.resolve()
        return given.resolve() in (folder, *folder.parents)
    return given.exists() and file.samefile(given)


def check_settings(settings: Sequence[str] | None, recipe: Path | None) -> None:
    """Refuse settings of a recipe that is not there.

    Raises:
        UsageError: ``--set`` without ``--recipe``.
    """
    if settings and recipe is None:
        raise UsageError(
            f"--set {settings[0]}: replaces a setting of a recipe; name that with --recipe."
        )


def print_json(value: Any) -> None:
    """A result for machines, on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
