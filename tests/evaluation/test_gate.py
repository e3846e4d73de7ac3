"""Limits that an evaluation must meet."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cure.errors import ConfigError
from cure.evaluation.gate import Requirement, check_requirements
from cure.evaluation.metrics import accuracy_of


def accuracy(right: int, count: int) -> dict[str, Any]:
    return accuracy_of(torch.arange(count) < right, 0.0)


RESULT = {
    "natural": accuracy(80, 100),
    "attacks": {"pgd20": accuracy(40, 100)},
    "unfinished": {"autoattack": {"bounds": [30.0, 90.0]}},
    "worst_case": accuracy(40, 100),
}


@pytest.mark.parametrize(
    ("text", "lower", "met"),
    [
        ("natural>=80", False, True),
        ("natural > 80", False, False),
        # Wilson's lower end of 80 of 100 is 71.1 (Brown, Cai, DasGupta 2001, by hand).
        ("natural>=71", True, True),
        ("natural>=71.2", True, False),
        ("pgd20>=40%", False, True),
        ("pgd20>=41", False, False),
        ("autoattack>=1", False, False),
        ("worst_case>=1", False, False),
    ],
)
def test_limits(text: str, lower: bool, met: bool) -> None:
    (row,) = check_requirements(RESULT, [Requirement.parse(text)], lower)
    assert row["met"] is met
    assert "\n" not in row["measured"]


def test_an_unfinished_curve_leaves_the_worst_case_known() -> None:
    """A curve is no part of the worst case."""
    result = RESULT | {"unfinished": {"curve": {"missing": [0.2]}}}
    (row,) = check_requirements(result, [Requirement.parse("worst_case>=40")], False)
    assert row["met"], row


def test_other_spellings_of_an_attack_are_met_too() -> None:
    for text in ("pgd-20>=40", "pgd20:restarts=1>=40"):
        (row,) = check_requirements(RESULT, [Requirement.parse(text)], False)
        assert row["met"], row


def test_a_limit_on_an_estimate_says_so() -> None:
    early = accuracy(40, 100) | {"not_attacked": {"apgd-ce": 0, "square": 7}}
    whole = accuracy(40, 100) | {"not_attacked": {"apgd-ce": 0, "square": 0}}
    for part, expected in ((early, True), (whole, False)):
        worst = accuracy(39, 100) | {"over": ["pgd20", "screened-ordered"]}
        result = RESULT | {
            "attacks": RESULT["attacks"] | {"screened-ordered": part},
            "worst_case": worst,
        }
        del result["unfinished"]
        for name in ("worst_case", "screened-ordered", "pgd20", "natural"):
            (row,) = check_requirements(result, [Requirement.parse(f"{name}>=1")], False)
            said = "since screened-ordered left images alone" in row["measured"]
            assert said is (expected and name in ("worst_case", "screened-ordered")), name


@pytest.mark.parametrize("text", ["pgd20", "pgd20<=40", "pgd20=>40", ">=40", "natural>=101", ""])
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="natural>=75"):
        Requirement.parse(text)


def test_a_share_is_no_percentage() -> None:
    with pytest.raises(ConfigError, match="a percentage such as natural>=90"):
        Requirement.parse("natural>=0.9")


def test_an_accuracy_that_cannot_be_believed_meets_no_limit() -> None:
    checks = [
        {"name": "gradients", "status": "fail", "meaning": "zero"},
        {"name": "precision", "status": "warn", "meaning": "large"},
    ]
    result = RESULT | {"diagnosis": {"verdict": "fail", "checks": checks}}
    attacked, natural = check_requirements(
        result, [Requirement.parse("pgd20>=5"), Requirement.parse("natural>=80")], False
    )
    assert not attacked["met"]
    assert "the diagnosis failed (gradients)" in attacked["measured"]
    assert natural["met"]
    warned = RESULT | {"diagnosis": {"verdict": "warn", "checks": checks[1:]}}
    assert check_requirements(warned, [Requirement.parse("pgd20>=5")], False)[0]["met"]
