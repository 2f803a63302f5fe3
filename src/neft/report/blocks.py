"""What a page is made of; the template lays out each kind of block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from markupsafe import Markup


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    kind: ClassVar = "paragraph"
    text: str


@dataclass(frozen=True)
class Cells:
    """A table; the first cell of each row names it."""

    kind: ClassVar = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: bool = False
    """Its cells are running texts, not numbers."""
    summary: str = ""
    """If given, the table is folded away under these words."""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Picture:
    """A figure."""

    kind: ClassVar = "figure"
    image: Markup
    caption: str
    label: str
    """Of the region that scrolls where the screen is too narrow."""


@dataclass(frozen=True)
class Gap:
    """Something that this run does not hold."""

    kind: ClassVar = "gap"
    text: str
    command: str = ""
    """Makes it."""


@dataclass(frozen=True)
class Code:
    """A text to copy, folded away."""

    kind: ClassVar = "code"
    summary: str
    text: str


@dataclass(frozen=True)
class NeuronBlock:
    """The table of neurons that the page's script fills."""

    kind: ClassVar = "neurons"
    payload: str
    """See ``packed``."""
    num_rows: int
    file: str
    """Where the same numbers are, for who runs no scripts."""


Block: TypeAlias = Paragraph | Cells | Picture | Gap | Code | NeuronBlock


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    name: str
    """Its id, unique in the page."""
    title: str
    short: str
    """In the navigation."""
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Tile:
    """One number at the top of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """Everything that is shown."""

    title: str
    eyebrow: str
    summary: str
    tiles: Sequence[Tile]
    notices: Sequence[Gap]
    """What a reader must know before anything else."""
    sections: Sequence[Section]
    footer: str
