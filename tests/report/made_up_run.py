"""A run's folder with all that a report can show, made up but of the right shape; of any size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from neft.analysis.table import Table
from neft.neurons import Axis, NeuronScores, Projection

HOSTILE = (
    "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
)
_SIGNATURE = "nrefs:1|bs:1000|seed:12345|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
_EDGES = (0, 1, 3, 10, 30, 50, 70, 90, 97, 99, 100)


@dataclass(frozen=True)
class Shape:
    """How large a made-up model is, and how much of it was looked at."""

    num_layers: int = 4
    num_units: int = 48
    vector_length: int = 16
    num_parameters: int = 20_000
    vocabulary: int = 300
    num_lens: int = 60
    num_context_units: int = 6
    num_examples: int = 30


SMOLLM2 = Shape(
    num_layers=30,
    num_units=1536,
    vector_length=576,
    num_parameters=134_515_008,
    vocabulary=49_152,
    num_lens=10_500,
    num_context_units=200,
    num_examples=150,
)


def make_run(folder: Path, shape: Shape = Shape(), hostile: str = HOSTILE) -> Path:
    """Fill ``folder`` with a finished run; ``hostile`` stands wherever a user or model may write."""
    random = np.random.default_rng(0)
    _prepare(folder, hostile)
    _evaluations(folder, shape, hostile)
    for stage, num_steps in {"warmup": 50, "train": 150}.items():
        _training(folder, stage, num_steps, shape, random)
    scores = _scores(shape, random)
    scores.save(_stage(folder, "score", ["warmup"]) / "scores.safetensors")
    chosen = scores.select(percent=9)
    chosen.save(_stage(folder, "select", ["score"]) / "neurons.json")
    _analysis(folder, shape, scores, hostile, random)
    return folder


def _stage(folder: Path, stage: str, reads: Sequence[str] = ()) -> Path:
    made = folder / stage
    made.mkdir(parents=True, exist_ok=True)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) if stage == "prepare" else None
    record = {
        "stage": stage,
        "version": 1,
        "fingerprint": stage.encode().hex().ljust(64, "0"),
        "ingredients": {"model": f"content:{'a1' * 32}", "data.test": f".jsonl sha256:{'b2' * 32}"}
        | ({"recipe": recipe} if recipe else {}),
        "reads": {name: name.encode().hex().ljust(64, "0") for name in reads},
        "attempts": 1,
        "seconds": 252.7,
        "finished": "2026-11-23T20:30:53+00:00",
        "files": {},
        "packages": {"neft": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        "machine": {"processor": "Some(R) Processor", "cores": 2, "platform": "Linux-6.1-x86_64"},
        "commit": "331e6c9" + "0" * 33,
    }
    _write(made / "stage.json", record)
    return made


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _prepare(folder: Path, hostile: str) -> None:
    recipe = {
        "output": "runs/demo",
        "seed": 0,
        "model": {"path": "models/smollm2-135m-instruct", "dtype": "float32"},
        "data": {
            "task": "translation",
            "source_language": "English",
            "target_language": "French",
            "template": f"{hostile} {{source}}",
        },
        "select": {"percent": 9.0, "which": "lowest", "seed": 0},
        "train": {"method": "neft", "steps": 150},
        "analysis": {"overlap_with": {"second half": "other/neurons.json"}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    (folder / "recipe.yaml").write_text(text)
    prepared = _stage(folder, "prepare")
    (folder / "recipe.yaml").rename(prepared / "recipe.yaml")


def _evaluations(folder: Path, shape: Shape, hostile: str) -> None:
    for stage, scores, general in (
        ("baseline", {"BLEU": 0.6, "chrF++": 8.8}, 3.62),
        ("evaluate", {"BLEU": 11.0, "chrF++": 28.2}, 4.01),
    ):
        made = _stage(folder, stage, ["baseline", "train"] if stage == "evaluate" else [])
        fields = {
            name: {"score": score, "signature": _SIGNATURE, "low": 0.8 * score, "high": 1.2 * score}
            for name, score in scores.items()
        }
        num = shape.num_examples
        _write(
            made / "scores.json",
            {"scores": fields, "num_examples": num, "seconds": 33.2, "general_loss": general},
        )
        answers = [f"Réponse {stage} {number}" for number in range(num)]
        # At a place that the page shows.
        answers[3 * num // (2 * min(num, 20))] = hostile
        (made / "predictions.jsonl").write_text(
            "".join(
                json.dumps(
                    {
                        "prompt": f"Translate the following text from English to French. Text {number}",
                        "prediction": answer,
                        "reference": f"Texte {number}",
                    },
                    ensure_ascii=False,
                )
                + "\n"
                for number, answer in enumerate(answers)
            ),
            encoding="utf-8",
        )
    _write(folder / "evaluate" / "results.json", {"method": "neft", "artifact_bytes": 48_461_658})


def _training(
    folder: Path, stage: str, num_steps: int, shape: Shape, random: np.random.Generator
) -> None:
    steps = np.arange(1, num_steps + 1)
    losses = 1.7 + 3 * np.exp(-steps / 20) + random.normal(0, 0.2, num_steps)
    dev = [{"step": step, "loss": 1.75 + 2 / step} for step in range(25, num_steps + 1, 25)]
    fields = {
        "num_parameters": shape.num_parameters,
        "num_trainable": int(0.09 * shape.num_parameters),
        "result": "adapter" if stage == "train" else "model",
        "num_steps": num_steps,
        "best_step": num_steps,
        "best_dev_loss": dev[-1]["loss"],
        "seconds_per_step": 1.55,
        "peak_memory_bytes": 2_010_000_000,
        "examples": {"train": {"used": 1491, "dropped": 109, "truncated": 0}},
        "history": {
            "train": [
                {"step": int(step), "loss": float(loss)}
                for step, loss in zip(steps, losses, strict=True)
            ],
            "dev": dev,
        },
    }
    _write(_stage(folder, stage, ["select"] if stage == "train" else []) / "training.json", fields)


def _scores(shape: Shape, random: np.random.Generator) -> NeuronScores:
    projections, distances = [], {}
    for layer in range(shape.num_layers):
        for role, axis in (("up", Axis.ROW), ("down", Axis.COLUMN)):
            name = f"model.layers.{layer}.mlp.{role}_proj"
            projections.append(
                Projection(name, layer, role, axis, shape.num_units, shape.vector_length)
            )
            centre = -6 + 0.4 * np.sin(layer / 4) - 0.2 * (role == "down")
            distances[name] = 10 ** random.normal(centre, 0.4, shape.num_units)
    return NeuronScores(projections, distances, shape.num_parameters)


def _analysis(
    folder: Path, shape: Shape, scores: NeuronScores, hostile: str, random: np.random.Generator
) -> None:
    made = _stage(folder, "analysis", ["score", "select", "train", "evaluate"])
    neurons = _neurons(scores, random)
    neurons.save(made / "neurons.parquet")
    _buckets(neurons).save(made / "buckets.csv")
    _activity(shape, random).save(made / "activity.parquet")
    tokens = [hostile, "<b>bold</b>", " Bonjour", "\n", *_words(shape.vocabulary - 4, random)]
    _lens(shape, neurons, tokens, random).save(made / "lens.parquet")
    _contexts(shape, neurons, tokens, random).save(made / "contexts.parquet")
    _causal(shape).save(made / "causal.csv")
    _overlap().save(made / "overlap.csv")


def _words(count: int, random: np.random.Generator) -> list[str]:
    letters = list("aàbcdeéfghijklmnopqrstuvwxyz日本ш")
    drawn = random.integers(0, len(letters), (count, 9)).tolist()
    lengths = random.integers(2, 10, count).tolist()
    # Half of them begin a word, as in a tokenizer's vocabulary.
    return [
        " " * (length % 2) + "".join(letters[letter] for letter in places[:length])
        for places, length in zip(drawn, lengths, strict=True)
    ]


def _neurons(scores: NeuronScores, random: np.random.Generator) -> Table:
    projections = list(scores.projections.values())
    chosen = scores.select(percent=9)
    sizes = [projection.num_neurons for projection in projections]
    total = sum(sizes)
    trained = np.concatenate(
        [np.isin(np.arange(p.num_neurons), chosen[p.name]) for p in projections]
    )
    roles = np.repeat([p.role for p in projections], sizes)
    use = random.beta(2, 8, total)
    after = np.clip(use + random.normal(0, 0.05, total) * (1 + 2 * trained), 0, 1)
    ranks = [_ranks(values, roles) for values in (use, after)]
    change = ranks[1] - ranks[0]
    threshold = 100_000 / 352_256
    strong = np.abs(change) > threshold * total / 2
    layers = np.repeat([p.layer for p in projections], sizes)
    return Table(
        {
            "module": np.repeat([p.name for p in projections], sizes).tolist(),
            "layer": layers,
            "role": roles.tolist(),
            "index": np.concatenate([np.arange(size) for size in sizes]),
            "trained": trained,
            "distance": np.concatenate([scores.distances[p.name] for p in projections]),
            "norm_before": random.normal(1.5, 0.1, total),
            "norm_after": random.normal(1.5, 0.2, total),
            "change": np.abs(random.normal(0, 0.1, total)) * trained,
            "turn": random.random(total) * 0.1 * trained,
            "utilization_before": use,
            "utilization_after": after,
            "peak_before": np.minimum(layers + random.integers(0, 9, total), 29),
            "peak_after": np.minimum(layers + random.integers(0, 9, total), 29),
            "rank_before": ranks[0],
            "rank_after": ranks[1],
            "rank_change": change,
            "strong": strong,
            "suppressed": strong & (change > 0),
            "indirect": strong & ~trained,
        },
        {
            "before": {"weights": "base", "num_texts": 100, "num_tokens": 5321},
            "after": {"weights": "neft", "num_texts": 100, "num_tokens": 4711},
            "threshold": threshold,
        },
    )


def _ranks(values: np.ndarray, roles: np.ndarray) -> np.ndarray:
    ranks = np.zeros(len(values), dtype=np.int64)
    for role in np.unique(roles):
        own = np.flatnonzero(roles == role)
        ranks[own[np.argsort(-values[own], kind="stable")]] = np.arange(1, len(own) + 1)
    return ranks


def _buckets(neurons: Table) -> Table:
    rows = []
    roles, ranks = np.array(neurons["role"]), np.asarray(neurons["rank_before"])
    changes = np.abs(np.asarray(neurons["rank_change"]))
    for role in ("all", "up", "down"):
        own = np.ones(len(roles), dtype=bool) if role == "all" else roles == role
        percents = 100 * ranks / ranks.max()
        for low, high in pairwise(_EDGES):
            found = changes[own & (percents > low) & (percents <= high)]
            rows.append(
                (role, low, high, len(found), float(found.mean()) if len(found) else np.nan)
            )
    names = ("role", "low", "high", "num_neurons", "mean_rank_change")
    return Table(dict(zip(names, zip(*rows, strict=True), strict=True)), {"seconds": 1.0})


def _activity(shape: Shape, random: np.random.Generator) -> Table:
    count = shape.num_layers * shape.num_units
    names = ("mean", "active", "q50", "q90", "q99")
    numbers = {
        f"{name}_{side}": random.random(count) for name in names for side in ("before", "after")
    }
    return Table(
        {
            "layer": np.repeat(np.arange(shape.num_layers), shape.num_units),
            "index": np.tile(np.arange(shape.num_units), shape.num_layers),
        }
        | numbers,
        {"num_tokens": 5321},
    )


def _out_neurons(neurons: Table) -> list[tuple[int, int]]:
    """Trained ones, the first of which the first page of the table shows."""
    keys = zip(neurons["layer"], neurons["role"], neurons["index"], neurons["trained"], strict=True)
    return [(int(layer), int(index)) for layer, role, index, on in keys if on and role == "down"]


def _lens(shape: Shape, neurons: Table, tokens: list[str], random: np.random.Generator) -> Table:
    keys = _out_neurons(neurons)[: shape.num_lens]
    columns: dict[str, Any] = {"layer": [key[0] for key in keys], "index": [key[1] for key in keys]}
    for what in ("promoted", "suppressed"):
        for side in ("before", "after"):
            drawn = random.integers(0, len(tokens), (len(keys), 5))
            drawn[0] = [0, 1, 2, 3, 4]
            columns[f"{what}_{side}"] = [[tokens[token] for token in row] for row in drawn]
    return Table(columns, {"lens_tokens": 5})


def _contexts(
    shape: Shape, neurons: Table, tokens: list[str], random: np.random.Generator
) -> Table:
    rows = []
    for layer, index in _out_neurons(neurons)[: shape.num_context_units]:
        for model in ("before", "after"):
            for rank in range(1, 4):
                left, token, right = (
                    "".join(tokens[t] for t in random.integers(0, len(tokens), count))
                    for count in (12, 1, 8)
                )
                token = tokens[0] if rank == 1 else token
                rows.append((layer, index, model, rank, float(9 / rank), left, token, right))
    names = ("layer", "index", "model", "rank", "activation", "left", "token", "right")
    return Table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)), {})


def _causal(shape: Shape) -> Table:
    rows: list[tuple[Any, ...]] = [("nothing restored", "none", 0, 1.77, 4.01, 0.0, 0.0)]
    for group, kind, count, rise, general in (
        ("all trained neurons", "all", 100, 2.61, -0.39),
        ("highest tenth by score", "highest", 10, 0.42, -0.09),
        ("lowest tenth by score", "lowest", 10, 0.06, -0.01),
        ("random tenth", "random", 10, 0.11, -0.03),
    ):
        rows.append((group, kind, count, 1.77 + rise, 4.01 + general, rise, general))
    for layer in range(shape.num_layers):
        rise = 0.05 + 0.2 * layer / shape.num_layers
        rows.append((f"layer {layer}", "layer", 5, 1.77 + rise, 4.0, rise, -0.01))
    names = (
        "group",
        "kind",
        "num_neurons",
        "task_loss",
        "general_loss",
        "task_rise",
        "general_rise",
    )
    return Table(dict(zip(names, zip(*rows, strict=True), strict=True)), {"num_texts": 100})


def _overlap() -> Table:
    rows = []
    for percent, share in ((1, 0.31), (3, 0.44), (9, 0.62)):
        for one, other in (("this run", "second half"), ("this run", "early warm-up")):
            chance, jaccard = percent * 0.025, share / (2 - share)
            rows.append(
                (one, other, percent, 210, 210, 130, share, jaccard, chance, chance / 2, "")
            )
    rows.append(("this run", "second half", 9, 21, 21, 13, 0.62, 0.44, 0.2, 0.1, 3))
    names = ("a", "b", "percent", "num_a", "num_b", "num_both", "share", "jaccard")
    names += ("chance_share", "chance_jaccard", "layer")
    return Table(dict(zip(names, zip(*rows, strict=True), strict=True)), {})
