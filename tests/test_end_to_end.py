"""The whole story on the real SmolLM2-135M-Instruct, in a few steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from neft import NeuronSet
from neft.checkpoints import open_weights
from neft.evaluation import generate
from neft.models import load_model
from neft.pipeline.run import run
from neft.recipe import Recipe, checked
from neft.sft.data import load_examples
from neft.sft.prompts import prompt_ids

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.real

PAIRS = [
    ("Open the file.", "Ouvrir le fichier."),
    ("Save your changes.", "Enregistrez vos modifications."),
    ("The page could not be found.", "La page est introuvable."),
    ("Enter your password.", "Saisissez votre mot de passe."),
    ("Delete this folder?", "Supprimer ce dossier ?"),
    ("No results.", "Aucun résultat."),
    ("Choose a language.", "Choisissez une langue."),
    ("The connection was lost.", "La connexion a été perdue."),
    ("Print the document.", "Imprimer le document."),
    ("Your account was created.", "Votre compte a été créé."),
    ("Send a message.", "Envoyer un message."),
    ("Close the window.", "Fermer la fenêtre."),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    from fetch_model import fetch_model

    folder = tmp_path_factory.mktemp("real")
    data = folder / "pairs.jsonl"
    rows = [json.dumps({"source": s, "target": t}, ensure_ascii=False) for s, t in PAIRS]
    data.write_text("\n".join(rows), encoding="utf-8")
    training = {"steps": 4, "batch_size": 4, "warmup_steps": 1, "evaluate_every": 2}
    return checked(
        Recipe,
        {
            "output": str(folder / "run"),
            "model": {"path": str(fetch_model(ROOT / "models/smollm2-135m-instruct"))},
            "data": {
                "task": "translation",
                "source_language": "English",
                "target_language": "French",
                "train": str(data),
                "dev": str(data),
                "test": str(data),
                "dev_limit": 4,
                "test_limit": 4,
            },
            "warmup": training | {"learning_rate": 5e-5},
            "select": {"percent": 9},
            # Decay would move masked weights; vectors that are not parameters it cannot reach.
            "train": training | {"learning_rate": 2e-3, "weight_decay": 0.1},
            "evaluate": {"max_new_tokens": 12, "batch_size": 2},
        },
        where="test",
    )


@pytest.fixture(scope="module")
def finished(recipe: Recipe) -> Path:
    """The folder of the finished run."""
    run(recipe, say=print)
    return Path(recipe.output)


def answers(model: torch.nn.Module, recipe: Recipe) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    examples = load_examples(recipe.data, "test")
    prompts = [prompt_ids(example, tokenizer, recipe.data) for example in examples]
    return generate(model, tokenizer, prompts, recipe.evaluate, progress=False)


def evaluated(run: Path) -> list[str]:
    lines = (run / "evaluate" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def test_nine_percent_of_all_parameters_are_chosen(recipe, finished):
    neurons = NeuronSet.load(finished / "select" / "neurons.json")
    total = open_weights(recipe.model.path).num_parameters
    assert total == 134_515_008
    assert len(neurons) == int(0.09 * total / 576)
    assert set(neurons.counts_by_role()) == {"up", "down"}


def test_no_bit_outside_the_neurons_changes(recipe, finished):
    base = load_model(recipe.model)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    adapted = PeftModel.from_pretrained(base, finished / "train" / "adapter")
    neurons = NeuronSet.load(finished / "select" / "neurons.json")
    after = adapted.merge_and_unload().state_dict()
    assert after.keys() == before.keys()
    for name, weight in before.items():
        changed = after[name].view(torch.int32) != weight.view(torch.int32)
        module = name.removesuffix(".weight")
        if module in neurons:
            dimension = neurons.projections[module].neuron_dim
            moved = torch.nonzero(changed.any(1 - dimension)).flatten()
            assert moved.tolist() == neurons[module].tolist(), name
        else:
            assert not changed.any(), name


def test_plain_peft_and_plain_transformers_answer_as_the_evaluation_did(recipe, finished, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(recipe.model.path)
    adapted = PeftModel.from_pretrained(base, finished / "train" / "adapter")
    assert answers(adapted, recipe) == evaluated(finished)
    adapted.merge_and_unload().save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert answers(merged, recipe) == evaluated(finished)


def test_the_second_run_only_looks(recipe, finished, monkeypatch):
    said: list[str] = []
    run(recipe, say=said.append)
    assert len(said) == 7
    assert all("already done" in line for line in said)


def test_the_python_lines_of_the_readme_run(recipe, finished, tmp_path, monkeypatch):
    (tmp_path / "models").symlink_to(Path(recipe.model.path).parent)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert code is not None
    names: dict[str, object] = {}
    exec(code[1], names)
    assert isinstance(names["model"], PeftModel)
    assert names["neurons"] == NeuronSet.load(finished / "select" / "neurons.json")
