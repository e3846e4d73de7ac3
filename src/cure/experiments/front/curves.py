"""What a front trains: the values of each method's setting, as a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cure.config import NATURAL
from cure.errors import ConfigError, unknown
from cure.experiments.plan import REFERENCE, Plan, PlanRow, stages
from cure.recipe import changed, check, parse_override, read_recipe
from cure.registry import METHODS
from cure.training.prerequisites import natural_config
from cure.utils.io import user_path

Values = Mapping[str, Sequence[Any]]


_OF_THE_IMAGES = (
    *("source", "test_", "validation", "split_seed", "train_split", "limit", "resize", "fit"),
    *("color", "background", "labels", "image_column", "label_column"),
)
"""Beginnings of settings of the data that choose or change the images of an evaluation."""


@dataclass(frozen=True)
class Curve:
    """The values of one setting of one method.

    Attributes:
        label: its name in tables: the method, with the setting where that is not its usual one.
        method: registered name.
        key: the setting's place in a recipe; None for a method that is trained once.
        values: of the setting.
        more: the accuracy that a higher value favours, where the method says so.
    """

    label: str
    method: str
    key: str | None
    values: tuple[Any, ...]
    more: str | None

    @property
    def knob(self) -> str | None:
        """The setting as it is written under ``method``, or its whole key."""
        return None if self.key is None else self.key.removeprefix("method.")

    def row(self, value: Any) -> str:
        """Label of the plan's row for a value: letters, digits, dots and hyphens."""
        words = [self.label] if self.key is None else [self.label, str(value)]
        return "".join(c if c.isalnum() or c in "._-" else "-" for c in "-".join(words))


def curves_of(methods: Sequence[str], values: Values) -> list[Curve]:
    """The settings that vary, by what was asked for or by what the methods declare.

    Raises:
        ConfigError: for an unknown method, and for values of a method that is not among them or
            has no such setting.
    """
    for word in values:
        if word.split(":")[0] not in methods:
            raise ConfigError(f"values: {unknown('method', word.split(':')[0], methods)}")
    found = []
    for method in dict.fromkeys(methods):
        declared = METHODS[method].tradeoff
        asked = [word for word in values if word.split(":")[0] == method]
        for word in asked or [method]:
            key = word.partition(":")[2] or (declared[0].key if declared else None)
            given = tuple(values.get(word, declared[0].values if declared else (None,)))
            if key is None and given != (None,):
                raise ConfigError(
                    f"values: {method} declares no setting that trades natural for robust "
                    f"accuracy; name one, as in {method}:attack.epsilon=2/255,4/255"
                )
            if not given or len(set(map(str, given))) < len(given):
                raise ConfigError(f"values: expected different values of {word}, got {list(given)}")
            usual = not declared or key == declared[0].key
            label = method if usual else f"{method}-{str(key).removeprefix('method.')}"
            more = next((one.more for one in declared if one.key == key), None)
            found.append(Curve(label, method, key, given, more))
    return found


def read_values(words: Sequence[str]) -> dict[str, list[Any]]:
    """The values in ``METHOD=A,B,C`` or ``METHOD:KEY=A,B,C``, each in YAML.

    Raises:
        ConfigError: when a word is none of these, or names a method and key again.

    >>> read_values(["trades=1,3", "at:attack.epsilon=2/255,4/255"])
    {'trades': [1, 3], 'at:attack.epsilon': ['2/255', '4/255']}
    """
    found: dict[str, list[Any]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name or not text or name in found:
            raise ConfigError(
                f"values: expected METHOD=A,B,C or METHOD:KEY=A,B,C, each once, got '{word}'"
            )
        found[name] = [parse_override(f"{name}={part}")[1] for part in text.split(",")]
    return found


def plan_of(
    curves: Sequence[Curve],
    recipe: str | Path,
    settings: Mapping[str, Any],
    own: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    attacks: Sequence[str],
    split: Any,
    limit: int | None,
    folder: str | Path | None,
) -> Plan:
    """The runs as a plan, every one of them checked.

    Raises:
        ConfigError: when a run is not valid, or settings name methods.
    """
    known = {curve.method for curve in curves}
    for method in own:
        if method not in known:
            raise ConfigError(f"settings of one method: {unknown('method', method, known)}")
    if any(key.split(".")[0] in ("method", "seed", "name") for key in settings):
        raise ConfigError(
            "settings: method, seed and name are set for each run; give settings of one method "
            "with --with METHOD:method.KEY=VALUE"
        )
    for key in (
        *(curve.key or "" for curve in curves),
        *(k for each in own.values() for k in each),
    ):
        if key.startswith(("threat.", *(f"data.{name}" for name in _OF_THE_IMAGES))):
            raise ConfigError(
                f"{key}: all points of a front are measured under one threat on the same images; "
                "set it for all runs, or vary attack.epsilon, with which one trains"
            )
    raw = read_recipe(recipe)
    base = raw.get("method")
    base = base.get("name") if isinstance(base, dict) else base
    common = changed(raw, settings)
    config = check(common, f"recipe {recipe}")
    rows: dict[str, PlanRow] = {}
    if config.starts_naturally:
        # All values of a seed begin with the same natural network.
        content = natural_config(config).model_dump(mode="json")
        start = {key: content[key] for key in ("layers", "start", "method", "training")}
        rows[NATURAL] = PlanRow(settings=start, note="the start of all other rows")
    for curve in curves:
        if curve.method == NATURAL and NATURAL in rows:
            continue
        fixed = {} if curve.method == base else {"method": curve.method}
        fixed |= own.get(curve.method, {})
        if NATURAL in rows:
            fixed["start"] = REFERENCE + NATURAL
        for value in curve.values:
            varied = {} if curve.key is None else {curve.key: value}
            row = fixed | varied
            teachers = check(changed(common, row), f"{curve.row(value)}").method.teachers()
            for role, teacher in teachers.items():
                if teacher.path == NATURAL and NATURAL in rows:
                    row[f"method.{role}"] = REFERENCE + NATURAL
            rows[curve.row(value)] = PlanRow(settings=row)
    measured = {"attacks": tuple(attacks), "limit": limit, "split": split, "per_image": True}
    content = {
        "name": "front",
        "recipe": str(recipe),
        "runs": str(user_path(folder or Path("fronts") / config.name) / "trained"),
        "settings": dict(settings),
        "seeds": tuple(seeds),
        "evaluations": (measured,),
        "rows": rows,
    }
    plan = Plan.of(content, "front")
    stages(plan)
    return plan
