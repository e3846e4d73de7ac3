"""Typed records of the results of commands: evaluations, corruptions, diagnoses, studies, fronts.

Each names its ``format``, by which :func:`read_result` knows it.  :class:`RunRecord` is a whole run
in one file, as a plan keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from cure.errors import CheckpointError
from cure.runs.records import (
    Environment,
    EpochMetrics,
    EpochTiming,
    FileRecord,
    Finite,
    Interval,
    Record,
    Severity,
)
from cure.utils.io import read_json


class Share(Record):
    """Percent of images that are classified correctly, with a 95 % interval."""

    accuracy: Finite
    interval: Interval


class Accuracy(Share):
    """Accuracy on ``n`` images; results of earlier versions have no figures by class."""

    correct: int | None = None
    n: int
    seconds: float | None = None
    right: str | None = None
    """Which images are right, where that was asked for: :func:`cure.evaluation.metrics.unpack`."""
    balanced_accuracy: Finite | None = None
    """Mean of the accuracies of the classes, percent."""
    balanced_interval: Interval | None = None
    accuracy_by_class: list[Finite | None] | None = None
    """In the order of ``data.classes``; null for a class without images."""


class Majority(Record):
    """Accuracy of always naming the largest class of the images."""

    accuracy: Finite


class AttackAccuracy(Accuracy):
    """Accuracy under an attack."""

    settings: dict[str, Any]
    attacked: int | None = None
    """Images that were attacked: those that are correct as they are."""
    largest_change: float | None = None
    """In the norm of the threat."""
    seed: int | None = None
    not_attacked: dict[str, int] | None = None
    """Of an attack that ends its parts early: images that each part left alone."""

    def estimate(self) -> str | None:
        """What the accuracy estimates, where a part left images alone."""
        left = {part: count for part, count in (self.not_attacked or {}).items() if count}
        if not left or self.correct is None:
            return None
        parts = ", ".join(f"{part} {count:,}" for part, count in left.items())
        return (
            f"an estimate from above: its parts ended before all images, left alone by {parts} "
            f"({self.correct:,} stand at the end); for a figure to report: autoattack"
        )


class CurvePoint(Accuracy):
    """Accuracy at one radius."""

    epsilon: float
    epsilon_text: str


class Curve(Record):
    """Accuracy over the radius of the threat."""

    attack: str
    settings: dict[str, Any] = Field(default_factory=dict)
    points: list[CurvePoint]


class Unfinished(Record):
    """An attack that the time limit ended."""

    bounds: Interval
    """The accuracy lies between these, in percent."""
    undecided: int
    n: int
    stopped_in: str


class Finding(Record):
    """What one check of the diagnosis found."""

    name: str
    status: Severity
    measured: dict[str, Any] = Field(default_factory=dict)
    meaning: str


class Findings(Record):
    """What the checks of the diagnosis found."""

    verdict: Severity
    """The worst status."""
    checks: list[Finding]
    left_out: dict[str, str] = Field(default_factory=dict)


class ThreatFacts(Record):
    """The set of changes that an attack may make."""

    norm: str
    epsilon: float
    epsilon_text: str

    def same(self, norm: str, epsilon: float) -> bool:
        """Whether it is the ball of this norm and radius."""
        return self.norm == norm and math.isclose(self.epsilon, epsilon, rel_tol=1e-9)


class DataFacts(Record):
    """The images of a result."""

    name: str
    split: str
    n: int | None = None
    limit: int | None = None
    """The first so many images were asked for; there may be fewer."""
    classes: list[str] = Field(default_factory=list)
    classes_present: int | None = None
    images_by_class: list[int] | None = None
    size: list[int] | None = None
    """Channels, height, width."""
    sha256: str | None = None
    """Of their pixels and labels."""
    own: bool | None = None
    """Whether they are the images that the run itself names; None in older results."""

    def answers(self, limit: int | None) -> bool:
        """Whether they are the run's own: the first ``limit``, or all where there are fewer or it
        is None.

        Older results do not tell what was asked for; they answer for all images.
        """
        if self.own is False:
            return False
        if "limit" not in self.model_fields_set or self.n is None:
            return limit in (None, self.n)
        whole = self.limit is None or self.n < self.limit
        return self.n == limit or (whole and (limit is None or self.n < limit))


class SizedData(DataFacts):
    """Images whose size is known."""

    size: list[int]


class ModelFacts(Record):
    """The network of a result; what is not known is missing."""

    name: str | None = None
    parameters: int | None = None
    checkpoint: str | None = None
    """"best" or "last", of a run."""
    epoch: int | None = None
    method: str | None = None
    recipe: str | None = None
    run_seed: int | None = None
    weights: str | None = None


class TimedEnvironment(Environment):
    """An environment with the time at which the result was made."""

    time: str


class ResultRecord(FileRecord):
    """What all results have in common."""

    format: str
    target: str
    """Name of the run or network."""
    data: DataFacts
    model: ModelFacts
    seed: int | None = None
    environment: TimedEnvironment

    @property
    def time(self) -> str:
        """When it was made; sorts in alphabetical order."""
        return self.environment.time


class UnseenThreat(Record):
    """Accuracy under a threat that the network was not trained for."""

    threat: ThreatFacts
    attacks: dict[str, AttackAccuracy]
    worst_case: Accuracy | None = None
    unfinished: dict[str, Unfinished] | None = None


class CertifiedPoint(Share):
    """Accuracy that is certified at one radius."""

    radius: float


class Smoothed(Accuracy):
    """Certified accuracy of the network that Gaussian noise smooths."""

    abstained: float
    points: list[CertifiedPoint]
    settings: dict[str, Any]


class EvaluationRecord(ResultRecord):
    """A result of ``cure evaluate``; docs/result-files.md explains its keys."""

    made_by: ClassVar[str] = "cure evaluate"

    format: Literal["cure-evaluation-1"]
    target: str
    natural: Accuracy
    majority: Majority | None = None
    attacks: dict[str, AttackAccuracy]
    curve: Curve | None = None
    unfinished: dict[str, Unfinished] | None = None
    worst_case: Accuracy | None = None
    nrr: dict[str, float | None]
    unseen: dict[str, UnseenThreat | Accuracy] | None = None
    """By norm; and "all_threats" over all of them."""
    verified: Accuracy | None = None
    """What interval bounds prove."""
    smoothed: Smoothed | None = None
    diagnosis: Findings | None = None
    notes: list[str] = Field(default_factory=list)
    """What was decided for the user while evaluating, a sentence each."""
    threat: ThreatFacts
    data: SizedData
    model: ModelFacts
    seed: int | None = None
    batch_size: int | None = None
    environment: TimedEnvironment

    def beyond(self) -> list[tuple[str, Share | Unfinished]]:
        """What was measured beyond the threat: unseen threats and certificates, with titles."""
        rows: list[tuple[str, Share | Unfinished]] = []
        for norm, part in (self.unseen or {}).items():
            if isinstance(part, Accuracy):
                rows.append(("every attack in every norm", part))
                continue
            title = f"{norm} {part.threat.epsilon_text}, not asked for"
            found = part.attacks | (part.unfinished or {})
            rows += [(f"{title}: {attack}", cell) for attack, cell in found.items()]
            if part.worst_case is not None:
                rows.append((f"{title}: worst case", part.worst_case))
        if self.verified is not None:
            ball = f"{self.threat.norm} {self.threat.epsilon_text}"
            rows.append((f"proved by interval bounds, {ball}", self.verified))
        if self.smoothed is not None:
            title = f"smoothed by noise {self.smoothed.settings['sigma']:g}, certified in L2"
            rows += [(f"{title} {point.radius:g}", point) for point in self.smoothed.points]
        return rows


class CorruptionAccuracy(Share):
    """Accuracy under one corruption, over severities and at each."""

    group: str
    severities: dict[str, Accuracy]


class CorruptionSettings(Record):
    """How images were corrupted."""

    severities: list[int]
    source: str | None = None
    """"generated", or the name of the published files."""


class CorruptionRecord(ResultRecord):
    """A result of ``cure corruptions``; docs/corruptions.md explains its keys."""

    made_by: ClassVar[str] = "cure corruptions"

    format: Literal["cure-corruptions-1"]
    target: str
    natural: Accuracy | None = None
    means: dict[str, Share | None]
    groups: dict[str, Share]
    severities: dict[str, Share] = Field(default_factory=dict)
    corruptions: dict[str, CorruptionAccuracy]
    mce: dict[str, Any] | None = None
    settings: CorruptionSettings

    @model_validator(mode="after")
    def _every_severity_is_there(self) -> Self:
        for name, part in self.corruptions.items():
            for severity in self.settings.severities:
                if str(severity) not in part.severities:
                    raise ValueError(f"corruptions.{name} lacks severity {severity}")
        return self


class DiagnosisRecord(ResultRecord, Findings):
    """A result of ``cure diagnose``; docs/diagnose.md explains its keys."""

    made_by: ClassVar[str] = "cure diagnose"

    format: Literal["cure-diagnosis-1"]
    n: int
    norm: str | None = None
    epsilon: float | None = None
    epsilon_text: str | None = None


class StudyRecord(FileRecord):
    """A result of ``cure analyse``: what all studies share; the rest is kept as it is."""

    made_by: ClassVar[str] = "cure analyse"

    format: Literal["cure-study-1"]
    study: str
    environment: Environment | None = None

    @property
    def body(self) -> dict[str, Any]:
        """What the study itself found, by key."""
        return dict(self.model_extra or {})


class FrontEstimate(Record):
    """A mean over seeds with its 95 % intervals."""

    mean: float
    images: Interval
    """Bootstrap over the images."""
    seeds: Interval | None = None
    """Student t over seeds; None for one seed."""


class FrontRow(Record):
    """One run; accuracy and interval under each attack stand at ``pgd20``, ``pgd20_interval``."""

    method: str
    knob: str | None
    """The setting that varies; None where nothing does."""
    value: Any
    seed: int
    natural: float
    natural_interval: Interval
    n: int
    """Images."""


class FrontPoint(Record):
    """One value of one curve, over its seeds."""

    curve: str
    value: Any
    seeds: list[int]
    natural: FrontEstimate
    robust: FrontEstimate
    dominated: bool
    """Whether another point of the record is as good in both accuracies and better in one."""


class FrontCurve(Record):
    """What the values of one method reach."""

    method: str
    knob: str | None
    more: str | None
    """The accuracy that a higher value favours; None where that is not known."""
    seeds: list[int]
    """Those of which all values are done; the figures here are theirs."""
    hypervolume: FrontEstimate | None
    """Percent of the area between the reference and (100, 100)."""
    robust_range: Interval | None
    """Robust accuracies between the curve's own points, for every seed."""


class FrontComparison(Record):
    """Natural accuracies at one robust accuracy, interpolated between a method's own points."""

    robust: float
    natural: dict[str, FrontEstimate | None]
    """By curve; None where it does not reach so far."""


class FrontRecord(FileRecord):
    """Fronts of methods (``cure front``)."""

    made_by: ClassVar[str] = "cure front"

    format: Literal["cure-front-1"]
    recipe: str
    settings: dict[str, Any]
    """Changes to the recipe for all runs."""
    own_settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Changes for one method, by its name."""
    data: DataFacts
    threat: ThreatFacts
    attack: str
    """The attack of the robust accuracies."""
    reference: Interval
    """Natural and robust accuracy from which the hypervolume counts."""
    rows: list[FrontRow]
    points: list[FrontPoint]
    curves: dict[str, FrontCurve]
    common_range: Interval | None
    """Robust accuracies that all curves reach."""
    comparisons: list[FrontComparison]
    missing: list[str]
    """Names of the runs that are not done."""
    environment: Environment


class RunRecord(FileRecord):
    """A run in one file, as a plan keeps it when the run's folder may be gone."""

    made_by: ClassVar[str] = "cure table"

    format: Literal["cure-run-1"]
    plan: str | None = None
    label: str | None = None
    """Row of the plan."""
    seed: int | None = None
    note: str = ""
    config: dict[str, Any]
    best_epoch: int | None = None
    environment: Environment | None = None
    metrics: list[EpochMetrics] = Field(default_factory=list)
    timing: list[EpochTiming] = Field(default_factory=list)
    evaluations: list[EvaluationRecord]

    def of_best_weights(self) -> list[EvaluationRecord]:
        """The evaluations, without those of best weights of another epoch."""
        return of_epochs(self.evaluations, {"best": self.best_epoch})


RESULTS: Mapping[str, type[EvaluationRecord | CorruptionRecord | DiagnosisRecord]] = {
    "evaluations": EvaluationRecord,
    "corruptions": CorruptionRecord,
    "diagnoses": DiagnosisRecord,
}
"""Records by the folder of a run that keeps them."""

Result = EvaluationRecord | CorruptionRecord | DiagnosisRecord | StudyRecord | RunRecord

_BY_FORMAT: Mapping[str, type[Result]] = {
    "cure-evaluation-1": EvaluationRecord,
    "cure-corruptions-1": CorruptionRecord,
    "cure-diagnosis-1": DiagnosisRecord,
    "cure-study-1": StudyRecord,
    "cure-run-1": RunRecord,
}


def read_result(path: Path) -> Result:
    """The result in a file, of whichever command.

    Raises:
        CheckpointError: when the file cannot be read or is none of these results.
    """
    return parse_result(read_json(path), path)


def parse_result(content: object, path: str | Path) -> Result:
    """The result in the content of a file; see :func:`read_result`."""
    name = content.get("format") if isinstance(content, dict) else None
    kind = _BY_FORMAT.get(name) if isinstance(name, str) else None
    if kind is None:
        raise CheckpointError(
            f"expected a run folder, or a result of `cure evaluate`, `corruptions`, `diagnose` or "
            f"`analyse` in JSON, got {path} (its format is '{name}'); name one of these"
        )
    return kind.parse(content, path)


def number_of(path: Path) -> int:
    """The number at the end of a result's file name (``best-test-2.json``): later ones are larger.

    >>> number_of(Path("evaluations/best-test-12.json"))
    12
    """
    last = path.stem.rpartition("-")[2]
    return int(last) if last.isdigit() else 0


FileKind = TypeVar("FileKind", bound=FileRecord)


def read_numbered(folder: Path, kind: type[FileKind]) -> Iterator[FileKind]:
    """The records of a folder of numbered results, by number.

    Raises:
        CheckpointError: when one is damaged.
    """
    for path in sorted(folder.glob("*.json"), key=lambda path: (number_of(path), path.name)):
        yield kind.read(path)


def oldest_first(results: Iterable[ResultKind]) -> list[ResultKind]:
    """The same results by the time at which they were made."""
    return sorted(results, key=lambda result: result.time)


ResultKind = TypeVar("ResultKind", bound=ResultRecord)


def of_epochs(results: Iterable[ResultKind], epochs: Mapping[str, int | None]) -> list[ResultKind]:
    """Without results of checkpoints that hold the weights of another epoch now.

    Args:
        results: in any order.
        epochs: of the weights of each checkpoint, where they are known.
    """
    return [
        result
        for result in results
        if result.model.epoch is None
        or epochs.get(str(result.model.checkpoint)) in (None, result.model.epoch)
    ]
