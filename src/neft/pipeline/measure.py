"""A warm-up that trains nothing: the base model reads what a fine-tune would, and is watched."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from neft.files import replaced_atomically, write_json
from neft.memory import peak_memory, reset_peak_memory
from neft.neurons import Projection
from neft.pipeline.evaluate import device
from neft.projections import find_candidates
from neft.recipe import Recipe, WarmupSection

if TYPE_CHECKING:
    from torch import Tensor, nn

    from neft.scoring.activation import ActivationSums
    from neft.scoring.gradient import GradientSigns

    Sums: TypeAlias = GradientSigns | ActivationSums

MEASURED = "measured.safetensors"
"""What was summed up; a killed warm-up goes on from it."""
RECORD = "measured.json"
"""What it took."""
_STATE = "neft-measured"


@dataclass
class _Progress:
    """How far it has got, and the content of ``measured.json`` in the end."""

    method: str
    num_batches: int = 0
    count: int = 0
    """Batches or tokens, whichever the sums are over."""
    seconds_per_batch: float = 0.0
    """Median."""
    peak_memory_bytes: int | None = None
    """On the accelerator, else of the whole process; ``None`` where nobody can tell."""
    examples: dict[str, int] = field(default_factory=dict)


def measure(recipe: Recipe, options: WarmupSection, working: Path) -> None:
    """Let the base model read the warm-up's batches, and sum up what ``options.method`` looks at.

    Sums are kept every ``evaluate_every`` batches, and when a signal stops it: the same call goes on.

    Raises:
        UsageError: a model or data that cannot be used.
        RunError: a loss, gradient or activation that is not finite, or too little memory.
        KeyboardInterrupt: after SIGINT or SIGTERM.
    """
    from neft.models import load_model, load_tokenizer
    from neft.sft.batches import batches_of, padded
    from neft.sft.callbacks import StopOnSignal
    from neft.sft.prompts import load_encoded

    encoded = load_encoded(options.data_of(recipe.data), "train", load_tokenizer(recipe.model))
    batches = batches_of(encoded, options, options.seed_of(recipe.seed))
    model = load_model(recipe.model).to(device())
    if options.gradient_checkpointing:
        _checkpoint_layers(model)
    file = working / MEASURED
    sums, progress = _resumed(file) or _begun(recipe, options, model, len(batches))
    progress.examples = encoded.counts
    seconds: list[float] = []
    reset_peak_memory()
    with StopOnSignal() as stop, _shown(len(batches)) as show:
        for number in range(progress.num_batches, len(batches)):
            show(number)
            start = time.perf_counter()
            batch = padded(encoded, batches[number])
            sums.add(model, [{name: rows.to(model.device) for name, rows in batch.items()}])
            seconds.append(time.perf_counter() - start)
            is_last = stop.stopped or number + 1 == len(batches)
            if is_last or (number + 1) % options.evaluate_every == 0:
                progress.num_batches = number + 1
                progress.count = sums.count
                progress.seconds_per_batch = statistics.median(seconds)
                peaks = (progress.peak_memory_bytes, peak_memory())
                progress.peak_memory_bytes = max((p for p in peaks if p is not None), default=None)
                _save(sums, progress, file)
            if stop.stopped:
                raise KeyboardInterrupt
    write_json(working / RECORD, asdict(progress))


def _checkpoint_layers(model: nn.Module) -> None:
    """Keep the layers' inputs alone for the backward pass, and compute the rest again."""
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            # The model's own switch works in training mode alone, which turns dropout on.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def read_measured(warmup: Path) -> Sums:
    """What a finished warm-up summed up."""
    found = _resumed(warmup / MEASURED)
    assert found is not None, warmup
    return found[0]


def _begun(
    recipe: Recipe, options: WarmupSection, model: Any, num_batches: int
) -> tuple[Sums, _Progress]:
    from neft.scoring.activation import ActivationSums
    from neft.scoring.gradient import GradientSigns

    projections = find_candidates(model, recipe.score.modules)
    progress = _Progress(options.method)
    if options.method == "activation":
        return ActivationSums.nothing_yet(projections), progress
    return GradientSigns.nothing_yet(projections, num_batches, _mean_loss), progress


def _mean_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """As training has it: of the batch's target tokens."""
    from neft.sft.loss import target_loss

    total, count = target_loss(model, batch, model.get_output_embeddings())
    return total / count


def _save(sums: Sums, progress: _Progress, file: Path) -> None:
    from safetensors.torch import save_file

    with replaced_atomically(file) as part:
        state = asdict(progress) | {"projections": [p.to_dict() for p in sums.projections]}
        save_file(sums.sums, part, {_STATE: json.dumps(state)})


def _resumed(file: Path) -> tuple[Sums, _Progress] | None:
    """What an attempt before has left, if anything."""
    from safetensors import safe_open

    from neft.scoring.activation import ActivationSums
    from neft.scoring.gradient import GradientSigns

    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as stored:
        state = json.loads(stored.metadata()[_STATE])
        projections = [Projection.from_dict(fields) for fields in state.pop("projections")]
        progress = _Progress(**state)
        sums = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    if progress.method == "activation":
        return ActivationSums(projections, sums, progress.count), progress
    return GradientSigns(projections, sums, progress.count, _mean_loss), progress


@contextmanager
def _shown(num_batches: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, if that is a terminal; is told how many batches are done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Measuring", total=num_batches)
        yield lambda done: bar.update(task, completed=done)
