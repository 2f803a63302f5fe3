"""Memory of training over a quantized base: NeFT beside LoRA of equal size, and both over float32.

    python benchmarks/quantized_memory.py MODEL_FOLDER --json out.json

Each method runs in a process of its own, on the CPU with products in float32: it loads the model and
takes a step of AdamW on 64 random tokens. Reported is the size of the tensors that are alive then:
weights, gradients and moments. (What the process holds would count the pages of the checkpoint, which
stays mapped.) Needs `pip install 'neft[quantized]'`.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from measuring import write_figures
from processes import in_processes

METHODS = ("neft", "lora", "neft 8bit", "lora 8bit", "neft 4bit", "lora 4bit")
PERCENT = 9.0


def prepared(method: str, folder: Path) -> Any:
    """The model, frozen but for an adapter of ``PERCENT`` percent of it."""
    from neft.checkpoints import open_weights
    from neft.models import load_model
    from neft.recipe import LoraSection, ModelSection
    from neft.scoring import score_by_norm
    from neft.sft.counting import matching_rank
    from neft.sft.methods import prepare

    name, _, bits = method.partition(" ")
    weights = open_weights(folder)
    neurons = score_by_norm(weights).select(percent=PERCENT)
    model = load_model(
        ModelSection.model_validate({"path": str(folder), "quantization": bits or None})
    )
    if name == "neft":
        return prepare(model, "neft", neurons=neurons)
    rank = matching_rank(weights.network, neurons.num_parameters)
    return prepare(model, "lora", lora=LoraSection(rank=rank))


class Training:
    """One method's model and its optimizer."""

    def __init__(self, method: str, folder: Path) -> None:
        import torch

        self._model = prepared(method, folder).train()
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-4, fused=True)

    def step(self) -> None:
        import torch

        ids = torch.randint(1000, (1, 64), generator=torch.Generator().manual_seed(0))
        self._model(input_ids=ids, labels=ids).loss.backward()
        self._optimizer.step()

    def report(self) -> dict[str, int]:
        return {"trained": sum(p.numel() for p in self._trained), "held_bytes": held()}


def held() -> int:
    """Bytes of all tensors that are alive."""
    import torch

    gc.collect()
    storages = [
        tensor.untyped_storage() for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    works = {method: partial(Training, method, options.model) for method in METHODS}
    preload = ["torch", "transformers", "peft"]
    results = in_processes(works, rounds=0, preload=preload, together=False).reports
    for method, found in results.items():
        print(f"{method:12} {found['trained']:12,} trained  {found['held_bytes'] / 1e9:.2f} GB")
    if options.json:
        write_figures(options.json, [], percent=PERCENT, methods=results)


if __name__ == "__main__":
    main()
