"""A checkpoint folder of safetensors, in one file or in shards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from neft.checkpoints.source import TensorInfo, WeightSource
from neft.errors import CheckpointError
from neft.projections import as_module

if TYPE_CHECKING:
    from torch import Tensor, nn

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

# Names that the format gives to dtypes -> names that torch gives to them.
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class FolderWeights(WeightSource):
    """Weights in a local folder; only headers are read until a tensor is asked for.

    Raises:
        CheckpointError: the folder or a shard is missing, torn, or not what the index says.
    """

    def __init__(self, folder: Path, label: str) -> None:
        self.label = label
        self._folder = folder
        config = folder / "config.json"
        self.config_path = config if config.is_file() else None
        self._shards: dict[str, Path] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for shard, names in _shards(folder, label).items():
            header = _read_header(shard)
            for name in header if names is None else names:
                if name not in header:
                    raise CheckpointError(
                        f"{shard}: has no tensor {name}, which {INDEX} says is there. The folder "
                        "mixes files of two checkpoints; save or fetch it again."
                    )
                self._shards[name] = shard
                self.tensors[name] = header[name]

    @cached_property
    def network(self) -> nn.Module:
        return as_module(self._folder)

    def _read(self, name: str, index: int | None) -> Tensor:
        # Pages that were read count as this process's memory for as long as their file is mapped, so a
        # shard that stayed open would grow by the whole of itself.
        shard = self._shards[name]
        with _faults_named(shard), safe_open(shard, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name) if index is None else file.get_slice(name)[index]
            return tensor


def _shards(folder: Path, label: str) -> dict[Path, Sequence[str] | None]:
    """Files of the checkpoint -> names of the tensors to take from it (``None``: all)."""
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if (folder / INDEX).is_file():
        return _indexed_shards(folder / INDEX)
    raise CheckpointError(f"{label}: {_lack_of_safetensors(folder)}")


def _indexed_shards(index: Path) -> dict[Path, Sequence[str] | None]:
    names_by_shard: dict[Path, list[str]] = {}
    try:
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            names_by_shard.setdefault(index.parent / file, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a readable index of shards: {error!r}.") from error
    if missing := sorted(shard.name for shard in names_by_shard if not shard.is_file()):
        raise CheckpointError(
            f"{index.parent}: {len(missing)} of {len(names_by_shard)} shards missing: "
            f"{', '.join(missing)}. Fetch or copy the checkpoint again."
        )
    return dict(names_by_shard)


def _lack_of_safetensors(folder: Path) -> str:
    """What is there instead."""
    if (folder / "adapter_config.json").is_file():
        return "is an adapter, not a model. Merge it into its base first, e.g. by neft merge."
    if found := sorted(folder.glob("*.safetensors")):
        return (
            f"has {found[0].name}, but neither {SINGLE} nor {INDEX}. Copy the index too, or rename the "
            "file if it holds the whole model."
        )
    if pickled := sorted(file for file in folder.iterdir() if file.suffix in _PICKLES):
        return (
            f"has only pickled weights ({pickled[0].name}), which can run code and are never loaded. If "
            "you trust them, convert them: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(folder, safe_serialization=True)."
        )
    return f"has neither {SINGLE} nor {INDEX}, so it is not a checkpoint that can be read."


def _read_header(shard: Path) -> Mapping[str, TensorInfo]:
    """Every tensor of a shard."""
    with _faults_named(shard), safe_open(shard, framework="pt") as file:
        return {name: _info(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118


def _info(part: Any) -> TensorInfo:
    dtype = part.get_dtype()
    return TensorInfo(tuple(part.get_shape()), _DTYPES.get(dtype, dtype))


@contextmanager
def _faults_named(shard: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{shard}: cannot be read as safetensors: {error}. It is torn or damaged; fetch or save it "
            "again."
        ) from error
