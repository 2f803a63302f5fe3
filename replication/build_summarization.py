"""Build cross-lingual summaries from the package descriptions of Debian.

    python replication/build_summarization.py [--language fr] [--output data/summarization/en-fr]

A document is the long description of a package in English; its summary is the one-line synopsis in
French, German or Chinese, as translated by the Debian Description Translation Project. The index files of
a frozen release are pinned in ``debian.lock.json``. One package is kept for each source package, and the
rows are split by a hash of the source package's name. The same index files give the same bytes.

Output: ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl``, one ``{"document", "summary", "package"}`` a
line in random (hashed) order, so that the first n rows are a fair sample; and ``report.json`` with counts
and hashes, written last.
"""

from __future__ import annotations

import bz2
import lzma
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dataset_folder
import debian
from dataset_folder import finished_report, fraction, program_digest, publish
from debian import CACHE, LOCK, MIRROR, fetch_archive_files, paragraphs_of, read_debian_lock
from neft.errors import DataError

RELEASE = "dists/bookworm/main"
PACKAGES = f"{RELEASE}/binary-amd64/Packages.xz"
ENGLISH = f"{RELEASE}/i18n/Translation-en.xz"
MAX_DOCUMENT_WORDS = 200
MAX_SUMMARY_CHARS = 100
MAX_HELD_OUT = 500
"""Rows of dev and of test at most."""
MAX_SHARED = 0.5
"""Share of its word 4-grams that a document may have in common with one of another source package."""
MAX_SOURCES = 3
"""Source packages that may use the same paragraph; one of more of them tells nothing of its package."""


@dataclass(frozen=True)
class Language:
    """What the builder must know of a target language."""

    name: str
    code: str
    """As in the names of the index and its fields."""
    script: str
    """First word of the Unicode names of its letters."""
    fewest_letters: int
    """Letters of that script in a summary; names such as "Django" may be in plain Latin."""
    fewest_words: int
    """Words of a document."""
    held_out: float
    """Share of the source packages whose hash falls to dev, and the same again to test."""

    @property
    def index(self) -> str:
        """Path of its index in the archive."""
        return f"{RELEASE}/i18n/Translation-{self.code}.bz2"


LANGUAGES = {
    "fr": Language("French", "fr", "LATIN", fewest_letters=8, fewest_words=40, held_out=0.08),
    "de": Language("German", "de", "LATIN", fewest_letters=8, fewest_words=40, held_out=0.08),
    "zh": Language("Chinese", "zh_CN", "CJK", fewest_letters=4, fewest_words=20, held_out=0.15),
}


@dataclass(frozen=True)
class Description:
    """One description of an index: of a package, in one language."""

    package: str
    md5: str
    """Of the English description; its translations carry the same one."""
    synopsis: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A document, its summary, and the package that both describe."""

    document: str
    summary: str
    package: str


@dataclass(frozen=True)
class Candidate:
    """A row with what is needed to choose among the rows."""

    row: Row
    source_package: str


# --- Read -----------------------------------------------------------------------------------------


def _stanzas(index: Path) -> Iterator[list[str]]:
    """The lines of each stanza of a compressed index.

    Raises:
        DataError: not a compressed UTF-8 text.
    """
    lines: list[str] = []
    opened = lzma.open if index.suffix == ".xz" else bz2.open
    try:
        with opened(index, "rt", encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    lines.append(line.rstrip("\n"))
                elif lines:
                    yield lines
                    lines = []
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise DataError(f"{index}: not a compressed index: {error}") from error
    if lines:
        yield lines


def read_descriptions(index: Path) -> Iterator[Description]:
    """Every description in a ``Translation-xx`` index."""
    language = index.name.removeprefix("Translation-").partition(".")[0]
    synopsis = f"Description-{language}"
    for lines in _stanzas(index):
        head = [line for line in lines if not line.startswith(" ")]
        fields = dict(line.split(": ", 1) for line in head if ": " in line)
        # Some translations hold an empty line, and what follows it is a stanza without fields.
        if {"Package", "Description-md5", synopsis} <= fields.keys():
            yield Description(
                package=fields["Package"],
                md5=fields["Description-md5"],
                synopsis=fields[synopsis],
                paragraphs=tuple(paragraphs_of(line for line in lines if line.startswith(" "))),
            )


def read_sources(index: Path) -> dict[str, str]:
    """The source package of each package in a ``Packages`` index."""
    sources = {}
    for lines in _stanzas(index):
        fields = dict(
            line.split(": ", 1) for line in lines if line.startswith(("Package: ", "Sour"))
        )
        # Source is left out when it has the package's name, and may carry a version: "gcc-12 (12.2.0)".
        sources[fields["Package"]] = fields.get("Source", fields["Package"]).partition(" ")[0]
    return sources


# --- Clean and reject -----------------------------------------------------------------------------

_KIND = re.compile(
    r"\s+[-\u2013\u2014]+\s+[^-\u2013\u2014]+$|\s*[(\uff08][^()\uff08\uff09]*[)\uff09]$"
)
_NOT_A_PROGRAM = re.compile(r"transitional|dummy|meta-?\s?package|debug(ging)? symbols", re.I)
# Frequent in English, and a word in none of the target languages.
_ENGLISH_WORD = re.compile(r"\b(?:the|of|and|with|from|for|to|is|library)\b", re.I)


def clean(text: str) -> str:
    """``text`` in NFC with straight apostrophes and one space for any white space."""
    return " ".join(unicodedata.normalize("NFC", text).replace("\u2019", "'").split())


def clean_summary(synopsis: str) -> str:
    """A cleaned synopsis without the kind of package at its end, which the document does not tell.

    >>> clean_summary("moteur de jeu - fichiers de données")
    'moteur de jeu'
    """
    text = clean(synopsis).rstrip(".\u3002")
    return _KIND.sub("", text).strip() or text


def _letters(text: str) -> list[str]:
    return [c for c in text if unicodedata.category(c)[0] == "L"]


def reject(document: str, summary: str, synopsis: str, language: Language) -> str | None:
    """Why a row is left out: the first fault found, ``None`` for a good one.

    Args:
        document: long description in English, a paragraph a line.
        summary: cleaned synopsis in the language.
        synopsis: the synopsis in English.
        language: the summary's.
    """
    num_words = len(document.split())
    letters = _letters(summary)
    others = [c for c in letters if not unicodedata.name(c, "").startswith(language.script)]
    faults = {
        "document short": num_words < language.fewest_words,
        "document long": num_words > MAX_DOCUMENT_WORDS,
        "document is not prose": len(_letters(document)) < 0.7 * len(document),
        "no program": _NOT_A_PROGRAM.search(synopsis) is not None,
        "summary short": len(letters) - len(others) < language.fewest_letters,
        "summary long": len(summary) > MAX_SUMMARY_CHARS,
        "summary in another script": not "".join(others).isascii(),
        "summary untranslated": summary.casefold() == clean_summary(synopsis).casefold()
        or len(_ENGLISH_WORD.findall(summary)) >= (2 if language.script == "LATIN" else 1),
    }
    return next((fault for fault, found in faults.items() if found), None)


def common_paragraphs(english: Iterable[Description], sources: Mapping[str, str]) -> set[str]:
    """Paragraphs that more than ``MAX_SOURCES`` source packages use, "This package contains ..."."""
    users: defaultdict[str, set[str]] = defaultdict(set)
    for description in english:
        for paragraph in description.paragraphs:
            users[paragraph].add(sources.get(description.package, description.package))
    return {paragraph for paragraph, used_by in users.items() if len(used_by) > MAX_SOURCES}


# --- Choose and split -----------------------------------------------------------------------------


def one_a_source(candidates: Iterable[Candidate]) -> list[Candidate]:
    """One candidate for each source package: of its own name, or else of the shortest name."""
    chosen: dict[str, Candidate] = {}
    for candidate in candidates:
        rival = chosen.setdefault(candidate.source_package, candidate)
        chosen[candidate.source_package] = min(candidate, rival, key=_rank)
    return sorted(chosen.values(), key=lambda candidate: candidate.source_package)


def _rank(candidate: Candidate) -> tuple[bool, int, str]:
    package = candidate.row.package
    return package != candidate.source_package, len(package), package


def without_near_duplicates(candidates: Iterable[Candidate]) -> list[Candidate]:
    """In hashed order; none shares over ``MAX_SHARED`` of its word 4-grams with an earlier one."""
    in_order = sorted(
        candidates, key=lambda c: (fraction(f"order {c.source_package}"), c.source_package)
    )
    first_with: dict[tuple[str, ...], int] = {}
    kept: list[Candidate] = []
    for candidate in in_order:
        words = re.findall(r"\w+", candidate.row.document.casefold())
        grams = set(zip(words, words[1:], words[2:], words[3:], strict=False))
        shared = Counter(first_with[gram] for gram in grams if gram in first_with)
        if max(shared.values(), default=0) > MAX_SHARED * len(grams):
            continue
        for gram in grams:
            first_with.setdefault(gram, len(kept))
        kept.append(candidate)
    return kept


def split(candidates: Iterable[Candidate], held_out: float) -> dict[str, list[Row]]:
    """Train, dev and test by the hash of the source package, in the order given.

    Args:
        candidates: one for each source package.
        held_out: share of the source packages, 0..0.5, that falls to dev; as many again fall to test.
    """
    splits: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    for candidate in candidates:
        place = fraction(f"split {candidate.source_package}")
        name = "test" if place < held_out else "dev" if place >= 1 - held_out else "train"
        splits[name].append(candidate.row)
    return splits | {name: splits[name][:MAX_HELD_OUT] for name in ("dev", "test")}


# --- Build ----------------------------------------------------------------------------------------


def _candidates(
    files: Mapping[str, Path], language: Language, dropped: Counter[str]
) -> Iterator[Candidate]:
    """Every good row of the indexes; what is dropped is counted by its fault."""
    sources = read_sources(files[PACKAGES])
    english = {description.md5: description for description in read_descriptions(files[ENGLISH])}
    common = common_paragraphs(english.values(), sources)
    for translated in read_descriptions(files[language.index]):
        original = english.get(translated.md5)
        if original is None or translated.package not in sources:
            dropped["no English description"] += 1
            continue
        document = "\n".join(clean(part) for part in original.paragraphs if part not in common)
        summary = clean_summary(translated.synopsis)
        if reason := reject(document, summary, original.synopsis, language):
            dropped[reason] += 1
        else:
            row = Row(document, summary, translated.package)
            yield Candidate(row, sources[translated.package])


def build_summarization(
    folder: Path, cache: Path, language: str = "fr", mirror: str = MIRROR, lock: Path = LOCK
) -> dict[str, Any]:
    """Build the three splits in ``folder``, unless they are there already.

    Args:
        folder: gets ``train.jsonl``, ``dev.jsonl``, ``test.jsonl`` and, last, ``report.json``.
        cache: folder of downloaded index files.
        language: a key of ``LANGUAGES``.
        mirror: address of the Debian archive.
        lock: the pinned index files.

    Returns:
        The report: inputs; rows and sha256 of each file; how many descriptions each filter dropped.

    Raises:
        DataError: an index file that is not in the lock, cannot be fetched, is not the pinned one or is
            broken; or a split without a single row.
    """
    target = LANGUAGES[language]
    pins = read_debian_lock(lock, [PACKAGES, ENGLISH, target.index])
    inputs = {
        "language": language,
        "program": program_digest(__file__, debian.__file__, dataset_folder.__file__),
        "debian files": pins,
    }
    if report := finished_report(folder, inputs):
        return report
    files = fetch_archive_files(pins, mirror, cache)
    dropped: Counter[str] = Counter()
    candidates = list(_candidates(files, target, dropped))
    of_sources = one_a_source(candidates)
    dropped["of the same source package"] = len(candidates) - len(of_sources)
    distinct = without_near_duplicates(of_sources)
    dropped["near-duplicate"] = len(of_sources) - len(distinct)
    splits = split(distinct, target.held_out)
    if empty := [name for name, rows in splits.items() if not rows]:
        raise DataError(
            f"{files[target.index]}: no {target.name} rows are left for {' and '.join(empty)}; this "
            "index holds too few translated descriptions."
        )
    return publish(
        folder,
        inputs,
        {name: [asdict(row) for row in rows] for name, rows in splits.items()},
        {"dropped": dict(dropped.most_common())},
    )


def main() -> int:
    """Parse, build, print."""
    parser = dataset_folder.argument_parser(__doc__)
    parser.add_argument("--language", choices=LANGUAGES, default="fr", help="summarise in this")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of the data; data/summarization/en-LANGUAGE if not given",
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of downloaded files")
    parser.add_argument("--mirror", default=MIRROR, help="address of the Debian archive")
    parser.add_argument("--lock", type=Path, default=LOCK, help="the pinned index files")
    options = parser.parse_args()
    folder = options.output or Path(f"data/summarization/en-{options.language}")
    return dataset_folder.run(
        lambda: build_summarization(
            folder, options.cache, options.language, options.mirror, options.lock
        ),
        folder,
    )


if __name__ == "__main__":
    sys.exit(main())
