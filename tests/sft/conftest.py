"""A tiny model, data and neurons to train, shared by the tests of training."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from training_runs import Run

from neft.neurons import NeuronSet
from neft.projections import find_projections
from neft.recipe import DataSection, LoraSection, ModelSection, TrainingSection
from neft.sft.methods import METHODS
from neft.sft.train import TrainingResult, train

if TYPE_CHECKING:
    from conftest import TinyModel, TinyTokenizer


@pytest.fixture(autouse=True, scope="module")
def _light() -> Iterator[None]:
    """Tiny matrices gain nothing from threads; every run collects garbage, of which imports are none."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(
    tiny_model: TinyModel, tiny_tokenizer: TinyTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> ModelSection:
    """A Llama with dropout in its attention, so that random numbers matter."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", attention_dropout=0.1).save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return ModelSection(path=str(folder))


@pytest.fixture(scope="module")
def calm(
    tiny_model: TinyModel, tiny_tokenizer: TinyTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> ModelSection:
    """A model without dropout, to compare with what must give the same."""
    folder = tmp_path_factory.mktemp("calm")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return ModelSection(path=str(folder))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSection:
    """20 training and 6 development pairs."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 20), ("dev", 6)):
        rows = [{"source": f"{split} {i}", "target": "mot " * (i % 3 + 1)} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSection(
        task="prompt",
        template="{source}",
        train=str(folder / "train.jsonl"),
        dev=str(folder / "dev.jsonl"),
        test=str(folder / "dev.jsonl"),
    )


@pytest.fixture(scope="module")
def neurons(base: ModelSection) -> NeuronSet:
    return every_third(base)


def every_third(model: ModelSection) -> NeuronSet:
    """Every third in and out neuron."""
    projections = find_projections(model.path)
    return NeuronSet(projections, {p.name: range(0, p.num_neurons, 3) for p in projections})


@pytest.fixture
def run(base: ModelSection, data: DataSection) -> Run:
    """``run(folder, "neft", steps=3)``: a training run; by default of 7 steps, 5 of them an epoch.

    Methods get every third neuron, or LoRA of rank 4 with dropout, as they need.
    """

    def make(
        folder: Path,
        method: str = "full",
        *,
        model: ModelSection = base,
        lora: LoraSection | None = None,
        seed: int = 1,
        snapshots: tuple[int, ...] = (),
        **options: Any,
    ) -> TrainingResult:
        fields = {"steps": 7, "batch_size": 4, "evaluate_every": 2}
        section = TrainingSection(**({"learning_rate": 1e-2, "warmup_steps": 2} | fields | options))
        if method == "lora" and lora is None:
            lora = LoraSection(rank=4, dropout=0.1)
        return train(
            model,
            data,
            section,
            method=method,
            neurons=every_third(model) if METHODS[method].needs_neurons else None,
            lora=lora,
            seed=seed,
            folder=folder,
            snapshots=snapshots,
        )

    return make
