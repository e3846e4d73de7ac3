"""What a page is built from: words, tables, figures; and how numbers are written in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from cure.report.loader import number
from cure.utils.plotting import Picture

NO_BREAK = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"
_SPACES = "\n" + NO_BREAK
LONGEST_LABEL = 26
"""Letters of a name in a drawing; the page has it in full."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it says.
        detail: smaller, after it: an interval.
        order: what sorting goes by; by default the text.
        series: the number of a network, whose mark is drawn before the text.
        notes: numbers of the remarks below the table that concern it, and how bad each is.
        bar: a value and its interval in percent, drawn below the text.
    """

    text: str
    detail: str = ""
    order: float | str | None = None
    series: int | None = None
    notes: Sequence[tuple[int, str]] = ()
    bar: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Grid:
    """A table; the first column names its rows.

    Attributes:
        caption: what it is about.
        header: a heading a column.
        rows: cells.
        words: how many columns, from the first, are words; the others are numbers.
        sortable: whether a reader may sort it.
        folded: whether it is folded away below a line with its caption.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: int = 1
    sortable: bool = False
    folded: bool = False
    kind: str = field(default="grid", init=False)


@dataclass(frozen=True)
class Figure:
    """A drawing, with its numbers in a table for who does not see it."""

    picture: Picture
    data: Grid | None = None
    kind: str = field(default="figure", init=False)

    @property
    def size(self) -> str:
        """How much of the page it takes: "small" has room for another beside it."""
        width = _width(self.picture.svg)
        return "small" if width < 340 else "middle" if width < 390 else "wide"


def _width(svg: str) -> float:
    """Width of a drawing in points."""
    found = re.search(r'<svg[^>]*\bwidth="([\d.]+)pt"', svg)
    return float(found[1]) if found else 0.0


@dataclass(frozen=True)
class Words:
    """Sentences; a list where there are several."""

    sentences: Sequence[str]
    tone: str = "plain"
    kind: str = field(default="words", init=False)


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str
    kind: str = field(default="heading", init=False)


@dataclass(frozen=True)
class Missing:
    """What is not there, and the command that makes it."""

    sentence: str
    commands: Sequence[str]
    kind: str = field(default="missing", init=False)


Block = Grid | Figure | Words | Heading | Missing


@dataclass
class Section:
    """A part of the page with an entry in its contents.

    Attributes:
        name: its id.
        title: its heading.
        meaning: what it shows, in words a newcomer understands.
        blocks: its content.
    """

    name: str
    title: str
    meaning: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def filled(self) -> bool:
        """Whether there is more than a hint at a command."""
        return any(block.kind != "missing" for block in self.blocks)


def plain(text: str) -> str:
    """``text`` without what cannot be seen: a name must not turn the words around it."""
    return "".join(
        letter if letter.isprintable() or letter in _SPACES else "\ufffd" for letter in text
    )


def label(text: str) -> str:
    """A name as drawings have it: plain and not too long."""
    text = " ".join(plain(text).split())
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"


def written(value: object, digits: int = 1) -> str:
    """A number in words of the page, a dash when there is none."""
    known = number(value)
    if known is None:
        return DASH
    return f"{known:,.{digits}f}".replace("-", MINUS)


def percent(value: object) -> str:
    """``63.7 %``."""
    return written(value) + (f"{NO_BREAK}%" if number(value) is not None else "")


def points(value: float, interval: Interval) -> str:
    """A difference with its sign and interval: ``−10.9 points (−18.0 to −3.5)``."""
    sign = "+" if value > 0 else ""
    low, high = (("+" if end > 0 else "") + written(end) for end in interval)
    return f"{sign}{written(value)} points ({low} to {high})"


def between(interval: Sequence[float]) -> str:
    """``58.1–68.9``."""
    low, high = interval
    return f"{written(low)}{DASH}{written(high)}"
