"""Plans of runs to compare: rows, seeds and evaluations.

:mod:`cure.experiments.plan_work` trains and evaluates them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, ValidationError
from pydantic_core import PydanticCustomError

from cure.attacks.registry import attack_name, check_attacks
from cure.config import RunConfig, Section
from cure.errors import ConfigError, unknown
from cure.recipe import Raw, check, explain, layered, override_all, read_recipe, read_yaml
from cure.utils.io import first_line, user_path

REFERENCE = "run:"
"""A text ``run:ROW`` in a row's settings is the folder of that row's run of the same seed."""

SEED = "{seed}"
"""In a text of the settings: the seed of the run, as in ``start: runs/natural-seed{seed}``."""


@dataclass(frozen=True)
class Wanted:
    """One evaluation that a run must have."""

    checkpoint: Literal["best", "last"]
    attacks: tuple[str, ...]
    limit: int | None
    split: Literal["validation", "test"]
    per_image: bool


def _names(attacks: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(attack_name(name) for name in attacks)


def _different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds or len(set(seeds)) < len(seeds):
        raise PydanticCustomError(
            "seeds",
            "expected one seed or more, each once, got {came}",
            {"came": ", ".join(map(str, seeds)) or "none"},
        )
    return seeds


def _some_rows(rows: dict[str, PlanRow]) -> dict[str, PlanRow]:
    if not rows:
        raise PydanticCustomError("rows", "expected one row or more, with a label and its settings")
    return rows


Seeds = Annotated[tuple[NonNegativeInt, ...], AfterValidator(_different)]


class Measurement(Section):
    """One evaluation of every run."""

    attacks: Annotated[tuple[str, ...], AfterValidator(_names)] = ("pgd20", "cw")
    """Names from ``cure list attacks``."""
    limit: PositiveInt | None = None
    """Only the first so many images."""
    checkpoints: tuple[Literal["best", "last"], ...] = ("best",)
    """Which weights. Where both are asked for and the best epoch is the last, only "best"."""
    seeds: Seeds | None = None
    """Only runs of these seeds."""
    rows: tuple[str, ...] | None = None
    """Only these rows."""
    split: Literal["validation", "test"] = "test"
    """Which images; tables are of test images."""
    per_image: bool = False
    """Also keep which images are right, for paired intervals."""

    def of(self, checkpoint: Literal["best", "last"]) -> Wanted:
        """What is measured of these weights."""
        attacks = tuple(name for name in self.attacks if name != "natural")
        return Wanted(checkpoint, attacks, self.limit, self.split, self.per_image)


class PlanRow(Section):
    """One way to train, repeated over seeds."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """What differs from the plan's settings: ``{method: at}``."""
    seeds: Seeds | None = None
    """Seeds of the runs; by default the plan's."""
    note: str = ""
    """What a reader of the table should know."""


class Plan(Section):
    """Runs to compare: one recipe, settings for all, and rows that differ from them."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the plan."""
    description: str = ""
    """What it is for."""
    recipe: str
    """Recipe of every run."""
    runs: str = "runs"
    """Folder of the runs; plans that share it share their runs."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Changes to the recipe, for all rows; ``{seed}`` in a text is the run's seed."""
    seeds: Seeds = (0,)
    """Seeds of the rows that name none."""
    evaluations: tuple[Measurement, ...] = (Measurement(),)
    """What is measured."""
    rows: Annotated[dict[str, PlanRow], AfterValidator(_some_rows)]
    """The rows by label."""
    reference: str | None = None
    """Label of the row that the others are subtracted from, seed by seed."""

    @classmethod
    def of(cls, content: object, place: str) -> Self:
        """The plan with this content.

        Args:
            content: its fields.
            place: what messages call it.

        Raises:
            ConfigError: when a field is wrong.
        """
        if not isinstance(content, dict):
            raise ConfigError(f"{place}: expected the keys name, recipe and rows, got {content!r}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ConfigError(f"{place}: {explain(error.errors()[0], cls)}") from None


@dataclass(frozen=True)
class Entry:
    """One run of a plan.

    Attributes:
        label: its row.
        seed: its seed.
        settings: changes to the plan's recipe.
        config: the whole configuration; other runs of the plan are written as ``run:ROW``.
        needs: the rows whose run of the same seed must be there first.
    """

    label: str
    seed: int
    settings: Raw
    config: RunConfig
    needs: frozenset[str]

    @property
    def name(self) -> str:
        """Name of its folder and of its result."""
        return f"{self.label}-seed{self.seed}"


def read_plan(path: str | Path) -> Plan:
    """The plan in a YAML file, every run of it checked.

    Raises:
        ConfigError: when it cannot be read, or a row is no valid run.
    """
    try:
        raw = read_yaml(user_path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"plan {path} cannot be read as text: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"plan {path} is not valid YAML: {first_line(error)}") from None
    plan = Plan.of(raw, f"plan {path}")
    stages(plan)
    for measurement in plan.evaluations:
        check_attacks(measurement.attacks)
        for label in measurement.rows or ():
            check_row(plan, label, "evaluations.rows")
    if plan.reference is not None:
        check_row(plan, plan.reference, "reference")
    return plan


def check_row(plan: Plan, label: str, place: str) -> None:
    """Refuse a label that no row has; ``place`` is where it was named.

    Raises:
        ConfigError: names the rows.
    """
    if label not in plan.rows:
        raise ConfigError(f"plan {plan.name}: {place}: {unknown('row', label, plan.rows)}")


def entries(plan: Plan) -> list[Entry]:
    """All runs of a plan, seed by seed, so that the first rows to be complete are of one seed."""
    seeds = {label: row.seeds or plan.seeds for label, row in plan.rows.items()}
    found = []
    for seed in sorted({seed for own in seeds.values() for seed in own}):
        found += [_entry(plan, label, seed) for label, own in seeds.items() if seed in own]
    return found


def _entry(plan: Plan, label: str, seed: int) -> Entry:
    settings = layered(plan.settings, plan.rows[label].settings, {"seed": seed, "name": label})
    settings = _texts(settings, lambda text: text.replace(SEED, str(seed)))
    raw = read_recipe(plan.recipe)
    override_all(raw, settings.items())
    needs: set[str] = set()

    def note(needed: str) -> str:
        check_row(plan, needed, f"row {label}")
        if seed not in (plan.rows[needed].seeds or plan.seeds):
            raise ConfigError(
                f"plan {plan.name}: row {label} needs {REFERENCE}{needed} of seed {seed}, which "
                "that row leaves out; add the seed there"
            )
        needs.add(needed)
        return REFERENCE + needed

    raw = referring(raw, note)
    config = check(raw, f"row {label} of plan {plan.name}")
    return Entry(label, seed, settings, config, frozenset(needs))


def referring(value: Any, replacement: Callable[[str], str]) -> Any:
    """The same data with every text ``run:ROW`` replaced."""
    return _texts(
        value,
        lambda text: (
            replacement(text.removeprefix(REFERENCE)) if text.startswith(REFERENCE) else text
        ),
    )


def _texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same data with every text changed."""
    if isinstance(value, dict):
        return {key: _texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def stages(plan: Plan) -> list[list[Entry]]:
    """The runs in groups; those of a group are independent and need only earlier groups.

    Raises:
        ConfigError: when rows need each other in a circle.
    """
    left, done, found = entries(plan), set[tuple[str, int]](), []
    while left:
        ready = [e for e in left if all((label, e.seed) in done for label in e.needs)]
        if not ready:
            circle = ", ".join(sorted({entry.label for entry in left}))
            raise ConfigError(f"plan {plan.name}: the rows {circle} need each other in a circle")
        found.append(ready)
        done |= {(entry.label, entry.seed) for entry in ready}
        left = [entry for entry in left if entry not in ready]
    return found
