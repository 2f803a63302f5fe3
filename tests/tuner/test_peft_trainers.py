"""TRL's trainers, used as anyone would use them with a PEFT configuration."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import adapted, base_state, choose, logits, same_bits, vectors
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from neft import NeftConfig

COMMON: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "seed": 0,
    "disable_tqdm": True,
}
TEXTS = Dataset.from_list([{"text": f"number {number} and more"} for number in range(8)])
PAIRS = Dataset.from_list(
    [
        {"prompt": f"number {number}?", "chosen": f" {number}!", "rejected": " no"}
        for number in range(8)
    ]
)


def check_frozen(model: PeftModel, before: dict[str, torch.Tensor]) -> None:
    """The adapter learnt, in float32; nothing else has another bit."""
    assert {parameter.dtype for parameter in vectors(model).values()} == {torch.float32}
    assert same_bits(base_state(model), before)
    merged = model.merge_and_unload().state_dict()
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in model.peft_config["default"].neurons.modules()}


def fine_tune(model: torch.nn.Module, tokenizer: Any, folder: Path, **options: Any) -> SFTTrainer:
    return SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), **COMMON | options),
        train_dataset=TEXTS,
        eval_dataset=TEXTS,
        processing_class=tokenizer,
        peft_config=NeftConfig(neurons=choose(model)),
    )


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_supervised_fine_tuning(tiny_model, tiny_tokenizer, tmp_path, gradient_checkpointing):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    trainer = fine_tune(
        model,
        tiny_tokenizer(),
        tmp_path,
        gradient_checkpointing=gradient_checkpointing,
        save_strategy="no",
    )
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < loss
    check_frozen(trainer.model, before)


def test_the_trainer_resumes_and_keeps_the_best(tiny_model, tiny_tokenizer, tmp_path):
    options = {
        "max_steps": 3,
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "gradient_checkpointing": False,
    }
    whole = fine_tune(tiny_model(), tiny_tokenizer(), tmp_path / "whole", **options)
    whole.train()
    resumed = fine_tune(tiny_model(), tiny_tokenizer(), tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert resumed.state.log_history[-2]["eval_loss"] == whole.state.log_history[-2]["eval_loss"]
    assert same_bits(resumed.model.state_dict(), whole.model.state_dict())

    saved = PeftModel.from_pretrained(tiny_model(), whole.state.best_model_checkpoint)
    assert torch.equal(logits(saved), logits(whole.model.eval()))


def test_preferences_against_the_base_model(tiny_model, tiny_tokenizer, tmp_path):
    """DPO whose reference is the same model with the adapter disabled."""
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path), save_strategy="no", gradient_checkpointing=False, **COMMON
        ),
        train_dataset=PAIRS,
        processing_class=tiny_tokenizer(),
        peft_config=NeftConfig(neurons=choose(model)),
    )
    assert trainer.ref_model is None
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(0.6931472)  # log 2: policy and reference are equal
    assert second["loss"] < first["loss"]
    assert second["rewards/margins"] > 0
    check_frozen(trainer.model, before)


def test_preferences_against_a_trained_adapter(tiny_model, tiny_tokenizer, tmp_path):
    """TRL copies the adapter to a second one, "ref", by the names of its parameters."""
    wrapped = adapted(tiny_model())
    output = logits(wrapped)
    trainer = DPOTrainer(
        model=wrapped,
        args=DPOConfig(
            output_dir=str(tmp_path), save_strategy="no", gradient_checkpointing=False, **COMMON
        ),
        train_dataset=PAIRS,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(0.6931472)
    assert second["loss"] < first["loss"]
    trainer.model.eval().set_adapter("ref")
    assert torch.equal(logits(trainer.model), output), "the reference is the adapter as it was"
