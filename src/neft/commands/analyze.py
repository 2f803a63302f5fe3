"""``neft analyze``: what training did to the neurons of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neft.commands.shared import AsJson, check_output, guarded, print_json
from neft.errors import UsageError

app = typer.Typer(help="Look at what training did to the neurons of a run.", no_args_is_help=True)

_INSPECTIONS = {
    "utilization": (
        "How much each layer's neurons resemble what the model holds, before and after training.\n\n"
        "Pearson correlation of neuron vectors with mean hidden states (paper, section 6)."
    ),
    "ranks": (
        "Which neurons rose and fell in the order of utilization.\n\n"
        "Average rank change, affected neurons and percentiles (the paper's Figures 3 and 6)."
    ),
    "activity": (
        "Which feed-forward units are at work more or less than before.\n\n"
        "Activations on the test split's texts, before and after training."
    ),
    "lens": (
        "Which tokens out neurons promote and suppress, before and after training.\n\n"
        "The logit lens: vectors through the unembedding; those that moved most come first."
    ),
    "causal": (
        "What the loss is with groups of trained neurons put back to what they were.\n\n"
        "On the development split, and on general text if the recipe names one."
    ),
}
"""Command -> its help."""


def _add_inspections() -> None:
    for name, text in _INSPECTIONS.items():
        _add_inspection(name, text)


def _add_inspection(name: str, text: str) -> None:
    """Add a command that analyses a finished run and shows one part of what was found."""

    def inspect(
        run: Annotated[
            Path, typer.Argument(help="The output folder of a finished run.", show_default=False)
        ],
        limit: Annotated[int, typer.Option(min=1, help="Rows of long tables.")] = 20,
        as_json: AsJson = False,
    ) -> None:
        from neft.console import say, show_info
        from neft.pipeline.inspection import INSPECTIONS
        from neft.pipeline.run import analyze

        found = INSPECTIONS[name](analyze(run, say=say), limit)
        if as_json:
            print_json(found)
        else:
            show_info(found)

    app.command(name, help=text)(guarded(inspect))


_add_inspections()


@app.command()
@guarded
def overlap(
    selections: Annotated[
        list[Path],
        typer.Argument(help="Two or more: neuron sets, scores, adapters.", show_default=False),
    ],
    percent: Annotated[
        list[float] | None,
        typer.Option(help="Budget at which scores are selected; repeatable. Default: 3, 6, 9, 12."),
    ] = None,
    by_layer: Annotated[bool, typer.Option("--by-layer", help="A row a layer besides.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a .csv or .parquet file too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How far choices of neurons agree, beside what chance would give (the paper's Table 5)."""
    from neft.analysis.overlap import overlap_table
    from neft.console import show_overlap
    from neft.neurons import NeuronScores
    from neft.pipeline.selection import load_selection

    if output is not None:
        check_output(output, (".csv", ".parquet"), selections)
        if output.suffix == ".csv":  # beside which a .json file says what it was computed from
            check_output(output.with_suffix(".json"), (".json",), selections)
    if twice := [path for path in selections if selections.count(path) > 1]:
        raise UsageError(f"{twice[0]}: is given twice; compare it with another.")
    chosen = {str(path): load_selection(path) for path in selections}
    with_scores = any(isinstance(found, NeuronScores) for found in chosen.values())
    if percent and not with_scores:
        raise UsageError(
            f"--percent {percent[0]:g}: is a budget for scores; sets are taken as they are."
        )
    table = overlap_table(
        chosen, percent or ((3, 6, 9, 12) if with_scores else ()), by_layer=by_layer
    )
    if output is not None:
        table.save(output)
    if as_json:
        print_json(table.rows())
    else:
        show_overlap(table.rows(), selections)
