"""Adapters on disk: put one on a base model, merge one into a plain checkpoint."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neft.errors import AdapterError, CheckpointError, NeftError
from neft.memory import is_shortage
from neft.models import load_model, load_tokenizer, quiet_transformers
from neft.pipeline.store import new_folder
from neft.recipe import ModelSection, Recipe
from neft.sft.methods import find_method

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration.

    Raises:
        AdapterError: names what the folder lacks, or what cannot be read.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder; an adapter is a folder with {CONFIG}.")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder}: has no {name}, so it is not a complete adapter.")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG}: cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG}: expected a JSON object.")
    return config


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter in ``folder`` on ``base``, for inference.

    Raises:
        AdapterError: the folder is incomplete, torn, or made for another model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    read_config(folder)
    try:
        with warnings.catch_warnings():
            # PEFT only warns, and goes on with the base's vectors.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(base, folder)
    except NeftError:
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        SafetensorError,
        UserWarning,
    ) as error:
        if is_shortage(error):
            raise  # of memory: nothing is wrong with the adapter
        raise AdapterError(f"{folder}: cannot be put on this model: {error}") from error


def load_trained(recipe: Recipe, train: Path) -> PreTrainedModel | PeftModel:
    """What a finished training run has made of the base model: an adapter on it, or another model."""
    if find_method(recipe.train.method).makes_adapter:
        return load_adapter(load_model(recipe.model), train / "adapter")
    tuned = {"path": str(train / "model"), "revision": None}
    return load_model(recipe.model.model_copy(update=tuned))


def load_merged(recipe: Recipe, train: Path) -> PreTrainedModel:
    """The same as a plain model, any adapter merged into its weights."""
    trained: Any = load_trained(recipe, train)
    if find_method(recipe.train.method).makes_adapter:
        trained = trained.merge_and_unload()
    plain: PreTrainedModel = trained
    return plain


def merge_adapter(folder: Path, output: Path, base: str | None = None, dtype: str = "auto") -> None:
    """Write base model and adapter as one plain checkpoint, which transformers alone loads.

    Args:
        folder: the adapter.
        output: folder of the checkpoint; must not exist, or be empty.
        base: the base model; default: the one that the adapter's configuration names.
        dtype: of the checkpoint; ``auto`` is that of the base's. 16 bits round the trained vectors,
            which are float32.

    Raises:
        AdapterError: the adapter is incomplete, torn, or does not fit the base.
        UsageError: ``output`` holds something.
    """
    with new_folder(output.expanduser().resolve()) as working:
        model = _base_section(folder, base, dtype)
        merged = load_adapter(load_model(model), folder).merge_and_unload()
        with quiet_transformers():
            merged.save_pretrained(working)
            load_tokenizer(model).save_pretrained(working)


def _base_section(folder: Path, base: str | None, dtype: str) -> ModelSection:
    config = read_config(folder)
    path = base or config.get("base_model_name_or_path")
    if not path:
        raise AdapterError(f"{folder / CONFIG}: names no base model; say which one with --base.")
    model = ModelSection(path=path, revision=None if base else config.get("revision"))
    stored = _stored_dtype(model) if dtype == "auto" else dtype
    return ModelSection.model_validate(model.model_dump() | {"dtype": stored})


def _stored_dtype(model: ModelSection) -> str:
    """The dtype that a checkpoint's configuration names; float32 where it names none."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model.path, revision=model.revision)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{model.path}: the base model's configuration cannot be read: {error}"
        ) from error
    dtype = str(config.dtype).removeprefix("torch.")
    return dtype if dtype in ("bfloat16", "float16") else "float32"
