"""What the report of a comparison shows: its tables and figures."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from neft import __version__
from neft.report import wording
from neft.report.blocks import Block, Cells, Code, Gap, Page, Paragraph, Picture, Section, Tile
from neft.report.run_data import ComparisonData, Fields
from neft.report.wording import NO_VALUE

_FIGURE = Markup('<img class="plot paper" src="data:image/png;base64,{}" alt="{}">')


def comparison_page(comparison: ComparisonData, folder: str) -> Page:
    """The report of ``comparison``, which lies in ``folder``."""
    tasks: Sequence[Fields] = comparison.results["tasks"]
    sections = [
        Section(f"task-{number}", str(task["task"]), str(task["task"]), list(_task(task)))
        for number, task in enumerate(tasks)
    ]
    if not tasks:
        gap = Gap("Nothing has been evaluated yet.", "neft compare RECIPE")
        sections.append(Section("results", "Results", "Results", [gap]))
    if comparison.figures:
        sections.append(Section("figures", "Figures", "Figures", list(_figures(comparison, tasks))))
    sections.append(Section("neurons", "Neurons", "Neurons", list(_neurons(comparison))))
    sections.append(
        Section(
            "provenance",
            "Where these numbers come from",
            "Provenance",
            list(_origin(comparison, folder)),
        )
    )
    failures = comparison.results.get("failures", [])
    return Page(
        title=f"Comparison of fine-tuning methods on {_model(comparison)}",
        eyebrow=f"neft report · {folder}",
        summary=_summary(tasks),
        tiles=list(_tiles(tasks)),
        notices=[
            Gap(f"{len(failures)} training{'s' * (len(failures) > 1)} failed; see the tables.")
        ]
        if failures
        else [],
        sections=sections,
        footer=f"Written by neft {__version__}.",
    )


def _neurons(comparison: ComparisonData) -> Iterator[Block]:
    if comparison.neurons is None:
        yield Gap(
            "Nobody has looked at what the methods did to the neurons. A section analysis does:",
            "neft compare RECIPE --set 'analysis={}'",
        )
        return
    for task in comparison.neurons["tasks"]:
        roles = list(task["rows"][0]["by_role"])
        yield Cells(
            f"{task['task']}: how far the order of {task['num_neurons']:,} neurons by utilization moved",
            [
                "method",
                "average rank change",
                *roles,
                "strongly affected",
                "suppressed",
                "indirectly affected",
                "change of trained vectors",
            ],
            [_neuron_row(row) for row in task["rows"]],
            notes=[
                "Against the base model; unrelated orders would differ by "
                f"{task['unrelated']:,.0f} ranks."
            ],
        )
        for part, caption in _NEURON_FIGURES.items():
            png = comparison.figures.get(f"{task['task']}-neurons-{part}.png")
            if png is not None:
                words = ", ".join(
                    f"{row['name']} {row['average_rank_change']:,.0f}" for row in task["rows"]
                )
                yield _picture(png, f"{task['task']}: {caption}", f"Average rank change: {words}.")


_NEURON_FIGURES = {
    "buckets": "mean rank change by percentile of rank in the base model (the paper's Figure 3)",
    "pairs": "average rank change to the reference method (Figure 5)",
    "affected": "strongly affected, suppressed and indirectly affected neurons (Figure 6)",
    "overlap": "what different warm-ups would choose (Table 5)",
}


def _neuron_row(row: Fields) -> list[str]:
    spread = "" if row["spread"] is None else f" ± {row['spread']:,.0f}"
    return [
        row["name"],
        f"{row['average_rank_change']:,.0f}{spread}",
        *(f"{value:,.0f}" for value in row["by_role"].values()),
        *(f"{row[kind]:,.0f}" for kind in ("strong", "suppressed", "indirect")),
        f"{100 * row['change']:.1f}%",
    ]


def _picture(png: bytes, title: str, words: str) -> Picture:
    data = base64.b64encode(png).decode("ascii")
    # Markup.format escapes what it is given.
    return Picture(_FIGURE.format(data, f"{title}. {words}"), title, title)


def _model(comparison: ComparisonData) -> str:
    path: str = comparison.results.get("comparison", {}).get("model", {}).get("path", "a model")
    return path.rstrip("/").rpartition("/")[2]


def _summary(tasks: Sequence[Fields]) -> str:
    sentences = [f"{len(tasks)} task{'s' * (len(tasks) != 1)}."] if tasks else ["No results yet."]
    for task in tasks:
        metric = next(iter(task["base"]["scores"]))
        best = max(_evaluated(task), key=lambda row: row["metrics"][metric]["mean"], default=None)
        if best is not None:
            sentences.append(
                f"{task['task']}: {best['name']} has the highest {metric}, "
                f"{_mean(best['metrics'][metric])}{_standing(best['metrics'][metric])}; base model "
                f"{task['base']['scores'][metric]['score']:.1f}."
            )
    return " ".join(sentences)


def _standing(summary: Fields) -> str:
    """Whether the highest mean is more than chance: ``neft compare`` has tested it."""
    if summary.get("is_best"):
        return ", significantly above every other complete row"
    return ", but not significantly above every other row"


def _tiles(tasks: Sequence[Fields]) -> Iterator[Tile]:
    rows = [row for task in tasks for row in task["rows"]]
    yield Tile("tasks", str(len(tasks)))
    yield Tile("rows", str(len(rows)), f"{sum(bool(row['seeds']) for row in rows)} with results")


def _evaluated(task: Fields) -> list[Fields]:
    return [row for row in task["rows"] if row["seeds"] and row["metrics"]]


def _task(task: Fields) -> Iterator[Block]:
    metrics = list(task["base"]["scores"])
    header = ["method", "trained", "%", "learning rate", *metrics]
    header += [f"{metrics[0]} to reference (p)", "forgetting", "time a step", "memory"]
    base = ["base model", *[NO_VALUE] * 3]
    base += [f"{task['base']['scores'][metric]['score']:.1f}" for metric in metrics]
    rows = [[*base, *[NO_VALUE] * 4], *(_row(row, task, metrics) for row in task["rows"])]
    notes = [f"{name}: {score['signature']}" for name, score in task["base"]["scores"].items()]
    notes.append("± is the standard deviation over seeds.")
    notes.append("Forgetting is the rise of the loss on general text, in nats a token.")
    yield Cells(f"Methods on {task['num_examples']:,} test examples", header, rows, notes=notes)


def _row(row: Fields, task: Fields, metrics: Sequence[str]) -> list[str]:
    seeds = row["seeds"]
    if not seeds:
        why = row.get("failure") or "not finished"
        return [row["name"], f"{row['state']}: {why}", *[NO_VALUE] * (len(metrics) + 6)]
    trained = seeds[0]["num_trainable"]
    first = row["metrics"][metrics[0]]
    return [
        row["name"],
        f"{trained:,}",
        f"{100 * trained / task['num_parameters']:.2f}",
        NO_VALUE if row["rate"] is None else f"{row['rate']:g}",
        *(_mean(row["metrics"][metric]) for metric in metrics),
        _difference(first),
        NO_VALUE if row.get("forgetting") is None else f"{row['forgetting']:+.3f}",
        f"{statistics.fmean(seed['seconds_per_step'] for seed in seeds):.2f} s",
        _memory(seeds),
    ]


def _mean(summary: Fields) -> str:
    spread = summary.get("spread")
    return f"{summary['mean']:.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def _difference(summary: Fields) -> str:
    difference, p_value = summary.get("difference"), summary.get("p_value")
    if difference is None or p_value is None:
        return NO_VALUE
    return f"{difference:+.1f} ({'< 0.001' if p_value < 0.001 else f'{p_value:.3f}'})"


def _memory(seeds: Sequence[Fields]) -> str:
    peaks = [peak for seed in seeds if (peak := seed.get("peak_memory_bytes")) is not None]
    return wording.size(max(peaks)) if peaks else NO_VALUE


def _figures(comparison: ComparisonData, tasks: Sequence[Fields]) -> Iterator[Block]:
    entries = comparison.results.get("comparison", {}).get("figures", [])
    titles = {entry["file"]: entry.get("title") for entry in entries}
    words = " ".join(_points(task) for task in tasks)
    for name, title in titles.items():
        png = comparison.figures.get(f"{name}.png")
        if png is not None:
            yield _picture(png, f"{title or name}: score against trained parameters", words)


def _points(task: Fields) -> str:
    metric = next(iter(task["base"]["scores"]))
    points = [
        f"{row['name']} {_mean(row['metrics'][metric])} with "
        f"{row['seeds'][0]['num_trainable'] / 1e6:.3g} million"
        for row in _evaluated(task)
    ]
    return f"{task['task']}, {metric} and trained parameters: {', '.join(points)}."


def _origin(comparison: ComparisonData, folder: str) -> Iterator[Block]:
    provenance: Mapping[str, Any] = comparison.results.get("provenance", {})
    facts = [("folder", folder), ("model", str(provenance.get("model", NO_VALUE)))]
    for name, words in {"machine": "machine", "packages": "versions"}.items():
        pairs = provenance.get(name, {}).items()
        facts.append((words, ", ".join(f"{key} {value}" for key, value in pairs) or NO_VALUE))
    facts.append(("commit", provenance.get("commit") or "not run from a git checkout"))
    yield Cells("Model, machine and versions", ("", "value"), facts, texts=True)
    yield Paragraph(
        "Data and fingerprints of every row are in results.json beside this comparison."
    )
    yield Code("The comparison, with all defaults", comparison.recipe_yaml)
