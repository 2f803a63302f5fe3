"""Finding neurons by themselves, without the rest of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from neft.checkpoints import open_weights
from neft.errors import UsageError
from neft.neurons import NeuronScores
from neft.pipeline.adapter import CONFIG
from neft.pipeline.run import LOCK, Say, run_stages
from neft.pipeline.scoring import merged
from neft.pipeline.selection import SCORES
from neft.pipeline.stages import finding_stages
from neft.pipeline.store import StageFolder
from neft.projections import find_candidates
from neft.recipe import ModelSection, Recipe, load_recipe


def find_in_weights(
    before: str | None, after: str | None, method: str, modules: Sequence[str] | None
) -> NeuronScores:
    """Score the neurons of checkpoints that are there, without data.

    Args:
        before: the original checkpoint: a folder or Hub id.
        after: for ``cosine``, the same after fine-tuning, or the folder of an adapter for it.
        method: ``cosine`` or ``norm``.
        modules: projections to score; default: up and down.

    Raises:
        UsageError: checkpoints missing or superfluous, or a method that needs data.
    """
    from neft.scoring import score_by_norm, score_neurons

    if method not in ("cosine", "norm"):
        raise UsageError(
            f"--method {method} reads data: name a recipe with --recipe, e.g. recipes/demo.yaml."
        )
    wanted = 2 if method == "cosine" else 1
    given = [path for path in (before, after) if path is not None]
    if before is None or len(given) != wanted:
        raise UsageError(
            f"--method {method} scores {wanted} checkpoint{'s' * (wanted > 1)}; {len(given)} given."
        )
    if after is None:
        return score_by_norm(before, modules)
    if (Path(after).expanduser() / CONFIG).is_file():
        tuned = merged(ModelSection(path=before), Path(after))
        return score_neurons(before, tuned, modules, exact_start=True)
    return score_neurons(before, after, modules)


def with_method(
    recipe: Path, settings: Sequence[str], method: str | None, modules: Sequence[str] | None
) -> Recipe:
    """Read a recipe whose neurons are to be found by ``method``, or as it says itself.

    Raises:
        RecipeError: the recipe has faults, or says nothing about finding neurons.
        UsageError: a method that is none of a recipe's.
    """
    if method == "cosine":
        raise UsageError(
            "--method cosine compares two checkpoints. With --recipe, say how the second comes about: "
            "full or lora."
        )
    found = list(settings)
    if method == "probe":
        found.append("score.method=probe")
    elif method is not None:
        found += ["score.method=cosine", f"warmup.method={method}"]
    if modules:
        found.append(f"score.modules={json.dumps(list(modules))}")
    loaded = load_recipe(recipe, found)
    if loaded.warmup is None and loaded.score.needs_warmup:
        raise UsageError(f"{recipe}: has no section warmup, so there is no way to find neurons.")
    return loaded


def find(recipe: Recipe, file: Path, *, say: Say) -> NeuronScores:
    """Do the warm-up and the scoring of a recipe; its output folder is not touched.

    A call that was killed goes on where it was.

    Args:
        recipe: says how.
        file: gets the scores; until it is there, a hidden folder beside it holds the warm-up.
        say: is told what happens.

    Raises:
        UsageError: input that cannot be used.
        RunError: a run that broke down, or another process that works on the same file.
    """
    file = file.expanduser().resolve()
    folder = file.with_name(f".{file.name}.work")
    model = recipe.model
    find_candidates(open_weights(model.path, model.revision).network, recipe.score.modules)
    stages = finding_stages(recipe)
    folders = {stage.name: StageFolder(folder / stage.name) for stage in stages}
    run_stages(stages, folders, folder / LOCK, overwrite=True, say=say)
    scores = NeuronScores.load(folders["score"].path / SCORES)
    scores.save(file)
    shutil.rmtree(folder)
    return scores
