"""The parts of a page: words, tables, figures; and how numbers are written in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cure.analysis.render import number, with_interval
from cure.runs.results import Share
from cure.utils.plotting import Picture

NO_BREAK = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it says.
        detail: smaller, after it: an interval.
        order: value to sort by; by default the text.
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
        header: a heading for each column.
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
    """A drawing, with its numbers in a table for readers who do not see it."""

    picture: Picture
    data: Grid | None = None
    kind: str = field(default="figure", init=False)

    @property
    def size(self) -> str:
        """How much of the page it takes: "small" has room for another beside it."""
        width = self.picture.width
        return "small" if width < 4.7 else "middle" if width < 5.5 else "wide"


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
        meaning: what it shows, for a newcomer.
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


def written(value: float | None, digits: int = 1) -> str:
    """A number as the page writes it, a dash when there is none."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:,.{digits}f}".replace("-", MINUS)


def percent(value: float | None) -> str:
    """``63.7 %``."""
    return written(value) + ("" if value is None else f"{NO_BREAK}%")


def points(value: float, interval: Sequence[float]) -> str:
    """A difference with its interval: ``−10.9 points (−18.0 to −3.5)``."""
    text, _, limits = with_interval(value, interval, sign=True).partition(" ")
    return f"{text} points {limits}".replace("-", MINUS)


def between(interval: Sequence[float]) -> str:
    """``58.1–68.9``."""
    return DASH.join(number(limit) for limit in interval)


def accuracy_cell(
    value: float | None,
    interval: Sequence[float] | None,
    notes: Sequence[tuple[int, str]] = (),
    count: int | None = None,
    *,
    bar: bool = False,
) -> Cell:
    """An accuracy with its interval, and its number of images where that is not the table's."""
    if value is None or interval is None:
        return Cell(DASH, order=-1.0)
    low, high = interval
    detail = f"({between(interval)})" + (f", n = {count:,}" if count is not None else "")
    return Cell(
        written(value),
        detail,
        float(value),
        notes=notes,
        bar=(float(value), low, high) if bar else None,
    )


def share_cell(part: Share | None, *details: Any, bar: bool = False) -> Cell:
    """As :func:`accuracy_cell`, for a part of a result."""
    if part is None:
        return accuracy_cell(None, None)
    return accuracy_cell(part.accuracy, part.interval, *details, bar=bar)
