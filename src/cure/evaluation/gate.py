"""Limits that an evaluation must meet, for releases: a line each, JUnit and SARIF files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from xml.etree import ElementTree

from cure.attacks.registry import attack_name
from cure.errors import ConfigError
from cure.utils.io import write_json, write_text
from cure.utils.version import VERSION

_FORM = re.compile(r"\s*([^\s<>]*[^\s<>=])\s*(>=|>)\s*(\d+(?:\.\d+)?)\s*%?\s*")


@dataclass(frozen=True)
class Requirement:
    """A least accuracy.

    Attributes:
        attack: "natural", "worst_case" or the name of an attack.
        above: whether the accuracy must be above the limit, not only reach it.
        limit: percent.
    """

    attack: str
    above: bool
    limit: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """The requirement in words.

        Raises:
            ConfigError: when it is none.

        >>> Requirement.parse("pgd20>=40")
        Requirement(attack='pgd20', above=False, limit=40.0)
        """
        found = _FORM.fullmatch(text)
        if found is None or not 0 <= float(found[3]) <= 100:
            raise ConfigError(
                f"require: expected a least accuracy in percent such as natural>=75 or pgd20>40, "
                f"got '{text}'"
            )
        if 0 < float(found[3]) < 1:
            raise ConfigError(
                f"require: expected a percentage such as {found[1]}>={100 * float(found[3]):g}, "
                f"got '{text}', which nearly every network meets"
            )
        return cls(attack_name(found[1]), found[2] == ">", float(found[3]))

    def __str__(self) -> str:
        return f"{self.attack}{'>' if self.above else '>='}{self.limit:g}"


def check_requirements(
    result: Mapping[str, Any], requirements: Sequence[Requirement], lower_bound: bool
) -> list[dict[str, Any]]:
    """Which limits an evaluation meets; under attack none where a check of its diagnosis failed.

    Args:
        result: of :func:`cure.evaluate`.
        requirements: the limits.
        lower_bound: compare the lower ends of the 95 % intervals.

    Returns:
        For each {"requirement", "met", "value", "measured"}: ``value`` is the percentage that was
        compared (None where the attack did not finish), ``measured`` a sentence.
    """
    rows = []
    for wanted in requirements:
        part = _part(result, wanted.attack)
        value, measured = None, f"{wanted.attack} was not measured to its end"
        if part is not None:
            low, high = part["interval"]
            value = low if lower_bound else part["accuracy"]
            measured = (
                f"{wanted.attack} is {part['accuracy']:.1f} % of {part['n']:,} images "
                f"({low:.1f} to {high:.1f})"
            )
            if lower_bound:
                measured += f", lower end {low:.1f}"
            if early := _left_alone(result, wanted.attack):
                measured += f"; an estimate from above, since {', '.join(early)} left images alone"
        met = value is not None and (
            value > wanted.limit if wanted.above else value >= wanted.limit
        )
        if wanted.attack != "natural" and (failed := _failed_checks(result)):
            met = False
            measured += f"; the diagnosis failed ({', '.join(failed)}): it cannot be believed"
        rows.append(
            {
                "requirement": str(wanted),
                "lower_bound": lower_bound,
                "met": met,
                "value": value,
                "measured": measured,
            }
        )
    return rows


def _part(result: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    if name == "natural":
        return result["natural"]  # type: ignore[no-any-return]
    if name == "worst_case":
        # Of the attacks that finished; where one did not, the worst case is not known.
        missing = set(result.get("unfinished", {})) - {"curve"}
        return None if missing else result.get("worst_case")
    return result["attacks"].get(name)  # type: ignore[no-any-return]


def _failed_checks(result: Mapping[str, Any]) -> list[str]:
    """Checks of the diagnosis by which an accuracy under attack cannot be believed."""
    checks = (result.get("diagnosis") or {}).get("checks", [])
    return [check["name"] for check in checks if check["status"] == "fail"]


def _left_alone(result: Mapping[str, Any], name: str) -> list[str]:
    """Attacks behind a figure whose parts ended before all images."""
    part = _part(result, name) or {}
    attacks = result["attacks"]
    over = [other for other in part.get("over", [name]) if other in attacks]
    return [other for other in over if any(attacks[other].get("not_attacked", {}).values())]


def write_junit(path: Path, result: Mapping[str, Any]) -> None:
    """Write the requirements as test cases of JUnit XML, which CI servers show.

    Args:
        path: file to write.
        result: with "requirements".
    """
    rows = result["requirements"]
    failed = [row for row in rows if not row["met"]]
    name = f"cure evaluate {result['target']}"
    suites = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        suites, "testsuite", name=name, tests=str(len(rows)), failures=str(len(failed)), errors="0"
    )
    for row in rows:
        case = ElementTree.SubElement(
            suite, "testcase", classname=str(result["target"]), name=row["requirement"]
        )
        if not row["met"]:
            ElementTree.SubElement(case, "failure", message=row["measured"]).text = row["measured"]
        ElementTree.SubElement(case, "system-out").text = row["measured"]
    text = ElementTree.tostring(suites, encoding="unicode")
    write_text(path, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n')


def write_sarif(path: Path, result: Mapping[str, Any], artefact: str) -> None:
    """Write the requirements that are not met as SARIF 2.1.0, which code scanning shows.

    Args:
        path: file to write.
        result: with "requirements".
        artefact: what was evaluated, as the location of each result.
    """
    rows = result["requirements"]
    found = [
        {
            "ruleId": row["requirement"],
            "kind": "pass" if row["met"] else "fail",
            "level": "none" if row["met"] else "error",
            "message": {"text": row["measured"]},
            "locations": [{"physicalLocation": {"artifactLocation": {"uri": artefact}}}],
        }
        for row in rows
    ]
    rules = [
        {
            "id": row["requirement"],
            "shortDescription": {"text": f"accuracy required: {row['requirement']} %"},
        }
        for row in rows
    ]
    driver = {"name": "cure", "version": VERSION, "rules": rules}
    write_json(
        path,
        {
            "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
            "version": "2.1.0",
            "runs": [{"tool": {"driver": driver}, "results": found}],
        },
    )
