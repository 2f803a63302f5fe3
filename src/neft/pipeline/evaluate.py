"""A model on the test split: what it writes, and the scores of that."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neft.evaluation import Score, generate, score_predictions, text_loss
from neft.files import write_json, write_text
from neft.models import load_tokenizer
from neft.recipe import EvaluateSection, Recipe
from neft.sft.data import Example, load_examples, load_texts
from neft.sft.prompts import prompt_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

PREDICTIONS = "predictions.jsonl"
SCORES = "scores.json"


@dataclass(frozen=True)
class Evaluation:
    """What one model achieves on the test split."""

    scores: Mapping[str, Score]
    num_examples: int
    seconds: float
    """Duration of generation."""
    general_loss: float | None = None
    """Mean loss of a token of held-out general text, in nats, where the recipe names one."""


@dataclass(frozen=True)
class Prediction:
    """One line of ``predictions.jsonl``."""

    prompt: str
    prediction: str
    reference: str


def evaluate(model: Any, recipe: Recipe, folder: Path) -> Evaluation:
    """Let ``model`` answer every prompt of the test split; keep and score the answers.

    Args:
        model: a causal language model, with or without an adapter; is moved to the accelerator if
            there is one.
        recipe: its data, model (for the tokenizer) and evaluate sections count.
        folder: gets ``predictions.jsonl`` and ``scores.json``.
    """
    examples = load_examples(recipe.data, "test")
    tokenizer = load_tokenizer(recipe.model)
    prompts = [prompt_ids(example, tokenizer, recipe.data) for example in examples]
    start = time.perf_counter()
    texts = generate(model.to(device()), tokenizer, prompts, recipe.evaluate)
    seconds = time.perf_counter() - start
    _write_predictions(folder / PREDICTIONS, examples, texts)
    scores = score_predictions(
        recipe.data.task,
        texts,
        [example.target for example in examples],
        recipe.data.target_language,
        recipe.evaluate.lowercase,
        recipe.data.labels,
    )
    general_loss = _general_loss(model, tokenizer, recipe.evaluate)
    evaluation = Evaluation(scores, len(examples), round(seconds, 3), general_loss)
    write_json(folder / SCORES, asdict(evaluation))
    return evaluation


def _general_loss(
    model: Any, tokenizer: PreTrainedTokenizerBase, options: EvaluateSection
) -> float | None:
    if options.general is None:
        return None
    texts = load_texts(options.general)
    return text_loss(
        model,
        tokenizer,
        texts,
        max_length=options.general.max_length,
        batch_size=options.batch_size,
    ).loss


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _write_predictions(path: Path, examples: list[Example], texts: list[str]) -> None:
    lines = (
        json.dumps(
            asdict(Prediction(_prompt_text(example), text, example.target)), ensure_ascii=False
        )
        for example, text in zip(examples, texts, strict=True)
    )
    write_text(path, "".join(f"{line}\n" for line in lines))


def _prompt_text(example: Example) -> str:
    if isinstance(example.prompt, str):
        return example.prompt
    return "\n".join(f"{turn.role}: {turn.content}" for turn in example.prompt)


def read_predictions(path: Path) -> list[Prediction]:
    """Read what ``evaluate`` kept."""
    # Not str.splitlines, which also splits at separators that JSON leaves inside a text.
    with path.open(encoding="utf-8") as file:
        return [Prediction(**json.loads(line)) for line in file]


def read_evaluation(folder: Path) -> Evaluation:
    """Read the scores that ``evaluate`` kept."""
    fields = json.loads((folder / SCORES).read_text(encoding="utf-8"))
    scores = {name: Score(**score) for name, score in fields["scores"].items()}
    return Evaluation(**fields | {"scores": scores})
