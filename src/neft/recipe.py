"""The recipe: a strict schema of everything that determines a run.

One YAML file, one section a stage. Unknown keys are refused; faults are reported together, each with its
path in the file. What settings must have in common is looked at once each of them is right by itself.
Sections are plain frozen models that the rooms take as their options.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args

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
from neft.templates import MESSAGES, TARGETS, TEMPLATES, placeholders


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
MethodName: TypeAlias = Literal["full", "embed", "in_out", "lora", "mask", "neft"]
Quantization: TypeAlias = Literal["4bit", "8bit"]
Task: TypeAlias = Literal["translation", "summarization", "classification", "prompt", "chat"]


class _SettingsError(ValueError):
    """What is wrong with the settings of a section."""

    def __init__(self, faults: Sequence[tuple[str, str]]) -> None:
        """``faults``: (place within the section, or nothing for the section itself; what is wrong)."""
        super().__init__(
            "; ".join(f"{place}: {fault}" if place else fault for place, fault in faults)
        )
        self.faults = faults


class Section(BaseModel):
    """Part of a recipe: unknown keys are refused, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _default(section: Section, name: str) -> Any:
    # What a section was given cannot be told from what it has: a recipe is written down in full.
    return type(section).model_fields[name].default


class ModelSection(Section):
    """The base model."""

    path: str
    """A checkpoint folder, or a Hub id."""
    revision: str | None = None
    """Hub revision: branch, tag or commit."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype in which frozen weights are held during training and evaluation; the warm-up and the
    trained neurons are always float32."""
    quantization: Quantization | None = None
    """Hold the frozen weights of all linear layers but the LM head in fewer bits, by bitsandbytes:
    ``4bit`` is NF4 as in QLoRA, ``8bit`` LLM.int8; the rest, and the products, are in ``dtype``. For the
    methods ``neft`` and ``lora``."""
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    """Run Python code that the checkpoint ships. Off unless you trust its author."""
    config: str | None = None
    """A file like the checkpoint's ``config.json``, by which ``neft compare --dry-run`` plans where the
    checkpoint itself is out of reach."""


class ParallelFiles(Section):
    """Two plain-text files, line n of one belonging to line n of the other."""

    source: str
    target: str


class HubData(Section):
    """A data set on the Hub."""

    id: str
    config: str | None = None
    split: str
    """Its name, or a slice of it as ``datasets`` writes them: ``train[:20000]``, ``train[-1000:]``."""
    revision: str | None = None
    """Branch, tag or commit."""
    fields: dict[str, str] = {}
    """Where a task's field lies in a row of this set, if not where ``data.fields`` says: training and
    test data of different origin seldom name their columns alike."""


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


class DataSection(Section):
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

    @model_validator(mode="after")
    def _uses_its_labels(self) -> DataSection:
        in_prompt = "{labels}" in (self.template or "")
        if self.labels is not None and self.task != "classification" and not in_prompt:
            raise _SettingsError([("labels", f"are for classification, not for {self.task!r}")])
        return self

    @model_validator(mode="after")
    def _takes_the_fields_of_its_task(self) -> DataSection:
        try:
            sources = {split: getattr(self, split) for split in ("train", "dev", "test")}
            faults = list(self.faults_of_fields({"": self} | sources))
        except ValueError as error:
            raise _SettingsError([("template", str(error))]) from error
        if faults:
            raise _SettingsError(faults)
        return self

    def faults_of_fields(self, sources: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """(place, fault) of each field that this task does not have.

        Args:
            sources: place -> what may say where fields lie.
        """
        known = self.row_fields
        for place, source in sources.items():
            for name in source.fields if isinstance(source, HubData | DataSection) else ():
                if name not in known:
                    fault = f"{name!r} is not a field of this task; it has {', '.join(known)}"
                    yield f"{place}.fields".removeprefix("."), fault

    @property
    def constants(self) -> dict[str, str]:
        """What a template may name beside the fields of a row."""
        values = {
            "source_language": self.source_language,
            "target_language": self.target_language,
            "labels": ", ".join(self.labels) if self.labels else None,
        }
        return {name: value for name, value in values.items() if value is not None}

    @property
    def prompt_template(self) -> str:
        """The prompt of every task but chats."""
        if self.template is not None:
            return self.template
        template = TEMPLATES[self.task]
        if self.source_language is None:
            template = template.replace("{source_language} ", "")
        return template

    @property
    def row_fields(self) -> tuple[str, ...]:
        """The fields of a row that this task reads."""
        if self.task == "chat":
            return (MESSAGES,)
        names = [*placeholders(self.prompt_template, self.constants), TARGETS[self.task]]
        return tuple(dict.fromkeys(names))


class TrainingSection(Section):
    """One training run; the defaults are the paper's (section 4.1)."""

    learning_rate: Rate
    epochs: Rate | None = None
    """Length of the run in passes over the data; give this or ``steps``."""
    steps: Count | None = None
    """Length of the run in optimizer steps."""
    batch_size: Count = 8
    """Examples a step and ``gradient_accumulation``; several processes share them."""
    gradient_accumulation: Count = 1
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """AdamW keeps two numbers a trained weight, Adafactor two a row and column of them."""
    in_backward: bool = False
    """Update each weight as soon as its gradient is there, and free that at once: hardly two gradients
    exist at a time. Without clipping and accumulation, and on one device."""
    group_by_length: bool = False
    """Batches of texts of like length, in random order: less padding, so faster."""
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

    @property
    def has_length(self) -> bool:
        """Whether there are steps to take."""
        return True

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSection:
        if self.has_length and (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self

    @model_validator(mode="after")
    def _frees_gradients(self) -> TrainingSection:
        if self.in_backward and self.gradient_accumulation > 1:
            raise ValueError(
                "in_backward frees gradients at once, so none can be accumulated: set "
                "gradient_accumulation to 1"
            )
        if self.in_backward and self.max_grad_norm != _default(self, "max_grad_norm"):
            raise ValueError(
                "in_backward frees gradients before their norm is known, so none can be clipped: remove "
                "max_grad_norm"
            )
        return self


WarmupMethod: TypeAlias = Literal["full", "lora", "gradient", "activation", "norm", "none"]


class WarmupSection(TrainingSection):
    """What shows which neurons the task moves (Algorithm 1, step 1), or foretells it for less."""

    method: WarmupMethod = "full"
    """``full``: a short full fine-tune, the paper's way; ``lora``: a short LoRA run, merged;
    ``gradient``: gradients on as many batches, without any update; ``activation``: a forward pass alone;
    ``norm``: the base model's weights alone; ``none``: a fine-tuned ``checkpoint`` that is there already.
    Those that do not train have no use for the rate and its schedule."""
    learning_rate: Rate = 2e-5
    """The paper's."""
    rank: Count = 8
    """Of ``lora``."""
    checkpoint: str | None = None
    """For ``none``: a folder or Hub id with the base model after fine-tuning."""
    train: DataSource | None = None
    """Find the neurons on other data than they are trained on (the paper's NeFT_Trans); default:
    ``data.train``."""
    dev: DataSource | None = None
    """Goes with ``train``; default: ``data.dev``."""
    train_limit: Count | None = None
    """Use only the first rows; default: ``data.train_limit``."""
    seed: Seed | None = None
    """Default: the run's."""
    snapshots: tuple[Count, ...] = ()
    """Steps whose weights are kept beside the best, for ``score.step``; multiples of
    ``evaluate_every``."""

    def data_of(self, data: DataSection) -> DataSection:
        """The data of a run's warm-up, given the run's."""
        others = {"train": self.train, "dev": self.dev, "train_limit": self.train_limit}
        return data.model_copy(update={split: s for split, s in others.items() if s is not None})

    def seed_of(self, seed: int) -> int:
        """The seed of a run's warm-up, given the run's."""
        return seed if self.seed is None else self.seed

    @property
    def trains(self) -> bool:
        """Whether weights are updated."""
        return self.method in ("full", "lora")

    @property
    def has_length(self) -> bool:
        """Whether it reads data, for so many steps."""
        return self.method not in ("norm", "none")

    @model_validator(mode="after")
    def _fits_method(self) -> WarmupSection:
        if (self.checkpoint is not None) != (self.method == "none"):
            raise ValueError("method 'none' and checkpoint go together")
        if self.snapshots and self.method != "full":
            raise ValueError(f"snapshots are kept by method 'full', not by {self.method!r}")
        if self.method != "lora" and self.rank != _default(self, "rank"):
            raise ValueError(f"rank goes with method 'lora', not with {self.method!r}")
        return self

    @model_validator(mode="after")
    def _snapshots_are_measured(self) -> WarmupSection:
        for step in self.snapshots:
            if step % self.evaluate_every or (self.steps is not None and step > self.steps):
                raise ValueError(
                    f"snapshots has {step}, which is no multiple of evaluate_every = "
                    f"{self.evaluate_every} within the run"
                )
        return self


class ProbeSection(Section):
    """Classifiers of hidden states, for ``score.method: probe``."""

    layers: Annotated[tuple[CountOrZero, ...], Field(min_length=1)] | None = None
    """Layers whose hidden states are probed, from 0; default: all."""
    limit: Count = 2000
    """Texts of the training split that are read, the first; memory grows with them."""
    folds: Annotated[int, Field(ge=2), _Number] = 5
    """Of the cross-validation that measures how well each layer's probe tells the labels."""
    batch_size: Count = 16
    """Texts at once; changes nothing but rounding."""


class ScoreSection(Section):
    """How neurons are scored (Algorithm 1, step 2)."""

    method: Literal["cosine", "probe"] = "cosine"
    """``cosine``: how far the warm-up turned each neuron; ``probe``: how far each neuron lies along what
    tells the labels apart (paper, section 3), for classification and without a warm-up."""
    probe: ProbeSection | None = None
    """For ``probe``, if not its defaults."""
    modules: tuple[str, ...] | None = None
    """Roles (``up``, ``gate``, ``down``, ``q``, ...) or module-name patterns; default: up and down."""
    step: Count | None = None
    """Compare with the warm-up's weights after this step (the paper's NeFT_Early); one of
    ``warmup.snapshots``. Default: its weights with the lowest development loss."""

    @property
    def probing(self) -> ProbeSection:
        """The settings of ``probe``."""
        return self.probe or ProbeSection()

    @property
    def needs_warmup(self) -> bool:
        """Whether it is a warm-up that shows what to score."""
        return self.method == "cosine"

    @model_validator(mode="after")
    def _fits_method(self) -> ScoreSection:
        if self.probe is not None and self.method != "probe":
            raise ValueError("the section probe needs method 'probe'")
        if self.step is not None and not self.needs_warmup:
            raise ValueError(f"step is one of a warm-up, which method {self.method!r} does without")
        return self


class SelectSection(Section):
    """Which neurons are trained (Algorithm 1, step 3)."""

    percent: Percent | None = None
    """Budget in percent of all parameters of the model; give this, ``count`` or ``megabytes``."""
    count: Count | None = None
    megabytes: Rate | None = None
    """Budget by the size of the vectors in the adapter: float32, 1 MB = 10^6 bytes."""
    which: Literal["lowest", "highest", "random"] = "lowest"
    """By cosine; ``highest`` alone is the paper's Reversed."""
    seed: Seed = 0
    """For ``which: random``."""
    rule: Literal["paper", "even", "floor", "units"] = "paper"
    """``paper``: one ranking over all layers and projections; ``even``: the budget is dealt evenly to the
    layers; ``floor``: each layer gets a part of its even share, and the ranking decides about the rest;
    ``units``: the up, gate and down neurons of a feed-forward unit are chosen together."""
    floor: Percent = 50.0
    """For ``rule: floor``: that part, in percent."""
    above_rounding: bool = False
    """Leave out neurons that moved no more than rounding to 16 bits moves them."""
    reversed_percent: Percent | None = None
    """As many percent of the neurons with the highest cosine besides (NeFT_3%+Reversed_x%); this or
    ``reversed_count``."""
    reversed_count: Count | None = None
    union: tuple[str, ...] = ()
    """Files of neuron sets that are joined to the choice (NeFT_Union)."""
    intersection: tuple[str, ...] = ()
    """Files of neuron sets in all of which a neuron must be to stay chosen."""
    neurons: str | None = None
    """A file of a neuron set to take instead of choosing: without a budget, scores and warm-up."""

    @model_validator(mode="after")
    def _one_budget(self) -> SelectSection:
        budgets = sum(b is not None for b in (self.percent, self.count, self.megabytes))
        if self.neurons is not None:
            if budgets or self.takes_reversed:
                raise ValueError("neurons takes a set as it is; remove the budgets")
            if self.rule != "paper" or self.above_rounding:
                raise ValueError("neurons takes a set as it is; remove rule and above_rounding")
        elif budgets != 1:
            raise ValueError("give one of percent, count and megabytes")
        if self.reversed_percent is not None and self.reversed_count is not None:
            raise ValueError("give either reversed_percent or reversed_count")
        if self.takes_reversed and self.which != "lowest":
            raise ValueError(f"the reversed neurons are joined to the lowest, not to {self.which}")
        return self

    @model_validator(mode="after")
    def _fits_rule(self) -> SelectSection:
        if self.rule != "floor" and self.floor != _default(self, "floor"):
            raise ValueError(f"floor goes with rule 'floor', not with {self.rule!r}")
        if self.takes_reversed and (self.rule != "paper" or self.above_rounding):
            raise ValueError(
                "the reversed neurons go with rule 'paper', and without above_rounding: they are those "
                "that moved least, wherever they are"
            )
        return self

    @property
    def takes_reversed(self) -> bool:
        """Whether neurons with the highest cosine are chosen besides."""
        return self.reversed_percent is not None or self.reversed_count is not None

    @property
    def needs_scores(self) -> bool:
        """Whether the choice depends on a warm-up and its scores."""
        return self.neurons is None and (self.which != "random" or self.above_rounding)


class LoraSection(Section):
    """LoRA (Hu et al., 2022) on all linear layers but the LM head; for ``train.method: lora``."""

    rank: Count | None = None
    """Give this or ``match``."""
    match: Literal["neft"] | None = None
    """``neft``: the rank whose trainable parameters come nearest to the budget in ``select``."""
    alpha: Rate | None = None
    """Updates are scaled by ``alpha / rank``; default: the rank, which leaves them as they are."""
    dropout: Annotated[float, Field(ge=0, lt=1), _Number] = 0.0

    @model_validator(mode="after")
    def _one_rank(self) -> LoraSection:
        if (self.rank is None) == (self.match is None):
            raise ValueError("give either rank or match")
        return self


class TrainSection(TrainingSection):
    """The run that is shipped (Algorithm 1, step 4), or a baseline of it."""

    method: MethodName = "neft"
    """``full``: all parameters; ``embed``: the input embeddings; ``in_out``: the up and down
    projections; ``lora``; ``mask``: the chosen neurons by masked full gradients, the paper's way;
    ``neft``: the chosen neurons alone."""
    lora: LoraSection | None = None

    @model_validator(mode="after")
    def _fits_method(self) -> TrainSection:
        if (self.lora is not None) != (self.method == "lora"):
            raise ValueError("method 'lora' and the section lora go together")
        if self.method == "mask" and self.weight_decay:
            raise ValueError(
                "method 'mask' needs weight_decay 0: decay moves the masked weights too"
            )
        return self


class GeneralSection(Section):
    """Held-out general text, on which forgetting is measured: the change of the model's loss."""

    text: DataSource
    """Texts that neither training nor the task's other splits hold, one a row."""
    field: str = "text"
    limit: Count | None = None
    """Use only the first rows."""
    max_length: Count = 256
    """Tokens of a text that are read."""

    @model_validator(mode="after")
    def _has_one_field(self) -> GeneralSection:
        if isinstance(self.text, HubData) and self.text.fields:
            raise ValueError("say with field where the text lies, and remove text.fields")
        return self


class EvaluateSection(Section):
    """Generation on the test split, and its metrics."""

    batch_size: Count = 32
    max_new_tokens: Count = 128
    num_beams: Count = 1
    no_repeat_ngram_size: CountOrZero = 0
    """The paper decodes greedily with 4."""
    lowercase: bool = False
    """Compare lower-cased texts (the paper does, into French)."""
    general: GeneralSection | None = None


class AnalysisSection(Section):
    """What training did to the neurons (paper, section 6, and beyond): see ``neft.analysis``."""

    limit: Count = 100
    """Examples of the test split that are read; for the causal test, as many of the development split and
    of the general texts."""
    max_length: Count = 256
    """Tokens of a text that are read; the rest is cut off."""
    lens_tokens: Count = 5
    """Tokens that an out neuron promotes or suppresses most, of each as many."""
    lens_limit: Count = 20000
    """Out neurons that are looked at through the logit lens: those that training moved most."""
    contexts: CountOrZero = 3
    """Tokens in their context that activate a unit most."""
    context_units: Count = 200
    """Units of which contexts are kept: those that training moved most."""
    causal: bool = True
    """Measure the loss with groups of trained neurons put back to what they were."""
    overlap_with: dict[str, str] = {}
    """Name -> file of a neuron set or of scores, with which the run's choice is compared."""


EngineName: TypeAlias = Literal["ddp", "fsdp2", "zero2", "zero3"]


class DistributedSection(Section):
    """How several processes train together, where a launcher starts them; one alone has no use for it.

    The batches, and so the results but for rounding, are those of one process.
    """

    engine: EngineName = "ddp"
    """``ddp``: every process has all weights; ``fsdp2``: each has a share, and gathers a layer at a time;
    ``zero2``, ``zero3``: DeepSpeed's: a share of the optimizer's state, or of the weights too."""
    reshard_after_forward: bool | None = None
    """``fsdp2``: give up a layer's weights after the forward pass, and gather them anew for the backward
    pass; default: true. False takes memory for all weights meanwhile, and less traffic."""

    @model_validator(mode="after")
    def _fits_engine(self) -> DistributedSection:
        if self.reshard_after_forward is not None and self.engine != "fsdp2":
            raise ValueError(f"reshard_after_forward is for fsdp2, not for {self.engine!r}")
        return self


class Recipe(Section):
    """A whole run."""

    output: str
    """Folder of the run, one sub-folder a stage."""
    seed: Seed = 0
    model: ModelSection
    data: DataSection
    warmup: WarmupSection | None = None
    """Needed where neurons are chosen by their scores."""
    score: ScoreSection = ScoreSection()
    select: SelectSection | None = None
    """Needed by the methods ``neft`` and ``mask``, and for the budget that ``lora`` may match."""
    train: TrainSection
    evaluate: EvaluateSection = EvaluateSection()
    analysis: AnalysisSection | None = None
    """What is looked at after evaluation; default: nothing."""
    distributed: DistributedSection = DistributedSection()

    @model_validator(mode="after")
    def _neurons_need_a_source(self) -> Recipe:
        method = self.train.method
        if method in ("neft", "mask"):
            if self.select is None:
                raise ValueError(f"train.method {method!r} needs the section select")
            from_warmup = self.select.needs_scores and self.score.needs_warmup
            if from_warmup and self.warmup is None:
                raise ValueError(
                    f"train.method {method!r} needs the section warmup, unless select takes random "
                    "neurons or a file of them, or score.method is 'probe'"
                )
        if self.train.lora is not None and self.train.lora.match and self.select is None:
            raise ValueError(
                "train.lora.match 'neft' needs the section select, whose budget it matches"
            )
        return self

    @model_validator(mode="after")
    def _quantized_weights_stay_frozen(self) -> Recipe:
        bits = self.model.quantization
        if bits is None:
            return self
        if self.train.method not in ("neft", "lora"):
            raise ValueError(
                f"train.method {self.train.method!r} trains the model's own weights, which "
                f"model.quantization {bits!r} makes integers; choose neft or lora"
            )
        if self.warmup is not None and self.warmup.method == "full":
            raise ValueError(
                "warmup.method 'full' trains all weights, which model.quantization "
                f"{bits!r} makes integers; choose lora, gradient, activation, norm or none"
            )
        if self.analysis is not None:
            raise ValueError(
                f"the section analysis compares weights, which model.quantization {bits!r} rounds by "
                "more than training moves them; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _probe_has_labels(self) -> Recipe:
        if self.score.method == "probe" and self.data.task != "classification":
            raise ValueError(
                f"score.method 'probe' needs labels, so data.task classification, not {self.data.task!r}"
            )
        return self

    @model_validator(mode="after")
    def _warmup_takes_the_fields_of_the_task(self) -> Recipe:
        if self.warmup is not None:
            sources = {"warmup.train": self.warmup.train, "warmup.dev": self.warmup.dev}
            if faults := list(self.data.faults_of_fields(sources)):
                raise _SettingsError(faults)
        return self

    @model_validator(mode="after")
    def _scored_step_is_kept(self) -> Recipe:
        step = self.score.step
        if step is not None and self.warmup is not None and step not in self.warmup.snapshots:
            raise ValueError(f"score.step {step} is not one of warmup.snapshots")
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
        RecipeError: lists the faults, each with its place.
    """
    return checked(Recipe, read_fields(path, overrides), str(path))


def read_fields(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read the fields of a recipe, as yet unchecked; arguments as for ``load_recipe``.

    Raises:
        RecipeError: the file or an override cannot be read.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            fields = yaml.load(file, _UniqueKeys)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, e.g. 'model:' and 'data:'.")
    for override in overrides:
        _apply_override(fields, override)
    return fields


class _UniqueKeys(yaml.SafeLoader):
    """Plain YAML that refuses a key given twice, of which one would be lost silently."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Before ``<<`` brings in keys of other mappings, which a mapping's own may replace.
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add((key.tag, str(key.value)))
        return node


Checked = TypeVar("Checked", bound=Section)


def checked(schema: type[Checked], fields: Mapping[str, Any], where: str) -> Checked:
    """Check plain values by a schema; ``where`` names their source in errors.

    Raises:
        RecipeError: lists the faults, each with its place.
    """
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise refused(where, _fault_lines(schema, error)) from error


def faults_of(schema: type[Section], fields: Mapping[str, Any]) -> list[str]:
    """One line for each fault that a schema finds; none where the fields fit."""
    try:
        schema.model_validate(fields)
    except ValidationError as error:
        return _fault_lines(schema, error)
    return []


def refused(where: str, faults: Sequence[str]) -> RecipeError:
    """The error that lists ``faults``."""
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return RecipeError(f"{where}: {count}:\n" + "\n".join(f"  {fault}" for fault in faults))


# Where pydantic speaks of Python, not of recipes.
_MESSAGES = {
    "dict_type": "should be a mapping",
    "extra_forbidden": "unknown key",
    "missing": "is missing",
    "model_type": "should be a section",
    "tuple_type": "should be a list",
}


def _fault_lines(schema: type[BaseModel], error: ValidationError) -> list[str]:
    return [line for fault in error.errors() for line in _lines_of(schema, fault)]


def _lines_of(schema: type[BaseModel], fault: ErrorDetails) -> Iterator[str]:
    places = [str(part) for part in fault["loc"] if part not in _SOURCE_KINDS]
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, _SettingsError):
        for place, message in cause.faults:
            yield f"{'.'.join([*places, *filter(None, [place])]) or 'recipe'}: {message}"
        return
    message = _MESSAGES.get(fault["type"], fault["msg"].removeprefix("Value error, "))
    value = fault["input"]
    found = "" if isinstance(value, dict) else f" (found {value!r})"
    known = _keys_beside(schema, fault["loc"]) if fault["type"] == "extra_forbidden" else ()
    close = difflib.get_close_matches(places[-1] if places else "", known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    yield f"{'.'.join(places) or 'recipe'}: {message}{found}{hint}"


def _keys_beside(schema: type[BaseModel], place: Sequence[str | int]) -> Collection[str]:
    """The known keys of the section that an unknown key stands in, where it can be only one."""
    for part in place[:-1]:
        if part in schema.model_fields:
            sections = list(_sections_in(schema.model_fields[str(part)].annotation))
            if len(sections) != 1:
                return ()
            schema = sections[0]
    return schema.model_fields


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if arguments := get_args(annotation):
        for argument in arguments:
            yield from _sections_in(argument)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


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
