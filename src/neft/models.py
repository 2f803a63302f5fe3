"""Loading a base model and its tokenizer: a good one, or an error that says what is wrong."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from neft.errors import CheckpointError, UsageError
from neft.memory import is_shortage
from neft.quantized import keep_format
from neft.recipe import ModelSection, Quantization

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the warnings and progress bars of transformers off the terminal; what matters, we say.

    So too its notices of deprecation, which are for the libraries between it and us.
    """
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def load_model(model: ModelSection, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal language model, in evaluation mode: on the CPU, or on the accelerator if quantized.

    Weights are read from safetensors only, never from pickles; code that the checkpoint ships runs
    only if ``model.trust_remote_code`` says so.

    Args:
        model: where the checkpoint is.
        dtype: dtype of all weights; default: ``model.dtype``.

    Raises:
        CheckpointError: no such folder or Hub id, not a causal language model, torn, missing or quantized
            weights.
        UsageError: quantization that this machine cannot do.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    _check_folder(model)
    check_quantization(model)
    held_in = dtype or getattr(torch, model.dtype)
    try:
        with quiet_transformers():
            loaded, report = AutoModelForCausalLM.from_pretrained(
                _location(model),
                revision=model.revision,
                dtype=held_in,
                **_quantizing(model.quantization, held_in),
                attn_implementation=model.attn_implementation,
                trust_remote_code=model.trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        if is_shortage(error):
            raise  # of memory: nothing is wrong with the checkpoint
        raise _not_loadable(model, "model", error) from error
    if getattr(getattr(loaded, "hf_quantizer", None), "pre_quantized", False):
        raise CheckpointError(
            f"{model.path}: its weights are stored quantized, so neurons can be neither found in nor "
            "merged into them. Give the model that it was made from; model.quantization quantizes it."
        )
    # transformers fills what does not fit with random numbers, and only logs it.
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise CheckpointError(
            f"{model.path}: {name} has shape {list(found)}, but its config.json makes it "
            f"{list(expected)}. Weights and configuration are of different models."
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{model.path}: {len(missing)} tensors of a {type(loaded).__name__} are missing, "
            f"e.g. {missing[0]}. The checkpoint is torn, or holds another kind of model."
        )
    keep_format(loaded)
    result: PreTrainedModel = loaded
    return result


def check_quantization(model: ModelSection) -> None:
    """Find out before anything expensive whether the model can be quantized here.

    Raises:
        UsageError: bitsandbytes is not installed, or does not run on the accelerator.
    """
    if model.quantization is None:
        return
    wanted = f"model.quantization is {model.quantization!r}, for which"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"{wanted} bitsandbytes is needed: pip install 'neft[quantized]'.")
    import bitsandbytes
    import torch

    accelerator = torch.accelerator.current_accelerator()
    kind = "cpu" if accelerator is None else accelerator.type
    if kind not in bitsandbytes.supported_torch_devices:
        raise UsageError(
            f"{wanted} bitsandbytes {bitsandbytes.__version__} has no kernels on {kind}. It runs on "
            f"{', '.join(sorted(bitsandbytes.supported_torch_devices))}."
        )


def _quantizing(
    quantization: Quantization | None, dtype: torch.dtype
) -> dict[str, BitsAndBytesConfig]:
    """Options of ``from_pretrained``; ``None`` there would take stored integers for weights."""
    from transformers import BitsAndBytesConfig

    match quantization:
        case "4bit":
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        case "8bit":
            config = BitsAndBytesConfig(load_in_8bit=True)
        case None:
            return {}
    return {"quantization_config": config}


def load_tokenizer(
    model: ModelSection, *, padding_side: Literal["left", "right"] = "right"
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; one without a pad token gets its EOS, else its unknown token, as that.

    Args:
        model: where the checkpoint is.
        padding_side: ``right`` for training, ``left`` for generation.

    Raises:
        CheckpointError: no such folder or Hub id, no tokenizer in it, or no token fit for padding.
    """
    from transformers import AutoTokenizer

    _check_folder(model)
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                _location(model),
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
                padding_side=padding_side,
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
        raise _not_loadable(model, "tokenizer", error) from error
    if tokenizer.pad_token is None:
        _give_pad_token(tokenizer, model.path)
    return tokenizer


def _give_pad_token(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    substitute = tokenizer.eos_token or tokenizer.unk_token
    if substitute is None:
        raise CheckpointError(
            f"{place}: the tokenizer has no pad, EOS or unknown token to pad with. Set pad_token in its "
            "tokenizer_config.json."
        )
    tokenizer.pad_token = substitute
    _log.info("%s: the tokenizer has no pad token; %r stands in for it.", place, substitute)


def _location(model: ModelSection) -> str:
    folder = Path(model.path).expanduser()
    return str(folder) if folder.is_dir() else model.path


def _check_folder(model: ModelSection) -> None:
    """Refuse what is clearly not a checkpoint; anything that could be a Hub id passes."""
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        _check_files(folder)
    elif folder.exists():
        raise CheckpointError(f"{model.path}: is a file; a checkpoint is a folder.")
    elif model.path.startswith((".", "/", "~")) or model.path.count("/") > 1:
        raise CheckpointError(f"{model.path}: no such folder.")


def _check_files(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{folder}: is an adapter, not a model. Name its base model, or merge it first."
            )
        raise CheckpointError(f"{folder}: has no config.json, so it is not a model checkpoint.")
    if any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder}: holds only pickled weights (pytorch_model*.bin), which can run code and are "
            "never loaded. Convert the checkpoint to safetensors."
        )


def _not_loadable(model: ModelSection, what: str, error: Exception) -> CheckpointError:
    reason = str(error).strip() or type(error).__name__
    if "trust_remote_code" in reason:
        return CheckpointError(
            f"{model.path}: ships Python code of its own. If you trust its author, set "
            "model.trust_remote_code to true."
        )
    if not Path(model.path).expanduser().is_dir():
        return CheckpointError(
            f"{model.path}: no such folder here, and no {what} can be fetched under that id from the "
            f"Hub. Check the spelling and the network. ({reason})"
        )
    return CheckpointError(f"{model.path}: the {what} cannot be loaded: {reason}")
