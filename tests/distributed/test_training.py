"""Two processes train as one does, under every engine: the same losses, the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training import Case, begin, by_several

from neft.scoring import score_neurons

if TYPE_CHECKING:
    from conftest import TinyModel, TinyTokenizer

FSDP2 = {"engine": "fsdp2"}
KEPT = FSDP2 | {"reshard_after_forward": False}
ENGINES = {"ddp": {"engine": "ddp"}, "fsdp2": FSDP2, "fsdp2 without resharding": KEPT}
DIVIDED = ["fsdp2", "zero2", "zero3"]
ENGINES |= {engine: {"engine": engine} for engine in DIVIDED}
# 13 examples make two whole batches of 6, and one that is not.
EPOCHS = {"steps": None, "epochs": 2, "evaluate_every": 3}
COSTLY = EPOCHS | {"gradient_accumulation": 2, "gradient_checkpointing": True}
SIXTEEN_BITS = {"options": COSTLY, "dtype": "bfloat16"}
# Name -> what is trained, and to how many digits one process gives the same.
RUNS: dict[str, tuple[dict[str, Any], float]] = {
    "neft": ({"options": COSTLY}, 1e-5),
    "neft by length": ({"options": EPOCHS | {"group_by_length": True}}, 1e-5),
    "neft over 16 bits": (SIXTEEN_BITS, 3e-2),
    "lora": ({"method": "lora", "options": COSTLY}, 1e-4),
    "full": ({"method": "full", "options": EPOCHS}, 1e-4),
    # FSDP2 rounds what goes from layer to layer too.
    "full in 16 bits": (
        {"method": "full", "dtype": "bfloat16", "options": COSTLY | {"learning_rate": 1e-3}},
        3e-2,
    ),
    "in_out": ({"method": "in_out"}, 1e-4),
    "embed": ({"method": "embed"}, 1e-4),
}
RESUMED = ["neft, ddp", *(f"{run}, {engine}" for run in ("neft", "full") for engine in DIVIDED)]
CASES = {f"{run}, {engine}": (run, engine) for run in RUNS for engine in ENGINES}


@pytest.fixture(scope="module")
def place(
    tiny_model: TinyModel, tiny_tokenizer: TinyTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model whose sizes two processes cannot halve, and data."""
    folder = tmp_path_factory.mktemp("several")
    model = tiny_model(intermediate_size=65, vocab_size=127)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for split, count in (("train", 13), ("dev", 5)):
        rows = [{"source": f"{split} {i}", "target": "mot " * (i % 3 + 1)} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def case(place: Path) -> Case:
    """What all cases have in common."""
    dev = str(place / "dev.jsonl")
    splits = {"train": str(place / "train.jsonl"), "dev": dev, "test": dev}
    data = {"task": "prompt", "template": "{source}", **splits}
    return Case(model=str(place / "model"), data=data, folder="")


@pytest.fixture(scope="module")
def outcomes(case: Case, place: Path) -> dict[str, str | None]:
    """Everything that two processes are asked to do here, at once: starting them takes longest."""
    cases = {
        name: replace(case, **RUNS[run][0], distributed=ENGINES[engine])
        for name, (run, engine) in CASES.items()
    }
    cases |= {f"{name}, killed": replace(cases[name], killed_at=3) for name in RESUMED}
    cases["many files"] = replace(cases["full, fsdp2"], file_bytes=10_000)
    cases = {name: replace(it, folder=str(place / name)) for name, it in cases.items()}
    # One process has begun this, and left a checkpoint.
    cases["begun by one"] = replace(case, folder=str(place / "begun by one"), killed_at=3)
    begin(cases["begun by one"])
    cases["begun by one"] = replace(cases["begun by one"], killed_at=None)
    return by_several(cases, place)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def by_one(case: Case, place: Path) -> dict[str, Path]:
    """The same by one process."""
    folders = {run: place / f"{run}, alone" for run in RUNS}
    for run, folder in folders.items():
        replace(case, **RUNS[run][0], folder=str(folder)).carry_out()
    return folders


def weights_in(run: Path) -> dict[str, Tensor]:
    [result] = [run / name for name in ("adapter", "model") if (run / name).is_dir()]
    weights: dict[str, Tensor] = {}
    for file in result.glob("*.safetensors"):
        weights |= load_file(file)
    return weights


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "training.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_same_as_one_process(
    outcomes: dict[str, str | None], by_one: dict[str, Path], place: Path, name: str
) -> None:
    assert outcomes[name] is None
    run, _ = CASES[name]
    tolerance = RUNS[run][1]
    expected, found = record(by_one[run]), record(place / name)
    for split in ("train", "dev"):
        for one, other in zip(expected["history"][split], found["history"][split], strict=True):
            assert other == pytest.approx(one, rel=tolerance), split
    assert found["num_trainable"] == expected["num_trainable"]
    weights, reference = weights_in(place / name), weights_in(by_one[run])
    assert weights.keys() == reference.keys()
    for key, tensor in reference.items():
        assert weights[key].dtype is tensor.dtype, key
        torch.testing.assert_close(weights[key], tensor, rtol=tolerance, atol=tolerance)
    files = {file.name for file in (by_one[run] / "adapter").glob("*")}
    assert {file.name for file in (place / name / "adapter").glob("*")} == files


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("method", "trained"), [("embed", "embed_tokens"), ("in_out", "_proj")])
def test_frozen_weights_stay(
    outcomes: dict[str, str | None], case: Case, place: Path, method: str, trained: str, engine: str
) -> None:
    name = f"{method}, {engine}"
    assert outcomes[name] is None
    before = load_file(Path(case.model) / "model.safetensors")
    after = weights_in(place / name)
    changed = {key for key, tensor in before.items() if not torch.equal(after[key], tensor)}
    assert changed
    expected = ("up_proj", "down_proj") if method == "in_out" else (trained,)
    assert all(any(part in key for part in expected) for key in changed)


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_goes_on(outcomes: dict[str, str | None], place: Path, name: str) -> None:
    assert outcomes[f"{name}, killed"] is None
    assert record(place / f"{name}, killed")["history"] == record(place / name)["history"]
    weights, reference = weights_in(place / f"{name}, killed"), weights_in(place / name)
    for key, tensor in reference.items():
        assert torch.equal(weights[key], tensor), key


def test_a_large_model_is_written_in_files_and_scored_from_them(
    outcomes: dict[str, str | None], by_one: dict[str, Path], case: Case, place: Path
) -> None:
    assert outcomes["many files"] is None
    model = place / "many files" / "model"
    files = list(model.glob("model-*.safetensors"))
    assert len(files) > 3
    # Beside a file's share, a single tensor may be larger.
    assert all(len(load_file(file)) == 1 for file in files if file.stat().st_size > 11_000)
    reference, weights = weights_in(place / "full, fsdp2"), weights_in(place / "many files")
    assert weights.keys() == reference.keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in reference.items())
    scores = score_neurons(case.model, model)
    expected = score_neurons(case.model, by_one["full"] / "model")
    for name, distances in expected.distances.items():
        assert scores.distances[name] == pytest.approx(distances, rel=1e-3)


def test_others_cannot_go_on(outcomes: dict[str, str | None], place: Path) -> None:
    message = outcomes["begun by one"]
    assert message is not None
    assert "num_processes was 1 there and is 2 here" in message
    assert (place / "begun by one" / "checkpoints" / "checkpoint-2" / "complete.json").is_file()
