"""What the report of one run shows, part by part; what is missing says which command makes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from neft import __version__
from neft.report import wording
from neft.report.blocks import (
    Block,
    Cells,
    Code,
    Gap,
    NeuronBlock,
    Page,
    Paragraph,
    Picture,
    Section,
    Tile,
)
from neft.report.inline_svg import inline_svg
from neft.report.neuron_figures import whole_model
from neft.report.neuron_table import NeuronTable, neuron_table, packed
from neft.report.plots import PLOTS, analysis_setting, neuron_map, remedy, run_command
from neft.report.run_data import TABLES, Fields, RunData, Sample
from neft.report.wording import NO_VALUE

_METHODS = {
    "full": "Full fine-tuning",
    "embed": "Fine-tuning of the embeddings",
    "in_out": "Fine-tuning of all in and out neurons",
    "lora": "LoRA",
    "mask": "NeFT by masked gradients",
    "neft": "NeFT",
}
_NUM_SAMPLES = 20
_NUM_SHOWN = 5
# Characters of a sample that are shown; predictions.jsonl has all.
_EXCERPT = 600


def run_page(run: RunData) -> Page:
    """The report of ``run``."""
    return Page(
        title=_title(run),
        eyebrow=f"neft report · {run.folder}",
        summary=_summary(run),
        tiles=list(_tiles(run)),
        notices=list(_notices(run)),
        sections=[
            Section("results", "Before and after training", "Results", list(_results(run))),
            Section("samples", "Sample outputs", "Samples", list(_samples(run))),
            Section("training", "Training curves", "Training", list(_training(run))),
            Section("where", "Where the trained neurons are", "Where", list(_where(run))),
            Section(
                "scores", "How far neurons turned in the warm-up", "Scores", list(_scores(run))
            ),
            Section("use", "What the model uses", "Utilization", list(_utilization(run))),
            Section("overlap", "Overlap with other selections", "Overlap", list(_overlap(run))),
            Section("causal", "What the neurons buy", "Causal test", list(_causal(run))),
            Section("neurons", "Neurons", "Neurons", list(_neurons(run))),
            Section(
                "provenance", "Where these numbers come from", "Provenance", list(_origin(run))
            ),
        ],
        footer=f"Written by neft {__version__}.",
    )


# What was done


def _method(run: RunData) -> str:
    name = (run.results or {}).get("method") or _recipe(run, "train", "method") or "neft"
    return _METHODS.get(name, name)


def _recipe(run: RunData, *keys: str) -> Any:
    """A field of the recipe, ``None`` where it or the recipe is missing."""
    value: Any = run.recipe
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _model(run: RunData) -> str:
    path = _recipe(run, "model", "path")
    return Path(path).name if path else "a model"


def _task(run: RunData) -> str:
    task = _recipe(run, "data", "task")
    source, target = (_recipe(run, "data", f"{end}_language") for end in ("source", "target"))
    if task is None:
        return "its task"
    if task == "translation" and source and target:
        return f"translation from {source} to {target}"
    return str(task)


def _title(run: RunData) -> str:
    return f"{_method(run)} on {_model(run)}: {_task(run)}"


def _summary(run: RunData) -> str:
    sentences = [*_what_was_trained(run), *_what_came_out(run)]
    if not sentences:
        return "This run has only begun: there is nothing to report yet."
    return " ".join(sentences)


def _what_was_trained(run: RunData) -> Iterator[str]:
    if run.training is None:
        if run.base is not None:
            yield f"{_model(run)} was evaluated on {_task(run)} and has not been trained yet."
        return
    trained, total = run.training["num_trainable"], run.training["num_parameters"]
    neurons = ""
    if run.neurons is not None:
        chosen, candidates = len(run.neurons), run.neurons.num_candidates
        neurons = f", the vectors of {chosen:,} of {candidates:,} neurons"
    examples = run.training.get("examples", {}).get("train", {}).get("used")
    on = f" on {examples:,} examples" if examples else ""
    yield (
        f"{_method(run)} trained {trained:,} of the {total:,} parameters of {_model(run)} "
        f"({wording.share(trained, total)}{neurons}) for {run.training['num_steps']:,} steps{on} of "
        f"{_task(run)}."
    )


def _what_came_out(run: RunData) -> Iterator[str]:
    if run.trained is None or run.base is None:
        return
    changes = [
        f"{name} {wording.moved(run.base['scores'][name]['score'], score['score'], 1)}"
        for name, score in run.trained["scores"].items()
        if name in run.base["scores"]
    ]
    yield f"On {run.trained['num_examples']:,} held-out examples {wording.listed(changes)}."
    before, after = (side.get("general_loss") for side in (run.base, run.trained))
    if before is not None and after is not None:
        yield f"The loss on general text {wording.moved(before, after, 2)} nats a token."


def _tiles(run: RunData) -> Iterator[Tile]:
    if run.trained is not None and run.base is not None:
        for name, score in list(run.trained["scores"].items())[:2]:
            before = run.base["scores"].get(name, {}).get("score")
            note = "" if before is None else f"base model: {before:.1f}"
            yield Tile(name, f"{score['score']:.1f}", note)
    if run.training is not None:
        trained, total = run.training["num_trainable"], run.training["num_parameters"]
        yield Tile("trained", wording.share(trained, total), f"{trained:,} parameters")
        seconds = run.training["seconds_per_step"]
        yield Tile("time a step", f"{seconds:.2f} s", f"{run.training['num_steps']:,} steps")


def _notices(run: RunData) -> Iterator[Gap]:
    if run.stale:
        yield Gap(
            f"Left out, as they were made from earlier results than those that stand now: "
            f"{wording.listed(list(run.stale))}.",
            run_command(run),
        )
    if run.trained is None and "evaluate" not in run.stale:
        yield Gap("This run is not finished; parts of this page are empty.", run_command(run))


# Results


def _results(run: RunData) -> Iterator[Block]:
    rows = [*_score_rows(run), *_cost_rows(run)]
    if not rows:
        yield Gap("Nothing has been evaluated yet.", run_command(run))
        return
    num_examples = (run.trained or run.base or {}).get("num_examples")
    caption = "Base model and trained model"
    if num_examples:
        caption += f" on {num_examples:,} test examples"
    scores = [
        score for side in (run.base, run.trained) if side for score in side["scores"].values()
    ]
    notes = []
    if any(score.get("low") is not None for score in scores):
        notes.append("In brackets: 95% interval over the choice of test examples (bootstrap).")
    elif scores:
        notes.append("An earlier release made these scores, without intervals.")
    yield Cells(caption, ("", "base", "trained", "change"), rows, notes=notes)


def _score_rows(run: RunData) -> Iterator[tuple[str, ...]]:
    before, after = ((side or {}).get("scores", {}) for side in (run.base, run.trained))
    for name in before | after:
        old, new = before.get(name), after.get(name)
        change = f"{new['score'] - old['score']:+.1f}" if old and new else NO_VALUE
        yield name, _score(old), _score(new), change
    losses = [(side or {}).get("general_loss") for side in (run.base, run.trained)]
    if any(loss is not None for loss in losses):
        known = [loss for loss in losses if loss is not None]
        change = f"{known[1] - known[0]:+.3f}" if len(known) == len(losses) else NO_VALUE
        yield "loss on general text (nats a token)", *(_loss(loss, "") for loss in losses), change


def _score(score: Fields | None) -> str:
    if score is None:
        return NO_VALUE
    low, high = score.get("low"), score.get("high")
    interval = "" if low is None or high is None else f" [{low:.1f}, {high:.1f}]"
    return f"{score['score']:.1f}{interval}"


def _cost_rows(run: RunData) -> Iterator[tuple[str, ...]]:
    training = run.training
    if training is None:
        return
    trained, total = training["num_trainable"], training["num_parameters"]
    values = [
        ("trained parameters", f"{trained:,} ({wording.share(trained, total)})"),
        ("loss on development data (best)", f"{training['best_dev_loss']:.3f}"),
        ("time a step", f"{training['seconds_per_step']:.2f} s"),
    ]
    if training.get("peak_memory_bytes") is not None:
        values.append(("peak memory of training", wording.size(training["peak_memory_bytes"])))
    if (num_bytes := (run.results or {}).get("artifact_bytes")) is not None:
        name = "adapter" if training.get("result") == "adapter" else "trained model"
        values.append((f"size of the {name}", wording.size(num_bytes)))
    for name, value in values:
        yield name, NO_VALUE, value, NO_VALUE


# Samples


def _samples(run: RunData) -> Iterator[Block]:
    if not run.samples:
        yield Gap("No model has answered the test split yet.", run_command(run))
        return
    chosen = _spread(run.samples, _NUM_SAMPLES)
    shown = _spread(chosen, _NUM_SHOWN)
    more = [sample for sample in chosen if sample not in shown]
    count = f"{len(shown)} of {len(run.samples):,}" if len(shown) < len(run.samples) else "All"
    yield _side_by_side(
        f"{count} test examples, spread evenly over the test split, so that nobody chose them",
        shown,
    )
    if more:
        yield _side_by_side("The same of further examples", more, f"{len(more)} further examples")


def _side_by_side(caption: str, samples: Sequence[Sample], summary: str = "") -> Cells:
    return Cells(
        caption,
        ("prompt", "reference", "base model", "trained model"),
        [
            tuple(map(_excerpt, (sample.prompt, sample.reference, sample.before, sample.after)))
            for sample in samples
        ],
        texts=True,
        summary=summary,
    )


def _spread(samples: Sequence[Sample], num_samples: int) -> list[Sample]:
    count = min(num_samples, len(samples))
    return [samples[(2 * part + 1) * len(samples) // (2 * count)] for part in range(count)]


def _excerpt(text: str | None) -> str:
    if text is None:
        return NO_VALUE
    return text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]} … ({len(text):,} characters)"


# Figures


def _figure(run: RunData, name: str, caption: str, gap: str) -> Picture | Gap:
    drawn = PLOTS[name].draw(run)
    if drawn is None:
        return Gap(gap, remedy(run, name))
    image = inline_svg(drawn.figure, f"plot-{name}", drawn.alternative)
    return Picture(image, f"{caption} {drawn.alternative}", PLOTS[name].description)


def _training(run: RunData) -> Iterator[Block]:
    explanation = "Loss of a target token; the dotted line is the checkpoint that was kept."
    yield _figure(run, "training", explanation, "Nothing has been trained yet.")


def _where(run: RunData) -> Iterator[Block]:
    found = neuron_map(run)
    if found is None and run.training is not None:
        yield Paragraph(f"{_method(run)} trains no chosen neurons, so there is no map of them.")
        return
    explanation = "Percent of the neurons of each layer and projection that were trained."
    yield _figure(run, "neurons", explanation, "No neurons have been chosen yet.")
    if found is not None:
        header = ["layer", *(f"{role}: trained" for role in found.roles)]
        header += [f"{role}: all" for role in found.roles]
        yield Cells(
            "Trained neurons by layer",
            header,
            [
                [
                    str(layer),
                    *(f"{n:,}" for n in (*found.num_trained[:, i], *found.num_candidates[:, i])),
                ]
                for i, layer in enumerate(found.layers)
            ],
            summary="The counts as a table",
        )


_SCORES = {
    "cosine": "The score of a neuron is the cosine of its vector before and after a short fine-tune "
    "(the warm-up); 1 - cos is how far it turned.",
    "gradient": "The score of a neuron is how far the signs of its gradients foretell that a fine-tune "
    "would turn it: 1 - cos, if its learning rates summed to 1.",
    "activation": "The score of a neuron is its mean absolute activation on the training data.",
    "norm": "The score of a neuron is how far a move of length 1 would turn it: short ones come first.",
    "probe": "The score of a neuron is the largest |cosine| of its vector with what tells the labels "
    "apart in the hidden states of any layer (paper, section 3).",
}


def _scores(run: RunData) -> Iterator[Block]:
    if run.training is not None and run.scores is None and "score" not in run.stale:
        yield Paragraph("This run has no scores: its method, or its choice of neurons, needs none.")
        return
    method = "cosine" if run.scores is None else run.scores.provenance.get("method", "cosine")
    yield _figure(run, "scores", _SCORES.get(method, ""), "Neurons have not been scored yet.")


def _utilization(run: RunData) -> Iterator[Block]:
    about = run.tables["neurons"].about if "neurons" in run.tables else {}
    measured = _texts_read(about)
    yield Paragraph(
        "A neuron's utilization is the largest absolute correlation of its vector with the mean hidden "
        "states of its layer and those above. Neurons are ranked by it within their projection, in the "
        "base model and in the trained one; 1 is the most used." + measured
    )
    gap = "The utilization of neurons has not been measured for this run."
    if "neurons" not in run.tables and "buckets" not in run.tables:
        yield Gap(gap, remedy(run, "figure3"))
        return
    yield _figure(run, "figure3", "Which ranks moved (the paper's Figure 3).", gap)
    yield _figure(run, "figure5", "How far ranks moved on average (the paper's Figure 5).", gap)
    threshold = about.get("threshold")
    rule = f"more than {threshold:.1%} of the list" if isinstance(threshold, float) else "very far"
    explanation = (
        f"Neurons whose rank moved {rule} are strongly affected; of these, those that fell are "
        "suppressed, and those that were not trained indirectly affected (the paper's Figure 6)."
    )
    yield _figure(run, "figure6", explanation, gap)


def _texts_read(about: Fields) -> str:
    """What hidden states were measured on, if the table says so."""
    sides = [
        (name, about.get(side)) for side, name in {"before": "base", "after": "trained"}.items()
    ]
    parts = [
        f"{side['num_texts']:,} texts ({side['num_tokens']:,} tokens) of the {name} model"
        for name, side in sides
        if isinstance(side, dict) and "num_texts" in side and "num_tokens" in side
    ]
    return f" Hidden states are means over {wording.listed(parts)}." if parts else ""


def _overlap(run: RunData) -> Iterator[Block]:
    if run.training is not None and run.neurons is None:
        yield Paragraph(f"{_method(run)} trains no chosen neurons, so there is no overlap of them.")
        return
    gap = "This run's choice of neurons has not been compared with another one."
    explanation = (
        "Share of the neurons of one selection that are in the other too, and the share that two random "
        "selections of these sizes would have."
    )
    figure = _figure(run, "overlap", explanation, gap)
    yield figure
    if isinstance(figure, Picture):
        yield Cells(
            "Overlap of selections, whole model",
            (
                "selections",
                "budget %",
                "neurons",
                "shared",
                "share",
                "by chance",
                "Jaccard",
                "by chance",
            ),
            [
                _overlap_row(row)
                for row in whole_model(run.tables["overlap"])
                if row["a"] != row["b"]
            ],
            summary="The numbers as a table",
        )


def _overlap_row(row: Fields) -> tuple[str, ...]:
    counts = [_count(row.get(name)) for name in ("num_a", "num_both")]
    shares = [
        NO_VALUE if row.get(name) is None else f"{row[name]:.3f}"
        for name in ("share", "chance_share", "jaccard", "chance_jaccard")
    ]
    budget = NO_VALUE if row["percent"] is None else f"{row['percent']:g}"
    return f"{row['a']} / {row['b']}", budget, *counts, *shares


def _count(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:,.0f}"


def _causal(run: RunData) -> Iterator[Block]:
    if run.training is not None and run.neurons is None and "causal" not in run.tables:
        yield Paragraph(f"{_method(run)} trains no chosen neurons, so none can be restored.")
        return
    explanation = (
        "A group of trained neurons gets its original values back, and the loss is measured again. A "
        "rise on the task is what the group had bought; a fall on general text is what it had cost."
    )
    gap = "No neurons have been restored to see what they buy."
    figure = _figure(run, "causal", explanation, gap)
    yield figure
    if isinstance(figure, Picture):
        yield Cells(
            "Loss with groups of neurons restored, in nats a token",
            ("restored", "neurons", "task loss", "rise", "general loss", "rise"),
            [_causal_row(row) for row in run.tables["causal"].rows()],
            summary="The numbers as a table",
        )


def _causal_row(row: Fields) -> tuple[str, ...]:
    return (
        str(row["group"]),
        f"{row['num_neurons']:,.0f}",
        *(
            _loss(row.get(f"{text}_{what}"), sign)
            for text in ("task", "general")
            for what, sign in (("loss", ""), ("rise", "+"))
        ),
    )


def _loss(value: float | None, sign: str) -> str:
    return NO_VALUE if value is None or value != value else f"{value:{sign}.3f}"


# Neurons


def _neurons(run: RunData) -> Iterator[Block]:
    table = neuron_table(run)
    if table is None:
        if run.training is not None:
            text = (
                f"{_method(run)} trains no chosen neurons; an analysis lists those it moved most."
            )
            yield Gap(text, remedy(run, "figure3"))
        else:
            yield Gap("No neurons have been chosen yet.", run_command(run))
        return
    yield Paragraph(_which_neurons(table))
    if missing := [words for name, words in _PARTS.items() if not len(run.tables.get(name, ()))]:
        yield Gap(
            f"Not known of them: {wording.listed(missing)}.",
            run_command(run, analysis_setting(run, "analysis")),
        )
    known = TABLES["neurons"] if "neurons" in run.tables else None
    where = f"analysis/{known}" if known else "select/neurons.json and score/scores.safetensors"
    yield NeuronBlock(packed(table, run), len(table), where)


_PARTS = {
    "neurons": "change in training, utilization and rank",
    "lens": "tokens that out neurons promote (logit lens)",
    "activity": "activity of their units",
    "contexts": "contexts that activate units most",
}


def _which_neurons(table: NeuronTable) -> str:
    if not table.num_trained:
        which = f"No neurons were chosen. Listed are {len(table):,} of {table.num_known:,}"
        return f"{which}: {table.order}." if table.order else f"{which}."
    if table.order:
        return f"Listed are {len(table):,} of the {table.num_trained:,} trained neurons: {table.order}."
    return (
        f"All {table.num_trained:,} trained neurons, of {table.num_known:,}. Its index opens all that "
        "is known of a neuron."
    )


# Provenance


def _origin(run: RunData) -> Iterator[Block]:
    yield Cells("Models, seeds and versions", ("", "value"), list(_facts(run)), texts=True)
    if run.records:
        yield Cells(
            "Stages of this run",
            ("stage", "finished (UTC)", "duration", "fingerprint", "reads"),
            [_stage_row(name, record) for name, record in run.records.items()],
            texts=True,
        )
        yield Cells(
            "Identity of models and data: hashes of their content",
            ("ingredient", "identity"),
            list(_identities(run)),
            texts=True,
        )
    if run.recipe_yaml is not None:
        yield Code("The recipe, with all defaults", run.recipe_yaml)
    abouts = {name: dict(table.about) for name, table in run.tables.items() if table.about}
    if abouts:
        yield Code(
            "What the analyses were computed from", json.dumps(abouts, indent=2, ensure_ascii=False)
        )


def _facts(run: RunData) -> Iterator[tuple[str, str]]:
    last: Fields = list(run.records.values())[-1] if run.records else {}
    yield "folder", run.folder
    for words, keys in {
        "base model": ("model", "path"),
        "model revision": ("model", "revision"),
        "dtype": ("model", "dtype"),
        "seed": ("seed",),
        "seed of the selection": ("select", "seed"),
    }.items():
        if (value := _recipe(run, *keys)) is not None:
            yield words, str(value)
    for score in ((run.trained or run.base or {}).get("scores", {})).items():
        yield f"signature of {score[0]}", score[1]["signature"]
    for name, words in {"machine": "machine", "packages": "versions"}.items():
        if last.get(name):
            yield words, ", ".join(f"{key} {value}" for key, value in last[name].items())
    if "commit" in last:
        yield "commit", last["commit"] or "not run from a git checkout"


def _stage_row(name: str, record: Fields) -> tuple[str, ...]:
    reads = record.get("reads", {})
    return (
        name,
        (record.get("finished") or NO_VALUE).removesuffix("+00:00"),
        wording.duration(record.get("seconds", 0.0)),
        record["fingerprint"][:16],
        ", ".join(reads) or NO_VALUE,
    )


def _identities(run: RunData) -> Iterator[tuple[str, str]]:
    """Every ingredient that is a hash, once."""
    seen: set[tuple[str, str]] = set()
    for record in run.records.values():
        for name, value in record.get("ingredients", {}).items():
            if isinstance(value, str) and ":" in value and (name, value) not in seen:
                seen.add((name, value))
                yield name, value
