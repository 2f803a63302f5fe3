"""One training run, from options to a checkpoint or an adapter; killed and called again, it goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import neft
from neft import processes
from neft.errors import RunError, UsageError
from neft.files import file_identity, write_json
from neft.memory import naming_shortage
from neft.models import load_model, load_tokenizer, quiet_transformers
from neft.neurons import NeuronSet
from neft.products import faster_linear
from neft.recipe import DataSection, DistributedSection, LoraSection, ModelSection, TrainingSection
from neft.sft.batches import FILLER
from neft.sft.callbacks import (
    MeasureSteps,
    SealCheckpoints,
    ShowProgress,
    StopEarly,
    StopOnSignal,
)
from neft.sft.engines import check_engine, engine_at_work, engine_name, engine_settings, share
from neft.sft.in_backward import StepInBackward
from neft.sft.methods import METHODS, check_inputs, prepare
from neft.sft.prompts import Encoded, load_encoded
from neft.sft.resume import (
    CHECKPOINTS,
    checkpoint_folder,
    discard_torn,
    last_checkpoint,
    link_weights,
    read_state,
)
from neft.sft.trainer import TargetTrainer

_log = logging.getLogger(__name__)

# As the trainer calls them.
_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adafactor": "adafactor"}

RECORD = "training.json"
"""Written last: a run is finished when its folder has it."""
_HISTORY = ("step", "loss", "grad_norm", "learning_rate")
SNAPSHOTS = "snapshots"
"""Holds a folder like the result for each step whose weights were to be kept."""
_BY_DEFAULT = DistributedSection()


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run leaves."""

    path: Path
    """A float32 checkpoint with its tokenizer, or a PEFT adapter: the best by development loss."""
    num_steps: int
    best_step: int
    best_dev_loss: float
    """Mean loss of a target token, in nats."""
    seconds_per_step: float
    """Median over the optimizer steps."""
    peak_memory_bytes: int | None
    """During a step: on the accelerator, else of the whole process; ``None`` where nobody can tell."""
    num_trainable: int
    num_parameters: int
    """Of the base model."""
    history: dict[str, list[dict[str, float]]]
    """``train``: step, loss, gradient norm and learning rate of every step, but no norm with
    ``in_backward``; ``dev``: step and loss."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Everything that one call determines."""

    model: ModelSection
    options: TrainingSection
    method: str
    neurons: NeuronSet | None = None
    lora: LoraSection | None = None
    seed: int = 0
    folder: Path
    snapshots: tuple[int, ...] = ()
    distributed: DistributedSection = _BY_DEFAULT
    tokenizer: PreTrainedTokenizerBase
    train: Encoded
    dev: Encoded

    @property
    def crew(self) -> dict[str, Any]:
        """Who trains. Only the same can go on from a checkpoint: shares of the state are theirs."""
        return {
            "num_processes": processes.num_processes(),
            "engine": engine_name(self.distributed),
        }

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def plan(self) -> Path:
        return self.checkpoints / "plan.json"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the result depends on, as plain JSON values."""
        neurons = self.neurons and self.neurons.to_dict()["projections"]
        return {
            "method": self.method,
            "seed": self.seed,
            "model": _model_identity(self.model),
            # A recipe's sections add fields to these, all of which are here by themselves.
            "training": self.options.model_dump(
                mode="json", include=set(TrainingSection.model_fields) - {"report_to"}
            ),
            "neurons": neurons and _digest(neurons),
            "lora": self.lora and _lora_identity(self.lora),
            "snapshots": list(self.snapshots),
            "train": _digest([self.train.input_ids, self.train.labels]),
            "dev": _digest([self.dev.input_ids, self.dev.labels]),
        }


def train(
    model: ModelSection,
    data: DataSection,
    options: TrainingSection,
    *,
    method: str,
    neurons: NeuronSet | None = None,
    lora: LoraSection | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str],
    snapshots: Sequence[int] = (),
    distributed: DistributedSection = _BY_DEFAULT,
) -> TrainingResult:
    """Fine-tune ``model`` and keep the weights with the lowest development loss.

    Within a process group (``neft.processes``), all its processes must call this, and share the work.

    A run that was killed, at any moment, is continued by the same call from its last whole checkpoint,
    and ends with the same bits as an unbroken one where the platform is deterministic (the CPU is).
    SIGINT and SIGTERM leave a checkpoint of the step they come in. A finished run is not repeated.

    Methods that make no adapter train float32 weights, with matrix products in ``model.dtype``;
    adapters train float32 tensors over weights frozen in ``model.dtype``.

    Args:
        model: the base model.
        data: examples, and how they become prompts.
        options: optimizer, schedule and length.
        method: a key of ``neft.sft.methods.METHODS``.
        neurons: for methods that train chosen neurons.
        lora: for method ``lora``; its ``rank`` is resolved.
        seed: of data order, dropout and all other chance.
        folder: gets ``model/`` or ``adapter/``, and ``training.json``; ``checkpoints/`` meanwhile.
        snapshots: steps whose weights are kept besides, in ``snapshots/<step>/``; multiples of
            ``options.evaluate_every``.
        distributed: how several processes share the work.

    Raises:
        UsageError: input that cannot be used, or a folder that holds another run.
        RunError: a loss or gradient that is not finite, or too little memory; checkpoints are kept. Or
            a note beside them that cannot be read, so that they are of no use.
        KeyboardInterrupt: after SIGINT or SIGTERM.
    """
    check_inputs(method, neurons, lora)
    _check_options(method, options, snapshots)
    check_machine(model, options, distributed, method)
    tokenizer = load_tokenizer(model)
    train_split, dev_split = (load_encoded(data, split, tokenizer) for split in ("train", "dev"))
    run = _Run(
        model=model,
        options=options,
        method=method,
        neurons=neurons,
        lora=lora,
        seed=seed,
        folder=Path(folder),
        snapshots=tuple(snapshots),
        distributed=distributed,
        tokenizer=tokenizer,
        train=train_split,
        dev=dev_split,
    )
    record = run.folder / RECORD
    is_finished = record.is_file()
    # A kill may have left a finished run with the half of its checkpoints.
    last = None if is_finished else last_checkpoint(run.checkpoints)
    if is_finished or last is not None or run.plan.is_file():
        _check_is_ours(record if is_finished else run.plan, run)
    is_trained = is_finished or (last is not None and _is_trained(last))
    # Before anybody changes what the others have yet to see.
    processes.wait_for_all()
    if not is_trained:
        _train(run, last)
    if processes.is_first():
        if not is_finished:
            _publish(run)
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    processes.wait_for_all()
    return _result(record)


def _check_options(method: str, options: TrainingSection, snapshots: Sequence[int]) -> None:
    if method == "mask" and options.weight_decay:
        raise UsageError(
            f"Method 'mask' needs weight_decay 0, not {options.weight_decay:g}: decay moves the masked "
            "weights too."
        )
    for step in snapshots:
        if step < 1 or step % options.evaluate_every:
            raise UsageError(
                f"snapshots has {step}, which is no multiple of evaluate_every = "
                f"{options.evaluate_every}: only then are there weights to keep."
            )


def check_machine(
    model: ModelSection, options: TrainingSection, distributed: DistributedSection, method: str
) -> None:
    """Find out before anything expensive what this machine cannot do."""
    check_engine(distributed, model, options, method)
    available = get_available_reporting_integrations()
    for tracker in options.report_to:
        if tracker not in available:
            raise UsageError(
                f"report_to: {tracker!r} is not installed or not known to transformers. "
                f"Available here: {', '.join(available) or 'none'}."
            )
    if model.dtype == "float16" and not torch.cuda.is_available():
        raise UsageError(
            "model.dtype is float16, whose gradients need the loss scaling of a GPU; there is none here. "
            "Use bfloat16 or float32."
        )
    if options.in_backward and model.dtype == "float16":
        raise UsageError(
            "in_backward updates weights before float16 gradients can be checked for overflow. Use "
            "bfloat16 or float32."
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _lora_identity(lora: LoraSection) -> dict[str, Any]:
    return {"rank": lora.rank, "alpha": lora.alpha or lora.rank, "dropout": lora.dropout}


def _model_identity(model: ModelSection) -> dict[str, Any]:
    """Fields of the section, with the content of a folder's weights for its path: runs can be moved."""
    fields = model.model_dump(mode="json")
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        fields["path"] = [file_identity(file) for file in sorted(folder.glob("*.safetensors"))]
    return fields


def _noted(key: str, file: Path, run: _Run) -> dict[str, Any]:
    """A part of ``plan.json``, or of the record, which has the same parts."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{file}: is missing or torn, or another version of neft wrote it, so this training cannot "
            f"go on. Delete {run.folder} to begin anew."
        ) from error
    return found


def _check_is_ours(file: Path, run: _Run) -> None:
    """Refuse a folder whose plan or record is of another run."""
    if difference := _difference(_noted("run", file, run), run.identity):
        raise UsageError(
            f"{file.parent}: holds another training run; {difference}. Delete the folder, or choose "
            "another."
        )


def _check_same_crew(run: _Run) -> None:
    """Refuse to go on from a checkpoint of which others keep their shares."""
    if difference := _difference(_noted("crew", run.plan, run), run.crew):
        raise UsageError(
            f"{run.checkpoints}: this training was begun otherwise, and can only go on as it was begun; "
            f"{difference}. Start it that way, or delete the folder to begin anew."
        )


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: str = "") -> str | None:
    """The first key in which two runs differ, with both values unless they are mere digests."""
    for key in ours:
        before, now = theirs.get(key), ours[key]
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            if found := _difference(before, now, f"{path}{key}."):
                return found
        elif before != now:
            values = f"was {before!r} there and is {now!r} here"
            return f"{path}{key} {values if len(values) < 80 else 'differs'}"
    return None


def _is_trained(checkpoint: Path) -> bool:
    state = read_state(checkpoint)
    return bool(state["global_step"] >= state["max_steps"])


def _train(run: _Run, last: Path | None) -> None:
    if last is not None:
        _check_same_crew(run)
    processes.wait_for_all()
    if processes.is_first():
        discard_torn(run.checkpoints)
    processes.wait_for_all()
    set_seed(run.seed)
    engine = engine_at_work(run.distributed)
    with quiet_transformers(), engine, StopOnSignal() as stop, ShowProgress() as shown:
        trainer = _set_up(run, last)
        folders = {step: run.folder / SNAPSHOTS / str(step) for step in run.snapshots}
        for callback in (SealCheckpoints(folders), MeasureSteps(), stop, shown):
            trainer.add_callback(callback)
        _take_steps(trainer, run.options, last)
    if processes.any_process(stop.stopped):
        raise KeyboardInterrupt


def _take_steps(trainer: TargetTrainer, options: TrainingSection, last: Path | None) -> None:
    if options.in_backward:
        trainer.add_callback(StepInBackward())
    with faster_linear(), naming_shortage(lambda: f"step {trainer.state.global_step + 1}"):
        trainer.train(resume_from_checkpoint=str(last) if last else None)


def _set_up(run: _Run, last: Path | None) -> TargetTrainer:
    """A trainer, and a note of what is trained beside the checkpoints to come."""
    base = _base(run, last)
    num_parameters = base.num_parameters()  # knows how many weights a quantized tensor packs
    model: Any = prepare(base, run.method, run.neurons, run.lora)
    if engine_name(run.distributed) == "zero3":
        # Where no input of a block of experts has a gradient, DeepSpeed takes those of its parameters
        # before they are there.
        model.enable_input_require_grads()
    trainer = _trainer(run, model)
    _check_within(run, trainer.args)
    if not processes.is_first():
        return trainer
    plan = {
        "run": run.identity,
        "crew": run.crew,
        "num_parameters": num_parameters,
        "num_trainable": _num_trained(run, trainer.model),
    }
    write_json(run.plan, plan)
    return trainer


def _base(run: _Run, last: Path | None) -> PreTrainedModel:
    """The model to prepare for training."""
    if METHODS[run.method].makes_adapter:
        return load_model(run.model)
    # Resumed from its own checkpoint, a model need not read the base weights first.
    source = run.model.model_copy(update={"path": str(last), "revision": None})
    return load_model(source if last else run.model, torch.float32)


def _num_trained(run: _Run, model: nn.Module) -> int:
    """How many scalars can change; under a mask, fewer than have a gradient."""
    if run.neurons is not None:
        return run.neurons.num_parameters
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _check_within(run: _Run, settings: SFTConfig) -> None:
    """Refuse snapshots that the run would never come to."""
    examples = run.options.batch_size * settings.gradient_accumulation_steps
    num_steps = run.options.steps or math.ceil(
        settings.num_train_epochs * math.ceil(len(run.train) / examples)
    )
    if late := [step for step in run.snapshots if step > num_steps]:
        raise UsageError(f"snapshots has {late[0]}, but the run ends after step {num_steps}.")


def _trainer(run: _Run, model: nn.Module) -> TargetTrainer:
    # Like lengths side by side: little padding. The development loss does not depend on the order.
    by_length = sorted(range(len(run.dev)), key=lambda i: len(run.dev.input_ids[i]))
    # Every process must have as many batches: fillers make up for what is missing.
    several = processes.num_processes() > 1
    num_missing = -len(run.dev) % run.options.batch_size if several else 0
    masters = [(p, p.data) for p in model.parameters() if p.requires_grad]
    try:
        trainer = TargetTrainer(
            model=model,
            args=_settings(run),
            data_collator=DataCollatorForLanguageModeling(pad_token_id=run.tokenizer.pad_token_id),
            train_dataset=_dataset(run.train, range(len(run.train)), num_fillers=int(several)),
            eval_dataset=_dataset(run.dev, by_length, num_missing),
            processing_class=run.tokenizer,
        )
    except ValueError as error:
        raise UsageError(f"This training cannot be set up here: {error}") from error
    for parameter, values in masters:
        # TRL rounds what is trained over a quantized base to bfloat16.
        if parameter.dtype != values.dtype:
            parameter.data = values.to(parameter.device)
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            # Its default lies among the checkpoints, which do not outlive the run.
            callback.logging_dir = callback.logging_dir or str(run.folder / "logs")
    for name, parameter in trainer.model.named_parameters():
        # Updates smaller than half an ulp of a 16-bit weight would be lost, silently.
        assert not parameter.requires_grad or parameter.dtype is torch.float32, name
    return trainer


def _settings(run: _Run) -> SFTConfig:
    options = run.options
    # Frozen 16-bit weights set the dtype of the products by themselves; float32 masters need autocast.
    masters = not METHODS[run.method].makes_adapter
    settings = SFTConfig(
        output_dir=str(run.checkpoints),
        max_steps=options.steps or -1,
        num_train_epochs=options.epochs or 1.0,
        per_device_train_batch_size=share(options.batch_size),
        per_device_eval_batch_size=share(options.batch_size),
        gradient_accumulation_steps=options.gradient_accumulation,
        optim=_OPTIMIZERS[options.optimizer],
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.scheduler,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        # Gradients that are freed in the backward pass are not there to be clipped.
        max_grad_norm=0.0 if options.in_backward else options.max_grad_norm,
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=not torch.accelerator.is_available(),
        seed=run.seed,
        train_sampling_strategy="group_by_length" if options.group_by_length else "random",
        # Every step, as a loss that is not finite must stop the run at once.
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=options.evaluate_every,
        save_strategy="steps",
        save_steps=options.evaluate_every,
        metric_for_best_model="loss",
        greater_is_better=False,
        # Examples come tokenised, and within max_length.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        dataloader_pin_memory=torch.cuda.is_available(),
        # The trainer writes this into the configuration of the trained model, where it is for generation.
        use_cache=True,
        disable_tqdm=True,
        report_to=list(options.report_to) or "none",
        **engine_settings(run.distributed, run.model.dtype, masters=masters),
    )
    # Or the trainer would spread one process over all accelerators that it sees, with a batch for each.
    settings._n_gpu = min(settings.n_gpu, 1)
    return settings


def _dataset(encoded: Encoded, order: Iterable[int], num_fillers: int) -> Dataset:
    rows = [{"input_ids": encoded.input_ids[i], "labels": encoded.labels[i]} for i in order]
    return Dataset.from_list(rows + [FILLER] * num_fillers)


def _publish(run: _Run) -> None:
    """Make the best checkpoint the result, then write the record that finishes the run."""
    last = last_checkpoint(run.checkpoints)
    assert last is not None
    state = read_state(last)
    name = "adapter" if METHODS[run.method].makes_adapter else "model"
    link_weights(checkpoint_folder(run.checkpoints, state["best_global_step"]), run.folder / name)
    plan = json.loads(run.plan.read_text(encoding="utf-8"))
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    write_json(
        run.folder / RECORD,
        plan
        | {
            "result": name,
            "num_steps": state["global_step"],
            "best_step": state["best_global_step"],
            "best_dev_loss": state["best_metric"],
            "seconds_per_step": statistics.median(entry["seconds"] for entry in steps),
            "peak_memory_bytes": max(entry.get("peak_bytes", 0) for entry in steps) or None,
            "examples": {"train": run.train.counts, "dev": run.dev.counts},
            "versions": {"neft": neft.__version__}
            | {package: version(package) for package in ("torch", "transformers", "peft", "trl")},
            "history": {
                "train": [{key: entry[key] for key in _HISTORY if key in entry} for entry in steps],
                "dev": [
                    {"step": entry["step"], "loss": entry["eval_loss"]}
                    for entry in state["log_history"]
                    if "eval_loss" in entry
                ],
            },
        },
    )


def _result(record: Path) -> TrainingResult:
    fields = json.loads(record.read_text(encoding="utf-8"))
    return TrainingResult(
        path=record.parent / fields["result"],
        num_steps=fields["num_steps"],
        best_step=fields["best_step"],
        best_dev_loss=fields["best_dev_loss"],
        seconds_per_step=fields["seconds_per_step"],
        peak_memory_bytes=fields["peak_memory_bytes"],
        num_trainable=fields["num_trainable"],
        num_parameters=fields["num_parameters"],
        history=fields["history"],
    )


# --- trial ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialResult:
    """What a few steps took."""

    seconds: list[float]
    """Of each optimizer step."""
    peak_memory_bytes: int | None
    """Of the worst step; ``None`` where nobody can tell."""


def try_steps(
    model: ModelSection,
    options: TrainingSection,
    batches: Encoded,
    *,
    method: str,
    neurons: NeuronSet | None = None,
    lora: LoraSection | None = None,
    patience: float,
) -> TrialResult:
    """Take a few steps of a training run, for their time and memory alone; leaves nothing behind.

    Args:
        model: the base model.
        options: as of the run; its length does not count.
        batches: examples in the order in which they are read, ``options.batch_size`` a batch.
        method: a key of ``neft.sft.methods.METHODS``.
        neurons: for methods that train chosen neurons.
        lora: for method ``lora``; its ``rank`` is resolved.
        patience: seconds after which no more steps are begun, once there are three.

    Raises:
        UsageError: input that cannot be used.
        RunError: a loss or gradient that is not finite, or too little memory.
    """
    check_inputs(method, neurons, lora)
    # One more step than there are batches for, so that nothing is evaluated and saved in the end.
    examples = options.batch_size * options.gradient_accumulation
    num_steps = len(batches) // examples
    length = {"steps": num_steps + 1, "epochs": None, "evaluate_every": num_steps + 2}
    options = options.model_copy(update=length | {"group_by_length": False, "report_to": ()})
    alone = DistributedSection()
    check_machine(model, options, alone, method)
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        run = _Run(
            model=model,
            options=options,
            method=method,
            neurons=neurons,
            lora=lora,
            folder=Path(folder),
            tokenizer=load_tokenizer(model),
            train=batches,
            dev=batches,
            distributed=alone,
        )
        trainer = _trainer(run, prepare(_base(run, None), method, neurons, lora))
        trainer.args.train_sampling_strategy = "sequential"
        for callback in (MeasureSteps(), StopEarly(num_steps, patience)):
            trainer.add_callback(callback)
        _take_steps(trainer, options, None)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    peak = max(entry.get("peak_bytes", 0) for entry in steps) or None
    return TrialResult([entry["seconds"] for entry in steps], peak)
