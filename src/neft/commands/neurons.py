"""``neft neurons``: neuron sets as a library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from neft.commands.analyze import overlap
from neft.commands.shared import AsJson, check_output, guarded, print_json

app = typer.Typer(help="Combine, compare, show and convert neuron sets.", no_args_is_help=True)

_Set = Annotated[
    Path, typer.Argument(metavar="SET", help="A neuron set or an adapter.", show_default=False)
]

_OPERATIONS = {
    "union": "Neurons that are in any of the sets (NeFT_Union).",
    "intersect": "Neurons that are in all of the sets.",
    "subtract": "Neurons of the first set that are in none of the others.",
}
"""Command -> its help."""


def _add_operations() -> None:
    for name, text in _OPERATIONS.items():
        _add_operation(name, text)


def _add_operation(name: str, text: str) -> None:
    """Add a command that makes one set of several."""

    def combine(
        sets: Annotated[
            list[Path],
            typer.Argument(
                help="Two or more of one model: neuron sets, adapters.", show_default=False
            ),
        ],
        output: Annotated[Path, typer.Option("--output", "-o", help="A .json file.")] = Path(
            "neurons.json"
        ),
    ) -> None:
        from neft.console import show_info
        from neft.pipeline import neuron_sets

        check_output(output, (".json",), sets)
        result = neuron_sets.combine(name, sets)
        result.save(output)
        sizes = {str(path): len(neuron_sets.load_neurons(path)) for path in sets}
        show_info({"written": str(output), "num_neurons": len(result), "of": sizes})

    app.command(name, help=text)(guarded(combine))


_add_operations()
app.command()(overlap)


@app.command()
@guarded
def show(neurons: _Set, as_json: AsJson = False) -> None:
    """Counts by layer and projection, where the set comes from, and its first indices.

    With --json all indices.
    """
    from neft.console import show_info
    from neft.pipeline.info import describe_indices, describe_neurons
    from neft.pipeline.neuron_sets import load_neurons

    chosen = load_neurons(neurons)
    described = {"path": str(neurons)} | describe_neurons(chosen)
    if as_json:
        print_json(described | {"indices": {m: i.tolist() for m, i in chosen.items()}})
    else:
        show_info(described | {"neurons": describe_indices(chosen)})


@app.command()
@guarded
def convert(
    neurons: Annotated[
        Path,
        typer.Argument(
            metavar="SET",
            help="A neuron set, an adapter, the JSON of the paper's research code, or a .csv table.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write.", show_default=False)
    ],
    to: Annotated[
        Literal["neft", "authors", "csv"] | None,
        typer.Option(
            help="Format: this package's, the research code's JSON, or a row a neuron. Default: neft "
            "for .json, csv for .csv."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id that the neurons are of, for the research code's JSON and .csv."
        ),
    ] = None,
) -> None:
    """Write a neuron set in another format."""
    from neft.console import show_info
    from neft.pipeline.neuron_formats import output_format, read_neurons, write_neurons

    check_output(output, (".json", ".csv", ".txt"), [neurons])
    wanted = output_format(output, to)
    chosen = read_neurons(neurons, model)
    write_neurons(chosen, output, wanted)
    show_info({"written": str(output), "format": wanted, "num_neurons": len(chosen)})
