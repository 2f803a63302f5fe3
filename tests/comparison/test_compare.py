"""Whole comparisons of tiny models: what they find and share, and that nothing can stop them for good."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from neft.comparison.run import Compared, compare
from neft.comparison.schema import load_comparison
from neft.errors import RecipeError
from neft.neurons import NeuronSet
from neft.pipeline.evaluate import read_evaluation

COMMAND = [sys.executable, "-m", "neft", "compare"]


def compared(comparison: Path, *settings: str, **options: Any) -> tuple[Compared, list[str]]:
    said: list[str] = []
    return compare(load_comparison(comparison, settings), say=said.append, **options), said


def done(said: list[str]) -> list[str]:
    """The jobs that were done, in order."""
    return [line.partition(": done")[0] for line in said if ": done" in line]


def found(folder: Path) -> Any:
    """The content of results.json but for what differs from one time to the next."""
    fields = json.loads((folder / "compared" / "results.json").read_text())["tasks"]
    return without_times(fields)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.startswith("seconds")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(tiny_comparison, tmp_path_factory) -> tuple[Path, Compared, list[str]]:
    """A folder, what a comparison found there, and what it said."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, *compared(tiny_comparison(folder, seeds=[0, 1]))


def stage_folders(folder: Path) -> dict[str, int]:
    """Stage -> how many folders of it there are."""
    names = [path.name.partition("-")[0] for path in (folder / "compared" / "stages").iterdir()]
    return {name: names.count(name) for name in set(names)}


def test_every_row_is_there(finished) -> None:
    _, result, _ = finished
    (task,) = result.results
    assert not result.failures
    assert [row.name for row in task.rows] == ["neft", "full", "lora", "random"]
    for row in task.rows:
        assert row.state == "done"
        assert [seed.seed for seed in row.seeds] == [0, 1]
        assert list(row.metrics) == ["BLEU", "chrF++"]
        assert row.forgetting is not None


def test_shared_stages_are_done_once(finished) -> None:
    folder, _, said = finished
    assert len(done(said)) == len(set(done(said)))
    # Of neft two rates, and the second seed at the better; of the others two seeds. Random neurons differ
    # from seed to seed.
    assert stage_folders(folder) == {
        "baseline": 1,
        "warmup": 1,
        "score": 1,
        "select": 3,
        "train": 9,
        "evaluate": 8,
    }


def test_the_best_rate_is_the_one_with_the_lowest_loss(finished) -> None:
    _, result, _ = finished
    neft, full, lora, _ = result.results[0].rows
    losses = {trial.rate: trial.dev_loss for trial in neft.trials}
    assert list(losses) == [1e-2, 3e-2]
    assert neft.rate == min(losses, key=losses.__getitem__)
    assert neft.seeds[0].dev_loss == losses[neft.rate]
    assert neft.rate_at_edge
    assert (full.rate, full.rate_at_edge) == (1e-3, False)
    assert (lora.rate, lora.rate_of, lora.trials) == (neft.rate, "neft", ())


def test_numbers_are_those_of_the_folders(finished) -> None:
    folder, result, _ = finished
    for row in result.results[0].rows:
        scores = []
        for seed in row.seeds:
            evaluation = read_evaluation(folder / "compared" / seed.folders["evaluate"])
            assert seed.scores == evaluation.scores
            assert seed.general_loss == evaluation.general_loss
            scores.append(evaluation.scores["chrF++"].score)
        assert row.metrics["chrF++"].mean == pytest.approx(sum(scores) / 2)
        assert row.metrics["chrF++"].spread == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)


def test_seeds_draw_their_own_random_neurons_of_the_same_number(finished) -> None:
    folder, result, _ = finished
    neft, _, _, random = result.results[0].rows
    sets = [
        NeuronSet.load(folder / "compared" / seed.folders["train"] / ".." / name / "neurons.json")
        for seed in (*random.seeds, neft.seeds[0])
        for name in [selection_of(folder, seed.folders["train"])]
    ]
    assert len(sets[0]) == len(sets[1]) == len(sets[2])
    assert sets[0] != sets[1]


def selection_of(folder: Path, train: str) -> str:
    record = json.loads((folder / "compared" / train / "stage.json").read_text())
    return f"select-{record['reads']['select'][:16]}"


def test_whole_checkpoints_go_once_nothing_needs_them(finished) -> None:
    folder, _, _ = finished
    stages = folder / "compared" / "stages"
    assert not list(stages.glob("train-*/model"))
    assert len(list(stages.glob("train-*/adapter"))) == 7
    assert len(list(stages.glob("warmup-*/model"))) == 1


def test_a_second_run_does_nothing_and_says_the_same(finished) -> None:
    folder, result, _ = finished
    table = (folder / "compared" / "results.md").read_bytes()
    again, said = compared(folder / "comparison.yaml")
    assert said == []
    assert again.results == result.results
    assert (folder / "compared" / "results.md").read_bytes() == table


def test_results_say_where_they_come_from(finished) -> None:
    folder, _, _ = finished
    fields = json.loads((folder / "compared" / "results.json").read_text())
    assert fields["comparison"]["seeds"] == [0, 1]
    provenance = fields["provenance"]
    assert set(provenance) == {"model", "machine", "packages", "commit"}
    assert {"torch", "transformers", "peft", "sacrebleu"} <= set(provenance["packages"])
    (task,) = fields["tasks"]
    assert all(value.startswith(".jsonl sha256:") for value in task["data"].values())
    assert "nrefs:1" in task["base"]["scores"]["BLEU"]["signature"]


def test_an_added_row_reuses_what_is_there(finished, tmp_path_factory) -> None:
    folder, _, _ = finished
    rows = json.loads((folder / "compared" / "results.json").read_text())["comparison"]["methods"]
    early = {
        "name": "early",
        "method": "neft",
        "select": {"percent": 9},
        "score": {"step": 2},
        "rate_of": "neft",
    }
    result, said = compared(folder / "comparison.yaml", f"methods={json.dumps([*rows, early])}")
    assert [line.partition(" ")[0] for line in done(said)] == [
        "score",
        "select",
        "train",
        "evaluate",
        "train",
        "evaluate",
    ]
    assert [row.name for row in result.results[0].rows][-1] == "early"


def test_several_at_a_time_give_the_same_table(finished, tiny_comparison, tmp_path) -> None:
    folder, _, _ = finished
    compared(tiny_comparison(tmp_path, seeds=[0, 1]), num_jobs=2)
    assert without_paths(found(tmp_path)) == without_paths(found(folder))
    logs = (tmp_path / "compared" / "logs").iterdir()
    assert any("development loss" in log.read_text() for log in logs)


def without_paths(tasks: Any) -> Any:
    """Rows of another test may have joined; folders are named by the content alone."""
    return [
        task | {"rows": [row for row in task["rows"] if row["name"] != "early"]} for task in tasks
    ]


def test_union_and_trans_take_neurons_from_elsewhere(tiny_comparison, tmp_path) -> None:
    methods = [
        {"name": "neft", "method": "neft", "select": {"percent": 3}, "learning_rates": [1e-2]},
        {
            "name": "union",
            "method": "neft",
            "select": {"percent": 3},
            "union_with": ["other"],
            "tasks": ["upper"],
            "rate_of": "neft",
        },
        {
            "name": "trans",
            "method": "neft",
            "select": {"percent": 3},
            "warmup": {"train": str(tmp_path / "other.jsonl")},
            "tasks": ["upper"],
            "rate_of": "neft",
        },
    ]
    tasks = {"upper": {}, "other": {"data": {"train": str(tmp_path / "other.jsonl")}}}
    result, _ = compared(tiny_comparison(tmp_path, methods=methods, tasks=tasks))
    upper, other = result.results
    sets = {
        (row.task, row.name): NeuronSet.load(
            tmp_path
            / "compared"
            / "stages"
            / selection_of(tmp_path, row.seeds[0].folders["train"])
            / "neurons.json"
        )
        for task in (upper, other)
        for row in task.rows
    }
    assert sets["upper", "neft"] != sets["other", "neft"]
    assert sets["upper", "union"] == sets["upper", "neft"] | sets["other", "neft"]
    # The warm-up of task other is on the very data on which trans finds its neurons: it is shared.
    assert sets["upper", "trans"] == sets["other", "neft"]
    assert stage_folders(tmp_path)["warmup"] == 2


def test_a_failed_cell_is_reported_and_the_others_go_on(tiny_comparison, tmp_path) -> None:
    methods = [
        {"name": "good", "method": "full", "learning_rates": [1e-3]},
        {"name": "mixed", "method": "full", "learning_rates": [1e-3, 1e25]},
        {"name": "bad", "method": "full", "learning_rates": [1e25]},
    ]
    file = tiny_comparison(tmp_path, methods=methods, **{"train.max_grad_norm": 1e30})
    result, _ = compared(file)
    rows = {row.name: row for row in result.results[0].rows}
    assert (rows["good"].state, rows["mixed"].state) == ("done", "done")
    assert rows["mixed"].rate == 1e-3
    assert rows["bad"].state == "failed"
    (failure,) = result.failures
    assert failure.startswith("upper, bad: Step")
    assert "failed" in result.table.read_text()
    # Neither is a failure tried again unasked...
    again, said = compared(file)
    assert (said, again.failures) == ([], result.failures)
    # ...nor forgotten when it is.
    retried, said = compared(file, retry=True)
    assert [line for line in said if ": failed" in line]
    assert retried.failures == result.failures


def test_every_fault_is_found_before_the_first_cell(tiny_comparison, tmp_path) -> None:
    file = tiny_comparison(
        tmp_path,
        methods=[
            {"name": "all", "method": "neft", "select": {"percent": 9}, "learning_rates": [1e-2]},
            {"name": "much", "method": "neft", "select": {"percent": 99}, "learning_rates": [1e-2]},
        ],
        tasks={"upper": {}, "gone": {"data": {"dev": str(tmp_path / "gone.jsonl")}}},
    )
    with pytest.raises(RecipeError) as caught:
        compared(file)
    message = str(caught.value)
    assert "Nothing has been run" in message
    assert "'much'" in message
    assert "percent is 99" in message
    assert "gone.jsonl: no such file" in message
    assert not (tmp_path / "compared" / "stages").exists()


def test_a_killed_worker_costs_its_cell_alone(tiny_comparison, tmp_path) -> None:
    file = tiny_comparison(tmp_path)
    ours = subprocess.Popen([*COMMAND, str(file), "--jobs", "2"], stderr=subprocess.PIPE, text=True)
    assert ours.stderr is not None
    for line in ours.stderr:
        if "full" in line and "starts" in line:
            break
    # The worker that was started last, in the middle of its imports.
    children = subprocess.run(
        ["pgrep", "-P", str(ours.pid), "-f", "spawn_main"], capture_output=True, text=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    said = ours.stderr.read()
    assert ours.wait(timeout=120) == 1
    assert "its process was killed" in said
    rows = found(tmp_path)[0]["rows"]
    assert sorted(row["state"] for row in rows) == ["done", "done", "done", "failed"]
    result, _ = compared(file, retry=True)
    assert not result.failures


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_stopped_at_any_moment_it_ends_with_the_same_table(
    stop: signal.Signals, finished, tiny_comparison, tmp_path
) -> None:
    folder, _, _ = finished
    file = tiny_comparison(tmp_path, seeds=[0, 1])
    code = None
    for delay in (8, 5, 7, 4, 6, 9):
        ours = subprocess.Popen(
            [*COMMAND, str(file)], stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            code = ours.wait(timeout=delay)
            break
        except subprocess.TimeoutExpired:
            if stop is signal.SIGINT:
                os.killpg(ours.pid, stop)  # as a terminal does
            else:
                ours.kill()
            ours.wait(timeout=60)
            time.sleep(0.5)
    if code is None:
        subprocess.run([*COMMAND, str(file)], check=True, stderr=subprocess.DEVNULL)
    assert without_paths(found(tmp_path)) == without_paths(found(folder))
    assert not list((tmp_path / "compared" / "stages").glob(".*"))
