"""The benchmark of training steps at a shape that costs nothing; seconds are nobody's business here."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from functools import partial
from threading import Timer

import pytest
import torch

import plot_train_step
from processes import in_processes
from train_step import METHODS, PRESETS, TINY, Training, main

TINY_CPU = replace(PRESETS["cpu"], **TINY)


def counted(method: str) -> dict:
    training = Training(method, TINY_CPU)
    training.step()
    return training.report()


def test_budgets_are_equal():
    trained = {
        method: counted(method)["trainable"]
        for method in ("neft", "neft-rows", "neft-columns", "neft-slices", "lora", "shira")
    }
    base = counted("full")["trainable"]
    per_neuron, per_rank = 64, 2 * (4 * 64 + 2 * 96 + 3 * (64 + 128))  # grouped key/value heads
    for method in ("neft", "neft-rows", "neft-columns"):
        assert abs(trained[method] - 0.09 * base) <= per_neuron, method
    # The same number of neurons of each of the four weights.
    assert trained["neft"] - 4 * per_neuron < trained["neft-slices"] <= trained["neft"]
    assert abs(trained["lora"] - trained["neft"]) <= per_rank / 2
    assert trained["shira"] == trained["lora"]
    assert counted("mask")["trainable"] == base
    assert counted("floor")["trainable"] == 0


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("gpu")])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_steps_in_the_presets_for_a_gpu(method, preset):
    training = Training(method, replace(PRESETS[preset], **TINY, device="cpu"))
    before = [p.detach().clone() for p in training._model.parameters()]
    training.step()
    after = [*training._model.parameters()]
    moved = sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert (moved > 0) == (not method.startswith("floor"))


@pytest.mark.parametrize(
    ("method", "num_products"),
    # Two layers of seven and the head, or four of NeFT, forward.
    [("floor", 0), ("floor-faster", 15), ("lora", 0), ("lora-faster", 15), ("neft-plain", 4)],
)
def test_only_what_says_so_is_faster(method, num_products, onednn):
    Training(method, TINY_CPU)._step()
    assert onednn.call_count >= num_products
    assert bool(onednn.call_count) == bool(num_products)


def test_prints_ratios_and_writes_figures(tmp_path, capsys):
    path = tmp_path / "out.json"
    main(["--tiny", "--rounds", "2", "--methods", "neft,lora", "--json", str(path)])
    printed = capsys.readouterr().out
    assert "neft / lora step" in printed
    assert "neft / lora memory" in printed
    assert "floor" not in printed
    figures = json.loads(path.read_text())
    step, memory = figures["ratios"]
    assert (step["name"], memory["name"]) == ("neft / lora step", "neft / lora memory")
    seconds = [
        [sum(step.values()) for step in figures["methods"][method]["steps"]]
        for method in ("neft", "lora")
    ]
    rounds = sorted(neft / lora for neft, lora in zip(*seconds, strict=True))
    assert step["median"] == pytest.approx(sum(rounds) / 2)
    assert [step["min"], step["max"]] == rounds

    plot_train_step.main([str(path)])
    table = path.with_suffix(".md").read_text()
    assert (
        f"| neft / lora step | {step['median']:.3f} | {rounds[0]:.3f} .. {rounds[1]:.3f} |" in table
    )
    assert "peak memory, GB" in path.with_suffix(".svg").read_text()


class Counting:
    """Steps give 0, 1, 2, ...; from one of them on, something happens."""

    def __init__(self, fails_at: int | None = None, kills_at: int | None = None) -> None:
        self.steps = -1
        self.fails_at = fails_at
        self.kills_at = kills_at
        self._check()

    def _check(self) -> None:
        if self.steps == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        if self.steps == self.kills_at:
            os._exit(7)

    def step(self) -> int:
        self.steps += 1
        self._check()
        return self.steps

    def report(self) -> dict[str, int]:
        return {"process": os.getpid()}


@pytest.mark.parametrize("together", [True, False])
def test_what_does_not_fit_into_memory_is_skipped(together):
    works = {
        "never": partial(Counting, fails_at=-1),
        "later": partial(Counting, fails_at=2),
        "fits": Counting,
        "fits too": Counting,
    }
    outcomes = in_processes(works, rounds=3, preload=["torch"], together=together)
    # The first step warms up and does not count.
    assert outcomes.steps == {"fits": [1, 2, 3], "fits too": [1, 2, 3]}
    assert outcomes.skipped == dict.fromkeys(["never", "later"], "CUDA out of memory.")
    processes = {report["process"] for report in outcomes.reports.values()}
    assert len(processes) == 2
    assert os.getpid() not in processes


def test_one_round_counts_however_little_time_there_is():
    outcomes = in_processes(
        {"one": Counting, "two": Counting}, rounds=5, preload=["torch"], together=True, seconds=0
    )
    assert outcomes.steps == {"one": [1], "two": [1]}
    assert outcomes.reports.keys() == {"one", "two"}


def test_a_process_that_dies_is_named():
    works = {"fits": Counting, "dies": partial(Counting, kills_at=1)}
    with pytest.raises(RuntimeError, match="dies: its process ended with exit code 7"):
        in_processes(works, rounds=3, preload=["torch"], together=True)


class Leaving(Counting):
    def step(self) -> int:
        Timer(0.1, os._exit, [7]).start()
        return super().step()


class Slow(Counting):
    def step(self) -> int:
        time.sleep(1)
        return super().step()


def test_a_process_that_dies_while_others_work_is_named():
    with pytest.raises(RuntimeError, match="leaves: its process ended with exit code 7"):
        in_processes({"leaves": Leaving, "slow": Slow}, rounds=1, preload=["torch"], together=True)
