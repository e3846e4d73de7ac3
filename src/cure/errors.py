"""Errors a user can correct, each said in one sentence.

Everything that the user can correct is a :class:`CureError`: the command line prints its text and
ends with status 2, a notebook shows it as the last line.  Anything else that is raised is a fault
of this project and keeps its traceback.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class CureError(Exception):
    """A mistake the user can correct: what was expected, what came, what to do."""


class ConfigError(CureError):
    """A recipe or a setting that is unknown, of the wrong type, or out of range."""


class DataError(CureError):
    """Images or labels that are missing, unreadable or do not fit together."""


class ModelError(CureError):
    """A model or weights that cannot be built, do not fit, or do not behave as a classifier."""


class CheckpointError(CureError):
    """A run folder or checkpoint that is missing, damaged, unsafe or in use."""


class RanksLost(CureError):
    """Another process of a run ended or cannot be reached."""


class OutOfMemory(CureError):
    """The memory of the machine or of its GPU does not hold what is computed at once."""


class TrainingStopped(CureError):
    """Training ended itself: a loss that is not finite, or a network that fell to chance."""


class Interrupted(CureError):
    """The user stopped the command; the state to resume from is on disk."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for an unregistered name: the nearest known name, then all of them.

    >>> unknown("method", "cuer", ["cure", "natural"])
    "unknown method 'cuer'; did you mean 'cure'? Known: cure, natural"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    return f"unknown {kind} '{name}'{hint} Known: {', '.join(names)}"


def some(names: Iterable[str], most: int = 5) -> str:
    """The first so many names in quotation marks, and how many more there are.

    >>> some(["cat", "dog", "owl"], most=2)
    "'cat', 'dog' and 1 more"
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more


def counted(count: int, what: str) -> str:
    """A number and its noun, which is given in the singular.

    >>> counted(1, "image"), counted(1200, "image"), counted(0, "extra image")
    ('1 image', '1,200 images', '0 extra images')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"


class CureNote(UserWarning):
    """Something that was decided for the user, said once: what was found and what was done."""


@contextmanager
def notes_kept() -> Iterator[list[str]]:
    """Collect the notes that are given inside, each once; they are shown as well.

    >>> with warnings.catch_warnings(record=True), notes_kept() as notes:
    ...     for _ in range(2):
    ...         warnings.warn("half precision became float32", CureNote)
    >>> notes
    ['half precision became float32']
    """
    notes: list[str] = []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def keep(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if issubclass(category, CureNote):
                if str(message) in notes:
                    return
                notes.append(str(message))
            show(message, category, *place)

        warnings.showwarning = keep  # type: ignore[assignment]
        warnings.simplefilter("always", CureNote)
        yield notes
