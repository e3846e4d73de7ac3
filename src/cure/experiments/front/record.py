"""What a front found: points, hypervolumes and comparisons, from the results of its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from cure.config import NATURAL
from cure.errors import ConfigError
from cure.evaluation.metrics import unpack
from cure.experiments.compare.sources import no_place
from cure.experiments.front.curves import Curve
from cure.experiments.pareto import (
    Numbers,
    Point,
    Right,
    estimate,
    hypervolume,
    image_weights,
    natural_at,
    robust_range,
    undominated,
)
from cure.experiments.plan import Measurement, Plan, entries
from cure.experiments.plan_work import answer
from cure.recipe import check_kept
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
from cure.utils.environment import environment

FORMAT: Final = "cure-front-1"
DRAWS = 2000
"""Samples of the bootstrap over images."""


@dataclass(frozen=True)
class _Trained:
    """What is done of a curve.

    Attributes:
        curve: the curve.
        measured: what is measured of its runs.
        results: by place of the value, and seed.
        seeds: those of which all values are done.
    """

    curve: Curve
    measured: Measurement
    results: dict[tuple[int, int], EvaluationRecord]
    seeds: list[int]

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
                result = answer(record.of_best_weights(), measured.of("best"), config)
                if result is not None:
                    results[place, seed] = result
        places = range(len(curve.values))
        seeds = [seed for seed in plan.seeds if all((p, seed) in results for p in places)]
        return cls(curve, measured, results, seeds)

    @cached_property
    def right(self) -> Right | None:
        """The images that are right, of all values and ``seeds``; None without such a seed.

        All results have to be of the same images.
        """
        if not self.seeds:
            return None
        places = range(len(self.curve.values))
        return _right([[self.results[p, s] for s in self.seeds] for p in places], self.measured)


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
    # Older packed results hold no hash of their images.
    hashed = next((result for result in results if result.data.sha256), first)
    for result in results:
        alike = result.natural.n == first.natural.n and result.threat.same(
            first.threat.norm, first.threat.epsilon
        )
        if alike and result.data.sha256 in (None, hashed.data.sha256):
            continue
        other = hashed if alike else first
        raise ConfigError(
            f"{other.target} and {result.target} were measured on other images or under "
            "another threat, so their points make no front; give another --folder"
        )
    weights = image_weights(first.natural.n, DRAWS)
    compared = {each.curve.label: each.right for each in trained if each.right and each.curve.key}
    ranges = {label: _range(right) for label, right in compared.items()}
    common = _common(list(ranges.values()))
    if at is None:
        at = [round(sum(common) / 2, 1)] if common is not None and len(ranges) > 1 else []
    wanted = entries(plan)
    threat = wanted[0].config.threat
    return FrontRecord(
        format=FORMAT,
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
