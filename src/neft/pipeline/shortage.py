"""Where memory runs out: what a stage was estimated to take, and which settings lower that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from neft import processes
from neft.errors import NeftError, UsageError
from neft.memory import available_memory, is_shortage
from neft.pipeline.estimate import Estimator, StageEstimate
from neft.recipe import Recipe, TrainingSection, checked

_MEGABYTE = 10**6
# What lowers the peak by less is no remedy.
_WORTH_TELLING = 0.02


@dataclass(frozen=True)
class Remedy:
    """Settings that lower the memory of a stage."""

    settings: Mapping[str, Any]
    """``section.key`` -> value."""
    saved_bytes: int
    """Of the peak, by the same estimate."""

    def __str__(self) -> str:
        given = " ".join(f"--set {key}={_as_yaml(value)}" for key, value in self.settings.items())
        return f"{given}  ({_megabytes(self.saved_bytes)} less)"


def explain_shortage(recipe: Recipe, stage: str) -> str:
    """The estimate of a stage by part, what the machine has, and what helps, most first."""
    return "\n".join([*_estimate(recipe, stage), *_machine()])


def _estimate(recipe: Recipe, stage: str) -> list[str]:
    if (several := processes.num_processes()) > 1 and _trains(recipe, stage):
        return [
            f"What {several} processes take together is not estimated. Each takes less with a smaller "
            f"{stage}.batch_size, with {stage}.gradient_checkpointing, or with distributed.engine fsdp2."
        ]
    try:
        estimator = Estimator(recipe)
        if stage not in estimator.names:
            return []
        found = estimator.stage(stage)
        remedies = remedies_of(estimator, found)
    except Exception as error:
        # The shortage is the message; what cannot be found out about it must not hide it.
        if not isinstance(error, NeftError) and not is_shortage(error):
            raise
        return [f"What it takes cannot be estimated: {error}"]
    lines = [_estimated(found)]
    if remedies:
        lines += ["What helps, most first:", *(f"  {remedy}" for remedy in remedies)]
    return lines


def _trains(recipe: Recipe, stage: str) -> bool:
    """Whether all processes of a launch share the stage; the first does the others alone."""
    warms_up = recipe.warmup is not None and recipe.warmup.trains
    return stage == "train" or (stage == "warmup" and warms_up)


def remedies_of(estimator: Estimator, now: StageEstimate) -> list[Remedy]:
    """Settings each of which alone lowers the memory of a stage, the most effective first.

    Args:
        estimator: of the recipe as it is now.
        now: the stage, by that.
    """
    recipe, found = estimator.recipe, []
    for settings in _candidates(recipe, now):
        try:
            changed = checked(Recipe, _changed(recipe, settings), "changed recipe")
            less = estimator.with_recipe(changed).stage(now.stage)
        except UsageError:
            continue  # it does not go with the rest of the recipe
        saved = now.peak_bytes - less.peak_bytes
        if saved > _WORTH_TELLING * now.peak_bytes:
            found.append(Remedy(settings, saved))
    return sorted(found, key=lambda remedy: -remedy.saved_bytes)


def _candidates(recipe: Recipe, now: StageEstimate) -> Iterator[dict[str, Any]]:
    stage, longest = now.stage, now.longest_text or recipe.data.max_length
    if recipe.model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}
    if stage == "warmup":
        assert recipe.warmup is not None
        yield from _of_training(stage, recipe.warmup, longest)
        if recipe.warmup.trains:
            yield {"warmup.method": "gradient"}
            yield {"warmup.method": "activation"}
    elif stage == "train":
        yield from _of_training(stage, recipe.train, longest)
        if recipe.train.method == "mask":
            yield {"train.method": "neft"}
    else:
        yield from _of_generation(recipe)


def _of_training(section: str, options: TrainingSection, longest: int) -> Iterator[dict[str, Any]]:
    if options.batch_size > 1:
        # Accumulated gradients make the same step of smaller batches.
        half = {f"{section}.batch_size": options.batch_size // 2}
        if not options.in_backward:
            half[f"{section}.gradient_accumulation"] = 2 * options.gradient_accumulation
        yield half
    yield {f"{section}.gradient_checkpointing": True}
    yield {"data.max_length": max(1, longest // 2)}
    yield {f"{section}.optimizer": "adafactor"}
    if options.gradient_accumulation == 1:
        yield {f"{section}.in_backward": True}
        yield {f"{section}.optimizer": "adafactor", f"{section}.in_backward": True}


def _of_generation(recipe: Recipe) -> Iterator[dict[str, Any]]:
    options = recipe.evaluate
    yield {"evaluate.batch_size": max(1, options.batch_size // 2)}
    yield {"evaluate.num_beams": 1}
    yield {"evaluate.max_new_tokens": max(1, options.max_new_tokens // 2)}


def _changed(recipe: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the recipe with other settings, unchecked."""
    fields = recipe.model_dump()
    for place, value in settings.items():
        section, key = place.split(".")
        fields[section][key] = value
    return fields


def _estimated(found: StageEstimate) -> str:
    memory = found.memory
    parts = {
        "weights": memory.weights,
        "vectors": memory.vectors,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "loss": memory.loss,
        "Python and libraries": found.process_bytes,
        "freed but not given back": memory.kept_back,
    }
    told = ", ".join(f"{name} {_megabytes(size)}" for name, size in parts.items() if size)
    return f"Estimated: {_megabytes(found.peak_bytes)} at the peak ({told})."


def _machine() -> list[str]:
    there = available_memory()
    if there is None:
        return []
    total, free = _megabytes(there.total), _megabytes(there.free)
    return [f"The {there.place} has {total}, of which {free} are free now."]


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / _MEGABYTE:,.0f} MB"


def _as_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
