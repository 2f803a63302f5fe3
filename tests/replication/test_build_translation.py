"""Reading, cleaning and splitting of translation pairs, on handmade catalogs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import polib
import pytest

import build_translation
import dataset_folder
import debian
from build_translation import (
    LANGUAGES,
    Language,
    Pair,
    Registries,
    choose_targets,
    clean,
    halves,
    is_sentence,
    normalised,
    read_catalogs,
    reject,
    split,
    without_accelerators,
    words,
)
from debian import read_debian_lock
from neft.errors import DataError

FRENCH = LANGUAGES["fr"]


def catalog(entries: list[polib.POEntry]) -> polib.POFile:
    po = polib.POFile()
    po.metadata = {"Content-Type": "text/plain; charset=utf-8"}
    po.extend(entries)
    return po


def po_bytes(*pairs: tuple[str, str]) -> bytes:
    return str(catalog([polib.POEntry(msgid=s, msgstr=t) for s, t in pairs])).encode()


# --- Read -----------------------------------------------------------------------------------------


def test_entries_that_are_not_translations_are_left_out(tmp_path, make_wheel):
    entries = [
        polib.POEntry(msgid="Open", msgstr="Ouvrir"),
        polib.POEntry(msgid="Shut", msgstr="Ouvrir", flags=["fuzzy"]),
        polib.POEntry(msgid="Old", msgstr="Vieux", obsolete=True),
        polib.POEntry(
            msgid="%d file",
            msgid_plural="%d files",
            msgstr_plural={0: "%d fichier", 1: "%d fichiers"},
        ),
    ]
    make_wheel(tmp_path, "toy", {"toy/locale/fr/LC_MESSAGES/a.po": str(catalog(entries)).encode()})
    assert list(read_catalogs(tmp_path / "toy-1.0-py3-none-any.whl", FRENCH)) == [
        ("Open", "Ouvrir"),
        ("%d file", "%d fichier"),
        ("%d files", "%d fichiers"),
    ]


def test_a_language_without_plural_gives_the_plural_source(tmp_path, make_wheel):
    entry = polib.POEntry(msgid="%d file", msgid_plural="%d files", msgstr_plural={0: "%d 个文件"})
    make_wheel(tmp_path, "toy", {"toy/zh/a.po": str(catalog([entry])).encode()})
    chinese = Language("Chinese", ("zh",), "CJK", (0.1, 1.3), held_out=0.1)
    found = list(read_catalogs(tmp_path / "toy-1.0-py3-none-any.whl", chinese))
    assert found == [("%d files", "%d 个文件")]


def test_which_files_are_catalogs_of_the_language(tmp_path, make_wheel):
    compiled = catalog([polib.POEntry(msgid="Compiled", msgstr="Compilé")]).to_binary()
    files = {
        "a/locale/fr/LC_MESSAGES/django.po": po_bytes(("Text", "Texte")),
        # The same catalog again: the text form has the flags.
        "a/locale/fr/LC_MESSAGES/django.mo": compiled,
        "b/locale/fr_FR/LC_MESSAGES/messages.mo": compiled,
        "c/translations/fr.po": po_bytes(("Stem", "Tige")),
        "d/locale/de/LC_MESSAGES/django.po": po_bytes(("German", "Deutsch")),
        "fr/notes.txt": b"no catalog",
    }
    make_wheel(tmp_path, "toy", files)
    assert list(read_catalogs(tmp_path / "toy-1.0-py3-none-any.whl", FRENCH)) == [
        ("Text", "Texte"),
        ("Compiled", "Compilé"),
        ("Stem", "Tige"),
    ]


@pytest.mark.parametrize("name", ["a.po", "a.mo"])
def test_a_broken_catalog_is_named(tmp_path, make_wheel, name):
    make_wheel(tmp_path, "toy", {f"toy/fr/{name}": b"\xff\xfe no catalog"})
    with pytest.raises(DataError, match=rf"toy-1\.0.*toy/fr/{name}: not a gettext catalog"):
        list(read_catalogs(tmp_path / "toy-1.0-py3-none-any.whl", FRENCH))


def test_a_debian_package_is_read_without_its_accelerators(tmp_path, make_package):
    entry = polib.POEntry(msgid="Sa_ve ~as %FILE_NAME", msgstr="En_registrer ~sous %FILE_NAME")
    folder = "./usr/lib/office/fr/LC_MESSAGES"
    files = {
        f"{folder}/a.mo": catalog([entry]).to_binary(),
        f"{folder.replace('fr', 'de')}/a.mo": b"not read",
        f"{folder}/notes.txt": b"no catalog",
    }
    make_package(tmp_path / "office.deb", files)
    assert list(read_catalogs(tmp_path / "office.deb", FRENCH)) == [
        ("Save as %FILE_NAME", "Enregistrer sous %FILE_NAME")
    ]


@pytest.mark.parametrize(
    ("marked", "plain"),
    [("_File", "File"), ("Ca_ncel", "Cancel"), ("~Next >", "Next >"), ("a _ b", "a _ b")],
)
def test_accelerators(marked, plain):
    assert without_accelerators(marked) == plain


# --- Clean and reject -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a\u00a0b\u202f:\n c\t", "a b : c"),
        ("l\u2019e\u0301tat\u2026", "l'état..."),
        ("Fish &amp; chips\u200b", "Fish & chips"),
        ("one\\ntwo", "one two"),
    ],
)
def test_clean(raw, cleaned):
    assert clean(raw) == cleaned


@pytest.mark.parametrize(
    ("source", "target", "fault"),
    [
        ("Save the file", "Enregistrer le fichier", None),
        ("Saving...", "Enregistrement...", None),
        ("Saved %(name)s to {path}", "{path} contient %(name)s", None),
        ("Only 50% saved", "50% enregistrés seulement", None),
        ("Host (advanced):", "Hôte (avancé) :", None),
        ("Save the file", "", "empty"),
        ("Save the file" * 30, "Enregistrer le fichier", "long"),
        ("<b>Save</b> the file", "Enregistrer le fichier", "markup"),
        ("Use `save` now", "Utilisez `save`", "markup"),
        ("See https://a.org", "Voir https://a.org", "markup"),
        ("&Save file", "Enregistrer", "markup"),
        ("max_size", "taille", "identifier"),
        ("camelCase", "chameau", "identifier"),
        ("--verbose", "bavard", "identifier"),
        ("X", "Y", "symbols"),
        ("%(a)s: %(b)s", "%(a)s : %(b)s", "symbols"),
        ("Summer", "\u00c3\u00a9t\u00c3\u00a9s", "mojibake"),
        ("Saved %(name)s", "%(nom)s enregistré", "placeholders differ"),
        ("%s of %s", "%s sur", "placeholders differ"),
        ("1 page in 10", "Une page sur 10", "numbers differ"),
        ("Language name", "Имя языка", "script"),
        ("Größe ändern", "Modifier la taille", "script"),
        ("Source code", "source Code", "copied"),
        ("Pick the one that you want", "Pick the one that you voulez", "untranslated"),
        ("Default User Group Name", "Default User Group", "untranslated"),
        ("Save the file.", "Enregistrer le fichier", "final mark differs"),
        ("Cancel the comment edit", "Non", "length"),
    ],
)
def test_reject(source, target, fault):
    assert reject(source, target, FRENCH) == fault


@pytest.mark.parametrize(
    ("language", "source", "target", "fault"),
    [
        ("zh", "Restart the Django server.", "重新启动 Django 服务器。", None),
        ("zh", "%s files are there", "%s中有%s个文件", "placeholders differ"),
        ("zh", "%d files were saved", "保存了%d个文件", None),
        ("zh", "Restart the server.", "Redémarrer le serveur.", "script"),
        ("hi", "Are you sure?", "क्या आप निश्चित हैं?", None),
        ("hi", "12 files were saved.", "१२ फ़ाइलें सहेजी गईं।", None),
        ("hi", "Are you sure?", "Are you sure?", "script"),
        ("de", "Delete the volume", "Datenträger löschen", None),
        ("bs", "Returns the logical value TRUE.", "Vraća logičku vrijednost TRUE.", None),
        ("mi", "Use a log scale", "Whakamahia tauine pūkete", None),
        ("bs", "$(ARG1) is write protected", "Zaštićen za pisanje je", "placeholders differ"),
    ],
)
def test_reject_in_other_languages(language, source, target, fault):
    assert reject(source, target, LANGUAGES[language]) == fault


def test_one_target_a_source():
    pairs = [
        Pair("Open", "Ouvert", "a"),
        Pair("Open", "Ouvert", "a"),
        Pair("Open", "Ouvert", "a"),
        Pair("Open", "Ouvrir", "c"),
        Pair("Open", "Ouvrir", "b"),
        Pair("Shut", "Fermer", "a"),
    ]
    # Two packages outweigh three entries of one.
    assert choose_targets(pairs) == [Pair("Open", "Ouvrir", "b"), Pair("Shut", "Fermer", "a")]
    assert choose_targets(reversed(pairs)) == choose_targets(pairs)


# --- Split ----------------------------------------------------------------------------------------


def test_what_may_be_measured_on():
    assert is_sentence("Save the file")
    assert not is_sentence("Save file")
    assert not is_sentence("Create New Volume Type"), "a title"
    assert not is_sentence("move %s to the %s")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Save the file", "save THE file!"),
        ("Save 3 files", "Save 12 files:"),
        ("Save %(name)s now", "Save {0} now"),
    ],
    ids=["case and marks", "numbers", "format fields"],
)
def test_near_duplicates_share_a_key(one, other):
    assert normalised(one) == normalised(other) != normalised("Save")


SLOTS = [
    ["save", "open", "close", "move", "copy", "delete", "rename", "print", "share", "send"],
    ["big", "new", "old", "main", "empty", "hidden", "public", "local", "first", "last"],
    ["file", "folder", "page", "image", "table", "chart", "cell", "theme", "editor", "kernel"],
    ["from", "to", "on", "in", "near", "before", "after", "under", "with", "without"],
    ["disk", "server", "cloud", "window", "screen", "panel", "archive", "view", "queue", "user"],
]


def sources() -> list[str]:
    """Sentences, many of which differ from another by a word or in case only; and as many labels."""
    chance = random.Random(0)
    sentences = [" ".join(chance.choice(slot) for slot in SLOTS) for _ in range(900)]
    doubles = [sentence.capitalize() + "!" for sentence in sentences[::3]]
    labels = [
        f"{one} {other}" for one in SLOTS[0] + SLOTS[1] for slot in SLOTS[2:] for other in slot
    ]
    return list(dict.fromkeys([*sentences, *doubles, *labels]))


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Pair]]:
    return split([Pair(source, f"{source} !", "toy") for source in sources()], held_out=0.2)


def naive_distance(a: list[str], b: list[str]) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True)) if len(a) == len(b) else 99


def test_no_split_has_a_near_duplicate_of_another(splits):
    keys = {name: [normalised(p.source).split() for p in pairs] for name, pairs in splits.items()}
    for one, other in [("train", "dev"), ("train", "test"), ("dev", "test")]:
        assert keys[other], "an empty split proves nothing"
        assert min(naive_distance(a, b) for a in keys[one] for b in keys[other]) >= 2


def test_held_out_splits_hold_sentences_each_once(splits):
    for name in ("dev", "test"):
        found = [pair.source for pair in splits[name]]
        assert all(map(is_sentence, found))
        assert len({normalised(source) for source in found}) == len(found)


def test_near_duplicates_fall_to_the_same_split(splits):
    doubled = {source[:-1].lower() for source in sources() if source.endswith("!")}
    held_out = [normalised(pair.source) for name in ("dev", "test") for pair in splits[name]]
    # A third has a double; were doubles torn apart, those would have had to leave dev and test.
    assert 0.25 < sum(key in doubled for key in held_out) / len(held_out) < 0.4


def test_labels_are_a_fifth_of_train_at_most(splits):
    num_labels = sum(len(words(pair.source)) < 3 for pair in splits["train"])
    assert 0.15 < num_labels / len(splits["train"]) <= 0.2


def test_the_split_depends_on_the_source_alone(splits):
    shuffled = [Pair(source, "autre", "top") for source in reversed(sources())]
    again = split(shuffled, held_out=0.2)
    for name, pairs in splits.items():
        assert [pair.source for pair in again[name]] == [pair.source for pair in pairs]


def test_the_first_rows_are_a_fair_sample(splits):
    found = [pair.source.casefold() for pair in splits["train"]]
    first, rest = found[: len(found) // 2], found[len(found) // 2 :]
    early = [sum(source < "m" for source in half) / len(half) for half in (first, rest)]
    assert abs(early[0] - early[1]) < 0.15


def test_halves_are_disjoint_and_keep_near_duplicates_together(splits):
    parts = halves(splits["train"])
    assert parts.keys() == {"train_A", "train_B"}
    keys = {name: {normalised(pair.source) for pair in pairs} for name, pairs in parts.items()}
    assert keys["train_A"].isdisjoint(keys["train_B"])
    assert len(keys["train_A"]) < len(parts["train_A"]), "no near-duplicates: proves nothing"
    order = {pair.source: place for place, pair in enumerate(splits["train"])}
    for pairs in parts.values():
        assert 0.4 < len(pairs) / len(splits["train"]) < 0.6
        places = [order[pair.source] for pair in pairs]
        assert places == sorted(places)
    assert sum(map(len, parts.values())) == len(order)


# --- Build ----------------------------------------------------------------------------------------


@pytest.fixture
def lock(tmp_path, make_wheel, write_lock):
    """Two wheels, in the cache already."""
    vowels = str.maketrans("aeiou", "éàîôù")
    pairs = [(source, source.translate(vowels)) for source in sources()]
    entries = [
        make_wheel(tmp_path / "cache", "toy", {"toy/fr.po": po_bytes(*pairs[::2])}),
        make_wheel(tmp_path / "cache", "top", {"top/fr.po": po_bytes(*pairs[1::2], ("No", ""))}),
    ]
    return write_lock(entries)


def build(folder: Path, lock: Path) -> dict:
    return build_translation.build_translation(
        folder, "fr", Registries(lock, lock.parent / "cache")
    )


def test_files_and_report(tmp_path, lock):
    report = build(tmp_path / "out", lock)
    for name, file in report["files"].items():
        lines = (tmp_path / "out" / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) == file["rows"] > 0
        assert all(json.loads(line).keys() == {"source", "target", "origin"} for line in lines)
    rows = {name.removesuffix(".jsonl"): file["rows"] for name, file in report["files"].items()}
    assert rows.keys() == {"train", "dev", "test", "train_A", "train_B"}
    assert rows["train"] == rows["train_A"] + rows["train_B"]
    assert report["dropped"]["empty"] == 1
    assert sum(report["origins"].values()) == rows["train"] + rows["dev"] + rows["test"]


def test_only_the_packages_of_the_language_are_read(tmp_path, lock, make_package, monkeypatch):
    pairs = [(f"{source} there", f"{source} là-bas") for source in sources()]
    po = po_bytes(*pairs)
    name = "pool/main/o/office/office-l10n-fr_1_all.deb"
    pins = {name: make_package(tmp_path / "debian" / name, {"./usr/fr.po": po}), "other": "0"}
    (tmp_path / "debian.lock.json").write_text(json.dumps(pins))
    entries = json.loads(lock.read_text())
    lock.write_text(json.dumps([entries[0], entries[1] | {"languages": ["de", "zh"]}]))
    french = replace(FRENCH, debian_packages=(name,))
    monkeypatch.setitem(LANGUAGES, "fr", french)
    registries = Registries(
        lock, tmp_path / "cache", tmp_path / "debian.lock.json", tmp_path / "debian", "file:///none"
    )
    report = build_translation.build_translation(tmp_path / "out", "fr", registries)
    assert report["origins"].keys() == {"toy", "office"}
    assert report["inputs"]["debian files"] == {name: pins[name]}
    assert report["inputs"]["wheels"].keys() == {"toy==1.0"}


def test_every_debian_package_of_a_language_is_pinned():
    for language in LANGUAGES.values():
        read_debian_lock(debian.LOCK, language.debian_packages)


def test_a_finished_build_is_not_repeated_but_a_changed_one_is(tmp_path, lock):
    folder = tmp_path / "out"
    report = build(folder, lock)
    wheels = list((tmp_path / "cache").iterdir())
    hidden = [wheel.rename(tmp_path / wheel.name) for wheel in wheels]
    assert build(folder, lock) == report, "needs no wheel"
    for wheel in hidden:
        wheel.rename(tmp_path / "cache" / wheel.name)
    before = (folder / "dev.jsonl").read_bytes()
    (folder / "dev.jsonl").write_bytes(before[:100])
    assert build(folder, lock) == report
    assert (folder / "dev.jsonl").read_bytes() == before


@pytest.mark.parametrize("torn", ["", '{"files": {', "{}"])
def test_a_torn_report_finishes_nothing(tmp_path, lock, torn):
    report = build(tmp_path / "out", lock)
    (tmp_path / "out" / "report.json").write_text(torn)
    assert build(tmp_path / "out", lock) == report
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")) == report


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path, lock, monkeypatch):
    class Killed(BaseException):
        pass

    folder = tmp_path / "out"
    build(folder, lock)
    entries = json.loads(lock.read_text())
    lock.write_text(json.dumps(entries[:1]))  # other inputs: the folder must be built anew
    written = []

    def write_one_file_only(path: Path, text: str) -> None:
        if written:
            raise Killed
        written.append(path)
        path.write_text(text)

    with monkeypatch.context() as patch:
        patch.setattr(dataset_folder, "write_text", write_one_file_only)
        with pytest.raises(Killed):
            build(folder, lock)
    assert written
    assert not (folder / "report.json").exists()
    assert build(folder, lock)["origins"].keys() == {"toy"}


def test_the_same_bytes_under_any_hash_seed(tmp_path, lock):
    script = (
        "import sys; from pathlib import Path; from build_translation import *\n"
        "build_translation(Path(sys.argv[1]), 'fr', Registries(Path(sys.argv[3]), Path(sys.argv[2])))"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", script, tmp_path / seed, tmp_path / "cache", lock],
            check=True,
            env=os.environ
            | {
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": str(Path(build_translation.__file__).parent),
            },
        )
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl", "report.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_wheels_with_too_little_in_them(tmp_path, make_wheel, write_lock):
    files = {"toy/fr.po": po_bytes(("Open the file", "Ouvrir le fichier"))}
    lock = write_lock([make_wheel(tmp_path / "cache", "toy", files)])
    with pytest.raises(DataError, match="no French pairs are left for "):
        build(tmp_path / "out", lock)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_wrong(tmp_path, lock, monkeypatch, capsys):
    entries = json.loads(lock.read_text())
    lock.write_text(json.dumps([entries[0] | {"sha256": "0" * 64}]))
    options = {"output": tmp_path / "out", "cache": tmp_path / "cache", "lock": lock}
    monkeypatch.setattr(sys, "argv", ["x", *(f"--{name}={path}" for name, path in options.items())])
    assert build_translation.main() == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "toy==1.0 is pinned to 0000" in message
    assert not (tmp_path / "out").exists()
