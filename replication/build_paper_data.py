"""Build the paper's full-size data that the Hub does not hold as a data set.

    python replication/build_paper_data.py news-commentary en zh
    python replication/build_paper_data.py cross-sum english chinese_simplified

For ``recipes/paper/``, which takes everything else by its Hub id:

- **News Commentary** v16 from statmt.org. The Hub's data set is v11, with fewer than 100,000 pairs into
  Chinese and without Hindi. 1,000 pairs at most, the last of the file, are development data; the others
  come in hashed order, so that the first n are a fair sample.
- **CrossSum**, of which the Hub holds one archive a language pair and a program that reads them, which
  ``datasets`` runs no more. The splits are its own.

Neither publishes hashes; the report has the sha256 of the archive that the files were made of. The same
archive gives the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import tarfile
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dataset_folder
from dataset_folder import finished_report, fraction, program_digest, publish
from neft.errors import DataError
from neft.files import replaced_atomically

NEWS_COMMENTARY = "https://data.statmt.org/news-commentary/v16/training"
CROSS_SUM = "https://huggingface.co/datasets/csebuetnlp/CrossSum/resolve/main/data"
OUTPUT = Path("data/paper")
CACHE = OUTPUT / "downloads"
SMALL, LARGE = 20_000, 100_000
"""Training pairs of Table 2."""
DEV = 1_000
DEV_SHARE = 0.05
"""Of a small corpus."""

Rows = list[dict[str, str]]


def fetch(mirror: str, name: str, cache: Path) -> Path:
    """Where the file ``name`` of ``mirror`` lies in ``cache``; it is downloaded if it is missing.

    Raises:
        DataError: it cannot be fetched.
    """
    path = cache / name
    if not path.exists():
        address = f"{mirror.rstrip('/')}/{name}"
        print(f"Downloading {address}", flush=True)
        try:
            with urllib.request.urlopen(address, timeout=60) as response:
                content = response.read()
        except (OSError, ValueError) as error:  # URLError is an OSError; ValueError: no address
            raise DataError(
                f"{address}: cannot be fetched: {error}. Check the connection, give another --mirror, "
                f"or put the file at {path}."
            ) from error
        with replaced_atomically(path) as part:
            part.write_bytes(content)
    return path


# --- News Commentary ------------------------------------------------------------------------------


def read_pairs(file: Path, dropped: Counter[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a compressed table of two columns; where one side is empty, an article ends.

    Raises:
        DataError: not such a table.
    """
    try:
        with gzip.open(file, "rt", encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                cells = [cell.strip() for cell in line.split("\t")]
                if len(cells) > 2:
                    raise DataError(f"{file}, line {number}: {len(cells)} columns instead of 2.")
                if len(cells) < 2 or not all(cells):
                    dropped["one side empty"] += 1
                    continue
                yield cells[0], cells[1]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file}: not a gzipped UTF-8 text: {error}. Delete it and try again."
        ) from error


def split_pairs(pairs: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """The end of a corpus for development, so that it shares no article but one; the rest to train on.

    Pairs of training that development holds too are left out, and so are repeated ones.
    """
    num_dev = min(DEV, int(DEV_SHARE * len(pairs)))
    dev = pairs[len(pairs) - num_dev :]
    distinct = set(pairs[: len(pairs) - num_dev]) - set(dev)
    train = sorted(distinct, key=lambda pair: (fraction("\t".join(pair)), pair))[:LARGE]
    splits = {"train": train, "dev": dev}
    # The neurons of the large set are found on the small one, as in the paper (section 5.2).
    return splits | ({"train_20k": train[:SMALL]} if len(train) > SMALL else {})


def build_news_commentary(
    folder: Path, cache: Path, source: str, target: str, mirror: str = NEWS_COMMENTARY
) -> dict[str, Any]:
    """Build ``train.jsonl``, ``dev.jsonl`` and, of a large corpus, ``train_20k.jsonl`` in ``folder``.

    Rows are ``{"source", "target"}``.

    Args:
        folder: gets the files and, last, ``report.json``.
        cache: folder of downloaded files.
        source: language code, e.g. ``"hi"``.
        target: language code.
        mirror: address of the folder with the corpus.

    Raises:
        DataError: a file that cannot be fetched or is broken.
    """
    first, second = sorted((source, target))
    archive = fetch(mirror, f"news-commentary-v16.{first}-{second}.tsv.gz", cache)
    inputs = _inputs(archive, source, target)
    if report := finished_report(folder, inputs):
        return report
    dropped: Counter[str] = Counter()
    names = ("source", "target") if source == first else ("target", "source")
    splits = split_pairs(list(read_pairs(archive, dropped)))
    if not splits["dev"]:
        raise DataError(f"{archive}: too few pairs for training and development.")
    rows = {
        split: [dict(zip(names, pair, strict=True)) for pair in pairs]
        for split, pairs in splits.items()
    }
    return publish(folder, inputs, rows, {"dropped": dropped})


# --- CrossSum -------------------------------------------------------------------------------------


def read_summaries(archive: Path, pair: str) -> dict[str, Rows]:
    """The splits of a CrossSum archive.

    Raises:
        DataError: not such an archive, or a split is missing or empty.
    """
    splits = {}
    try:
        with tarfile.open(archive, "r:bz2") as members:
            by_name = {member.name.removeprefix("./"): member for member in members}
            for split, official in {"train": "train", "dev": "val", "test": "test"}.items():
                member = by_name.get(f"{pair}_{official}.jsonl")
                file = None if member is None else members.extractfile(member)
                rows = [] if file is None else [json.loads(line) for line in file if line.strip()]
                if not rows:
                    raise DataError(f"{archive}: holds no rows in {pair}_{official}.jsonl.")
                splits[split] = [
                    {"document": row["text"], "summary": row["summary"]} for row in rows
                ]
    except (tarfile.TarError, OSError, EOFError, ValueError, KeyError) as error:
        raise DataError(
            f"{archive}: not an archive of CrossSum: {error}. Delete it and try again."
        ) from error
    return splits


def build_cross_sum(
    folder: Path, cache: Path, source: str, target: str, mirror: str = CROSS_SUM
) -> dict[str, Any]:
    """Build ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl`` in ``folder``.

    Rows are ``{"document", "summary"}``.

    Args:
        folder: gets the files and, last, ``report.json``.
        cache: folder of downloaded archives.
        source: language of the articles as CrossSum names it, e.g. ``"english"``.
        target: language of the summaries, e.g. ``"chinese_simplified"``.
        mirror: address of the folder with the archives.

    Raises:
        DataError: an archive that cannot be fetched or is broken.
    """
    pair = f"{source}-{target}"
    archive = fetch(mirror, f"{pair}_CrossSum.tar.bz2", cache)
    inputs = _inputs(archive, source, target)
    if report := finished_report(folder, inputs):
        return report
    return publish(folder, inputs, read_summaries(archive, pair), {})


def _inputs(archive: Path, source: str, target: str) -> dict[str, Any]:
    return {
        "source": source,
        "target": target,
        "program": program_digest(__file__, dataset_folder.__file__),
        "archive": {archive.name: hashlib.sha256(archive.read_bytes()).hexdigest()},
    }


BUILDERS = {"news-commentary": build_news_commentary, "cross-sum": build_cross_sum}
MIRRORS = {"news-commentary": NEWS_COMMENTARY, "cross-sum": CROSS_SUM}


def main() -> int:
    """Parse, build, print."""
    parser = dataset_folder.argument_parser(__doc__)
    parser.add_argument("corpus", choices=BUILDERS, help="which data")
    parser.add_argument("source", help="language, as the corpus names it")
    parser.add_argument("target", help="language")
    parser.add_argument(
        "--output", type=Path, help=f"folder; {OUTPUT}/CORPUS/SOURCE-TARGET if not given"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of downloaded files")
    parser.add_argument(
        "--mirror", help="address of the folder with the files; its own if not given"
    )
    options = parser.parse_args()
    folder = options.output or OUTPUT / options.corpus / f"{options.source}-{options.target}"
    mirror = options.mirror or MIRRORS[options.corpus]
    build = BUILDERS[options.corpus]
    return dataset_folder.run(
        lambda: build(folder, options.cache, options.source, options.target, mirror), folder
    )


if __name__ == "__main__":
    sys.exit(main())
