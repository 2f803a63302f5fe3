"""The command line: parse, call, print."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from neft.commands import analyze, neurons
from neft.commands.shared import (
    AsJson,
    Given,
    Overwrite,
    RecipeFile,
    Settings,
    check_output,
    check_settings,
    guarded,
    log,
    print_json,
)
from neft.errors import RecipeError, UsageError
from neft.libraries import silence_libraries
from neft.report.plot_names import DESCRIPTIONS

app = typer.Typer(
    name="neft",
    help="Neuron-level fine-tuning of language models: find the neurons that a task moves, and train "
    "only those.",
    epilog="Exit codes: 0 done, 1 the run failed, 2 wrong use or recipe, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Finding = Literal["cosine", "full", "lora", "gradient", "activation", "norm", "probe"]
Modules = Annotated[
    list[str] | None,
    typer.Option(
        help="A role (up, gate, down, q, k, v, o), module name or pattern; repeatable. "
        "Default: up, down."
    ),
]

app.add_typer(analyze.app, name="analyze")
app.add_typer(neurons.app, name="neurons")


def main() -> None:
    """The entry point of the command ``neft``."""
    arguments = sys.argv[1:]
    if "--debug" in arguments:
        # It belongs to neft and not to a command, but is wanted at the end of a line that failed.
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    app(arguments, prog_name="neft")


def _command(function: Callable[Given, None]) -> Callable[Given, None]:
    return app.command()(guarded(function))


def _training_command(function: Callable[Given, None]) -> Callable[Given, None]:
    return app.command()(guarded(function, trains=True))


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
    log.handlers = [handler]
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    if not debug:
        silence_libraries()


@_training_command
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
    overwrite: Overwrite = False,
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
            print_json([asdict(row) for row in outlines])
        else:
            show_outline(outlines)
        return
    from neft.comparison.results import plain
    from neft.comparison.run import compare
    from neft.console import say, show_comparison

    compared = compare(loaded, num_jobs=jobs, retry=retry, overwrite=overwrite, say=say)
    if as_json:
        print_json({"tasks": plain(compared.results), "failures": compared.failures})
    else:
        show_comparison(compared)
    if compared.failures:
        raise typer.Exit(1)


@_command
def estimate(
    recipe: RecipeFile,
    settings: Settings = None,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Take a few training steps, where weights and data are here: seconds a step, and the "
            "memory beside its estimate. Default: for a single run.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run or a comparison will take, stage by stage: memory, disk, seconds a step.

    Trains nothing that is kept; without calibration, no weights are read.
    """
    from neft.comparison.schema import is_comparison, load_comparison
    from neft.recipe import load_recipe, read_fields

    if is_comparison(read_fields(recipe, settings or ())):
        from neft.comparison.estimate import estimate_rows
        from neft.console import show_row_estimates

        rows = estimate_rows(load_comparison(recipe, settings or ()), calibrate=bool(calibrate))
        if as_json:
            print_json([asdict(row) for row in rows])
        else:
            show_row_estimates(rows)
        return
    from neft.console import show_estimates
    from neft.pipeline.estimate import estimate

    stages = estimate(load_recipe(recipe, settings or ()), calibrate=calibrate is not False)
    if as_json:
        print_json([asdict(stage) for stage in stages])
    else:
        show_estimates(stages)


@_command
def validate(
    recipes: Annotated[
        list[Path],
        typer.Argument(help="YAML files, or folders of them.", show_default=False),
    ],
    settings: Settings = None,
) -> None:
    """Check that recipes fit the schema; looks at no data and no model."""
    from neft.comparison.schema import is_comparison, load_comparison
    from neft.recipe import find_recipes, load_recipe, read_fields

    faults: list[str] = []
    for recipe in find_recipes(recipes):
        try:
            load = load_comparison if is_comparison(read_fields(recipe)) else load_recipe
            load(recipe, settings or ())
        except RecipeError as error:
            faults.append(str(error))
        else:
            typer.echo(f"{recipe}: fits")
    if faults:
        raise RecipeError("\n".join(faults))


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
            print_json(plain(rows))
        else:
            show_comparison_status(rows)
        return
    stages = read_status(run)
    if as_json:
        print_json([asdict(stage) for stage in stages])
    else:
        show_status(stages)


@_training_command
def score(
    before: Annotated[
        str | None, typer.Argument(help="The original checkpoint: a folder or Hub id.")
    ] = None,
    after: Annotated[str | None, typer.Argument(help="The same after fine-tuning.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .safetensors file.")] = Path(
        "scores.safetensors"
    ),
    method: Annotated[
        Finding | None,
        typer.Option(help="See above. Default: cosine, or what the recipe says."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Find the neurons of this recipe: its model and data.")
    ] = None,
    settings: Settings = None,
    modules: Modules = None,
) -> None:
    """Find neurons: score each by what a task did to it, or would do.

    Methods, and what they take, for checkpoints that are there:

    - cosine: how far AFTER turned from BEFORE; a pair of matrices, seconds.

    - norm: the shortest first, of BEFORE alone; one matrix, seconds.

    And for a recipe (--recipe), on its model, data and warmup:

    - full: a short full fine-tune, then cosine; 16 bytes a parameter.

    - full, lean (--set warmup.optimizer=adafactor
    --set warmup.in_backward=true): 4 bytes a parameter, one gradient.

    - lora: a short LoRA run, merged, then cosine; what LoRA takes.

    - gradient: signs of gradients, no update; the model, 1 byte a weight.

    - activation: forward passes alone; the model, a third of the time.

    - probe: classifiers of hidden states, for labelled texts; as activation.
    """
    from neft.console import say, show_info
    from neft.pipeline.finding import find, find_in_weights, with_method
    from neft.pipeline.info import describe_scores

    inputs = [given for given in (before, after, recipe) if given is not None]
    check_output(output, (".safetensors",), inputs)
    check_settings(settings, recipe)
    if recipe is None:
        scores = find_in_weights(before, after, method or "cosine", modules)
        scores.save(output)
    else:
        if before is not None:
            raise UsageError("--recipe names the model; for another, --set model.path=...")
        scores = find(with_method(recipe, settings or (), method, modules), output, say=say)
    show_info({"written": str(output)} | describe_scores(scores))


@_command
def select(
    scores: Annotated[Path, typer.Argument(help="What neft score wrote.", show_default=False)],
    percent: Annotated[
        float | None, typer.Option(help="Budget in percent of all parameters of the model.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Budget in neurons.")] = None,
    megabytes: Annotated[
        float | None, typer.Option(help="Budget by the size of the vectors in an adapter.")
    ] = None,
    which: Annotated[
        Literal["lowest", "highest", "random"],
        typer.Option(help="By cosine; lowest are those that moved most."),
    ] = "lowest",
    seed: Annotated[int | None, typer.Option(help="For random. Default: 0.")] = None,
    rule: Annotated[
        Literal["paper", "even", "floor", "units"],
        typer.Option(
            help="One ranking (paper); as many in each layer (even); a part of that, and the rest by the "
            "ranking (floor); up, gate and down neurons of a unit together (units)."
        ),
    ] = "paper",
    floor: Annotated[
        float | None,
        typer.Option(help="For the rule floor: percent of an even share. Default: 50."),
    ] = None,
    above_rounding: Annotated[
        bool,
        typer.Option(
            "--above-rounding",
            help="Leave out what moved no more than rounding to 16 bits moves it.",
        ),
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .json file.")] = Path(
        "neurons.json"
    ),
) -> None:
    """Choose neurons by their scores."""
    from neft.console import show_info
    from neft.neurons import NeuronScores
    from neft.pipeline.info import describe_neurons

    check_output(output, (".json",), [scores])
    if seed is not None and which != "random":
        raise UsageError(f"--seed {seed} is for --which random, not for {which}.")
    if floor is not None and rule != "floor":
        raise UsageError(f"--floor {floor:g} is for --rule floor, not for {rule}.")
    neurons = NeuronScores.load(scores).select(
        percent=percent,
        count=count,
        megabytes=megabytes,
        which=which,
        seed=0 if seed is None else seed,
        rule=rule,
        floor=50.0 if floor is None else floor,
        above_rounding=above_rounding,
    )
    neurons.save(output)
    show_info({"written": str(output)} | describe_neurons(neurons))


@_command
def extract(
    base: Annotated[
        str, typer.Argument(help="The original checkpoint: a folder or Hub id.", show_default=False)
    ],
    finetuned: Annotated[
        str, typer.Argument(help="The same after fine-tuning, of any kind.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder.", show_default=False)],
    percent: Annotated[
        float | None, typer.Option(help="Budget in percent of all parameters of the model.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Budget in neurons.")] = None,
    modules: Modules = None,
    scores: Annotated[
        Path | None, typer.Option(help="Choose by what neft score wrote, instead of scoring.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Evaluate base, fine-tuned model and adapter on a recipe's test split."),
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Turn a fine-tuned checkpoint into an adapter with its most changed neurons; trains nothing."""
    from neft.console import say, show_extraction
    from neft.pipeline.extract import extract
    from neft.recipe import load_recipe

    check_settings(settings, recipe)
    extraction = extract(
        base,
        finetuned,
        output,
        percent=percent,
        count=count,
        modules=modules,
        scores=scores,
        recipe=None if recipe is None else load_recipe(recipe, settings or ()),
        say=say,
    )
    if as_json:
        print_json(extraction.to_dict())
    else:
        show_extraction(extraction, output)


@_command
def diff(
    before: Annotated[
        str, typer.Argument(help="A checkpoint: a folder or Hub id.", show_default=False)
    ],
    after: Annotated[str, typer.Argument(help="Another of the same model.", show_default=False)],
    plot: Annotated[
        Path | None, typer.Option(help="Draw a map of layers and projections: a .png or .svg file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which layers and projections moved between two checkpoints."""
    from neft.analysis.diff import diff_table, summarized
    from neft.checkpoints import open_weights
    from neft.console import show_diff
    from neft.report.diff_figure import save_change_map

    if plot is not None:
        check_output(plot, (".png", ".svg"), (before, after))
    table = diff_table(open_weights(before), open_weights(after))
    if plot is not None:
        save_change_map(table, plot)
    if as_json:
        by = {f"by_{group}": summarized(table, group) for group in ("role", "layer")}
        print_json(dict(table.about) | by | {"weights": table.rows()})
    else:
        show_diff(table)


@_training_command
def train(
    recipe: RecipeFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder.", show_default=False)],
    neurons: Annotated[
        Path | None,
        typer.Option(help="A neuron set or an adapter; for methods that need neurons."),
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
        print_json(asdict(evaluation))
    else:
        show_evaluation(evaluation, output)


@_command
def merge(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder.", show_default=False)],
    base: Annotated[
        str | None, typer.Option(help="The base model. Default: the one the adapter names.")
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
        print_json(described)
    else:
        show_info({"path": str(path)} | described)


@_command
def report(
    run: Annotated[
        Path,
        typer.Argument(help="The output folder of a run or comparison.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="An .html file.")] = Path(
        "report.html"
    ),
) -> None:
    """Write one self-contained HTML page about a run or a comparison."""
    from neft.files import write_text
    from neft.report.page import render_report
    from neft.report.run_data import read_run

    check_output(output, (".html",), ())
    write_text(output, render_report(read_run(run)))
    typer.echo(output)


@_command
def plot(
    name: Annotated[
        str, typer.Argument(help=f"A figure: {', '.join(DESCRIPTIONS)}.", show_default=False)
    ],
    run: Annotated[Path, typer.Argument(help="The output folder of a run.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Path without suffix. Default: NAME."),
    ] = None,
) -> None:
    """Draw one figure of a run as PNG and SVG."""
    from neft.files import check_folder
    from neft.report.plots import save_plot
    from neft.report.run_data import read_run

    stem = output or Path(name)
    check_folder(stem.parent)
    for file in save_plot(read_run(run), name, stem):
        typer.echo(file)
