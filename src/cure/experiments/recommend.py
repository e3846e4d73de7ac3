"""Where a run lies beside the fronts that were measured, and which setting to change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cure.config import Ratio, RunConfig
from cure.errors import CheckpointError, ConfigError, counted
from cure.experiments.compare.sources import no_place
from cure.experiments.front.curves import Curve
from cure.experiments.pareto import natural_at, robust_range
from cure.runs.folder import RunFolder, path_of
from cure.runs.results import EvaluationRecord, FrontCurve, FrontPoint, FrontRecord
from cure.runs.run import Run
from cure.utils.io import user_path

PACKAGE = Path(__file__).resolve().parents[1]
PLACES = (PACKAGE / "fronts", PACKAGE.parents[1] / "results")
"""Where measured fronts are: in an installed package, and in a clone."""


@dataclass(frozen=True)
class Recommendation:
    """What is known about a run's trade-off.

    Attributes:
        natural: of the run, percent.
        robust: of the run under the front's attack, percent.
        ahead: natural accuracy above (or below, negative) the front at the run's robust accuracy,
            in percentage points; None where the images are others or the front does not reach it.
        place: sentence: where the run lies.
        change: sentence: what to change.
        front: file of the front.
    """

    natural: float
    robust: float
    ahead: float | None
    place: str
    change: str
    front: Path


def recommend(run: Run | str | Path, fronts: Iterable[str | Path] | None = None) -> Recommendation:
    """Compare an evaluated run with the fronts of its recipe or images, under its threat.

    A front is known where ``cure front`` was carried out under the run's threat, with its recipe or
    on its images.  The
    sentence about a change is made from differences between means over seeds; where the interval
    over images of a difference's two ends overlap, it says so.

    Args:
        run: trained and evaluated under the front's attack (``cure evaluate RUN``).
        fronts: files of ``cure front``; by default those that come with the package.

    Returns:
        Two sentences and the figures in them.

    Raises:
        ConfigError: when no front is known for the run's recipe or images under its threat.
        CheckpointError: when the run was not evaluated under the front's attack.

    >>> import cure
    >>> small = ["start=scratch", "training.epochs=1", "data.limit=100", "data.validation=20"]
    >>> found = cure.front("at", "digits", small, values={"at": [0]}, limit=20, folder="known")
    >>> cure.recommend("known/trained/at-0-seed0", ["known/front.json"]).ahead
    0.0
    """
    folder = RunFolder.open(path_of(run))
    config = folder.config
    known = _alike(config, fronts)
    if not known:
        raise ConfigError(
            f"expected a front of recipe {config.name} under {config.threat.norm} "
            f"{config.threat.epsilon}, found none; measure one with `cure front METHOD... "
            f"{config.name} KEY=VALUE --output FILE` and give it with --front FILE"
        )
    for file, record in known:
        result = _evaluated(folder, record)
        if result is not None:
            return _compared(config, result, record, file)
    attacks = sorted({record.attack for _, record in known})
    raise CheckpointError(
        f"expected {folder.path} to be evaluated on test images under {' or '.join(attacks)}; "
        f"do so with `cure evaluate {folder.path} --attacks {attacks[0]}`"
    )


def known_fronts() -> list[Path]:
    """Files of ``cure front`` that come with the package."""
    place = next((place for place in PLACES if place.is_dir()), None)
    return [] if place is None else sorted(place.glob("*/fronts.json"))


def _alike(
    config: RunConfig, fronts: Iterable[str | Path] | None
) -> list[tuple[Path, FrontRecord]]:
    """The fronts under a run's threat of its recipe or images, those of its images first."""
    files = known_fronts() if fronts is None else [user_path(file) for file in fronts]
    read = [(file, FrontRecord.read(file)) for file in files]
    name = Path(str(config.data.source)).name
    # A run may have a name of its own: that of a trial, or of a choice on a line of weights.
    alike = [
        (file, record)
        for file, record in read
        if (config.name in {record.recipe, *_rows(record)} or record.data.name == name)
        and record.threat.same(config.threat.norm, config.threat.epsilon)
    ]
    return sorted(alike, key=lambda item: item[1].data.name != name)


def _rows(record: FrontRecord) -> list[str]:
    """Names of the runs that a front is of, without their seeds."""
    return [
        Curve(label, curve.method, curve.knob, (), None).row(point.value)
        for label, curve in record.curves.items()
        for point in record.points
        if point.curve == label
    ]


def _evaluated(folder: RunFolder, front: FrontRecord) -> EvaluationRecord | None:
    """A result of the best weights on the run's test images under a front's attack.

    The newest of those on as many images as the front, else the newest.
    """
    found = [
        result
        for result in reversed(folder.evaluations())
        if front.attack in result.attacks
        and result.threat.same(front.threat.norm, front.threat.epsilon)
        and result.data.own is not False
        and result.data.split == "test"
        and result.model.checkpoint == "best"
    ]
    alike = [result for result in found if result.natural.n == front.data.n]
    return next(iter([*alike, *found]), None)


def _compared(
    config: RunConfig, result: EvaluationRecord, record: FrontRecord, file: Path
) -> Recommendation:
    natural, robust = result.natural.accuracy, result.attacks[record.attack].accuracy
    facts = record.data
    same = (facts.name, facts.n) == (no_place(result.data.name), result.natural.n)
    same = same and facts.size in (None, result.data.size)
    points = [(point.natural.mean, point.robust.mean) for point in record.points]
    low, high = robust_range(points)
    ahead = natural - natural_at(points, robust) if same and low <= robust <= high else None
    return Recommendation(
        natural,
        robust,
        ahead,
        _place(natural, robust, ahead, same, record),
        _change(config, natural, robust, same, record),
        file,
    )


def _place(
    natural: float, robust: float, ahead: float | None, same: bool, record: FrontRecord
) -> str:
    """The sentence that says where the run lies."""
    seeds = len({seed for point in record.points for seed in point.seeds})
    known = (
        f"{record.recipe} on {record.data.name}, {record.data.n:,} images, {counted(seeds, 'seed')}"
    )
    here = f"natural {natural:.1f} %, {record.attack} {robust:.1f} %"
    if not same:
        return (
            f"{here}; the front that is known ({known}) is of other images, or another number of "
            "them: compare changes only"
        )
    if ahead is None:
        low, high = robust_range([(p.natural.mean, p.robust.mean) for p in record.points])
        side = "more" if robust > high else "less"
        return (
            f"{here}: {side} robust than the whole known front ({known}), which goes from "
            f"{record.attack} {low:.1f} to {high:.1f} %"
        )
    where = "above" if ahead >= 0 else "below"
    return f"{here}: {abs(ahead):.1f} points of natural accuracy {where} the known front ({known})"


def _change(
    config: RunConfig, natural: float, robust: float, same: bool, record: FrontRecord
) -> str:
    """The sentence that says what to change."""
    if same:
        better = _better(natural, robust, record)
        if better is not None:
            return better
    curve = next(
        (
            (label, curve)
            for label, curve in record.curves.items()
            if curve.method == config.method.name
            and curve.knob is not None
            and any(point.curve == label for point in record.points)
        ),
        None,
    )
    if curve is None:
        curves = [curve.method for curve in record.curves.values() if curve.knob is not None]
        methods = " ".join(dict.fromkeys([config.method.name, *curves]))
        return (
            f"the front has no run of {config.method.name} with another setting; `cure front "
            f"{methods} {record.recipe} ...` trains some"
        )
    return _step(config, *curve, record)


def _better(natural: float, robust: float, record: FrontRecord) -> str | None:
    """A point that is as good in both accuracies and better in one by more than its interval."""
    found = [
        point
        for point in record.points
        if (point.natural.images[0] > natural and point.robust.mean >= robust)
        or (point.robust.images[0] > robust and point.natural.mean >= natural)
    ]
    if not found:
        return None
    best = max(found, key=lambda point: point.natural.mean + point.robust.mean)
    return (
        f"{_named(best, record)}: +{best.natural.mean - natural:.1f} natural and "
        f"+{best.robust.mean - robust:.1f} {record.attack} against this run"
    )


def _named(point: FrontPoint, record: FrontRecord) -> str:
    """A point with the setting that makes it and its accuracies."""
    knob = record.curves[point.curve].knob
    setting = "" if knob is None else f" with {knob} {point.value}"
    return (
        f"{point.curve}{setting} has natural {point.natural.mean:.1f} %, {record.attack} "
        f"{point.robust.mean:.1f} %"
    )


def _step(config: RunConfig, label: str, curve: FrontCurve, record: FrontRecord) -> str:
    """What the neighbouring values of the run's own setting trade."""
    assert curve.knob is not None
    points = [point for point in record.points if point.curve == label]
    sizes = [_number(point.value) for point in points]
    if None not in sizes:
        points.sort(key=lambda point: _number(point.value) or 0.0)
    value = _value(config, curve.knob)
    here = min(points, key=lambda point: _distance(point.value, value))
    at = points.index(here)
    said = [
        _traded(curve.knob, here, points[other], record.attack)
        for other in (at - 1, at + 1)
        if 0 <= other < len(points)
    ]
    start = f"{label} with {curve.knob} {here.value} there has natural {here.natural.mean:.1f} %, "
    start += f"{record.attack} {here.robust.mean:.1f} %"
    if _distance(here.value, value) > 0:
        start = f"nearest measured to {curve.knob} {value}: {start}"
    return "; ".join([start, *said])


def _traded(knob: str, here: FrontPoint, there: FrontPoint, attack: str) -> str:
    natural = there.natural.mean - here.natural.mean
    robust = there.robust.mean - here.robust.mean
    text = f"{knob} {there.value}: {natural:+.1f} natural, {robust:+.1f} {attack}"
    return text if _apart(here, there) else f"{text} (within the intervals over images)"


def _apart(one: FrontPoint, other: FrontPoint) -> bool:
    """Whether the intervals of two points are apart in one accuracy or more."""
    return any(
        a.images[0] > b.images[1] or b.images[0] > a.images[1]
        for a, b in ((one.natural, other.natural), (one.robust, other.robust))
    )


def _value(config: RunConfig, knob: str) -> object:
    """The value of a setting, written under ``method`` or as a whole key."""
    if knob == "attack.epsilon":
        return config.training_epsilon  # the threat's where the setting is left out
    found: object = config if knob.split(".")[0] in type(config).model_fields else config.method
    for part in knob.split("."):
        found = getattr(found, part)
    return found


def _number(value: object) -> float | None:
    """The number that a value is, or a fraction such as 8/255; None for any other value."""
    try:
        return float(Ratio(str(value)))
    except ValueError:
        return None


def _distance(one: object, other: object) -> float:
    """0 for equal values; numbers by how far they are apart, others by whether they differ."""
    first, second = _number(one), _number(other)
    if first is None or second is None:
        return float(str(one) != str(other))
    return abs(first - second)
