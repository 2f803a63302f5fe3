"""How things are shown: results as tables on stdout, what happens as lines on stderr.

Texts come from users and models, so none of them is read as markup; without a terminal there are
neither colours nor progress bars.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neft.evaluation import Score
from neft.pipeline.evaluate import PREDICTIONS, Evaluation
from neft.pipeline.results import Results
from neft.pipeline.run import duration
from neft.pipeline.status import StageStatus

if TYPE_CHECKING:
    from neft.analysis.table import Table as DiffTable
    from neft.comparison.estimate import RowEstimate
    from neft.comparison.outline import Outline
    from neft.comparison.publish import Compared
    from neft.comparison.results import RowResult
    from neft.comparison.status import RowStatus
    from neft.pipeline.estimate import StageEstimate
    from neft.pipeline.extract import Extraction

# Wide enough for a signature or a path; a terminal has its own width.
_WIDTH_OF_FILES = 120
# Characters of a text that are shown; the whole of it is in the predictions.
_EXCERPT = 400


def _stdout() -> Console:
    width = None if sys.stdout.isatty() else _WIDTH_OF_FILES
    return Console(width=width, highlight=False, markup=False, emoji=False)


def say(line: str) -> None:
    """One line on stderr: what happens."""
    Console(stderr=True, highlight=False, markup=False, emoji=False).print(line, soft_wrap=True)


def complain(message: str) -> None:
    """An error on stderr."""
    text = Text.assemble(("error: ", "bold red"), message)
    Console(stderr=True, highlight=False, emoji=False).print(text, soft_wrap=True)


def show_results(results: Results, run: Path) -> None:
    """The table of a run, three samples, and where the adapter is."""
    console = _stdout()
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{results.num_examples} test examples", title_justify="left"
    )
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column(_METHOD_TITLES[results.method], justify="right", style="bold")
    for metric, score in results.trained.items():
        table.add_row(metric, _with_interval(results.base[metric]), _with_interval(score))
    if results.base_general_loss is not None and results.trained_general_loss is not None:
        losses = results.base_general_loss, results.trained_general_loss
        table.add_row("loss on general text", *(f"{loss:.3f}" for loss in losses))
    table.add_section()
    table.add_row(
        "trained parameters",
        "-",
        f"{results.num_trainable:,} ({results.percent_trainable:.2f}%)",
    )
    table.add_row(
        "development loss", "-", f"{results.best_dev_loss:.4f} (step {results.best_step})"
    )
    table.add_row("training steps", "-", f"{results.num_steps}")
    table.add_row("time a step", "-", f"{results.seconds_per_step:.2f} s")
    if results.peak_memory_bytes is not None:
        table.add_row("peak memory of training", "-", size(results.peak_memory_bytes))
    table.add_row(f"size of the {Path(results.artifact).name}", "-", size(results.artifact_bytes))
    console.print(table)
    for metric, score in results.trained.items():
        console.print(f"{metric}: {score.signature}", soft_wrap=True)
    for sample in results.samples:
        console.print()
        console.print(
            _fields(
                {
                    "prompt": sample.prompt,
                    "reference": sample.reference,
                    "before": sample.base,
                    "after": sample.trained,
                }
            )
        )
    console.print()
    console.print(f"{Path(results.artifact).name}: {run / results.artifact}", soft_wrap=True)


def _with_interval(score: Score) -> str:
    if score.low is None or score.high is None:
        return f"{score.score:.1f}"
    return f"{score.score:.1f} [{score.low:.1f}, {score.high:.1f}]"


_METHOD_TITLES = {
    "neft": "NeFT",
    "full": "full fine-tuning",
    "embed": "embeddings only",
    "in_out": "up and down projections",
    "lora": "LoRA",
    "mask": "masked gradients",
}


def show_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """The scores of one model, and where its predictions are."""
    console = _stdout()
    for metric, score in evaluation.scores.items():
        console.print(f"{metric} {_with_interval(score)}  ({score.signature})", soft_wrap=True)
    console.print(
        f"{evaluation.num_examples} test examples; predictions: {folder / PREDICTIONS}",
        soft_wrap=True,
    )


def show_outline(outlines: Sequence[Outline]) -> None:
    """A table a task: rows, trained parameters, memory."""
    console = _stdout()
    for task in dict.fromkeys(outline.task for outline in outlines):
        rows = [outline for outline in outlines if outline.task == task]
        table = Table(box=box.SIMPLE_HEAD, title=task, title_justify="left")
        table.add_column("method")
        for title in ("trained", "", "%", "memory", "runs"):
            table.add_column(title, justify="right")
        table.add_column("rates")
        table.add_column("")
        for row in rows:
            table.add_row(
                row.name,
                f"{row.num_trainable:,}",
                f"{row.num_trainable / 1e6:.1f}M",
                f"{row.percent:.2f}",
                size(row.num_bytes),
                str(row.num_runs),
                ", ".join(f"{rate:g}" for rate in row.rates),
                row.note,
            )
        console.print(table)
    console.print(
        f"{len(outlines)} rows, {sum(outline.num_runs for outline in outlines)} training runs, more "
        "where a grid is widened. Memory: weights, gradients and optimizer states; activations come "
        "on top.",
        soft_wrap=True,
    )


def show_estimates(stages: Sequence[StageEstimate]) -> None:
    """One row a stage."""
    console = _stdout()
    console.print(_estimates({stage.stage: stage for stage in stages}))
    _show_notes(console, stages)


def show_row_estimates(rows: Sequence[RowEstimate]) -> None:
    """A table a task, one row a method; its warm-ups first."""
    console = _stdout()
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task]
        named = {
            f"warmup: {row.row}" if row.estimate.stage == "warmup" else row.row: row.estimate
            for row in of_task
        }
        console.print(_estimates(named, title=task))
    _show_notes(console, [row.estimate for row in rows])


def _estimates(stages: Mapping[str, StageEstimate], title: str | None = None) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        padding=0,
        pad_edge=False,
    )
    table.add_column("" if title is None else "row", no_wrap=True)
    rows = {name: _estimate_row(stage) for name, stage in stages.items()}
    columns = next(iter(rows.values()))
    # What no stage has, as nothing was measured, say, would only take room.
    told = [
        column
        for column in columns
        if column in _ALWAYS or any(row[column] != "-" for row in rows.values())
    ]
    for column in told:
        table.add_column(
            column,
            justify="left" if column == "method" else "right",
            style="bold" if column == "peak" else "",
            no_wrap=True,
        )
    for name, row in rows.items():
        table.add_row(name, *(row[column] for column in told))
    return table


_ALWAYS = ("s a\nstep",)


def _estimate_row(stage: StageEstimate) -> dict[str, str]:
    memory = stage.memory
    sizes = {
        "weights": memory.weights,
        "vectors": memory.vectors,
        "gra-\ndients": memory.gradients,
        "opti-\nmizer": memory.optimizer,
        "activa-\ntions": memory.activations + memory.loss,
        "pro-\ncess": stage.process_bytes + memory.kept_back,
        "peak": stage.peak_bytes,
        "mea-\nsured": stage.measured_peak_bytes,
        "disk": stage.disk_bytes,
    }
    trained, seconds = stage.num_trainable, stage.seconds_per_step
    return (
        {"method": stage.method, "trained": "-" if trained is None else f"{trained / 1e6:.1f}M"}
        | {name: _rounded(num_bytes) for name, num_bytes in sizes.items()}
        | {
            "steps": "-" if stage.num_steps is None else f"{stage.num_steps:,}",
            "s a\nstep": "-" if seconds is None else f"{seconds:.3g}",
        }
    )


def _rounded(num_bytes: int | None) -> str:
    """Bytes to three digits: an estimate has no more."""
    if not num_bytes:
        return "-"
    unit = max(unit for unit in _UNITS if num_bytes >= unit)
    return f"{float(f'{num_bytes / unit:.3g}'):g} {_UNITS[unit]}"


_UNITS = {1: "B", 10**3: "kB", 10**6: "MB", 10**9: "GB"}


def _show_notes(console: Console, stages: Sequence[StageEstimate]) -> None:
    console.print(
        "Peak: at the worst moment of the largest batch; gradients come as activations go. Activations "
        "include the loss; process is what Python and its libraries hold, and what was freed and not "
        "given back. Disk: while the stage runs, at most.",
        soft_wrap=True,
    )
    for assumed in dict.fromkeys(stage.assumed for stage in stages if stage.assumed):
        console.print(f"Assumed: {assumed}.", soft_wrap=True)
    for reason in dict.fromkeys(stage.not_timed for stage in stages if stage.not_timed):
        console.print(f"No seconds a step: {reason}.", soft_wrap=True)


def show_comparison(compared: Compared) -> None:
    """A table a task, and where the files are."""
    console = _stdout()
    for result in compared.results:
        metrics = list(result.base.scores)
        table = Table(
            box=box.SIMPLE_HEAD,
            title=f"{result.task}: {result.num_examples} test examples",
            title_justify="left",
        )
        table.add_column("")
        for title in ("trained", "rate", "dev loss", *metrics, "forgetting", "s a step"):
            table.add_column(title, justify="right")
        base = [f"{score.score:.1f}" for score in result.base.scores.values()]
        table.add_row("base model", "-", "-", "-", *base, "-", "-")
        for row in result.rows:
            table.add_row(*_comparison_row(row, metrics))
        console.print(table)
    for failure in compared.failures:
        complain(failure)
    if compared.failures:
        console.print("Rows that failed are tried again with --retry.")
    console.print(f"Tables: {compared.table}", soft_wrap=True)
    for figure in compared.figures:
        console.print(f"Figure: {figure}", soft_wrap=True)


def _comparison_row(row: RowResult, metrics: Sequence[str]) -> list[str | Text]:
    if not row.seeds or row.num_trainable is None:
        return [row.name, row.state, *["-"] * (len(metrics) + 4)]
    cells: list[str | Text] = [
        row.name if row.state == "done" else f"{row.name} ({row.state})",
        f"{row.num_trainable / 1e6:.1f}M",
        f"{row.rate:g}",
        f"{sum(seed.dev_loss for seed in row.seeds) / len(row.seeds):.3f}",
    ]
    for metric in metrics:
        summary = row.metrics[metric]
        spread = "" if summary.spread is None else f" ± {summary.spread:.1f}"
        cells.append(Text(f"{summary.mean:.1f}{spread}", style="bold" if summary.is_best else ""))
    seconds = sum(seed.seconds_per_step for seed in row.seeds) / len(row.seeds)
    forgetting = "-" if row.forgetting is None else f"{row.forgetting:+.3f}"
    return [*cells, forgetting, f"{seconds:.2f}"]


def show_comparison_status(rows: Sequence[RowStatus]) -> None:
    """One line a row."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("task", "method", "state", "seeds", "development loss by rate"):
        table.add_column(title)
    for row in rows:
        table.add_row(
            row.task,
            row.name,
            Text(row.state, style=_ROW_STYLES[row.state]),
            f"{row.num_done}/{row.num_seeds}",
            ", ".join(
                f"{trial.rate:g} {_loss(trial.dev_loss)}{'*' if trial.rate == row.rate else ''}"
                for trial in row.trials
            )
            or (f"{row.rate:g}*" if row.rate is not None else "-"),
        )
    _stdout().print(table)
    for row in rows:
        if row.failure is not None:
            complain(f"{row.task}, {row.name}: {row.failure}")


def _loss(loss: float | None) -> str:
    if loss is None:
        return "..."
    return f"{loss:.3f}" if math.isfinite(loss) else "failed"


_ROW_STYLES = {"tuning": "cyan", "training": "cyan", "done": "green", "failed": "bold red"}


def show_status(stages: Sequence[StageStatus]) -> None:
    """One row a stage."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("stage", "state", "time", "size", "finished (UTC)"):
        table.add_column(title, justify="right" if title in ("time", "size") else "left")
    for stage in stages:
        table.add_row(
            stage.stage,
            Text(stage.state, style=_STATE_STYLES[stage.state]),
            "-" if stage.seconds is None else duration(stage.seconds),
            size(stage.num_bytes) if stage.num_bytes else "-",
            (stage.finished or "-").removesuffix("+00:00").replace("T", " "),
        )
    _stdout().print(table)


_STATE_STYLES = {
    "done": "green",
    "running": "bold cyan",
    "partial": "yellow",
    "damaged": "bold red",
    "stale": "yellow",
    "missing": "dim",
}


def show_overlap(rows: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> None:
    """A row a pair, its files by short names, without the columns that have nothing to tell."""
    names = {str(file): name for file, name in zip(files, short_names(files), strict=True)}
    told = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    shown = [
        {name: names[row[name]] if name in ("a", "b") else row[name] for name in told}
        for row in rows
    ]
    show_info({"overlap": shown})


def short_names(files: Sequence[Path]) -> list[str]:
    """The shortest end of each path that no other one of them has; the whole path if all its ends do."""
    return [_short_name(file, [other for other in files if other != file]) for file in files]


def _short_name(file: Path, others: Sequence[Path]) -> str:
    for length in range(1, len(file.parts)):
        end = file.parts[-length:]
        if all(other.parts[-length:] != end for other in others):
            return str(Path(*end))
    return str(file)


def show_extraction(extraction: Extraction, folder: Path) -> None:
    """What an adapter holds, what share of the fine-tune that is, and where it is."""
    info: dict[str, Any] = {
        "num_neurons": extraction.num_neurons,
        "num_parameters": extraction.num_parameters,
        "percent of the model": f"{extraction.percent:.2f}",
        "size": size(extraction.num_bytes),
        "share of the squared change": {
            "of the scored projections": f"{100 * extraction.share_of_projections:.1f}%",
            "of all weights": f"{100 * extraction.share_of_model:.1f}%",
        },
    }
    if extraction.left_out:
        info["weights that cannot be compared"] = dict(extraction.left_out)
    if extraction.scores:
        info[f"scores on {extraction.num_examples} test examples"] = [
            {
                "metric": metric,
                "base": f"{score.base.score:.1f}",
                "fine-tuned": f"{score.finetuned.score:.1f}",
                "adapter": f"{score.adapter.score:.1f}",
                "gain kept": "-" if score.share is None else f"{100 * score.share:.0f}%",
            }
            for metric, score in extraction.scores.items()
        ]
    show_info(info | {"adapter": str(folder)})


def show_diff(table: DiffTable) -> None:
    """What moved, by role and by layer; the rest of it is in the JSON."""
    from neft.analysis.diff import change_by_layer, summarized

    about = table.about
    shares = {row["layer"]: row["share"] for row in summarized(table, "layer")}
    info: dict[str, Any] = {
        "before": about["before"],
        "after": about["after"],
        "change of all weights, |after - before| / |before|": _cell(about["change"]),
    }
    if about["left_out"]:
        info["weights that cannot be compared"] = about["left_out"]
    info["by role (share of the squared change; turn: 1 - cos of the neurons)"] = summarized(
        table, "role"
    )
    info["by layer: share, and relative change of each projection"] = [
        {"layer": row["layer"], "share": shares[row["layer"]]} | row
        for row in change_by_layer(table)
    ]
    show_info(info)


def show_info(info: Mapping[str, Any]) -> None:
    """Plain values as lines, mappings indented, lists of mappings as tables."""
    console = _stdout()
    for key, value in info.items():
        _show_field(console, key, value, indent="")


def _show_field(console: Console, key: str, value: Any, indent: str) -> None:
    label = key.replace("_", " ")
    if isinstance(value, Mapping):
        console.print(f"{indent}{label}:", soft_wrap=True)
        for inner_key, inner in value.items():
            _show_field(console, inner_key, inner, f"{indent}  ")
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        console.print(_table(label, value))
    else:
        console.print(f"{indent}{label}: {_counted(value, key)}", soft_wrap=True)


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", collapse_padding=True)
    for column in rows[0]:
        # A word a line, and what is too long for its column goes on below: nothing is cut off.
        table.add_column(column.replace("_", "\n"), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value, column) for column, value in row.items()))
    return table


def _cell(value: Any, column: str = "") -> str:
    if value is None:
        return "-"
    return _number(value) if isinstance(value, float) else _counted(value, column)


def _counted(value: Any, name: str) -> str:
    """A value as it is, but a number of things with its digits in groups."""
    return f"{value:,}" if isinstance(value, int) and name.startswith("num_") else str(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _fields(fields: Mapping[str, str]) -> Table:
    """Names on the left, texts on the right, wrapped in their column."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for name, text in fields.items():
        table.add_row(name, Text(text if len(text) <= _EXCERPT else f"{text[: _EXCERPT - 3]}..."))
    return table


def size(num_bytes: int) -> str:
    """Bytes for people, in powers of 1000."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
