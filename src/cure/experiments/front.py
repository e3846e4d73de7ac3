"""Fronts of methods: a few values of the setting that trades natural for robust accuracy.

A method compared at one value of such a setting is compared at one operating point.  Here each
method is trained with several values and seeds, through a plan (:mod:`cure.experiments.plan`), and
compared by what its points reach together: the hypervolume, and the natural accuracy at an equal
robust accuracy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cure.config import NATURAL
from cure.errors import ConfigError, TrainingStopped, unknown
from cure.evaluation.metrics import unpack
from cure.experiments.compare.rows import no_place
from cure.experiments.executors import LocalExecutor
from cure.experiments.pareto import (
    Numbers,
    Point,
    Right,
    check_reference,
    estimate,
    hypervolume,
    image_weights,
    natural_at,
    robust_range,
    undominated,
)
from cure.experiments.plan import (
    REFERENCE,
    Measurement,
    Plan,
    PlanRow,
    answer,
    carry_out_plan,
    entries,
    results_of,
    stages,
)
from cure.recipe import check, check_kept, override, parse_override, read_recipe
from cure.registry import METHODS
from cure.runs.records import Environment
from cure.runs.results import (
    Accuracy,
    DataFacts,
    EvaluationRecord,
    FrontComparison,
    FrontCurve,
    FrontEstimate,
    FrontPoint,
    FrontRecord,
    FrontRow,
    RunRecord,
    ThreatFacts,
)
from cure.training.prerequisites import natural_config
from cure.training.setup import check_attacks
from cure.utils.environment import environment
from cure.utils.io import read_json, write_bytes, write_text
from cure.utils.plotting import Chart, Panel, Series

FORMAT = "cure-front-1"
DRAWS = 2000
"""Samples of the bootstrap over images."""

Say = Callable[[str], None]
Values = Mapping[str, Sequence[Any]]


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


def front(
    methods: str | Sequence[str],
    recipe: str | Path,
    settings: Mapping[str, Any] | Sequence[str] = (),
    *,
    values: Values | None = None,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: Sequence[int] = (0,),
    attacks: Sequence[str] = ("pgd20",),
    split: Any = "test",
    limit: int | None = None,
    reference: Point = (0.0, 0.0),
    at: Sequence[float] | None = None,
    folder: str | Path | None = None,
    output: str | Path | None = None,
    jobs: int = 1,
    say: Say = lambda line: None,  # noqa: ARG005
) -> FrontRecord:
    """Train methods with several values of their trade-off setting, and compare their fronts.

    What is done in ``folder`` is not done again, so the same call continues after a kill.

    Args:
        methods: names from ``cure list methods``.
        recipe: a name, or the path of a YAML file.
        settings: changes to it for all runs; ``{seed}`` in a text is the run's seed, as in
            ``start=runs/natural-seed{seed}``.  With ``start: natural`` the natural start of a seed
            is trained once for all its runs.
        values: by method, values in the place of those that the method declares
            (:attr:`cure.methods.Method.tradeoff`); under ``METHOD:KEY``, of another setting.
        own: by method, settings for it alone; ``run:ROW`` is the run of another row.
        seeds: of the runs.
        attacks: what is measured; the first gives the robust accuracy of the front.
        split: which images, "validation" or "test".
        limit: only the first so many of them.
        reference: natural and robust accuracy from which the hypervolume counts.
        at: robust accuracies in percent at which natural accuracies are compared; by default the
            middle of what all methods reach.
        folder: of runs and results; by default ``fronts/NAME`` with the recipe's name.
        output: JSON file to write, with a picture (.svg, .png) beside it; by default
            ``front.json`` in ``folder``.
        jobs: runs at a time.
        say: receives a line about each run.

    Returns:
        All rows, the points over seeds, hypervolumes and comparisons.

    Raises:
        CureError: for a mistake a user can correct, and when runs failed (what is done is written).
    """
    check_reference(reference)
    check_attacks(attacks)
    if not attacks or attacks[0] == NATURAL:
        raise ConfigError("attacks: expected one attack or more besides natural, such as pgd20")
    if not isinstance(settings, Mapping):
        settings = dict(map(parse_override, settings))
    names = [methods] if isinstance(methods, str) else list(methods)
    curves = curves_of(names, values or {})
    plan = plan_of(curves, recipe, settings, own or {}, seeds, attacks, split, limit, folder)
    place = Path(plan.runs).parent
    file = place / "front.json" if output is None else Path(output)
    _check_output(file)
    _announce(plan, curves, place, say)
    place.mkdir(parents=True, exist_ok=True)

    def write() -> FrontRecord | None:
        made = record_of(plan, curves, results_of(plan, place), reference, at, own or {})
        if made is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            made.write(file)
        return made

    def tell(line: str) -> None:
        say(line)
        if line.endswith(": done"):
            write()

    failures = carry_out_plan(plan, place, LocalExecutor(jobs), tell=tell)
    made = write()
    if made is not None:
        write_picture(made, file)
    if failures or made is None:
        raise TrainingStopped(f"{len(failures)} runs of the front failed: " + "; ".join(failures))
    return made


# -- what is trained -----------------------------------------------------------------------------


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

    >>> read_values(["trades=1,3", "at:threat.epsilon=2/255,4/255"])
    {'trades': [1, 3], 'at:threat.epsilon': ['2/255', '4/255']}
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
    raw = read_recipe(recipe)
    base = raw.get("method")
    base = base.get("name") if isinstance(base, dict) else base
    common = _changed(raw, settings)
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
            teachers = check(_changed(common, row), f"{curve.row(value)}").method.teachers()
            for role, teacher in teachers.items():
                if teacher.path == NATURAL and NATURAL in rows:
                    row[f"method.{role}"] = REFERENCE + NATURAL
            rows[curve.row(value)] = PlanRow(settings=row)
    measured = {"attacks": tuple(attacks), "limit": limit, "split": split, "per_image": True}
    content = {
        "name": "front",
        "recipe": str(recipe),
        "runs": str(Path(folder or Path("fronts") / config.name) / "trained"),
        "settings": dict(settings),
        "seeds": tuple(seeds),
        "evaluations": (measured,),
        "rows": rows,
    }
    plan = Plan.of(content, "front")
    stages(plan)
    return plan


def _changed(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe with settings changed."""
    changed = copy.deepcopy(dict(raw))
    for key, value in settings.items():
        override(changed, key, value)
    return changed


def _check_output(file: Path) -> None:
    """Refuse to replace a file that is no front.

    Raises:
        ConfigError: when it is there and something else.
    """
    if not file.exists():
        return
    content = read_json(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(f"{file} exists and is no front of this command; name another file")


def _announce(plan: Plan, curves: Sequence[Curve], place: Path, say: Say) -> None:
    """Say what is trained, and what is done already."""
    for curve in curves:
        if curve.key is None:
            say(f"{curve.label}: no setting trades natural for robust accuracy; trained once")
        else:
            say(f"{curve.label}: {curve.knob} {', '.join(map(str, curve.values))}")
    wanted, done = entries(plan), results_of(plan, place)
    epochs = sum(entry.config.training.epochs for entry in wanted if entry.name not in done)
    say(
        f"{len(wanted)} runs, {len(done)} of them done before; {epochs:,} epochs to train, in "
        f"{plan.runs}"
    )


# -- what comes of it ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trained:
    """What is done of a curve.

    Attributes:
        curve: the curve.
        results: by place of the value, and seed.
        seeds: those of which all values are done.
        right: of all values and these seeds; None without such a seed.
    """

    curve: Curve
    results: dict[tuple[int, int], EvaluationRecord]
    seeds: list[int]
    right: Right | None

    @classmethod
    def of(cls, curve: Curve, plan: Plan, done: Mapping[str, RunRecord]) -> _Trained:
        """From the results of the plan's runs."""
        (measured,) = plan.evaluations
        results = {}
        for place, value in enumerate(curve.values):
            for seed in plan.seeds:
                name = f"{curve.row(value)}-seed{seed}"
                if (record := done.get(name)) is None:
                    continue
                config = check_kept(record.config, name)
                result = answer(record.evaluations, measured.of("best"), config)
                if result is not None:
                    results[place, seed] = result
        places = range(len(curve.values))
        seeds = [seed for seed in plan.seeds if all((p, seed) in results for p in places)]
        right = None
        if seeds:
            right = _right([[results[p, seed] for seed in seeds] for p in places], measured)
        return cls(curve, results, seeds, right)


def record_of(
    plan: Plan,
    curves: Sequence[Curve],
    done: Mapping[str, RunRecord],
    reference: Point,
    at: Sequence[float] | None,
    own: Mapping[str, Mapping[str, Any]],
) -> FrontRecord | None:
    """The figures of the runs that are done; None while there are none.

    Args:
        plan: what is trained.
        curves: which of its rows belong together.
        done: results by name of the run.
        reference: from where the hypervolume counts.
        at: robust accuracies for the comparison; by default the middle of the common range.
        own: settings of one method, for the record.
    """
    shown = list(curves)
    if NATURAL in plan.rows and all(curve.method != NATURAL for curve in curves):
        shown.insert(0, Curve(NATURAL, NATURAL, None, (None,), None))
    trained = [_Trained.of(curve, plan, done) for curve in shown]
    results = [result for each in trained for result in each.results.values()]
    if not results:
        return None
    (measured,), first = plan.evaluations, results[0]
    weights = image_weights(first.natural.n, DRAWS)
    compared = {each.curve.label: each.right for each in trained if each.right and each.curve.key}
    ranges = {label: _range(right) for label, right in compared.items()}
    common = _common(list(ranges.values()))
    if at is None:
        at = [round(sum(common) / 2, 1)] if common is not None and len(ranges) > 1 else []
    wanted = entries(plan)
    threat = wanted[0].config.threat
    return FrontRecord(
        format="cure-front-1",
        recipe=str(no_place(plan.recipe)),
        settings=no_place(plan.settings),
        own_settings=no_place({method: dict(settings) for method, settings in own.items()}),
        data=DataFacts(
            name=no_place(first.data.name),
            split=first.data.split,
            n=first.natural.n,
            size=first.data.size,
        ),
        threat=ThreatFacts(
            norm=threat.norm, epsilon=float(threat.epsilon), epsilon_text=str(threat.epsilon)
        ),
        attack=_attack(measured),
        reference=list(reference),
        rows=[
            _row(each.curve, place, seed, result, measured)
            for each in trained
            for (place, seed), result in each.results.items()
        ],
        points=_points(trained, measured, weights),
        curves={
            each.curve.label: FrontCurve(
                method=each.curve.method,
                knob=each.curve.knob,
                more=each.curve.more,
                seeds=each.seeds,
                hypervolume=None
                if each.right is None
                else _estimate(each.right, weights, lambda points: hypervolume(points, reference)),
                robust_range=ranges.get(each.curve.label),
            )
            for each in trained
        },
        common_range=common,
        comparisons=[_comparison(float(level), compared, ranges, weights) for level in at],
        missing=[entry.name for entry in wanted if entry.name not in done],
        environment=Environment(**environment()),
    )


def _attack(measured: Measurement) -> str:
    return next(name for name in measured.attacks if name != NATURAL)


def _row(
    curve: Curve, place: int, seed: int, result: EvaluationRecord, measured: Measurement
) -> FrontRow:
    robust: dict[str, Any] = {}
    for name in measured.attacks:
        if name != NATURAL:
            found = result.attacks[name]
            robust |= {name: round(found.accuracy, 2), f"{name}_interval": found.interval}
    return FrontRow(
        method=curve.method,
        knob=curve.knob,
        value=curve.values[place],
        seed=seed,
        natural=round(result.natural.accuracy, 2),
        natural_interval=result.natural.interval,
        n=result.natural.n,
        **robust,
    )


def _right(results: Sequence[Sequence[EvaluationRecord]], measured: Measurement) -> Right:
    """The images that are right, from results [values][seeds]."""
    attack = _attack(measured)

    def bits(found: Accuracy) -> Any:
        assert found.right is not None, "results without it are not taken"
        return unpack(found.right, found.n)

    natural = [[bits(result.natural) for result in row] for row in results]
    robust = [[bits(result.attacks[attack]) for result in row] for row in results]
    return Right(np.array(natural, np.float64), np.array(robust, np.float64))


def _points(
    trained: Sequence[_Trained], measured: Measurement, weights: Numbers
) -> list[FrontPoint]:
    """Every value over the seeds that are done."""
    found = []
    for each in trained:
        for place, value in enumerate(each.curve.values):
            own = {seed: result for (p, seed), result in each.results.items() if p == place}
            if own:
                right = _right([list(own.values())], measured)
                natural = _estimate(right, weights, lambda points: points[0][0])
                robust = _estimate(right, weights, lambda points: points[0][1])
                found.append((each.curve.label, value, list(own), natural, robust))
    good = undominated([(natural.mean, robust.mean) for *_, natural, robust in found])
    return [
        FrontPoint(
            curve=label,
            value=value,
            seeds=seeds,
            natural=natural,
            robust=robust,
            dominated=not best,
        )
        for (label, value, seeds, natural, robust), best in zip(found, good, strict=True)
    ]


def _estimate(
    right: Right, weights: Numbers, of: Callable[[Sequence[Point]], float]
) -> FrontEstimate:
    found = estimate(right, weights, of)
    return FrontEstimate(
        mean=found.mean,
        images=list(found.images),
        seeds=None if found.seeds is None else list(found.seeds),
    )


def _range(right: Right) -> list[float] | None:
    """Robust accuracies between the points of every seed; None where there are none."""
    each = [robust_range([(x, y) for x, y in seed.tolist()]) for seed in right.points()]
    low, high = max(low for low, _ in each), min(high for _, high in each)
    return [low, high] if low <= high else None


def _common(ranges: Sequence[list[float] | None]) -> list[float] | None:
    known = [each for each in ranges if each is not None]
    if not known or len(known) < len(ranges):
        return None
    low, high = max(each[0] for each in known), min(each[1] for each in known)
    return [low, high] if low <= high else None


def _comparison(
    level: float,
    compared: Mapping[str, Right],
    ranges: Mapping[str, list[float] | None],
    weights: Numbers,
) -> FrontComparison:
    """Natural accuracy of each curve at a robust accuracy, where its points enclose it."""
    found = {}
    for label, right in compared.items():
        own = ranges[label]
        inside = own is not None and own[0] <= level <= own[1]
        found[label] = (
            _estimate(right, weights, lambda points: natural_at(points, level)) if inside else None
        )
    return FrontComparison(robust=level, natural=found)


# -- what is shown -------------------------------------------------------------------------------


def lines(record: FrontRecord) -> list[str]:
    """Hypervolumes, and natural accuracies at equal robustness, as sentences."""
    n, reference = f"{record.data.n:,}", record.reference
    found = [
        f"hypervolume above natural {reference[0]:g} %, robust {reference[1]:g} % "
        f"({record.attack}, {n} {record.data.split} images; percent of the area to 100 %, 100 %):"
    ]
    known = [(label, c) for label, c in record.curves.items() if c.hypervolume is not None]
    for label, curve in sorted(known, key=lambda item: -item[1].hypervolume.mean):  # type: ignore[union-attr]
        found.append(f"  {label}: {_words(curve.hypervolume)}, {_counted(curve.seeds)}")
    for each in record.comparisons:
        named = [
            f"{label} {_words(value)}" if value is not None else f"{label} does not reach it"
            for label, value in each.natural.items()
        ]
        found.append(f"natural accuracy at {record.attack} {each.robust:g} %: {'; '.join(named)}")
    if record.common_range is not None:
        low, high = record.common_range
        found.append(f"all curves have points around {record.attack} {low:.1f} to {high:.1f} %")
    elif len(record.curves) > 1:
        found.append("no robust accuracy lies between the points of every curve")
    if record.missing:
        found.append(f"not done yet: {', '.join(record.missing)}")
    return found


def _words(value: FrontEstimate | None) -> str:
    assert value is not None
    over = f"{value.images[0]:.1f} to {value.images[1]:.1f} over images"
    if value.seeds is not None:
        over += f", {value.seeds[0]:.1f} to {value.seeds[1]:.1f} over seeds"
    return f"{value.mean:.1f} ({over})"


def _counted(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} seed" + ("s" if len(seeds) != 1 else "")


def chart(record: FrontRecord) -> Chart:
    """Natural against robust accuracy: a curve a method, dominated points hollow."""
    series = []
    for style, label in enumerate(record.curves):
        points = [point for point in record.points if point.curve == label]
        if not points:
            continue
        x, y = [p.natural.mean for p in points], [p.robust.mean for p in points]
        series.append(Series(label, x, y, style=style))
        for hollow in (False, True):
            own = [point for point in points if point.dominated == hollow]
            if own:
                series.append(
                    Series(
                        "",
                        [point.natural.mean for point in own],
                        [point.robust.mean for point in own],
                        [point.robust.images for point in own],
                        [point.natural.images for point in own],
                        style=style,
                        line=False,
                        hollow=hollow,
                    )
                )
    n = f"{record.data.n:,} {record.data.split} images"
    panel = Panel(
        series,
        "natural accuracy, %",
        f"accuracy under {record.attack}, %",
        names=[
            (point.natural.mean, point.robust.mean, str(point.value))
            for point in record.points
            if point.value is not None
        ],
    )
    title = f"Natural and robust accuracy, {n}, {record.threat.norm} {record.threat.epsilon_text}"
    description = (
        "A curve a method, a point a value of its setting (mean over seeds, 95 % bootstrap "
        "interval over images); hollow points are dominated by another one. "
        + " ".join(lines(record))
    )
    return Chart("front", title, description, [panel], height=4.4)


def write_picture(record: FrontRecord, file: Path) -> None:
    """Draw the fronts beside the record, as .svg and .png."""
    picture = chart(record)
    write_text(file.with_suffix(".svg"), picture.draw().svg)
    write_bytes(file.with_suffix(".png"), picture.png())
