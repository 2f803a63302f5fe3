"""Memory of training over a quantized base: NeFT beside LoRA of equal size, and both over float32.

    python benchmarks/quantized_memory.py MODEL_FOLDER [--json OUT]

Each method runs in a process of its own, on the CPU with products in float32: it loads the model and
takes two steps of AdamW on 64 random tokens. Reported is what the process then holds, and the most that
it held during the steps, both less what it held before it loaded the model. Needs
`pip install 'neft[quantized]'`.
"""

from __future__ import annotations

import argparse
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
    import peft  # noqa: F401  (counts as a library)
    import psutil
    import torch
    import trl  # noqa: F401

    from neft.memory import peak_memory, release_free_memory, reset_peak_memory

    def held() -> int:
        release_free_memory()
        return int(psutil.Process().memory_info().rss)

    libraries = held()
    model = prepared(method, folder).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(1000, (1, 64), generator=torch.Generator().manual_seed(0))
    release_free_memory()
    reset_peak_memory()
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = peak_memory()
    assert peak is not None
    answers.send(
        {
            "method": method,
            "trained": sum(parameter.numel() for parameter in trained),
            "held": held() - libraries,
            "peak": peak - libraries,
        }
    )


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
        sizes = f"held {found['held'] / 1e9:.2f} GB, peak {found['peak'] / 1e9:.2f} GB"
        print(f"{method:12} {found['trained']:12,} trained  {sizes}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
