"""Memory of training over a quantized base: NeFT beside LoRA of equal size, and both over float32.

    python benchmarks/quantized_memory.py MODEL_FOLDER [--json OUT]

Each method runs in a process of its own, on the CPU with products in float32: it loads the model and
takes a step of AdamW on 64 random tokens. Reported is the size of the tensors that are alive then:
weights, gradients and moments. (What the process holds would count the pages of the checkpoint, which
stays mapped.) Needs `pip install 'neft[quantized]'`.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

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


def measure(method: str, folder: Path, answers: Connection) -> None:
    """Send the figures of one method, in bytes."""
    import torch

    model = prepared(method, folder).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(1000, (1, 64), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    num_trained = sum(parameter.numel() for parameter in trained)
    answers.send({"method": method, "trained": num_trained, "held": held()})


def held() -> int:
    """Bytes of all tensors that are alive."""
    import torch

    gc.collect()
    storages = [
        tensor.untyped_storage() for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    processes = multiprocessing.get_context("spawn")
    results = []
    for method in METHODS:
        receiving, sending = processes.Pipe(duplex=False)
        process = processes.Process(target=measure, args=(method, options.model, sending))
        process.start()
        sending.close()
        found = receiving.recv()
        process.join()
        results.append(found)
        print(
            f"{method:12} {found['trained']:12,} trained  {found['held'] / 1e9:.2f} GB", flush=True
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
