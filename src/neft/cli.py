"""The command line: parse, call, print."""

from __future__ import annotations

import functools
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec

import typer

from neft.errors import NeftError

app = typer.Typer(
    name="neft",
    help="Neuron-level fine-tuning of language models: find the neurons that a task moves, and train "
    "only those.",
    epilog="Exit codes: 0 done, 1 the run failed, 2 wrong use or recipe, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

analyses = typer.Typer(
    help="Look at what training did to the neurons of a run.", no_args_is_help=True
)
app.add_typer(analyses, name="analyze")

_log = logging.getLogger("neft")

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


def main() -> None:
    """The entry point of the command ``neft``."""
    arguments = sys.argv[1:]
    if "--debug" in arguments:
        # It belongs to neft and not to a command, but is wanted at the end of a line that failed.
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    app(arguments, prog_name="neft")


def _command(function: Callable[Given, None]) -> Callable[Given, None]:
    """A command whose errors become one message and an exit code."""
    return app.command()(_guarded(function))


def _guarded(function: Callable[Given, None]) -> Callable[Given, None]:

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

    if _log.isEnabledFor(logging.DEBUG):
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


def _print_version(wanted: bool) -> None:
    if wanted:
        from neft import __version__

        typer.echo(f"neft {__version__}")
        raise typer.Exit


@app.callback()
def _configure(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and the warnings of libraries.")
    ] = False,
    version: Annotated[  # noqa: ARG001  (its callback does it)
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _log.handlers = [handler]
    _log.setLevel(logging.DEBUG if debug else logging.INFO)
    if not debug:
        # What one library tells the authors of another is no business of a user's.
        warnings.simplefilter("ignore", FutureWarning)


@_command
def run(recipe: RecipeFile, settings: Settings = None, overwrite: Overwrite = False) -> None:
    """Find neurons, train them and evaluate: all that a recipe says.

    What is done already is skipped; a run that was interrupted goes on where it stopped.
    """
    from neft.console import say, show_results
    from neft.pipeline import run
    from neft.recipe import load_recipe

    loaded = load_recipe(recipe, settings or ())
    show_results(run.run(loaded, overwrite=overwrite, say=say), Path(loaded.output))


@_command
def compare(
    recipe: RecipeFile,
    settings: Settings = None,
    jobs: Annotated[
        int,
        typer.Option(min=1, help="Cells at a time: one a GPU, or sharing the cores."),
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the cells and what each trains; run nothing.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what failed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods: tune each by the same rule, evaluate, and write tables and figures.

    What is done already is skipped; a comparison that was interrupted goes on where it stopped.
    """
    from neft.comparison.schema import load_comparison

    loaded = load_comparison(recipe, settings or ())
    if dry_run:
        from neft.comparison.outline import outline
        from neft.console import show_outline

        outlines = outline(loaded)
        if as_json:
            _print_json([asdict(row) for row in outlines])
        else:
            show_outline(outlines)
        return
    from neft.comparison.results import plain
    from neft.comparison.run import compare
    from neft.console import say, show_comparison

    compared = compare(loaded, num_jobs=jobs, retry=retry, say=say)
    if as_json:
        _print_json({"tasks": plain(compared.results), "failures": compared.failures})
    else:
        show_comparison(compared)
    if compared.failures:
        raise typer.Exit(1)


@_command
def validate(
    recipes: Annotated[
        list[Path],
        typer.Argument(help="YAML files, or folders of them.", show_default=False),
    ],
) -> None:
    """Check that recipes fit the schema; looks at no data and no model."""
    from neft.comparison.schema import is_comparison, load_comparison
    from neft.recipe import find_recipes, load_recipe, read_fields

    for recipe in find_recipes(recipes):
        load = load_comparison if is_comparison(read_fields(recipe)) else load_recipe
        load(recipe)
        typer.echo(f"{recipe}: fits")


@_command
def status(
    run: Annotated[
        Path,
        typer.Argument(help="The output folder of a run or comparison.", show_default=False),
    ],
    as_json: AsJson = False,
) -> None:
    """Show how far a run or a comparison has got."""
    from neft.comparison.results import plain
    from neft.comparison.status import is_comparison_folder, read_comparison_status
    from neft.console import show_comparison_status, show_status
    from neft.pipeline.status import read_status

    if is_comparison_folder(run):
        rows = read_comparison_status(run)
        if as_json:
            _print_json(plain(rows))
        else:
            show_comparison_status(rows)
        return
    stages = read_status(run)
    if as_json:
        _print_json([asdict(stage) for stage in stages])
    else:
        show_status(stages)


@_command
def score(
    before: Annotated[
        str, typer.Argument(help="The original checkpoint: a folder or Hub id.", show_default=False)
    ],
    after: Annotated[str, typer.Argument(help="The same after fine-tuning.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("scores.safetensors"),
    modules: Annotated[
        list[str] | None,
        typer.Option(
            help="A role (up, gate, down, q, k, v, o), module name or pattern; repeatable. "
            "[default: up, down]"
        ),
    ] = None,
) -> None:
    """Measure how far each neuron moved between two checkpoints."""
    from neft.console import show_info
    from neft.pipeline.info import describe_scores
    from neft.scoring import score_neurons

    scores = score_neurons(before, after, modules=modules)
    scores.save(output)
    show_info({"written": str(output)} | describe_scores(scores))


@_command
def select(
    scores: Annotated[Path, typer.Argument(help="What neft score wrote.", show_default=False)],
    percent: Annotated[
        float | None, typer.Option(help="Budget in percent of all parameters of the model.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Budget in neurons.")] = None,
    which: Annotated[
        Literal["lowest", "highest", "random"],
        typer.Option(help="By cosine; lowest are those that moved most."),
    ] = "lowest",
    seed: Annotated[int, typer.Option(help="For random.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("neurons.json"),
) -> None:
    """Choose neurons by their scores."""
    from neft.console import show_info
    from neft.neurons import NeuronScores
    from neft.pipeline.info import describe_neurons

    neurons = NeuronScores.load(scores).select(percent=percent, count=count, which=which, seed=seed)
    neurons.save(output)
    show_info({"written": str(output)} | describe_neurons(neurons))


@_command
def train(
    recipe: RecipeFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder.", show_default=False)],
    neurons: Annotated[
        Path | None, typer.Option(help="What neft select wrote; for methods that need neurons.")
    ] = None,
    settings: Settings = None,
    overwrite: Overwrite = False,
) -> None:
    """Train with given neurons: the data, model and train sections of a recipe."""
    from neft.console import say
    from neft.pipeline import run
    from neft.recipe import load_recipe

    loaded = load_recipe(recipe, settings or ())
    typer.echo(run.train(loaded, neurons, output, overwrite=overwrite, say=say))


@_command
def evaluate(
    recipe: RecipeFile,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="A folder, for predictions and scores.", show_default=False
        ),
    ],
    adapter: Annotated[Path | None, typer.Option(help="Put this adapter on the model.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Another model than the recipe's, e.g. a merged one.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Another test file than the recipe's.")] = None,
    settings: Settings = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Generate on the test split of a recipe, and score that."""
    from neft.console import say, show_evaluation
    from neft.pipeline import run
    from neft.recipe import load_recipe

    replaced = {"model.path": model, "data.test": data}
    given = [f"{key}={json.dumps(value)}" for key, value in replaced.items() if value is not None]
    loaded = load_recipe(recipe, [*(settings or ()), *given])
    evaluation = run.evaluate(loaded, adapter, output, overwrite=overwrite, say=say)
    if as_json:
        _print_json(asdict(evaluation))
    else:
        show_evaluation(evaluation, output)


@_command
def merge(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder.", show_default=False)],
    base: Annotated[
        str | None, typer.Option(help="The base model. [default: the one the adapter names]")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of the merged weights; auto is the base's own."),
    ] = "auto",
) -> None:
    """Write adapter and base model as one plain checkpoint."""
    from neft.pipeline.adapter import merge_adapter

    merge_adapter(adapter, output, base, dtype)
    typer.echo(output)


@_command
def info(
    path: Annotated[
        Path,
        typer.Argument(help="An adapter folder, a neuron set or scores.", show_default=False),
    ],
    as_json: AsJson = False,
) -> None:
    """Show what is in an adapter, a neuron set or scores."""
    from neft.console import show_info
    from neft.pipeline.info import describe

    described = describe(path)
    if as_json:
        _print_json(described)
    else:
        show_info({"path": str(path)} | described)


def _inspection(name: str, summary: str, description: str) -> None:
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
            _print_json(found)
        else:
            show_info(found)

    inspect.__doc__ = f"{summary}\n\n{description}"
    analyses.command(name)(_guarded(inspect))


for _name, _summary, _description in (
    (
        "utilization",
        "How much each layer's neurons resemble what the model holds, before and after training.",
        "Pearson correlation of neuron vectors with mean hidden states (paper, section 6).",
    ),
    (
        "ranks",
        "Which neurons rose and fell in the order of utilization.",
        "Average rank change, affected neurons and percentiles (the paper's Figures 3 and 6).",
    ),
    (
        "activity",
        "Which feed-forward units are at work more or less than before.",
        "Activations on the test split's texts, before and after training.",
    ),
    (
        "lens",
        "Which tokens out neurons promote and suppress, before and after training.",
        "The logit lens: vectors through the unembedding; those that moved most come first.",
    ),
    (
        "causal",
        "What the loss is with groups of trained neurons put back to what they were.",
        "On the development split, and on general text if the recipe names one.",
    ),
):
    _inspection(_name, _summary, _description)


@analyses.command()
@_guarded
def overlap(
    selections: Annotated[
        list[Path],
        typer.Argument(help="Two or more: neuron sets, scores, adapters.", show_default=False),
    ],
    percent: Annotated[
        list[float] | None,
        typer.Option(
            help="Budget at which scores are selected; repeatable. [default: 3, 6, 9, 12]"
        ),
    ] = None,
    by_layer: Annotated[bool, typer.Option("--by-layer", help="A row a layer besides.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a .csv or .parquet file too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How far choices of neurons agree, beside what chance would give (the paper's Table 5)."""
    from neft.analysis.overlap import overlap_table
    from neft.console import show_info
    from neft.neurons import NeuronScores
    from neft.pipeline.selection import load_selection

    chosen = {str(path): load_selection(path) for path in selections}
    with_scores = any(isinstance(found, NeuronScores) for found in chosen.values())
    table = overlap_table(
        chosen, percent or ((3, 6, 9, 12) if with_scores else ()), by_layer=by_layer
    )
    if output is not None:
        table.save(output)
    if as_json:
        _print_json(table.rows())
    else:
        show_info({"overlap": table.rows()})


@_command
def report(
    run: Annotated[
        Path,
        typer.Argument(help="The output folder of a run or comparison.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about a run or a comparison."""
    from neft.files import write_text
    from neft.report.page import render_report
    from neft.report.run_data import read_run

    write_text(output, render_report(read_run(run)))
    typer.echo(output)


@_command
def plot(
    name: Annotated[str, typer.Argument(help="A figure; any other name lists them.")],
    run: Annotated[Path, typer.Argument(help="The output folder of a run.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Path without suffix. [default: NAME]"),
    ] = None,
) -> None:
    """Draw one figure of a run as PNG and SVG."""
    from neft.report.plots import save_plot
    from neft.report.run_data import read_run

    for file in save_plot(read_run(run), name, output or Path(name)):
        typer.echo(file)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
