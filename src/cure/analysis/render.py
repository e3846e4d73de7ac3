"""Results of studies as a sentence, tables and figures; the only place that formats them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cure.utils.plotting import Figures, Interval, Picture, Series

MISSING = "-"


@dataclass(frozen=True)
class StudyTable:
    """A table of a study.

    Attributes:
        title: a line above it.
        header: a heading for each column, with the unit.
        rows: text, numbers already rounded; the first column names the row.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class View:
    """What is shown of a result, as plain data.

    Attributes:
        finding: one sentence, with numbers and how many images or runs they are from.
        tables: the first one is printed on the terminal.
        figures: their names begin with the name of the study and a hyphen.
        commands: what a reader may want to run next: what each is for, and the command line.
    """

    finding: str
    tables: Sequence[StudyTable]
    figures: Sequence[Figures] = ()
    commands: Sequence[tuple[str, str]] = ()

    def pictures(self) -> list[Picture]:
        """The drawn figures."""
        return [figure.draw() for figure in self.figures]

    def markdown(self) -> str:
        """The first table and the finding in Markdown.

        >>> table = StudyTable("Growth", ["what", "size"], [["it", "7"]])
        >>> print(View("It grew.", [table]).markdown())
        Growth:
        <BLANKLINE>
        | what | size |
        |---|---|
        | it | 7 |
        <BLANKLINE>
        It grew.
        """
        table = self.tables[0]
        lines = [f"{table.title}:", "", "| " + " | ".join(table.header) + " |"]
        lines.append("|---|" + "---|" * (len(table.header) - 1))
        lines += ["| " + " | ".join(row) + " |" for row in table.rows]
        return "\n".join([*lines, "", self.finding])


def number(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A number with so many decimals; "-" when there is none.

    >>> number(1.25, 1, sign=True), number(None)
    ('+1.2', '-')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:{'+' if sign else ''}.{digits}f}"


def with_interval(
    value: float | None, interval: Interval | None, digits: int = 1, *, sign: bool = False
) -> str:
    """A number and its interval; an open limit is "-".

    >>> with_interval(75.0, (68.64, 80.5))
    '75.0 (68.6-80.5)'
    >>> with_interval(-1.0, (-2.0, 0.5), sign=True)
    '-1.0 (-2.0 to +0.5)'
    """
    text = number(value, digits, sign=sign)
    if interval is None or value is None:
        return text
    low, high = (number(limit, digits, sign=sign) for limit in interval)
    return f"{text} ({low}{' to ' if sign else '-'}{high})"


def accuracy(part: Mapping[str, Any]) -> str:
    """An accuracy of a result in percent, with its interval."""
    return with_interval(part["accuracy"], part["interval"])


def points(part: Mapping[str, Any]) -> str:
    """A difference of accuracies of a result in points, with its interval."""
    return with_interval(part["difference"], part["interval"], sign=True)


def listed(texts: Iterable[str], most: int = 6) -> str:
    """Texts with semicolons between, the first so many of them.

    >>> listed(["a", "b", "c"], most=2)
    'a; b; and 1 more'
    """
    texts = list(texts)
    rest = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return "; ".join(texts[:most] + rest)


def accuracy_series(
    label: str, x: Sequence[float], parts: Sequence[Mapping[str, Any]], **options: Any
) -> Series:
    """Accuracies of a result as a series, with intervals where they have them."""
    intervals = [part.get("interval") for part in parts]
    return Series(label, x, [part["accuracy"] for part in parts], intervals, **options)
