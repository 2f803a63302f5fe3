"""What a run will take, stage by stage, before it runs: memory, disk, and seconds a step.

Memory and disk follow from shapes, settings and the lengths of the texts, by the formulas in
``neft.sft.footprint``; seconds come from a few steps of the training itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neft.errors import ArchitectureError, RunError, UsageError
from neft.memory import available_memory, release_free_memory, resident_memory
from neft.pipeline.selection import choose, unscored, with_rank
from neft.pipeline.stages import needs_neurons, stage_names
from neft.projections import as_module, find_projections
from neft.recipe import (
    DataSection,
    HubData,
    LoraSection,
    ModelSection,
    ParallelFiles,
    Recipe,
    TrainingSection,
    WarmupSection,
)
from neft.sft.footprint import (
    WIDTHS,
    Batch,
    Footprint,
    Shape,
    Trained,
    activations,
    footprint,
    frozen_weights,
    held_bytes,
    loss_bytes,
    trained_tensors,
    vectors_bytes,
)

if TYPE_CHECKING:
    from torch import nn

    from neft.neurons import NeuronSet
    from neft.sft.prompts import Encoded
    from neft.sft.train import TrialResult

_FLOAT32 = 4
_FLOAT64 = 8
# A checkpoint's schedule, random state and settings.
_TRAINER_FILES = 30_000
# Measured (docs/estimate.md): buffers of threads and of matrix products, once something is computed.
_WORKING = 58_000_000


@dataclass(frozen=True)
class StageEstimate:
    """What one stage takes; sizes in bytes."""

    stage: str
    method: str
    num_trainable: int | None
    """Scalars that change; ``None`` where nothing is trained."""
    num_steps: int | None
    """Optimizer steps, or batches that are read."""
    longest_text: int | None
    """Tokens a text of the largest batch, padding included; ``None`` where texts are generated."""
    memory: Footprint
    process_bytes: int
    """What Python and its libraries hold; 0 on an accelerator."""
    peak_bytes: int
    disk_bytes: int
    """While it runs, at most."""
    kept_bytes: int
    """Once it is finished."""
    measured_peak_bytes: int | None
    """In the calibration; ``None`` where there was none, or nobody can tell."""
    seconds_per_step: float | None
    not_timed: str | None
    """Why there are no seconds a step, of a stage that has steps."""
    assumed: str | None
    """What the figures rest on where it cannot be known."""


def estimate(recipe: Recipe, *, calibrate: bool = True) -> list[StageEstimate]:
    """Estimate every stage of a recipe that takes more than moments.

    Args:
        recipe: the whole run. Model and data may be out of reach: then ``model.config`` tells the shape,
            and all texts are taken to be as long as ``data.max_length``.
        calibrate: take a few training steps, where the weights are here and fit in memory.

    Raises:
        UsageError: a model, data or budget that cannot be used.
    """
    return list(Estimator(recipe).stages(calibrate=calibrate))


def network_of(model: ModelSection) -> nn.Module:
    """The modules of a model without weights: of the checkpoint, else of ``model.config``.

    Raises:
        UsageError: neither can be read.
    """
    folder = Path(model.path).expanduser()
    if model.config is not None and not folder.is_dir():
        config = Path(model.config).expanduser()
        if not config.is_file():
            raise UsageError(f"model.config: {model.config}: no such file.")
        return as_module(config)
    return as_module(folder if folder.is_dir() else model.path)


class Estimator:
    """Estimates the stages of one recipe.

    Args:
        recipe: the whole run.
        network: its model's modules; default: ``network_of``.
        process_bytes: what this process holds without a model; default: as it is when first asked.
    """

    def __init__(
        self,
        recipe: Recipe,
        network: nn.Module | None = None,
        process_bytes: int | None = None,
    ) -> None:
        self._recipe = recipe
        self._network = network_of(recipe.model) if network is None else network
        self._given_process_bytes = process_bytes
        self._shape = Shape.of(self._network)

    @property
    def recipe(self) -> Recipe:
        """What is estimated."""
        return self._recipe

    @property
    def held_bytes(self) -> int:
        """What the stage ``train`` holds from step to step; activations come on top."""
        return held_bytes(self._shape, self.trained)

    def with_recipe(self, recipe: Recipe) -> Estimator:
        """The same for another recipe of the same model."""
        return Estimator(recipe, self._network, self._process_bytes)

    @property
    def names(self) -> list[str]:
        """The stages that can be estimated, in order; others take moments, or depend on these."""
        return [name for name in stage_names(self._recipe) if name in _ESTIMATED]

    def stages(self, *, calibrate: bool) -> Iterator[StageEstimate]:
        """All of these."""
        for name in self.names:
            yield self.stage(name, calibrate=calibrate)

    def stage(self, name: str, *, calibrate: bool = False) -> StageEstimate:
        """One of the stages ``baseline``, ``warmup``, ``score``, ``train`` and ``evaluate``.

        Raises:
            ArchitectureError: a model without attention.
            UsageError: data or a budget that cannot be used.
        """
        if not self._shape.num_heads:
            raise ArchitectureError(
                f"{type(self._network).__name__}: its configuration names no attention heads; what other "
                "layers keep cannot be estimated."
            )
        options = self._recipe.warmup
        if name == "train":
            return self._training(name, self._recipe.train, self.trained, calibrate)
        if name == "warmup":
            assert options is not None
            if not options.trains:
                return self._measuring(options)
            return self._training(name, options, self._warmed_up(options), calibrate)
        return self._scoring() if name == "score" else self._generating(name)

    # --- training -----------------------------------------------------------------------------------

    @cached_property
    def neurons(self) -> NeuronSet | None:
        """As many neurons as the recipe will choose, wherever they will lie."""
        if not needs_neurons(self._recipe):
            return None
        options = self._recipe.select
        assert options is not None
        candidates = unscored(self._network, self._recipe)
        chosen = choose(candidates, options)
        if not options.needs_scores:
            return chosen
        # Made-up scores would put them all into a few layers, with hardly anything to keep in the others.
        return candidates.select(count=len(chosen), which="random")

    @cached_property
    def trained(self) -> Trained:
        """What the stage ``train`` trains."""
        train, neurons = self._recipe.train, self.neurons
        lora = train.lora and with_rank(train.lora, self._network, self._recipe)
        return self._what_trains(train.method, train, neurons, lora)

    def _warmed_up(self, options: WarmupSection) -> Trained:
        lora = LoraSection(rank=options.rank) if options.method == "lora" else None
        return self._what_trains(options.method, options, None, lora)

    def _what_trains(
        self,
        method: str,
        options: TrainingSection,
        neurons: NeuronSet | None,
        lora: LoraSection | None,
    ) -> Trained:
        return Trained(
            method,
            self._recipe.model.dtype,
            options,
            trained_tensors(self._network, method, neurons, lora),
            neurons,
            lora,
            self._recipe.model.attn_implementation,
            self._recipe.model.quantization,
        )

    def _training(
        self, stage: str, options: TrainingSection, trained: Trained, calibrate: bool
    ) -> StageEstimate:
        texts = self._texts(stage, options)
        memory = footprint(self._shape, trained, texts.worst, on_cpu=self._on_cpu)
        result = self._result_bytes(trained)
        num_steps = texts.num_steps
        found = self._finished(
            stage,
            trained.method,
            memory,
            num_trainable=trained.num_trainable,
            num_steps=num_steps,
            longest_text=texts.worst.length,
            disk_bytes=self._checkpoints_bytes(trained, result, num_steps),
            kept_bytes=result + self._snapshots_bytes(options),
            assumed=texts.assumed,
        )
        return self._calibrated(found, options, trained, texts, calibrate)

    def _result_bytes(self, trained: Trained) -> int:
        """A float32 checkpoint with its tokenizer; or an adapter: vectors, and a bit a candidate."""
        if not trained.makes_adapter:
            return _FLOAT32 * self._shape.num_parameters + self._tokenizer_bytes
        bits = 0
        if trained.neurons is not None:
            bits = sum(p.num_neurons for p in trained.neurons.projections.values())
        # In base64, which takes four bytes for three.
        return _FLOAT32 * trained.num_scalars + bits // 6

    @cached_property
    def _tokenizer_bytes(self) -> int:
        folder = Path(self._recipe.model.path).expanduser()
        return sum(file.stat().st_size for file in folder.glob("*token*.json"))

    def _checkpoints_bytes(self, trained: Trained, result: int, num_steps: int | None) -> int:
        """At most: the best weights, the last checkpoint, and the next while it is written."""
        options = trained.options
        states = trained.optimizer_states + _TRAINER_FILES
        if trained.makes_adapter:
            states += self._tokenizer_bytes  # a model's result has it already
        num_saves = 3 if num_steps is None else math.ceil(num_steps / options.evaluate_every)
        best = result if num_saves > 2 else 0
        return min(num_saves, 2) * (result + states) + best + self._snapshots_bytes(options)

    def _snapshots_bytes(self, options: TrainingSection) -> int:
        snapshots = options.snapshots if isinstance(options, WarmupSection) else ()
        return len(snapshots) * (_FLOAT32 * self._shape.num_parameters + self._tokenizer_bytes)

    def _calibrated(
        self,
        found: StageEstimate,
        options: TrainingSection,
        trained: Trained,
        texts: _Texts,
        calibrate: bool,
    ) -> StageEstimate:
        if reason := self._why_not(found, texts, calibrate):
            return replace(found, not_timed=reason)
        try:
            trial = _try(self._recipe, options, trained, texts)
        except (UsageError, RunError) as error:
            return replace(found, not_timed=str(error))  # what was estimated holds all the same
        # The first step sets up, the second is the worst.
        seconds = trial.seconds[2:]
        return replace(
            found,
            seconds_per_step=sum(seconds) / len(seconds),
            measured_peak_bytes=trial.peak_memory_bytes,
        )

    def _why_not(self, found: StageEstimate, texts: _Texts, calibrate: bool) -> str | None:
        if not self.is_here:
            return "the weights are not on this machine"
        if texts.encoded is None:
            return "the data are not on this machine"
        there = available_memory()
        if there is not None and found.peak_bytes - found.process_bytes > there.free:
            return f"the {there.place} has only {there.free / 1e9:.1f} GB free"
        return None if calibrate else "--calibrate would take a few steps"

    # --- other stages -------------------------------------------------------------------------------

    def _measuring(self, options: WarmupSection) -> StageEstimate:
        """Forward passes, and for ``gradient`` a sum of signs and one gradient at a time."""
        texts = self._texts("warmup", options)
        projections = find_projections(self._network, self._recipe.score.modules)
        if options.method == "activation":
            sums = _FLOAT64 * sum(p.num_neurons for p in projections)
            memory = self._forward(texts.worst)
        else:
            scalars = [math.prod(p.weight_shape) for p in projections]
            sums = sum(scalars) * _sign_width(texts.num_batches)
            memory = self._backward(options, texts.worst, max(scalars))
        memory = replace(memory, optimizer=sums, peak=memory.peak + sums)
        return self._finished(
            "warmup",
            options.method,
            memory,
            num_steps=texts.num_batches,
            longest_text=texts.worst.length,
            disk_bytes=2 * sums,
            kept_bytes=sums,
            assumed=texts.assumed,
        )

    def _backward(self, options: TrainingSection, batch: Batch, largest: int) -> Footprint:
        in_out = self._what_trains("in_out", options, None, None)
        # Weights stay in their own dtype: no masters, no states, one gradient.
        frozen = replace(in_out, tensors=[(largest,)])
        kept, loss = activations(self._shape, frozen, batch), loss_bytes(self._shape, batch)
        weights, gradient = self._frozen_weights, frozen.width * largest
        return Footprint(
            weights, 0, gradient, 0, kept, loss, 0, weights + max(kept + loss, kept + gradient)
        )

    @property
    def _frozen_weights(self) -> int:
        model = self._recipe.model
        return frozen_weights(self._shape, model.dtype, model.quantization)

    def _forward(self, batch: Batch, cache: int = 0, logits: int = 0) -> Footprint:
        """One layer's tensors at a time, whatever else is kept."""
        weights = self._frozen_weights
        per_token = 3 * self._shape.intermediate + 4 * self._shape.hidden
        kept = cache + WIDTHS[self._recipe.model.dtype] * batch.num_tokens * per_token
        return Footprint(weights, 0, 0, 0, kept, logits, 0, weights + kept + logits)

    def _generating(self, stage: str) -> StageEstimate:
        """Keys and values of prompt and answer in all layers; the prompt itself passes at once."""
        options = self._recipe.evaluate
        num_texts = options.batch_size * options.num_beams
        length = self._longest_prompt + options.max_new_tokens
        width = WIDTHS[self._recipe.model.dtype]
        cache = 2 * width * self._shape.keys * self._shape.num_layers * num_texts * length
        logits = 2 * _FLOAT32 * num_texts * self._shape.vocabulary
        memory = self._forward(Batch(options.batch_size, self._longest_prompt, 0), cache, logits)
        if stage == "evaluate":
            vectors = vectors_bytes(self.trained)
            memory = replace(memory, vectors=vectors, peak=memory.peak + vectors)
        return self._finished(stage, "generate", memory)

    def _scoring(self) -> StageEstimate:
        """Two matrices and blocks of them in float64; a merged LoRA is a whole model in memory."""
        recipe, options = self._recipe, self._recipe.warmup
        candidates = _FLOAT64 * len(unscored(self._network, recipe))
        if recipe.score.method == "probe":
            memory = self._forward(
                Batch(recipe.score.probing.batch_size, recipe.data.max_length, 0)
            )
            states = _FLOAT64 * recipe.score.probing.limit * self._shape.hidden
            states *= self._shape.num_layers
            memory = replace(memory, activations=states, peak=memory.peak + states)
            return self._finished("score", "probe", memory, kept_bytes=candidates)
        assert options is not None
        matrices = 2 * _FLOAT32 * self._shape.largest
        is_merged = options.method == "lora"
        weights = _FLOAT32 * self._shape.num_parameters * is_merged + matrices
        memory = Footprint(weights, 0, 0, 0, 0, 0, 0, weights)
        method = "cosine" if options.method in ("full", "lora", "none") else options.method
        return self._finished("score", method, memory, kept_bytes=candidates)

    # --- common -------------------------------------------------------------------------------------

    @property
    def is_here(self) -> bool:
        """Whether the weights are on this machine."""
        return Path(self._recipe.model.path).expanduser().is_dir()

    @property
    def _on_cpu(self) -> bool:
        """Where the weights are not here, they are meant for a machine with an accelerator."""
        import torch

        return self.is_here and not torch.accelerator.is_available()

    @cached_property
    def _process_bytes(self) -> int:
        """What is held without a model; an accelerator counts tensors alone."""
        if not self._on_cpu:
            return 0
        if self._given_process_bytes is not None:
            return self._given_process_bytes
        # It brings all libraries with it that training needs.
        import neft.sft.train  # noqa: F401

        release_free_memory()
        return (resident_memory() or 0) + _WORKING

    @property
    def _longest_prompt(self) -> int:
        return self._recipe.data.max_length

    def _finished(
        self,
        stage: str,
        method: str,
        memory: Footprint,
        *,
        num_trainable: int | None = None,
        num_steps: int | None = None,
        longest_text: int | None = None,
        disk_bytes: int | None = None,
        kept_bytes: int = 0,
        assumed: str | None = None,
    ) -> StageEstimate:
        return StageEstimate(
            stage=stage,
            method=method,
            num_trainable=num_trainable,
            num_steps=num_steps,
            longest_text=longest_text,
            memory=memory,
            process_bytes=self._process_bytes,
            peak_bytes=self._process_bytes + memory.peak,
            disk_bytes=kept_bytes if disk_bytes is None else disk_bytes,
            kept_bytes=kept_bytes,
            measured_peak_bytes=None,
            seconds_per_step=None,
            not_timed=None,
            assumed=assumed,
        )

    def _texts(self, stage: str, options: TrainingSection) -> _Texts:
        recipe, warmup = self._recipe, self._recipe.warmup
        data, seed = recipe.data, recipe.seed
        if stage == "warmup":
            assert warmup is not None
            data, seed = warmup.data_of(data), warmup.seed_of(seed)
        return _Texts(recipe.model, data, options, seed, is_here=self.is_here)


def _sign_width(num_batches: int | None) -> int:
    """Bytes of a sum of signs over so many batches; of one that cannot be known, two."""
    if num_batches is None:
        return 2
    return 1 if num_batches < 2**7 else 2 if num_batches < 2**15 else 4


_ESTIMATED = ("baseline", "warmup", "score", "train", "evaluate")


class _Texts:
    """The batches that a training run reads, as far as they can be known."""

    def __init__(
        self,
        model: ModelSection,
        data: DataSection,
        options: TrainingSection,
        seed: int,
        *,
        is_here: bool,
    ) -> None:
        self._options = options
        self._max_length = data.max_length
        self._seed = seed
        self.encoded = _encoded(model, data) if is_here and _is_local(data.train) else None

    @cached_property
    def batches(self) -> list[list[int]]:
        """Positions of the examples of every batch, the smallest batches first."""
        from neft.sft.batches import batches_of

        assert self.encoded is not None
        return sorted(batches_of(self.encoded, self._options, self._seed), key=self._num_tokens)

    def _num_tokens(self, batch: Sequence[int]) -> int:
        return len(batch) * max(self._length(position) for position in batch)

    def _length(self, position: int) -> int:
        assert self.encoded is not None
        return len(self.encoded.input_ids[position])

    @cached_property
    def worst(self) -> Batch:
        """The largest batch; with as many targets as any has."""
        from neft.sft.prompts import IGNORED

        size = self._options.batch_size
        if self.encoded is None:
            return Batch(size, self._max_length, size * self._max_length)
        labels = self.encoded.labels
        targets = [sum(label != IGNORED for label in row) for row in labels]
        largest = self.batches[-1]
        return Batch(
            len(largest),
            max(map(self._length, largest)),
            max(sum(targets[position] for position in batch) for batch in self.batches),
            is_padded=size > 1,
        )

    @property
    def num_steps(self) -> int | None:
        """Of the run; ``None`` where that depends on data that are out of reach."""
        options = self._options
        if options.steps is not None:
            return options.steps
        if self.encoded is None:
            return None
        examples = options.batch_size * options.gradient_accumulation
        assert options.epochs is not None
        return math.ceil(options.epochs * math.ceil(len(self.encoded) / examples))

    @property
    def num_batches(self) -> int | None:
        """That are read where nothing is trained; ``None`` likewise."""
        if self.encoded is not None:
            return len(self.batches)
        steps, together = self._options.steps, self._options.gradient_accumulation
        return None if steps is None else steps * together

    @property
    def assumed(self) -> str | None:
        """What stands in for texts that are out of reach."""
        if self.encoded is not None:
            return None
        return f"texts of {self._max_length} tokens, all of them targets"

    def sample(self) -> Encoded:
        """Batches for a trial: a middling one, the largest, and some between, in the order to read."""
        from neft.sft.prompts import Encoded

        assert self.encoded is not None
        last, together = len(self.batches) - 1, self._options.gradient_accumulation
        chosen = [
            position
            for share in (0.5, 1.0, 0.5, 0.25, 0.75)
            for start in [max(0, min(round(share * last), last + 1 - together))]
            for number in range(start, start + together)
            # A short run may have fewer batches than it accumulates.
            for position in self._filled(self.batches[number % len(self.batches)])
        ]
        rows = [(self.encoded.input_ids[i], self.encoded.labels[i]) for i in chosen]
        return Encoded([ids for ids, _ in rows], [labels for _, labels in rows], 0, 0)

    def _filled(self, batch: Sequence[int]) -> Sequence[int]:
        """The last batch of an epoch may be smaller; the trial's are all of one size."""
        return [batch[number % len(batch)] for number in range(self._options.batch_size)]


def _is_local(source: Any) -> bool:
    files = [source.source, source.target] if isinstance(source, ParallelFiles) else [source]
    return not isinstance(source, HubData) and all(
        Path(file).expanduser().is_file() for file in files
    )


def _encoded(model: ModelSection, data: DataSection) -> Encoded:
    return _encoded_once(model.model_dump_json(), data.model_dump_json())


@lru_cache(maxsize=2)
def _encoded_once(model: str, data: str) -> Encoded:
    """The training split, of sections as JSON; several stages and settings have the same."""
    from neft.models import load_tokenizer
    from neft.sft.data import load_examples
    from neft.sft.prompts import encode_all

    section = DataSection.model_validate_json(data)
    tokenizer = load_tokenizer(ModelSection.model_validate_json(model))
    return encode_all(load_examples(section, "train"), tokenizer, section)


_PATIENCE = 8.0
"""Seconds of training steps in a calibration, about."""


def _try(recipe: Recipe, options: TrainingSection, trained: Trained, texts: _Texts) -> TrialResult:
    from neft.sft.train import try_steps

    release_free_memory()
    return try_steps(
        recipe.model,
        options,
        texts.sample(),
        method=trained.method,
        neurons=trained.neurons,
        lora=trained.lora,
        patience=_PATIENCE,
    )
