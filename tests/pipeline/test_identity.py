"""Identities follow content, and nothing else."""

from __future__ import annotations

import shutil

import pytest

from neft.errors import DataError
from neft.pipeline.identity import data_identity, model_identity
from neft.recipe import HubData, ModelSection, ParallelFiles


def test_data_identity_is_content_and_format(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.jsonl").write_text("{}\n")
    (tmp_path / "a.csv").write_text("{}\n")
    one, same, other = (
        data_identity(str(tmp_path / name), "data.train")
        for name in ("a.jsonl", "b.jsonl", "a.csv")
    )
    assert one == same != other


def test_data_identity_of_parallel_files(tmp_path) -> None:
    (tmp_path / "a.en").write_text("one\n")
    (tmp_path / "a.fr").write_text("un\n")
    files = [str(tmp_path / "a.en"), str(tmp_path / "a.fr")]
    forward = ParallelFiles(source=files[0], target=files[1])
    backward = ParallelFiles(source=files[1], target=files[0])
    assert data_identity(forward, "data.dev") == data_identity(forward, "data.dev")
    assert data_identity(forward, "data.dev") != data_identity(backward, "data.dev")


def test_data_identity_on_the_hub() -> None:
    fields = {"id": "a/b", "config": "en-fr", "split": "train", "revision": "v1"}
    identities = {
        data_identity(HubData(**fields | change), "data.train")
        for change in (
            {},
            {"id": "a/c"},
            {"config": None},
            {"split": "test"},
            {"revision": None},
        )
    }
    assert len(identities) == 5


@pytest.mark.parametrize(("name", "kind"), [("none.jsonl", "no such file"), (".", "a folder")])
def test_missing_data_file(tmp_path, monkeypatch, name, kind) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"data\.test: {name}: {kind}.*{tmp_path.name}"):
        data_identity(name, "data.test")


def test_missing_side_of_parallel_files(tmp_path) -> None:
    (tmp_path / "a.en").write_text("one\n")
    files = ParallelFiles(source=str(tmp_path / "a.en"), target=str(tmp_path / "a.fr"))
    with pytest.raises(DataError, match=r"data\.dev\.target: .*a\.fr: no such file"):
        data_identity(files, "data.dev")


def test_model_identity(tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    before = model_identity(ModelSection(path=str(folder)))
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    (copy / "README.md").write_text("not part of the model")
    assert model_identity(ModelSection(path=str(copy))) == before
    for name, content in [
        ("model.safetensors", b"Weights"),
        ("config.json", b"{}"),
        ("chat_template.jinja", b"{{ messages }}"),
    ]:
        changed = shutil.copytree(folder, tmp_path / f"changed-{name}")
        (changed / name).write_bytes(content)
        assert model_identity(ModelSection(path=str(changed))) != before


def test_model_identity_on_the_hub() -> None:
    assert model_identity(ModelSection(path="owner/name")) == "owner/name@main"
    assert model_identity(ModelSection(path="owner/name", revision="abc")) == "owner/name@abc"
