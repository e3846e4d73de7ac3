"""The table of checks, and how a count of images becomes a status.

Most checks count images on which something happened that does not happen to a sound evaluation,
above all images that the check's attack fooled and the evaluation's own attack did not.  Such a
share of all images is by how many points the reported accuracy is too high.  A check warns when
more than one point is certain and fails when more than five are: when a true share of one (five)
percent would give as many images with a probability below ``LEVEL``.  One point is what sound
attacks leave open (PGD-100 finds 0 to 0.8 points more than PGD-20 on the baselines in the tables of
CURE, ICLR 2024); five points are more than what separates neighbours in such tables.  A check with
other limits says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from cure.utils.stats import at_least

if TYPE_CHECKING:
    from cure.evaluation.diagnosis.context import CheckContext

CheckStatus = Literal["pass", "warn", "fail"]

LEVEL = 0.01
"""Probability, a check, of taking a limit that is just kept for broken."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        status: "pass", "warn" (the number may be off) or "fail" (the number cannot be used).
        measured: numbers by name, for the result file.
        meaning: what it means and, unless it passed, what to do.
    """

    status: CheckStatus
    measured: dict[str, Any]
    meaning: str


Function = Callable[["CheckContext"], Finding | str]


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        name: as in result files.
        run: takes a context and returns a finding, or a sentence that says why the check does not
            apply.
        cheap: it needs a few passes only, so ``evaluate`` always runs it.
        attacks: needs finite outputs and gradients.
    """

    name: str
    run: Function
    cheap: bool
    attacks: bool


CHECKS: dict[str, Check] = {}
"""All checks in the order in which they run; :func:`check` adds one."""


def check(
    name: str, *, cheap: bool = False, attacks: bool = True
) -> Callable[[Function], Function]:
    """Decorator that adds a function to ``CHECKS``; for its arguments see :class:`Check`."""

    def enter(function: Function) -> Function:
        if name in CHECKS:
            raise ValueError(f"two checks claim the name '{name}'")
        CHECKS[name] = Check(name, function, cheap, attacks)
        return function

    return enter


def beyond(count: int, trials: int, warn: float = 0.01, fail: float = 0.05) -> CheckStatus:
    """Whether ``count`` of ``trials`` is certainly more than a share of ``warn``, of ``fail``.

    >>> [beyond(count, 200) for count in (6, 7, 18, 19)]
    ['pass', 'warn', 'warn', 'fail']
    """
    if at_least(count, trials, fail) < LEVEL:
        return "fail"
    return "warn" if at_least(count, trials, warn) < LEVEL else "pass"


def worst(*statuses: CheckStatus) -> CheckStatus:
    """The worst of several statuses."""
    return max(statuses, key=("pass", "warn", "fail").index)


def judged(status: CheckStatus, measured: dict[str, Any], sound: str, unsound: str) -> Finding:
    """A finding whose meaning depends on whether it passed."""
    return Finding(status, measured, sound if status == "pass" else unsound)


def short(value: float | Tensor) -> float:
    """Round to four significant digits."""
    return float(f"{float(value):.4g}")
