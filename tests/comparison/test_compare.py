"""Whole comparisons of tiny models: what they find and share, and that nothing can stop them for good."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from neft.comparison.cells import Cells
from neft.comparison.plan import Plan
from neft.comparison.publish import Compared
from neft.comparison.results import RowResult
from neft.comparison.run import compare
from neft.comparison.schema import load_comparison
from neft.comparison.work import Workers
from neft.errors import RecipeError, UsageError
from neft.neurons import NeuronSet
from neft.pipeline.evaluate import read_evaluation
from neft.pipeline.run import run
from neft.recipe import load_recipe

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
        times = ("seconds", "seconds_per_step", "peak_memory_bytes", "finished", "commit")
        return {k: without_times(v) for k, v in value.items() if k not in times}
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


def chosen(folder: Path, row: RowResult, seed: int = 0, stage: str = "select") -> NeuronSet:
    return NeuronSet.load(folder / "compared" / row.seeds[seed].folders[stage] / "neurons.json")


def test_seeds_draw_their_own_random_neurons_of_the_same_number(finished) -> None:
    folder, result, _ = finished
    neft, _, _, random = result.results[0].rows
    first, second = chosen(folder, random, 0), chosen(folder, random, 1)
    assert len(first) == len(second) == len(chosen(folder, neft))
    assert first != second


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
    assert set(task["data"]) == {"train", "dev", "test", "general"}
    assert all(value.startswith(".jsonl sha256:") for value in task["data"].values())
    for made in [task["base_evaluated"], *(seed["trained"] for seed in task["rows"][0]["seeds"])]:
        assert made["packages"]["torch"] == provenance["packages"]["torch"]
        assert made["machine"] == provenance["machine"]
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


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("data.test_limit=2", "data.test_limit is not set there, 2 in this recipe"),
        (
            "methods=[{name: full, method: full, learning_rates: [1.0e-3], train: {steps: 3}}]",
            "method 'full'.train.steps is not set there, 3 in this recipe",
        ),
    ],
)
def test_tables_of_other_settings_are_kept(finished, setting, reason) -> None:
    folder, _, _ = finished
    output = folder / "compared"
    before = {path: path.read_bytes() for path in output.iterdir() if path.is_file()}
    with pytest.raises(UsageError) as error:
        compared(folder / "comparison.yaml", setting)
    assert str(error.value).splitlines() == [
        "Results of another recipe are in the way:",
        f"  {output}",
        "The recipes differ:",
        f"  {reason}",
        "Choose another output folder, or replace these results with --overwrite.",
    ]
    assert {path: path.read_bytes() for path in output.iterdir() if path.is_file()} == before


def test_tables_of_other_settings_are_replaced_if_asked(finished, tmp_path) -> None:
    folder, _, _ = finished
    shutil.copytree(folder / "compared", tmp_path / "compared")
    settings = f"output={tmp_path}/compared", "data.test_limit=2", "seeds=[0]"
    result, _ = compared(folder / "comparison.yaml", *settings, overwrite=True)
    assert result.results[0].num_examples == 2


def test_a_run_and_a_comparison_share_no_folder(finished, tiny_recipe, tmp_path) -> None:
    folder, _, _ = finished
    with pytest.raises(UsageError, match="compared: holds a comparison"):
        run(load_recipe(tiny_recipe(tmp_path, output=str(folder / "compared"))), say=print)
    (tmp_path / "run" / "prepare").mkdir(parents=True)
    (tmp_path / "run" / "prepare" / "stage.json").write_text("{}")
    with pytest.raises(UsageError, match="run: holds a run"):
        compared(folder / "comparison.yaml", f"output={tmp_path}/run")
    assert not (tmp_path / "run" / "comparison.yaml").exists()


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
    neft = {"method": "neft", "select": {"percent": 3}, "tasks": ["upper"]}
    methods = [
        # First, and with a grid of its own: nothing that it needs is there yet.
        neft | {"name": "union", "union_with": ["lent"], "learning_rates": [1e-2, 2e-2]},
        neft | {"name": "common", "intersection_with": ["lent"], "rate_of": "union"},
        neft | {"name": "neft", "rate_of": "union"},
        neft
        | {
            "name": "trans",
            "warmup": {"train": str(tmp_path / "other.jsonl")},
            "rate_of": "union",
        },
    ]
    tasks = {"upper": {}, "lent": {"data": {"train": str(tmp_path / "other.jsonl")}}}
    result, _ = compared(tiny_comparison(tmp_path, methods=methods, tasks=tasks))
    assert not result.failures
    (upper,) = result.results
    union, common, neft_row, trans = upper.rows
    own, lent = chosen(tmp_path, neft_row), chosen(tmp_path, trans)
    assert own != lent
    assert chosen(tmp_path, union, stage="join") == own | lent
    assert chosen(tmp_path, common, stage="join") == own & lent
    assert union.num_trainable == (own | lent).num_parameters
    # The warm-up of the task that lends is on the very data on which trans finds its neurons.
    assert stage_folders(tmp_path)["warmup"] == 2
    assert trans.seeds[0].neurons_data != neft_row.seeds[0].neurons_data


FULL = {"name": "full", "method": "full", "learning_rates": [1e-3, 2e-3]}


def test_a_checkpoint_that_is_needed_again_is_made_again(tiny_comparison, tmp_path) -> None:
    file = tiny_comparison(tmp_path, methods=[FULL])
    first, _ = compared(file)
    again, said = compared(file, "evaluate.max_new_tokens=3", overwrite=True)
    assert [line.partition(" ")[0] for line in done(said)] == ["baseline", "train", "evaluate"]
    assert not again.failures
    (before,), (after,) = first.results[0].rows[0].seeds, again.results[0].rows[0].seeds
    assert before.dev_loss == after.dev_loss


def test_rows_that_share_a_training_run_share_its_weights(tiny_comparison, tmp_path) -> None:
    rates = FULL["learning_rates"]
    methods = [
        FULL,
        *({"name": f"only {r}", "method": "full", "learning_rates": [r]} for r in rates),
    ]
    result, said = compared(tiny_comparison(tmp_path, methods=methods))
    assert [row.state for row in result.results[0].rows] == ["done"] * 3
    assert stage_folders(tmp_path)["train"] == 2
    assert not [line for line in done(said) if done(said).count(line) > 1]


def test_what_has_gone_is_made_again(tiny_comparison, tmp_path) -> None:
    file = tiny_comparison(tmp_path, methods=[FULL | {"learning_rates": [1e-3]}])
    compared(file)
    before = found(tmp_path)
    for stage in ("baseline", "train"):
        (gone,) = (tmp_path / "compared" / "stages").glob(f"{stage}-*")
        shutil.rmtree(gone)
        _, said = compared(file)
        assert [line.partition(" ")[0] for line in done(said)] == [stage]
    assert found(tmp_path) == before


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
    assert f"task 'gone', method 'all': data.dev: {tmp_path}/gone.jsonl: no such file" in message
    assert not (tmp_path / "compared" / "stages").exists()


def test_workers_are_as_quiet_as_the_command(tiny_comparison, tmp_path) -> None:
    methods = [{"name": "full", "method": "full", "learning_rates": [1e-3]}]
    comparison = tiny_comparison(tmp_path, methods=methods, warmup=None)
    told = subprocess.run([*COMMAND, str(comparison)], capture_output=True, text=True, check=True)
    foreign = [
        line
        for line in told.stderr.splitlines()
        if not line.startswith(
            ("checking data", "step ", "baseline of ", "train of ", "evaluate of")
        )
    ]
    assert foreign == []


def test_a_killed_worker_costs_its_row_alone(tiny_comparison, tmp_path) -> None:
    file = tiny_comparison(tmp_path)
    with subprocess.Popen([*COMMAND, str(file)], stderr=subprocess.PIPE, text=True) as ours:
        assert ours.stderr is not None
        said = ""
        for line in ours.stderr:
            said += line
            if line.startswith("train of upper, full") and "starts" in line:
                kill_workers(ours.pid)
    assert ours.returncode == 1
    assert "train of upper, full, rate 0.001, seed 0: failed: its process was killed" in said
    assert "Estimated:" in said
    assert "are free now" in said
    states = {row["name"]: row["state"] for row in found(tmp_path)[0]["rows"]}
    # An accident decides nothing: the row is neither tuned among the other rates nor left out.
    assert states == {"neft": "done", "full": "failed", "lora": "done", "random": "done"}
    again, said_again = compared(file)
    assert (len(again.failures), said_again) == (1, [])
    retried, _ = compared(file, retry=True)
    assert not retried.failures


def kill_workers(parent: int) -> None:
    listed = subprocess.run(
        ["pgrep", "-P", str(parent), "-f", "spawn_main"], capture_output=True, text=True
    )
    for child in listed.stdout.split():
        os.kill(int(child), signal.SIGKILL)


def test_a_worker_that_dies_idle_is_replaced(tiny_comparison, tmp_path) -> None:
    comparison = load_comparison(tiny_comparison(tmp_path))
    cells = Cells(comparison)
    baseline, warmup = Plan(cells).ready()[:2]
    with Workers(1, tmp_path / "lock", None) as workers:
        workers.start(baseline)
        assert workers.next_outcome().failure is None
        kill_workers(os.getpid())
        workers.start(warmup)
        outcome = workers.next_outcome()
        if outcome.failure is not None:  # it was found dead only when the job was given to it
            assert "killed" in outcome.failure.reason
            workers.start(warmup)
            assert workers.next_outcome().failure is None
    assert cells.finished(warmup) is not None


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
            ours.wait(timeout=300)
            time.sleep(0.5)
    if code is None:
        subprocess.run([*COMMAND, str(file)], check=True, stderr=subprocess.DEVNULL)
    assert without_paths(found(tmp_path)) == without_paths(found(folder))
    assert not list((tmp_path / "compared" / "stages").glob(".*"))
