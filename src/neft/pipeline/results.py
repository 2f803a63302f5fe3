"""What a run found out: the base model beside the trained one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neft.evaluation import Score
from neft.files import write_json
from neft.pipeline.evaluate import PREDICTIONS, read_evaluation, read_predictions

RESULTS = "results.json"
TRAINING = "training.json"
_NUM_SAMPLES = 3


@dataclass(frozen=True)
class Sample:
    """One test example before and after training."""

    prompt: str
    reference: str
    base: str
    trained: str


@dataclass(frozen=True)
class Results:
    """The content of ``results.json``."""

    method: str
    num_examples: int
    """Of the test split."""
    base: Mapping[str, Score]
    """Metric -> score of the model before training."""
    trained: Mapping[str, Score]
    base_general_loss: float | None
    """Mean loss of a token of held-out general text, in nats, where the recipe names one."""
    trained_general_loss: float | None
    num_trainable: int
    num_parameters: int
    """Of the base model."""
    num_steps: int
    best_step: int
    best_dev_loss: float
    """Mean loss of a target token, in nats."""
    seconds_per_step: float
    artifact: str
    """The adapter or model that was trained, relative to the folder of the run."""
    artifact_bytes: int
    samples: tuple[Sample, ...]
    """Spread evenly over the test split, so that nobody chose them."""
    peak_memory_bytes: int | None
    """During a training step: on the accelerator, else of the process; ``None`` where nobody can tell."""

    @property
    def percent_trainable(self) -> float:
        """Trained parameters in percent of the base model's."""
        return 100.0 * self.num_trainable / self.num_parameters


def collect_results(method: str, baseline: Path, train: Path, evaluation: Path) -> Results:
    """Write ``results.json`` into ``evaluation``.

    Args:
        method: how the model was trained.
        baseline: folder of the base model's evaluation.
        train: folder of the training run.
        evaluation: folder of the trained model's evaluation.
    """
    training = _read_object(train / TRAINING)
    artifact = trained_artifact(train)
    num_bytes = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    base, trained = read_evaluation(baseline), read_evaluation(evaluation)
    results = Results(
        method=method,
        num_examples=trained.num_examples,
        base=base.scores,
        trained=trained.scores,
        base_general_loss=base.general_loss,
        trained_general_loss=trained.general_loss,
        artifact=f"{train.name}/{artifact.name}",
        artifact_bytes=num_bytes,
        samples=_samples(baseline, evaluation),
        **{name: training[name] for name in _FROM_TRAINING},
    )
    write_json(evaluation / RESULTS, asdict(results))
    return results


def trained_artifact(train: Path) -> Path:
    """The adapter or model in the folder of a finished training run."""
    name: str = _read_object(train / TRAINING)["result"]
    return train / name


_FROM_TRAINING = (
    "num_trainable",
    "num_parameters",
    "num_steps",
    "best_step",
    "best_dev_loss",
    "seconds_per_step",
    "peak_memory_bytes",
)


def read_results(path: Path) -> Results:
    """Read what ``collect_results`` wrote."""
    fields = _read_object(path)
    return Results(
        **fields
        | {
            "base": _scores(fields["base"]),
            "trained": _scores(fields["trained"]),
            "samples": tuple(Sample(**sample) for sample in fields["samples"]),
        }
    )


def _samples(baseline: Path, evaluation: Path) -> tuple[Sample, ...]:
    before = read_predictions(baseline / PREDICTIONS)
    after = read_predictions(evaluation / PREDICTIONS)
    pairs = list(zip(before, after, strict=True))
    count = min(_NUM_SAMPLES, len(pairs))
    middles = [(2 * part + 1) * len(pairs) // (2 * count) for part in range(count)]
    return tuple(
        Sample(old.prompt, old.reference, old.prediction, new.prediction)
        for old, new in (pairs[position] for position in middles)
    )


def _scores(fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Score]:
    return {name: Score(**score) for name, score in fields.items()}


def _read_object(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return fields
