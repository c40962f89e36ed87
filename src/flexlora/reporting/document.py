"""What a report or a comparison consists of: plain values that templates turn into HTML.

Every text in them is plain text, which the templates escape.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import quote

from flexlora.journal import NOTHING

if TYPE_CHECKING:
    import plotly.graph_objects as go

_TIMES = {"s": 1, "min": 60, "h": 3600}
_FACTORS = _TIMES | {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_QUANTITY = re.compile(r"\s*([+-]?[0-9][0-9,]*(?:\.[0-9]+)?)(?: ?([A-Za-z%]+))?(?![\w.-])")


@dataclass(frozen=True)
class Link:
    """Text that leads to a file, by its path relative to the document."""

    text: str
    path: str

    @property
    def href(self) -> str:
        """The path as an address; it has no scheme, whatever its characters."""
        return f"./{quote(self.path, errors='replace')}"


@dataclass(frozen=True)
class Paragraph:
    """One paragraph; ``missing`` ones say that the journal does not contain something.

    What needs a mouse, such as a double click, is said with ``pointer``: where there is none, it
    is not shown.
    """

    kind: ClassVar[str] = "paragraph"
    text: str
    missing: bool = False
    pointer: bool = False


@dataclass(frozen=True)
class Code:
    """Text in which line breaks and spaces count."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Table:
    """A table of plain text; the columns ``words`` contain words, the others numbers.

    ``spans`` names groups of columns, each with its width, in a row above the head. If it is
    ``marked``, its first row is emphasised. A click on a column's head sorts a ``sortable`` one.
    """

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str | Link]]
    words: Collection[int]
    spans: Sequence[tuple[str, int]] = ()
    marked: bool = False
    sortable: bool = False


def order_of(cell: str | Link) -> str:
    """What a cell is sorted by: of a number with a unit, such as 1.5 KiB or 1 min 05 s, its value.

    Empty for a cell that says nothing, and the text itself if it is no number.
    """
    text = cell if isinstance(cell, str) else cell.text
    if text.strip() in ("", NOTHING):
        return ""
    first = _QUANTITY.match(text)
    if first is None:
        return text
    value = float(first[1].replace(",", "")) * _FACTORS.get(first[2], 1)
    if first[2] in _TIMES and (second := _QUANTITY.match(text, first.end())):
        value += float(second[1]) * _FACTORS.get(second[2], 0)
    return f"{value:.12g}"


@dataclass(frozen=True)
class Sample:
    """Texts under labels, one below the other, such as a question and its answers."""

    kind: ClassVar[str] = "sample"
    title: str
    texts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Figure:
    """A plotly figure with a title above and a caption below."""

    title: str
    plot: go.Figure
    caption: str


@dataclass(frozen=True)
class Figures:
    """Figures in a grid, or one below the other if they are ``wide``."""

    kind: ClassVar[str] = "figures"
    figures: Sequence[Figure]
    wide: bool = False


@dataclass(frozen=True)
class Details:
    """Parts that are shown when the summary is opened."""

    kind: ClassVar[str] = "details"
    summary: str
    parts: Sequence[Part]


Part = Paragraph | Code | Table | Sample | Figures | Details


@dataclass(frozen=True)
class Section:
    """A section under a title; the titles of a document differ."""

    title: str
    parts: Sequence[Part]

    @property
    def anchor(self) -> str:
        """What links to the section name."""
        return re.sub("[^a-z0-9]+", "-", self.title.lower()).strip("-")

    @property
    def is_empty(self) -> bool:
        """Whether all it says is what the journal does not contain."""
        return all(isinstance(part, Paragraph) and part.missing for part in self.parts)


@dataclass(frozen=True)
class Header:
    """The head of a document: what it is about, the main result, and facts by label."""

    title: str
    subtitle: str
    outcome: str
    notes: Sequence[str]
    facts: Sequence[tuple[str, str | Link]]


def without_empty(sections: Sequence[Section]) -> tuple[list[Section], list[str]]:
    """The sections that are not empty, and what the empty ones say."""
    texts = [
        part.text
        for section in sections
        if section.is_empty
        for part in section.parts
        if isinstance(part, Paragraph)
    ]
    return [section for section in sections if not section.is_empty], texts


def missing(sentence: str) -> Paragraph:
    """A sentence about something that the journal does not contain."""
    return Paragraph(sentence, missing=True)


def grid(figures: Sequence[Figure]) -> list[Part]:
    """These figures in a grid; no part if there is none."""
    return [Figures(figures)] if figures else []


def figures_in(sections: Iterable[Section]) -> Iterator[Figure]:
    """All figures of a document, in order."""
    for section in sections:
        yield from _figures(section.parts)


def _figures(parts: Iterable[Part]) -> Iterator[Figure]:
    for part in parts:
        if isinstance(part, Figures):
            yield from part.figures
        elif isinstance(part, Details):
            yield from _figures(part.parts)
