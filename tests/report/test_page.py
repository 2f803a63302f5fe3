"""The report as text: what it says, what it leaves out, and that nothing in it is taken for markup."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_run import HOSTILE, SMOLLM2, make_run

from neft.analysis.table import Table
from neft.errors import DataError, UsageError
from neft.neurons import NeuronSet
from neft.report import neuron_table
from neft.report.page import render_report
from neft.report.run_data import RunData, read_run

_VOID = {"meta", "link", "img", "input", "br"}


class Elements(HTMLParser):
    """All elements of a page with their attributes and own text, by a parser that is not ours."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        texts: list[str] = []
        self.found.append((tag, dict(attrs), texts))
        if tag not in _VOID:
            self._open.append((tag, texts))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1][1].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attrs, "".join(texts)) for name, attrs, texts in self.found if name == tag]

    def texts(self, tag: str) -> list[str]:
        return [text for _, text in self.all(tag)]


def payload(page: str) -> dict[str, Any]:
    data = next(text for attrs, text in Elements(page).all("script") if attrs.get("id"))
    fields: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(data)))
    return fields


def without(run: RunData, *tables: str) -> RunData:
    return replace(run, tables={n: t for n, t in run.tables.items() if n not in tables})


def gaps(page: str) -> str:
    """All commands that would fill gaps."""
    return "\n".join(re.findall(r'aria-label="Command"><code>(.*?)</code>', page))


def test_the_summary_says_what_was_done_and_what_came_out(page: str) -> None:
    summary = next(
        text for attrs, text in Elements(page).all("p") if attrs.get("class") == "summary"
    )
    assert "NeFT trained 1,800 of the 20,000 parameters of smollm2-135m-instruct (9.0%" in summary
    assert "112 of 384 neurons" in summary
    assert "for 150 steps on 1,491 examples of translation from English to French." in summary
    assert "On 30 held-out examples BLEU rose from 0.6 to 11.0 and chrF++ rose from 8.8" in summary
    assert "The loss on general text rose from 3.62 to 4.01 nats a token." in summary


def test_a_fall_is_not_called_a_rise(run_data: RunData) -> None:
    assert run_data.trained is not None
    worse = json.loads(json.dumps(run_data.trained).replace("11.0", "0.2"))
    assert "BLEU fell from 0.6 to 0.2" in render_report(replace(run_data, trained=worse))


def test_the_headline_table(page: str) -> None:
    cells = Elements(page).texts("td")
    for shown in ("0.6 [0.5, 0.7]", "11.0 [8.8, 13.2]", "+10.4", "3.620", "4.010", "+0.390"):
        assert shown in cells
    for shown in ("1,800 (9.0%)", "1.55 s", "2.0 GB", "48.5 MB"):
        assert shown in cells


def test_samples_are_spread_over_the_test_split(page: str) -> None:
    prompts = [text for text in Elements(page).texts("th") if text.startswith("Translate")]
    numbers = [int(prompt.rpartition(" ")[2]) for prompt in prompts]
    shown, folded = numbers[:5], numbers[5:]
    assert len(set(numbers)) == 20
    assert "15 further examples" in Elements(page).texts("summary")
    for part in (shown, folded):
        assert part == sorted(part)
        assert part[0] < 4
        assert part[-1] > 25


def test_nothing_from_models_or_users_is_markup(page: str) -> None:
    elements = Elements(page)
    # One of data, one that is ours, and no more.
    assert len(elements.all("script")) == 2
    assert not elements.all("b")
    assert all("onerror" not in attrs for _, attrs, _ in elements.found)
    assert HOSTILE in elements.texts("td")
    # In the recipe and in the data of the table, too, it stands as it was.
    assert any("document.title" in text for text in elements.texts("code"))
    assert HOSTILE in payload(page)["tokens"]


def test_the_policy_allows_its_own_script_and_style_alone(page: str) -> None:
    elements = Elements(page)
    metas = [attrs for attrs, _ in elements.all("meta") if "http-equiv" in attrs]
    policy = dict(part.strip().split(" ", 1) for part in (metas[0]["content"] or "").split(";"))
    style = elements.texts("style")
    script = [text for attrs, text in elements.all("script") if not attrs]
    assert policy["default-src"] == "'none'"
    for name, texts in {"style-src": style, "script-src": script}.items():
        digest = base64.b64encode(hashlib.sha256(texts[0].encode()).digest()).decode()
        assert (len(texts), policy[name]) == (1, f"'sha256-{digest}'")


def test_it_loads_nothing(page: str) -> None:
    for tag, attrs, _ in Elements(page).found:
        for name in ("src", "href", "xlink:href", "data", "srcset", "poster"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
        assert "style" not in attrs, "the policy would drop it"


def test_tables_have_captions_and_scopes(page: str) -> None:
    elements = Elements(page)
    assert len(elements.all("caption")) == len(elements.all("table")) > 5
    assert all(attrs.get("scope") in ("row", "col") for attrs, _ in elements.all("th"))


def test_figures_say_their_numbers(page: str, run_data: RunData) -> None:
    figures = [attrs for attrs, _ in Elements(page).all("svg")]
    assert len(figures) == 8
    words = " ".join(str(attrs["aria-label"]) for attrs in figures)
    table = run_data.tables["neurons"]
    changes = [abs(row["rank_change"]) for row in table.rows()]
    assert f"all {sum(changes) / len(changes):,.0f} (" in words
    assert f"{sum(map(bool, table['strong'])):,} strongly affected" in words
    assert "this run and early warm-up at 9% share 62.0% (chance 22.5%)" in words
    assert "all trained neurons: +2.610 on the task, -0.390 on general text" in words


def test_it_says_what_hidden_states_were_measured_on(page: str) -> None:
    assert (
        "means over 100 texts (5,321 tokens) of the base model and 100 texts (4,711 tokens) of the "
        "trained model."
    ) in page


def test_overlap_of_plain_sets(run_data: RunData) -> None:
    """As a run writes it: both orders of a pair, and no percent, as sets have none."""
    columns = {
        "a": ["this run", "other"],
        "b": ["other", "this run"],
        "percent": np.array([np.nan, np.nan]),
        "layer": np.array([np.nan, np.nan]),
        "num_a": [112, 56],
        "num_b": [56, 112],
        "num_both": [28, 28],
        "share": [0.25, 0.5],
        "jaccard": [0.2, 0.2],
        "chance_share": [0.146, 0.292],
        "chance_jaccard": [0.1, 0.1],
    }
    page = render_report(replace(run_data, tables={**run_data.tables, "overlap": Table(columns)}))
    assert "this run and other share 25.0% (chance 14.6%); other and this run share 50.0%" in page
    assert "nan" not in Elements(page).texts("td")


def test_ids_are_unique(page: str) -> None:
    ids = [attrs["id"] for _, attrs, _ in Elements(page).found if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_neuron_table_holds_all_trained_neurons(page: str, run_data: RunData) -> None:
    columns = payload(page)["columns"]
    assert run_data.neurons is not None
    trained = {
        (p.layer, p.role, int(index))
        for name, p in run_data.neurons.projections.items()
        for index in run_data.neurons[name]
    }
    assert set(zip(columns["layer"], columns["role"], columns["index"], strict=True)) == trained
    assert len(columns["index"]) == len(trained)
    rows = {(r["layer"], r["role"], r["index"]): r for r in run_data.tables["neurons"].rows()}
    for place, key in enumerate(
        zip(columns["layer"], columns["role"], columns["index"], strict=True)
    ):
        assert columns["rank_after"][place] == rows[key]["rank_after"]
        assert columns["distance"][place] == pytest.approx(rows[key]["distance"], rel=1e-3)


def test_what_is_known_of_a_neuron_is_its_own(page: str, run_data: RunData) -> None:
    data = payload(page)
    lens = {(row["layer"], row["index"]): row for row in run_data.tables["lens"].rows()}
    columns = data["columns"]
    for place, key in enumerate(zip(columns["layer"], columns["index"], strict=True)):
        promoted = [data["tokens"][token] for token in data["lens"]["promoted_after"][place]]
        is_out = columns["role"][place] == "down"
        assert promoted == (lens[key]["promoted_after"] if is_out and key in lens else [])
    activity = {f"{r['layer']}.{r['index']}": r for r in run_data.tables["activity"].rows()}
    for place, unit in enumerate(data["activity"]["units"]):
        found = data["activity"]["columns"]["mean_before"][place]
        assert found == pytest.approx(activity[unit]["mean_before"], rel=1e-3)
    context = run_data.tables["contexts"].rows()[0]
    kept = data["contexts"][f"{context['layer']}.{context['index']}"][context["model"]][0]
    assert kept == [context["activation"], context["left"], context["token"], context["right"]]


def test_categories() -> None:
    flags = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1]], dtype=bool)
    columns = {
        "layer": np.zeros(5, dtype=int),
        "role": ["up"] * 5,
        "index": np.arange(5),
        "trained": np.ones(5, dtype=bool),
        "strong": flags[:, 0],
        "suppressed": flags[:, 1],
        "indirect": flags[:, 2],
    }
    table = neuron_table.neuron_table(RunData("run", tables={"neurons": Table(columns)}))
    assert table is not None
    assert [neuron_table.CATEGORIES[place] for place in table.columns["category"]] == [
        "not strongly affected",
        "strongly affected, risen",
        "suppressed",
        "indirectly affected, risen",
        "indirectly affected, suppressed",
    ]


def test_too_many_neurons_are_cut_and_it_says_so(
    run_data: RunData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuron_table, "MAX_ROWS", 10)
    page = render_report(run_data)
    assert "Listed are 10 of the 112 trained neurons: those whose direction changed most" in page
    turns = sorted(row["turn"] for row in run_data.tables["neurons"].rows() if row["trained"])
    assert sorted(payload(page)["columns"]["turn"]) == pytest.approx(turns[-10:], rel=1e-3)


def test_without_analysis_the_scores_remain(run_data: RunData, run_folder: Path) -> None:
    assert run_data.recipe is not None
    recipe = {name: value for name, value in run_data.recipe.items() if name != "analysis"}
    page = render_report(replace(run_data, tables={}, recipe=recipe))
    assert set(payload(page)["columns"]) == {"layer", "role", "index", "distance"}
    assert len(Elements(page).all("svg")) == 3
    assert f"neft analyze ranks {run_folder}" in gaps(page)
    assert "--set &#39;analysis={causal: true}&#39;" in gaps(page)
    assert "--set &#39;analysis={overlap_with: {NAME: FILE}}&#39;" in gaps(page)


def test_one_missing_analysis_is_one_gap(run_data: RunData) -> None:
    page = render_report(without(run_data, "causal"))
    assert len(Elements(page).all("svg")) == 7
    assert "--set analysis.causal=true" in gaps(page)
    assert gaps(page).count("\n") == 0


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ((), "has only begun"),
        (("prepare",), "There is nothing to report yet"),
        (
            ("prepare", "baseline"),
            "was evaluated on translation from English to French and has not",
        ),
        (("prepare", "baseline", "warmup", "score", "select"), "has not been trained yet"),
        (("prepare", "baseline", "warmup", "score", "select", "train"), "NeFT trained 1,800"),
    ],
)
def test_an_unfinished_run(
    tmp_path: Path, run_folder: Path, stages: tuple[str, ...], says: str
) -> None:
    for stage in stages:
        shutil.copytree(run_folder / stage, tmp_path / stage)
    (tmp_path / ".evaluate.partial").mkdir()
    page = render_report(read_run(tmp_path))
    assert says.casefold() in page.casefold()
    assert "This run is not finished" in page
    assert f"neft run {tmp_path}/prepare/recipe.yaml" in gaps(page) or not stages


def test_what_was_made_from_earlier_results_is_left_out(tmp_path: Path, run_folder: Path) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    record = json.loads((folder / "train" / "stage.json").read_text())
    (folder / "train" / "stage.json").write_text(json.dumps(record | {"fingerprint": "other"}))
    run = read_run(folder)
    assert list(run.stale) == ["evaluate", "analysis"]
    assert (run.trained, run.results, dict(run.tables)) == (None, None, {})
    assert "Left out, as they were made from earlier results" in render_report(run)


def test_a_method_without_neurons(run_data: RunData) -> None:
    assert run_data.recipe is not None
    recipe = {**run_data.recipe, "train": {"method": "lora"}}
    results = {"method": "lora"}
    lora = replace(
        run_data, recipe=recipe, results=results, neurons=None, scores=None, warmup=None, tables={}
    )
    page = render_report(lora)
    assert "LoRA trained 1,800" in page
    assert "LoRA trains no chosen neurons, so there is no map of them." in page


def test_the_same_run_gives_the_same_page(run_folder: Path, page: str) -> None:
    assert render_report(read_run(run_folder)) == page


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(
        UsageError, match=r"no folder of a run or comparison.*Give the output folder"
    ):
        read_run(tmp_path)
    with pytest.raises(UsageError, match="no folder of a run"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "file",
    ["evaluate/scores.json", "train/training.json", "analysis/lens.parquet", "analysis/causal.csv"],
)
def test_a_damaged_file_is_named(tmp_path: Path, run_folder: Path, file: str) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    torn = (folder / file).read_bytes()[:-20]
    (folder / file).write_bytes(torn + b"\n1,2" if file.endswith("csv") else torn)
    with pytest.raises(DataError, match=re.escape(str(folder / file))):
        read_run(folder)


def test_no_predictions_of_two_test_splits_side_by_side(tmp_path: Path, run_folder: Path) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    file = folder / "evaluate" / "predictions.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match="29 predictions, but 30 of the base model"):
        read_run(folder)


def test_a_table_survives_csv(run_data: RunData) -> None:
    table = run_data.tables["causal"]
    assert table["group"][1] == "all trained neurons"
    assert table["task_rise"][1] == 2.61
    assert table.about == {"num_texts": 100}


def test_smollm2_fits_in_3_mb(tmp_path: Path) -> None:
    page = render_report(read_run(make_run(tmp_path / "run", SMOLLM2)))
    assert "All 21,017 trained neurons, of 92,160" in page
    data = payload(page)
    assert sum(map(bool, data["lens"]["promoted_after"])) > 7000
    assert len(data["contexts"]) == 200
    assert len(page.encode()) < 3_000_000


def comparison(folder: Path, num_seeds: int = 2) -> Path:
    summary = {"mean": 10.1, "spread": 0.4, "difference": 1.5, "p_value": 0.0004, "is_best": True}
    seed = {"num_trainable": 1_800, "seconds_per_step": 0.77, "peak_memory_bytes": 2_010_000_000}
    row = {
        "name": f"NeFT 9% {HOSTILE}",
        "state": "done",
        "failure": None,
        "rate": 0.002,
        "seeds": [seed] * num_seeds,
        "metrics": {"BLEU": summary},
        "forgetting": 0.33,
    }
    failed = row | {
        "name": "LoRA",
        "state": "failed",
        "failure": "diverged",
        "seeds": [],
        "metrics": {},
    }
    task = {
        "task": "en-fr",
        "num_examples": 24,
        "num_parameters": 20_000,
        "base": {"scores": {"BLEU": {"score": 0.6, "signature": "nrefs:1"}}},
        "rows": [row, failed],
    }
    results = {
        "comparison": {"model": {"path": "models/tiny"}, "figures": [{"file": "figure"}]},
        "provenance": {
            "model": "content:a1",
            "machine": {"cores": 2},
            "packages": {},
            "commit": None,
        },
        "tasks": [task],
        "failures": ["LoRA: diverged"],
    }
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "comparison.yaml").write_text("output: runs/x\n")
    (folder / "figure.png").write_bytes(base64.b64decode(_DOT))
    return folder


# A picture of one dot.
_DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


def test_a_damaged_comparison_is_written_again(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "compared")
    (folder / "results.json").write_text("{")
    with pytest.raises(DataError, match=r"results.json: damaged: .*Run neft compare again"):
        read_run(folder)


def test_a_comparison(tmp_path: Path) -> None:
    page = render_report(read_run(comparison(tmp_path / "compared")))
    elements = Elements(page)
    for shown in ("1,800", "9.00", "10.1 ± 0.4", "+1.5 (< 0.001)", "+0.330", "0.77 s", "2.0 GB"):
        assert shown in elements.texts("td")
    assert "failed: diverged" in elements.texts("td")
    assert f"NeFT 9% {HOSTILE}" in elements.texts("th")
    assert len(elements.all("script")) == 1
    alternative = elements.all("img")[0][0]["alt"]
    assert alternative is not None
    assert "10.1 ± 0.4 with 0.0018 million" in alternative
    assert "has the highest BLEU, 10.1 ± 0.4, significantly above every other complete row" in page
    assert "neft compare RECIPE --set &#39;analysis={}&#39;" in gaps(page)
    assert "1 training failed; see" in page


def test_a_comparison_with_analyses(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "compared")
    row = {
        "name": HOSTILE,
        "average_rank_change": 1234.4,
        "spread": 56.0,
        "by_role": {"up": 1000.0, "down": 1500.0},
        "strong": 12.5,
        "suppressed": 7.0,
        "indirect": 3.0,
        "change": 0.0721,
    }
    task = {"task": "en-fr", "num_neurons": 92160, "unrelated": 15360.0, "rows": [row]}
    (folder / "neurons.json").write_text(json.dumps({"tasks": [task]}))
    (folder / "en-fr-neurons-buckets.png").write_bytes(base64.b64decode(_DOT))
    page = render_report(read_run(folder))
    elements = Elements(page)
    for shown in ("1,234 ± 56", "1,500", "12", "7.2%"):
        assert shown in elements.texts("td")
    assert HOSTILE in elements.texts("th")
    assert len(elements.all("script")) == 1
    alternatives = [image["alt"] for image, _ in elements.all("img")]
    assert any("Figure 3" in str(text) and "1,234" in str(text) for text in alternatives)
    assert "analysis={}" not in gaps(page)


def test_neurons_without_scores_have_no_histogram(run_data: RunData) -> None:
    assert isinstance(run_data.neurons, NeuronSet)
    page = render_report(replace(without(run_data, "neurons"), scores=None))
    assert "distance" not in payload(page)["columns"]
    assert "Histogram" not in page
