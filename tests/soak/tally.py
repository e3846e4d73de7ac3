"""How many examples are tried, and what came of them.

``CURE_SOAK=1`` tries the large numbers, ``CURE_SOAK=0.1`` a tenth of them; without it a fixed few
are tried, the same in every session.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from cure.errors import ConfigError, CureError

SOAK = float(os.environ.get("CURE_SOAK", "0"))
"""Share of the large numbers; 0 outside of ``make soak``."""

COUNTS: dict[str, Counter[str]] = {}
"""By kind: "examples", "done", "refused", and "refused: CLASS" by class of the error."""


def number(few: int, many: int) -> int:
    """Examples to try: ``few``, or the share of ``many`` that ``CURE_SOAK`` says."""
    return max(1, round(SOAK * many)) if SOAK else few


def examples(few: int, many: int) -> Callable[[Any], Any]:
    """Settings of hypothesis for a test that trains."""
    return settings(
        max_examples=number(few, many),
        derandomize=not SOAK,
        database=None,
        deadline=None,
        # Making a failing training smaller would take minutes.
        phases=[Phase.generate, Phase.shrink] if SOAK else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def count(kind: str, what: str) -> None:
    """One more of ``what``."""
    COUNTS.setdefault(kind, Counter())[what] += 1


@contextmanager
def done_or_refused(kind: str) -> Iterator[None]:
    """Inside, an error that a user can correct counts as refused; any other one fails the test.

    A refusal is a sentence of one line; mistakes in a recipe are a list, one a line.
    """
    count(kind, "examples")
    try:
        yield
    except CureError as error:
        refusal = error
    else:
        count(kind, "done")
        return
    count(kind, "refused")
    count(kind, f"refused: {type(refusal).__name__}")
    first, *listed = str(refusal).splitlines()
    assert first.strip()
    assert all(isinstance(refusal, ConfigError) and line.startswith("  - ") for line in listed)


def mostly_done(kind: str, share: float) -> None:
    """Fail where nearly everything was refused: such examples would prove nothing."""
    found = COUNTS[kind]
    assert found["done"] >= share * found["examples"], dict(found)
