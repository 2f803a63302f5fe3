"""Training runs: what they learn, what they leave, and that killing them changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from training_runs import (
    Killed,
    Run,
    assert_same,
    assert_same_weights,
    kill,
    kill_at,
    run_until,
    weights_in,
)
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerControl
from trl import SFTTrainer

from neft import processes
from neft.errors import DataError, NeuronError, RunError, UsageError
from neft.models import load_model, load_tokenizer
from neft.neurons import NeuronSet
from neft.projections import find_projections
from neft.recipe import DataSection, ModelSection, TrainingSection
from neft.sft import callbacks, resume
from neft.sft import train as training
from neft.sft.data import load_examples
from neft.sft.methods import METHODS
from neft.sft.prompts import encode_all
from neft.sft.train import TrainingResult, train
from neft.sft.trainer import TargetTrainer

if TYPE_CHECKING:
    from conftest import TinyConfig, TinyModel, TinyTokenizer


# One that leaves a checkpoint, one that leaves an adapter.
BOTH_KINDS = ["full", "neft"]


# ------------------------------------------------------------------------------- what is learnt


def test_full_run(run: Run, base: ModelSection, tmp_path: Path) -> None:
    result = run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "training.json"]
    assert sorted(path.name for path in result.path.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    before, after = load_model(base), AutoModelForCausalLM.from_pretrained(result.path)
    changed = [
        name
        for name, tensor in after.state_dict().items()
        if not torch.equal(tensor, before.state_dict()[name])
    ]
    assert len(changed) == len(before.state_dict())
    assert after.config.use_cache
    assert result.num_trainable == result.num_parameters == before.num_parameters()
    assert result.history["dev"][-1]["loss"] < result.history["dev"][0]["loss"]
    umask = os.umask(0)
    os.umask(umask)
    assert (result.path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_neft_run(run: Run, base: ModelSection, neurons: NeuronSet, tmp_path: Path) -> None:
    from peft import PeftModel

    result = run(tmp_path, "neft", weight_decay=0.1)
    assert sorted(path.name for path in result.path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert result.num_trainable == neurons.num_parameters < result.num_parameters
    before = load_model(base).state_dict()
    tuned = PeftModel.from_pretrained(load_model(base), result.path).merge_and_unload()
    for name, tensor in tuned.state_dict().items():
        is_changed = tensor != before[name]
        module = name.removesuffix(".weight")
        if module in neurons:
            is_chosen = torch.zeros_like(is_changed)
            dim = neurons.projections[module].neuron_dim
            is_chosen.index_fill_(dim, torch.from_numpy(neurons[module]), True)
            assert not is_changed[~is_chosen].any(), name
            assert is_changed[is_chosen].any(), name
        else:
            assert not is_changed.any(), name


def test_record(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path, epochs=2.5, steps=None, gradient_accumulation=2, evaluate_every=3)
    record = json.loads((tmp_path / "training.json").read_text())
    # 20 examples in batches of 4, two batches a step: 3 steps an epoch.
    assert result.num_steps == record["num_steps"] == 8
    assert [entry["step"] for entry in result.history["train"]] == list(range(1, 9))
    assert [entry["step"] for entry in result.history["dev"]] == [3, 6, 8]
    assert [entry["learning_rate"] for entry in result.history["train"]][:3] == [0.0, 0.005, 0.01]
    best = min(result.history["dev"], key=lambda entry: entry["loss"])
    assert (result.best_step, result.best_dev_loss) == (best["step"], best["loss"])
    assert 0 < result.seconds_per_step < 60
    assert result.peak_memory_bytes is not None
    assert 50e6 < result.peak_memory_bytes < 10e9
    assert record["run"]["seed"] == 1
    assert record["examples"]["train"] == {"used": 20, "dropped": 0, "truncated": 0}
    assert record["versions"].keys() == {"neft", "torch", "transformers", "peft", "trl"}


def test_best_checkpoint_is_the_result(run: Run, data: DataSection, tmp_path: Path) -> None:
    # At this rate the loss falls, then diverges.
    result = run(tmp_path, learning_rate=0.3, steps=10, warmup_steps=8, evaluate_every=2)
    assert result.best_step < result.num_steps
    section = ModelSection(path=str(result.path))
    loss = dev_loss(load_model(section), section, data)
    assert loss == pytest.approx(result.best_dev_loss, rel=1e-5)
    assert loss < result.history["dev"][-1]["loss"]


def dev_loss(model: Any, section: ModelSection, data: DataSection) -> float:
    """Mean loss of a target token, one example at a time."""
    encoded = encode_all(load_examples(data, "dev"), load_tokenizer(section), data)
    losses: list[float] = []
    for ids, labels in zip(encoded.input_ids, encoded.labels, strict=True):
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [
            -log_probs[position - 1, label].item()
            for position, label in enumerate(labels)
            if label != -100
        ]
    return sum(losses) / len(losses)


def test_dev_loss_does_not_depend_on_the_batch_size(run: Run, tmp_path: Path) -> None:
    # A rate so low that nothing is learnt.
    options = {"steps": 1, "learning_rate": 1e-30}
    one, four = (run(tmp_path / str(n), batch_size=n, **options) for n in (1, 4))
    assert one.best_dev_loss == pytest.approx(four.best_dev_loss, rel=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_loss_is_that_of_the_whole_projection(
    model_type: str,
    tiny_model: TinyModel,
    tiny_tokenizer: TinyTokenizer,
    data: DataSection,
    tmp_path: Path,
) -> None:
    """With its gradients; against the model's own logits (gemma2 caps them), masked."""
    model = tiny_model(model_type)
    for module in (model, tiny_tokenizer()):
        module.save_pretrained(tmp_path)
    section = ModelSection(path=str(tmp_path))
    tokenizer = load_tokenizer(section)
    encoded = encode_all(load_examples(data, "train"), tokenizer, data)
    options = TrainingSection(learning_rate=1, steps=1)
    run = training._Run(
        model=section,
        options=options,
        method="full",
        folder=tmp_path,
        tokenizer=tokenizer,
        train=encoded,
        dev=encoded,
    )
    trainer = training._trainer(run, model)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(7))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = (
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()) / 7
    ) * (batch["labels"][:, 1:] != -100).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_dev_loss_of_many_tokens(
    calm: ModelSection, data: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums that float32 cannot hold."""
    tokenizer = load_tokenizer(calm)
    encoded = encode_all(load_examples(data, "dev"), tokenizer, data)
    run = training._Run(
        model=calm,
        options=TrainingSection(learning_rate=1, steps=1, batch_size=6),
        method="full",
        folder=tmp_path,
        tokenizer=tokenizer,
        train=encoded,
        dev=encoded,
    )
    trainer = training._trainer(run, load_model(calm))
    total = torch.tensor(2**24 + 1, dtype=torch.float64)
    monkeypatch.setattr(trainer, "compute_loss", lambda *_, **__: total)
    num_targets = sum(label != -100 for labels in encoded.labels for label in labels)
    assert trainer.evaluate()["eval_loss"] == total.item() / num_targets


def test_run_is_a_plain_loop(calm: ModelSection, data: DataSection, tmp_path: Path) -> None:
    """AdamW with decay of matrices only, clipping, and a linear schedule, written out."""
    steps, warmup, rate, decay, norm = 6, 2, 1e-2, 0.5, 0.05
    few = data.model_copy(update={"train_limit": 4})
    result = train(
        calm,
        few,
        TrainingSection(
            learning_rate=rate,
            steps=steps,
            batch_size=4,
            warmup_steps=warmup,
            weight_decay=decay,
            max_grad_norm=norm,
        ),
        method="full",
        folder=tmp_path,
    )

    model = load_model(calm)
    encoded = encode_all(load_examples(few, "train"), load_tokenizer(calm), few)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0}]
    )
    for step in range(steps):
        total, count = torch.zeros(()), 0
        for ids, labels in zip(encoded.input_ids, encoded.labels, strict=True):
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            total = total + F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
            count += sum(label != -100 for label in labels)
        loss = total / count
        loss.backward()
        gradient = torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
        now = rate * min(step / warmup, (steps - step) / (steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = now
        optimizer.step()
        optimizer.zero_grad()
        assert result.history["train"][step] == pytest.approx(
            {
                "step": step + 1,
                "loss": loss.item(),
                "grad_norm": gradient.item(),
                "learning_rate": now,
            },
            rel=1e-4,
        )
    weights = weights_in(result.path)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.data, msg=name, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("cosine", [0.0, 0.5, 1.0, 0.75, 0.25]),
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("constant_with_warmup", [0.0, 0.5, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules(scheduler: str, rates: list[float], run: Run, tmp_path: Path) -> None:
    result = run(tmp_path, learning_rate=1.0, steps=5, scheduler=scheduler, evaluate_every=5)
    logged = [entry["learning_rate"] for entry in result.history["train"]]
    assert logged == pytest.approx(rates)


def test_accumulated_batches_are_one_batch(
    calm: ModelSection, data: DataSection, tmp_path: Path
) -> None:
    """The target tokens of a step count alike, in whichever batch they are."""
    weights = []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        options = TrainingSection(
            learning_rate=1e-2,
            warmup_steps=0,
            steps=1,
            batch_size=batch_size,
            gradient_accumulation=accumulation,
        )
        result = train(calm, data, options, method="full", folder=tmp_path / str(batch_size))
        weights.append(weights_in(result.path))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], msg=name, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_nothing(
    method: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[TargetTrainer] = []
    make = training._trainer

    def remember(*args: Any) -> TargetTrainer:
        trainers.append(make(*args))
        return trainers[-1]

    monkeypatch.setattr(training, "_trainer", remember)
    plain = run(tmp_path / "plain", method, steps=3)
    again = run(tmp_path / "again", method, steps=3, gradient_checkpointing=True)
    assert [
        any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
        for trainer in trainers
    ] == [False, True]
    assert_same(plain, again)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("method", METHODS)
def test_the_other_library_trains_the_same(
    method: str,
    checkpointing: bool,
    run: Run,
    calm: ModelSection,
    tmp_path: Path,
    onednn: Mock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"steps": 3, "gradient_checkpointing": checkpointing}
    other = run(tmp_path / "other", method, model=calm, **options)
    # In each step at least the 14 layers and the head, forward and, but for the lowest, backward.
    assert onednn.call_count > 3 * 20
    onednn.reset_mock()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    usual = run(tmp_path / "usual", method, model=calm, **options)
    assert onednn.call_count == 0
    assert other.best_dev_loss == pytest.approx(usual.best_dev_loss, rel=1e-5)
    assert [entry["loss"] for entry in other.history["train"]] == pytest.approx(
        [entry["loss"] for entry in usual.history["train"]], rel=1e-5
    )


@pytest.mark.parametrize("method", METHODS)
def test_sixteen_bits_compute_and_float32_learns(
    method: str, run: Run, calm: ModelSection, tmp_path: Path
) -> None:
    options = {"learning_rate": 1e-3, "steps": 2, "warmup_steps": 0}
    results = {
        dtype: run(
            tmp_path / dtype, method, model=calm.model_copy(update={"dtype": dtype}), **options
        )
        for dtype in ("float32", "bfloat16")
    }
    # Not the same loss, but nearly.
    losses = {dtype: result.best_dev_loss for dtype, result in results.items()}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=1e-2)
    weights = weights_in(results["bfloat16"].path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    # Values that 16 bits cannot hold.
    assert all(
        (tensor != tensor.bfloat16()).any() for name, tensor in weights.items() if tensor.dim() == 2
    )


def test_seed_decides(run: Run, tmp_path: Path) -> None:
    first, second = run(tmp_path / "first"), run(tmp_path / "second")
    assert_same(first, second)
    assert run(tmp_path / "other", seed=2).history != first.history


# ------------------------------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainingResult]:
    return {}


@pytest.fixture
def reference(
    run: Run, unbroken: dict[str, TrainingResult], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], TrainingResult]:
    """Unbroken runs, each made once."""

    def get(method: str) -> TrainingResult:
        if method not in unbroken:
            unbroken[method] = run(tmp_path_factory.mktemp("unbroken"), method)
        return unbroken[method]

    return get


def kill_while_writing(trainer: Any, checkpoint: str) -> None:
    """Leave what a writer that renames its file into place leaves."""
    (Path(checkpoint) / ".tmpXYZ").write_bytes(b"half a file")
    raise Killed


def kill_while_deleting(folder: Any, *args: Any, **kwargs: Any) -> None:
    """Leave of the checkpoints what is left when their markers happen to go last."""
    if Path(folder).name != "checkpoints":
        rmtree(folder, *args, **kwargs)
        return
    for file in folder.rglob("*"):
        if file.is_file() and file.name != "complete.json":
            file.unlink()
    raise Killed


# What to replace, by what: the moment at which the run is killed.
MOMENTS = {
    "before the first checkpoint": (callbacks.SealCheckpoints, "on_step_begin", kill_at(1)),
    "after a checkpoint": (callbacks.SealCheckpoints, "on_step_begin", kill_at(2)),
    "between checkpoints": (callbacks.SealCheckpoints, "on_step_begin", kill_at(5)),
    "while a checkpoint is written": (
        SFTTrainer,
        "_save_optimizer_and_scheduler",
        kill_while_writing,
    ),
    "before a checkpoint is sealed": (callbacks, "seal", kill),
    "before old checkpoints go": (callbacks, "discard_superseded", kill),
    "while the result is published": (resume, "_link", kill),
    "before the record is written": (training, "write_json", None),
    "before the checkpoints go": (training.shutil, "rmtree", None),
    "while the checkpoints go": (training.shutil, "rmtree", kill_while_deleting),
}


@pytest.mark.parametrize("method", BOTH_KINDS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_continues(
    method: str,
    moment: str,
    run: Run,
    reference: Callable[[str], TrainingResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, name, replacement = MOMENTS[moment]
    if replacement is None:
        replacement = kill_for(getattr(place, name), moment)
    with monkeypatch.context() as patched:
        patched.setattr(place, name, replacement)
        with pytest.raises(Killed):
            run(tmp_path, method)
    assert_same(run(tmp_path, method), reference(method))
    assert not (tmp_path / "checkpoints").exists()


def kill_for(original: Callable[..., Any], moment: str) -> Callable[..., Any]:
    """Kill at the call that the moment names, and let others pass."""
    name = {
        "before the record is written": "training.json",
        "before the checkpoints go": "checkpoints",
    }

    def replacement(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == name[moment]:
            raise Killed
        return original(path, *args, **kwargs)

    return replacement


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_damaged_checkpoint_changes_nothing(
    name: str,
    run: Run,
    reference: Callable[[str], TrainingResult],
    tmp_path: Path,
) -> None:
    run_until(5, run, tmp_path)
    (tmp_path / "checkpoints/checkpoint-4" / name).unlink()
    assert_same(run(tmp_path), reference("full"))


def without_crew(file: Path) -> None:
    fields = json.loads(file.read_text())
    del fields["crew"]
    file.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, lambda file: os.truncate(file, 100), without_crew],
    ids=["missing", "torn", "of another version"],
)
def test_plan_that_cannot_be_read(
    damage: Callable[[Path], None],
    run: Run,
    tmp_path: Path,
) -> None:
    run_until(5, run, tmp_path)
    damage(tmp_path / "checkpoints/plan.json")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        RunError, match=rf"plan\.json: is missing or torn.* Delete {tmp_path} to begin"
    ):
        run(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_torn_checkpoint_leaves_nothing_in_the_result(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of one step, so that the same checkpoint, written again, is the best.
    whole = run(tmp_path / "whole", steps=1)
    with monkeypatch.context() as patched:
        patched.setattr(SFTTrainer, "_save_optimizer_and_scheduler", kill_while_writing)
        with pytest.raises(Killed):
            run(tmp_path / "broken", steps=1)
    assert_same(run(tmp_path / "broken", steps=1), whole)


@pytest.mark.parametrize(
    ("options", "kills"),
    [
        # Between epochs, and again within the next.
        ({"evaluate_every": 1}, (5, 6)),
        # Steps of two batches, but at the end of an epoch of one.
        ({"evaluate_every": 1, "gradient_accumulation": 2}, (2, 4)),
    ],
)
def test_run_killed_twice(
    options: dict[str, Any],
    kills: tuple[int, int],
    run: Run,
    tmp_path: Path,
) -> None:
    for step in kills:
        run_until(step, run, tmp_path / "broken", **options)
    assert_same(run(tmp_path / "broken", **options), run(tmp_path / "whole", **options))


def test_kill_9(
    base: ModelSection, data: DataSection, neurons: NeuronSet, run: Run, tmp_path: Path
) -> None:
    """A real process, really killed, in the middle of whatever it does after its third checkpoint."""
    neurons.save(tmp_path / "neurons.json")
    options = {"steps": 16, "evaluate_every": 2, "batch_size": 4, "learning_rate": 1e-3}
    sections = [section.model_dump_json() for section in (base, data)]
    script = f"""
import torch
from neft.neurons import NeuronSet
from neft.recipe import DataSection, ModelSection, TrainingSection
from neft.sft.train import train
torch.set_num_threads(1)
train(
    ModelSection.model_validate_json({sections[0]!r}),
    DataSection.model_validate_json({sections[1]!r}),
    TrainingSection(**{options!r}),
    method="neft", neurons=NeuronSet.load({str(tmp_path / "neurons.json")!r}), seed=1,
    folder={str(tmp_path / "broken")!r}, snapshots=(6, 16),
)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 6/16"):
            break
    process.send_signal(signal.SIGKILL)
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL
    assert "step 16/16" not in rest
    assert resume.last_checkpoint(tmp_path / "broken" / "checkpoints") is not None
    for name in ("broken", "whole"):
        section = TrainingSection(**options)
        chosen = NeuronSet.load(tmp_path / "neurons.json")
        train(
            base,
            data,
            section,
            method="neft",
            neurons=chosen,
            seed=1,
            folder=tmp_path / name,
            snapshots=(6, 16),
        )
    assert_same(
        training._result(tmp_path / "broken/training.json"),
        training._result(tmp_path / "whole/training.json"),
    )
    for step in ("6", "16"):
        assert_same_weights(*(tmp_path / name / "snapshots" / step for name in ("broken", "whole")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_a_checkpoint(
    number: signal.Signals,
    run: Run,
    reference: Callable[[str], TrainingResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def on_step_begin(self: Any, args: Any, state: Any, *rest: Any, **_: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patched:
        patched.setattr(callbacks.SealCheckpoints, "on_step_begin", on_step_begin)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    last = resume.last_checkpoint(tmp_path / "checkpoints")
    assert last is not None
    assert last.name == "checkpoint-3"
    assert_same(run(tmp_path), reference("full"))


@pytest.mark.parametrize(("step", "last"), [(2, 3), (7, 7)])
def test_signal_during_an_evaluation(
    step: int,
    last: int,
    run: Run,
    reference: Callable[[str], TrainingResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate = TargetTrainer.evaluate

    def interrupted(self: Any, **kwargs: Any) -> dict[str, float]:
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(TargetTrainer, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    found = resume.last_checkpoint(tmp_path / "checkpoints")
    assert found == tmp_path / "checkpoints" / f"checkpoint-{last}"
    assert_same(run(tmp_path), reference("full"))


def test_processes_stop_at_the_same_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that one of them gets before a save, and another after it."""
    stops = [callbacks.StopOnSignal(), callbacks.StopOnSignal()]
    monkeypatch.setattr(processes, "any_process", lambda _: any(stop.stopped for stop in stops))

    def saved() -> list[bool]:
        controls = [TrainerControl(), TrainerControl()]
        for stop, control in zip(stops, controls, strict=True):
            stop.on_step_end(None, None, control)
        # To the second process, in the evaluation between.
        stops[1].stopped = True
        for stop, control in zip(stops, controls, strict=True):
            stop.on_save(None, None, control)
        return [control.should_training_stop for control in controls]

    assert saved() == [False, False]
    assert saved() == [True, True]


def test_second_signal_stops_at_once() -> None:
    # Of what a shell starts in the background, SIGINT is ignored from the beginning.
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with callbacks.StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.stopped
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, found)


def test_runs_in_other_threads_leave_signals_alone(run: Run, tmp_path: Path) -> None:
    results: list[TrainingResult] = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path, steps=1)))
    thread.start()
    thread.join()
    assert results


def test_finished_run_is_not_repeated(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(tmp_path, steps=1)
    monkeypatch.setattr(training, "load_model", kill)
    assert run(tmp_path, steps=1) == result
    # Trackers do not change a result.
    assert run(tmp_path, steps=1, report_to=("tensorboard",)) == result


def test_only_what_is_needed_is_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[dict[str, bool]] = []

    class Look(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            kept.append(
                {
                    folder.name: (folder / "optimizer.pt").exists()
                    for folder in sorted(Path(args.output_dir).glob("checkpoint-*"))
                }
            )

    def add_callback(self: Any, callback: Any) -> None:
        SFTTrainer.add_callback(self, callback)
        if isinstance(callback, callbacks.SealCheckpoints):
            SFTTrainer.add_callback(self, Look())

    monkeypatch.setattr(TargetTrainer, "add_callback", add_callback)
    # Development losses by step: the second is the best.
    losses = iter([3.0, 1.0, 2.0, 2.5])
    evaluate = TargetTrainer.evaluate

    def scripted(self: Any, **kwargs: Any) -> dict[str, float]:
        return evaluate(self, **kwargs) | {"eval_loss": next(losses)}

    monkeypatch.setattr(TargetTrainer, "evaluate", scripted)
    result = run(tmp_path, steps=4, evaluate_every=1)
    assert kept == [
        {"checkpoint-1": True},
        {"checkpoint-2": True},
        {"checkpoint-2": False, "checkpoint-3": True},
        {"checkpoint-2": False, "checkpoint-4": True},
    ]
    assert result.best_step == 2


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"learning_rate": 0.5}, r"training\.learning_rate was 0\.01 there and is 0\.5 here"),
        ({"seed": 2}, "seed was 1 there and is 2 here"),
        ({"method": "neft"}, "method was 'full' there and is 'neft' here"),
    ],
)
def test_folder_of_another_run(
    finished: bool,
    change: dict[str, Any],
    difference: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if finished:
        run(tmp_path, steps=1)
    else:
        monkeypatch.setattr(callbacks, "discard_superseded", kill)
        with pytest.raises(Killed):
            run(tmp_path, steps=1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=f"holds another training run; {difference}"):
        run(tmp_path, **({"steps": 1} | change))
    assert sorted(tmp_path.rglob("*")) == before


def test_other_data_or_model_is_another_run(
    run: Run, base: ModelSection, data: DataSection, tmp_path: Path
) -> None:
    run(tmp_path / "run", steps=1)
    record = json.loads((tmp_path / "run/training.json").read_text())["run"]["training"]
    options = TrainingSection(**record)
    lines = Path(data.dev).read_text().replace("mot", "Mot")
    (tmp_path / "dev.jsonl").write_text(lines)
    other = data.model_copy(update={"dev": str(tmp_path / "dev.jsonl")})
    with pytest.raises(UsageError, match="dev differs"):
        train(base, other, options, method="full", seed=1, folder=tmp_path / "run")
    # The same weights elsewhere are the same model; others in the same place are not.
    moved = Path(base.path).rename(Path(base.path).with_name("moved"))
    try:
        section = ModelSection(path=str(moved))
        train(section, data, options, method="full", seed=1, folder=tmp_path / "run")
        weights = load_file(moved / "model.safetensors")
        original = weights["model.norm.weight"].clone()
        weights["model.norm.weight"][0] = 2
        save_file(weights, moved / "model.safetensors", {"format": "pt"})
        with pytest.raises(UsageError, match=r"model\.path"):
            train(section, data, options, method="full", seed=1, folder=tmp_path / "run")
        weights["model.norm.weight"] = original
        save_file(weights, moved / "model.safetensors", {"format": "pt"})
    finally:
        moved.rename(base.path)


# ------------------------------------------------------------------------------- what goes wrong


def with_weights(
    base: ModelSection, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> ModelSection:
    model = load_model(base)
    with torch.no_grad():
        change(model.state_dict())
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return ModelSection(path=str(folder))


def test_loss_that_is_not_a_number_stops_the_run(
    run: Run, base: ModelSection, tmp_path: Path
) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][3] = float("nan")

    spoiled = with_weights(base, tmp_path / "model", spoil)
    with pytest.raises(RunError, match="Step 1 of 5: the training loss is nan"):
        run(tmp_path / "run", model=spoiled, steps=5)
    assert not list((tmp_path / "run").glob("checkpoints/checkpoint-*"))


@pytest.mark.parametrize(
    ("measure", "value", "meaning"),
    [
        ("loss", float("inf"), "training loss is inf"),
        ("grad_norm", float("nan"), "norm of the gradient is nan"),
        ("eval_loss", float("nan"), "development loss is nan"),
    ],
)
def test_breakdown_keeps_the_last_good_checkpoint(
    measure: str,
    value: float,
    meaning: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = TargetTrainer.log

    def faulty(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.state.global_step == 4 and measure in logs:
            logs[measure] = value
        log(self, logs, start_time)

    monkeypatch.setattr(TargetTrainer, "log", faulty)
    fault = rf"Step 4 of 7: the {meaning}\. The last good checkpoint is kept: .*checkpoint-2\."
    with pytest.raises(RunError, match=fault + " Lower the learning rate"):
        run(tmp_path)
    assert [folder.name for folder in tmp_path.glob("checkpoints/checkpoint-*")] == ["checkpoint-2"]


def test_gradient_that_is_not_finite_stops_the_run(
    run: Run, base: ModelSection, tmp_path: Path
) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        # The logits stay as they are; the gradient of the norm is so large that its square overflows.
        weights["model.norm.weight"].mul_(1e-25)
        weights["lm_head.weight"].mul_(1e25)

    spoiled = with_weights(base, tmp_path / "model", spoil)
    with pytest.raises(RunError, match="Step 1 of 5: the norm of the gradient is inf"):
        run(tmp_path / "run", model=spoiled, steps=5)


def test_what_the_trainer_refuses_is_told(
    base: ModelSection, data: DataSection, tmp_path: Path
) -> None:
    [head] = find_projections(base.path, ["lm_head"])
    with pytest.raises(UsageError, match=r"cannot be set up here: .*`lm_head` is not supported"):
        train(
            base,
            data,
            TrainingSection(learning_rate=1e-3, steps=1),
            method="neft",
            neurons=NeuronSet([head], {"lm_head": [1, 2]}),
            folder=tmp_path,
        )


def test_float16_without_gpu(run: Run, base: ModelSection, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    section = base.model_copy(update={"dtype": "float16"})
    with pytest.raises(UsageError, match="float16, whose gradients need the loss scaling of a GPU"):
        run(tmp_path / "run", model=section, steps=1)
    assert not (tmp_path / "run").exists()


def test_unknown_tracker(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="report_to: 'tensorbored' is not installed or not known"):
        run(tmp_path / "run", report_to=("tensorbored",))
    assert not (tmp_path / "run").exists()


def test_tensorboard_outlives_the_run(run: Run, tmp_path: Path) -> None:
    run(tmp_path, steps=1, report_to=("tensorboard",))
    assert list((tmp_path / "logs").glob("events.out.tfevents*"))


def test_neurons_must_fit_the_method(
    base: ModelSection, data: DataSection, neurons: NeuronSet, tmp_path: Path
) -> None:
    options = TrainingSection(learning_rate=1e-3, steps=1)
    with pytest.raises(NeuronError, match="'full' takes no neurons"):
        train(base, data, options, method="full", neurons=neurons, folder=tmp_path / "run")
    for none in (None, neurons - neurons):
        with pytest.raises(NeuronError, match="'neft' trains chosen neurons"):
            train(base, data, options, method="neft", neurons=none, folder=tmp_path / "run")
    with pytest.raises(UsageError, match="Unknown method 'lore'; choose one of full, embed"):
        train(base, data, options, method="lore", folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_neurons_of_another_model(
    base: ModelSection, data: DataSection, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    other = find_projections(tiny_config("llama", intermediate_size=96))
    neurons = NeuronSet(other, {p.name: [0, 90] for p in other})
    options = TrainingSection(learning_rate=1e-3, steps=1)
    with pytest.raises(NeuronError, match=r"model\.layers\.0\.mlp\.up_proj"):
        train(base, data, options, method="neft", neurons=neurons, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_faulty_data_touches_nothing(base: ModelSection, data: DataSection, tmp_path: Path) -> None:
    faulty = data.model_copy(update={"dev": str(tmp_path / "none.jsonl")})
    options = TrainingSection(learning_rate=1e-3, steps=1)
    with pytest.raises(DataError):
        train(base, faulty, options, method="full", folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_dropped_examples_are_reported(
    base: ModelSection,
    data: DataSection,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = TrainingSection(learning_rate=1e-3, steps=1)
    encoded = encode_all(load_examples(data, "train"), load_tokenizer(base), data)
    longest = max(map(len, encoded.input_ids))
    short = data.model_copy(update={"max_length": longest - 1})
    train(base, short, options, method="full", folder=tmp_path)
    counts = json.loads((tmp_path / "training.json").read_text())["examples"]["train"]
    assert 0 < counts["dropped"] < 20
    assert f"data.train: of 20 examples, {counts['dropped']} were dropped" in caplog.text


def test_terminal(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "neft", steps=3)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/3", "step 3/3"]
    assert "training loss" in lines[0]
    assert lines[0].endswith("best")
