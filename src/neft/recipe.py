"""The recipe: a strict schema of everything that determines a run.

One YAML file, one section a stage. Unknown keys are refused, every fault is reported at once, each
with its path in the file. Sections are plain frozen models that the rooms take as their options.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from neft.errors import RecipeError


def _no_boolean(value: object) -> object:
    # YAML reads yes and on as true, which Python counts as 1.
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


_Number = BeforeValidator(_no_boolean)
Count: TypeAlias = Annotated[int, Field(gt=0), _Number]
CountOrZero: TypeAlias = Annotated[int, Field(ge=0), _Number]
Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**32), _Number]
Rate: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False), _Number]
RateOrZero: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False), _Number]
Percent: TypeAlias = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False), _Number]
Task: TypeAlias = Literal["translation", "summarization", "classification", "prompt", "chat"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(_Section):
    """The base model."""

    path: str
    """A checkpoint folder, or a Hub id."""
    revision: str | None = None
    """Hub revision: branch, tag or commit."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype in which frozen weights are held during training and evaluation; the warm-up and the
    trained neurons are always float32."""
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    """Run Python code that the checkpoint ships. Off unless you trust its author."""


class ParallelFiles(_Section):
    """Two plain-text files, line n of one belonging to line n of the other."""

    source: str
    target: str


class HubData(_Section):
    """A data set on the Hub."""

    id: str
    config: str | None = None
    split: str
    revision: str | None = None


# In brackets, so that a fault's path in the file can leave them out.
_FILE, _PARALLEL, _HUB = _SOURCE_KINDS = ("(file)", "(parallel files)", "(Hub data set)")


def _source_kind(value: object) -> str | None:
    keys: Collection[object] = value if isinstance(value, dict) else ()
    if isinstance(value, str):
        return _FILE
    if isinstance(value, ParallelFiles) or "source" in keys or "target" in keys:
        return _PARALLEL
    if isinstance(value, HubData) or "id" in keys:
        return _HUB
    return None


DataSource: TypeAlias = Annotated[
    Annotated[str, Tag(_FILE)]
    | Annotated[ParallelFiles, Tag(_PARALLEL)]
    | Annotated[HubData, Tag(_HUB)],
    Discriminator(
        _source_kind,
        custom_error_type="data_source",
        custom_error_message=(
            "should be a file, {source, target} of two text files, or {id, split} on the Hub"
        ),
    ),
]
"""A JSONL, CSV, TSV or Parquet file; two parallel text files; or a Hub data set."""


class DataSection(_Section):
    """What is learnt: the examples, and how they become prompt and target."""

    task: Task
    train: DataSource
    dev: DataSource
    """Chooses the best checkpoint."""
    test: DataSource
    fields: dict[str, str] = {}
    """Where a task's field lies in a row, e.g. ``{source: translation.en}``; dots go into nested
    rows. Default: the field's own name. Fields are ``source, target`` (translation),
    ``document, summary`` (summarization), ``premise, hypothesis, label`` (classification),
    ``target`` and the placeholders of the template (prompt), ``messages`` (chat)."""
    source_language: str | None = None
    target_language: str | None = None
    labels: tuple[str, ...] | None = None
    """Classification: the label names, in the order of integer labels."""
    template: str | None = None
    """The prompt, with ``{field}`` placeholders; default: the paper's for the task."""
    style: Literal["auto", "chat", "plain"] = "auto"
    """``chat``: the prompt as a user turn in the model's chat template; ``plain``: bare, as in the
    paper; ``auto``: chat when the tokenizer has a template."""
    max_length: Count = 1024
    """Longest prompt + target in tokens."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to training texts beyond ``max_length``; either way the count is reported."""
    train_limit: Count | None = None
    """Use only the first rows; likewise below."""
    dev_limit: Count | None = None
    test_limit: Count | None = None

    @model_validator(mode="after")
    def _complete(self) -> DataSection:
        if self.task == "translation" and not (self.source_language and self.target_language):
            raise ValueError("translation needs source_language and target_language")
        if self.task == "summarization" and not (self.target_language or self.template):
            raise ValueError("summarization needs target_language")
        if self.task == "prompt" and self.template is None:
            raise ValueError("task 'prompt' needs a template")
        if self.task == "classification" and not self.labels:
            raise ValueError(
                "classification needs labels, e.g. [entailment, neutral, contradiction]"
            )
        if self.task == "chat" and self.template is not None:
            raise ValueError("task 'chat' takes its prompts from 'messages'; remove template")
        if self.task == "chat" and self.style == "plain":
            raise ValueError("task 'chat' needs the chat template; set style to chat or auto")
        return self


class TrainingSection(_Section):
    """One training run: AdamW, the paper's defaults (section 4.1)."""

    learning_rate: Rate
    epochs: Rate | None = None
    """Length of the run in passes over the data; give this or ``steps``."""
    steps: Count | None = None
    """Length of the run in optimizer steps."""
    batch_size: Count = 8
    """Examples a device and step."""
    gradient_accumulation: Count = 1
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: CountOrZero = 10
    """Steps over which the learning rate rises from 0."""
    weight_decay: RateOrZero = 0.0
    max_grad_norm: Rate = 1.0
    gradient_checkpointing: bool = False
    evaluate_every: Count = 50
    """Steps between two measurements of the development loss; a resumable checkpoint goes with each."""
    report_to: tuple[str, ...] = ()
    """Trackers, as transformers names them: tensorboard, wandb, ..."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSection:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self


class WarmupSection(TrainingSection):
    """The short full fine-tune that shows which neurons the task moves (Algorithm 1, step 1)."""

    method: Literal["full"] = "full"


class ScoreSection(_Section):
    """How neurons are scored (Algorithm 1, step 2)."""

    method: Literal["cosine"] = "cosine"
    modules: tuple[str, ...] | None = None
    """Roles (``up``, ``gate``, ``down``, ``q``, ...) or module-name patterns; default: up and down."""


class SelectSection(_Section):
    """Which neurons are trained (Algorithm 1, step 3)."""

    percent: Percent | None = None
    """Budget in percent of all parameters of the model; give this or ``count``."""
    count: Count | None = None
    which: Literal["lowest", "highest", "random"] = "lowest"
    seed: Seed = 0
    """For ``which: random``."""

    @model_validator(mode="after")
    def _one_budget(self) -> SelectSection:
        if (self.percent is None) == (self.count is None):
            raise ValueError("give either percent or count")
        return self


class TrainSection(TrainingSection):
    """The run that is shipped (Algorithm 1, step 4)."""

    method: Literal["neft", "full"] = "neft"


class EvaluateSection(_Section):
    """Generation on the test split, and its metrics."""

    batch_size: Count = 32
    max_new_tokens: Count = 128
    num_beams: Count = 1
    no_repeat_ngram_size: CountOrZero = 0
    """The paper decodes greedily with 4."""
    lowercase: bool = False
    """Compare lower-cased texts (the paper does, into French)."""


class Recipe(_Section):
    """A whole run."""

    output: str
    """Folder of the run, one sub-folder a stage."""
    seed: Seed = 0
    model: ModelSection
    data: DataSection
    warmup: WarmupSection | None = None
    """Left out for methods that need no neurons."""
    score: ScoreSection = ScoreSection()
    select: SelectSection | None = None
    train: TrainSection
    evaluate: EvaluateSection = EvaluateSection()

    @model_validator(mode="after")
    def _neurons_need_a_source(self) -> Recipe:
        if self.train.method == "neft" and (self.warmup is None or self.select is None):
            raise ValueError("train.method 'neft' needs the sections warmup and select")
        return self


def find_recipes(places: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Recipe files, in order; a folder stands for all ``.yaml`` files in it, at any depth.

    Raises:
        RecipeError: a place that is not there, or a folder without recipes.
    """
    found: list[Path] = []
    for place in map(Path, places):
        files = sorted(place.rglob("*.yaml")) if place.is_dir() else [place]
        if not files or not files[0].is_file():
            raise RecipeError(f"{place}: no recipe there; a recipe is a .yaml file.")
        found += files
    return found


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file.
        overrides: ``"section.key=value"`` settings that replace what the file says; values are YAML.

    Raises:
        RecipeError: lists every fault with its place.
    """
    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, e.g. 'model:' and 'data:'.")
    for override in overrides:
        _apply_override(fields, override)
    return parse_recipe(fields, where=str(path))


def parse_recipe(fields: Mapping[str, Any], where: str) -> Recipe:
    """Check a recipe given as plain values; ``where`` names its source in errors."""
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        faults = [_fault_line(fault) for fault in error.errors()]
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise RecipeError(f"{where}: {count}:\n" + "\n".join(faults)) from error


# Where pydantic speaks of Python, not of recipes.
_MESSAGES = {
    "dict_type": "should be a mapping",
    "extra_forbidden": "unknown key",
    "missing": "is missing",
    "model_type": "should be a section",
    "tuple_type": "should be a list",
}


def _fault_line(fault: ErrorDetails) -> str:
    place = ".".join(str(part) for part in fault["loc"] if part not in _SOURCE_KINDS) or "recipe"
    message = _MESSAGES.get(fault["type"], fault["msg"].removeprefix("Value error, "))
    value = fault["input"]
    return f"  {place}: {message}" + ("" if isinstance(value, dict) else f" (found {value!r})")


def _apply_override(fields: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {override}: expected section.key=value.")
    *path, last = key.split(".")
    section = fields
    for part in path:
        child = section.setdefault(part, {})
        if child is None:
            child = section[part] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override}: {part!r} is not a section.")
        section = child
    try:
        section[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: not a YAML value: {error}") from error
