"""Typed records of every file that a run folder holds, for writing and for reading.

This module is the only place that knows the formats:

- :class:`Status`, :class:`Outcome`, :class:`Images`, :class:`Environment`,
  :class:`TrackingIds`: JSON files of a run;
- :class:`EpochMetrics`, :class:`EpochTiming`, :class:`GradientLine`: files with a JSON object a
  line;
- :class:`EvaluationRecord`, :class:`CorruptionRecord`, :class:`DiagnosisRecord`,
  :class:`StudyRecord`: results, which name their ``format``;
- :class:`RunRecord`: a whole run in one file, as a plan keeps it; :func:`write_packed`: the
  figures of many runs in one file.

Keys that this version does not know, from a newer one, are kept. A file that is damaged or lacks
a key ends with one :class:`~cure.errors.CheckpointError`. Files of version 0.1 have the same
formats; tests/fixtures/run-0.1 is one of its runs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, model_validator

from cure.errors import CheckpointError
from cure.utils.io import read_json, write_json, write_text

Finite = Annotated[float, Field(allow_inf_nan=False)]
Interval = Annotated[list[Finite], Field(min_length=2, max_length=2)]
"""Lower and upper limit."""
Severity = Literal["pass", "warn", "fail"]


class Record(BaseModel):
    """Some keys of a JSON object, typed; other keys are kept as they are."""

    model_config = ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True)

    def content(self) -> dict[str, Any]:
        """What a file holds: the keys that were given, in the order of the fields."""
        return self.model_dump(exclude_unset=True)


class FileRecord(Record):
    """A record that is a whole JSON file."""

    made_by: ClassVar[str] = ""
    """The command that makes the file again, for messages; empty for files of a run itself."""

    @classmethod
    def parse(cls, content: object, path: str | Path) -> Self:
        """The record in the content of a file.

        Args:
            content: of the JSON file.
            path: of the file, for the message.

        Raises:
            CheckpointError: when a key is missing or has another type.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            detail = _first(error)
            if cls.made_by:
                raise CheckpointError(
                    f"{path} is no whole result of `{cls.made_by}` ({detail}); make it again"
                ) from None
            raise CheckpointError(f"{path} is damaged ({detail}); restore it from a copy") from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record in a JSON file.

        Raises:
            CheckpointError: when the file cannot be read, is not JSON or is no such record.
        """
        return cls.parse(read_json(path), path)

    def write(self, path: Path) -> None:
        """Write the file completely or not at all.

        Raises:
            CheckpointError: when it cannot be written.
        """
        write_json(path, self.content())


def _first(error: ValidationError) -> str:
    """The first complaint of pydantic: ``natural.accuracy: Field required``."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])


# Files of a run.


class Accuracies(Record):
    """Accuracies on the validation images, in percent."""

    natural: float
    robust: float
    natural_balanced: float | None = None
    """Mean over the classes, where checkpoints are chosen by it; else not there."""
    robust_balanced: float | None = None
    """As ``natural_balanced``."""


class MeasuredAccuracies(Accuracies):
    """Accuracies with the number of images and of the attack's steps."""

    n: int
    """Validation images."""
    steps: int
    """Steps of PGD."""

    def __str__(self) -> str:
        balanced = ""
        if self.natural_balanced is not None and self.robust_balanced is not None:
            balanced = (
                f"; mean over classes {self.natural_balanced:.1f} % and "
                f"{self.robust_balanced:.1f} %"
            )
        return (
            f"natural {self.natural:.1f} %, robust {self.robust:.1f} % "
            f"(PGD-{self.steps}, {self.n:,} validation images{balanced})"
        )


class Outcome(FileRecord):
    """What a training gained (``outcome.json``); natural trainings have none."""

    start: MeasuredAccuracies
    """Before the first step."""
    end: MeasuredAccuracies | None = None
    """Of the best weights; none until the run is finished."""
    gained: bool | None = None
    """Whether robust accuracy rose by more than chance and to more than a few percent."""
    warnings: list[str] = []
    """What is wrong with the result, a sentence each, the worst first."""

    def lines(self, run: str) -> list[str]:
        """What is printed when a training ends.

        Args:
            run: its folder, for the next command.
        """
        if self.end is None:
            return []
        won = self.end.robust - self.start.robust
        lost = self.end.natural - self.start.natural
        return [
            *self.warnings,
            f"start: {self.start}",
            f"now:   {self.end}: {won:+.1f} points of robust accuracy for {lost:+.1f} points of "
            "natural accuracy",
            f"next:  cure evaluate {run}",
        ]


class TradeoffPoint(Accuracies):
    """A network between trained ones, with its accuracies on the validation images."""

    shares: list[float]
    """Weight of each end, in their order."""
    natural_interval: Interval
    robust_interval: Interval
    n: int
    """Validation images."""


class StrongAccuracies(Accuracies):
    """Accuracies of the chosen network under stronger attacks, on the same images."""

    attacks: list[str]
    """An image is right where it withstands all of them."""
    robust_interval: Interval
    n: int
    """Validation images."""


class TradeoffRecord(FileRecord):
    """Networks on lines between trained weights (``tradeoff.json``)."""

    ends: list[str]
    """What the shares are of."""
    steps: int
    """Steps of PGD."""
    points: list[TradeoffPoint]
    barriers: list[str] = []
    """Sentences on points that are worse than both ends."""
    chosen: TradeoffPoint | None = None
    """The point that was asked for, or the nearest to it."""
    strong: StrongAccuracies | None = None
    """The chosen point once more, under stronger attacks."""
    met: bool | None = None
    """Whether the chosen point meets the requirement; None without one."""
    run: str | None = None
    """Folder of the run that holds the chosen network."""


class BestEpoch(Record):
    """The epoch whose weights are the best checkpoint."""

    epoch: int
    validation: Accuracies | None = None


class Status(FileRecord):
    """How far a run came (``status.json``)."""

    state: Literal["new", "running", "stopped", "failed", "finished"]
    step: int | None = None
    """Optimiser steps that are done."""
    steps: int | None = None
    """Optimiser steps in all."""
    best: BestEpoch | None = None
    reason: str | None = None
    """Why the run failed."""
    phase: str | None = None
    """What is trained inside the run at the moment: "natural start", "teacher NAME"."""

    @property
    def finished(self) -> bool:
        """Whether the run was trained to its end."""
        return self.state == "finished"


class Images(FileRecord):
    """The images of a run (``data.json``)."""

    classes: list[str]
    channels: int
    size: Annotated[list[int], Field(min_length=2, max_length=2)]
    """Height and width in pixels."""
    account: dict[str, Any] | None = None
    """What was found in the images: :class:`cure.data.DataAccount`."""


class Environment(FileRecord):
    """On what something was computed (``environment.json``, and part of every result)."""

    cure: str | None = None
    commit: str | None = None
    python: str | None = None
    packages: dict[str, str] = Field(default_factory=dict)
    platform: str | None = None
    processor: str | None = None
    cores: int | None = None
    threads: int | None = None
    gpu: str | None = None
    command: str | None = None
    time: str | None = None
    """UTC, ISO 8601."""


class TrackingIds(RootModel[dict[str, str]]):
    """What W&B and MLflow call the run, by tracker (``tracking.json``)."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """The identities in a file; none when there is no file.

        Raises:
            CheckpointError: when the file is damaged.
        """
        if not path.exists():
            return cls({})
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            detail = _first(error)
            raise CheckpointError(f"{path} is damaged ({detail}); restore it from a copy") from None

    def write(self, path: Path) -> None:
        """Write the file completely or not at all."""
        write_json(path, self.root)


# Files with a JSON object a line.


class Line(Record):
    """A line of a file."""

    file: ClassVar[str]
    """Name of the file in the run folder."""


class EpochMetrics(Line):
    """What an epoch gave; the same bits for the same run."""

    file: ClassVar[str] = "metrics.jsonl"

    epoch: int
    """From 1."""
    epochs: int | None = None
    step: int | None = None
    """Optimiser steps done at its end."""
    learning_rate: float | None = None
    train: dict[str, float] = Field(default_factory=dict)
    """Means over the epoch by name; accuracies from 0 to 1."""
    validation: Accuracies | None = None
    """Missing where the epoch was not validated."""


class EpochTiming(Line):
    """What an epoch cost."""

    file: ClassVar[str] = "timing.jsonl"

    epoch: int
    seconds: float | None = None
    """Training alone."""
    processor_seconds: float | None = None
    images_per_second: float | None = None
    validation_seconds: float | None = None
    peak_memory_mib: float | None = None
    ranks: int | None = None

    @property
    def total_seconds(self) -> float:
        """Seconds of training and validation."""
        return (self.seconds or 0.0) + (self.validation_seconds or 0.0)


class GradientLine(Line):
    """A line of the gradient logger; lists have an item a tensor.

    The first line has ``tensors``, ``shapes`` and ``every``; see
    :mod:`cure.training.gradient_logger` for the others.
    """

    file: ClassVar[str] = "gradients.jsonl"

    step: int
    tensors: list[str] | None = None
    shapes: list[list[int]] | None = None
    every: int | None = None
    before: list[float] | None = None
    after: list[float] | None = None
    above: dict[str, list[float]] | None = None
    conserved: dict[str, list[int | None]] | None = None
    mask: list[int | None] | None = None
    again: list[int | None] | None = None


LineKind = TypeVar("LineKind", bound=Line)


def line_text(line: Line) -> str:
    """A line as it stands in its file, with its end."""
    return json.dumps(line.content()) + "\n"


def read_lines(path: Path, kind: type[LineKind]) -> list[LineKind]:
    """The complete lines of a file; none when there is no file.

    A last line that is not whole is left out: the run was killed while it was written.

    Raises:
        CheckpointError: when another line is damaged.
    """
    if not path.exists():
        return []
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore it from a copy") from None
    found = []
    for number, text in enumerate(texts, start=1):
        try:
            found.append(kind.model_validate(json.loads(text)))
        except ValidationError as error:
            detail = _first(error)
        except ValueError as error:
            if number == len(texts):
                break
            detail = str(error)
        else:
            continue
        raise CheckpointError(
            f"{path}, line {number} is damaged ({detail}); restore it from a copy"
        )
    return found


# Results.


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

    def answers(self, limit: int | None) -> bool:
        """Whether the images are the first ``limit``, or all where there are fewer or it is None.

        Older results do not tell what was asked for; they answer for all images.
        """
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


# Many runs in one small file.

PACKED_FORMAT = "cure-runs-1"

_KEPT_OF_ACCURACY = ("accuracy", "interval", "correct", "n", "right", "balanced_accuracy")
_KEPT_OF_EVALUATION: dict[str, Any] = {
    **dict.fromkeys(("format", "target", "nrr", "threat", "model", "seed", "batch_size"), True),
    "natural": {*_KEPT_OF_ACCURACY},
    "majority": True,
    "attacks": {"__all__": {*_KEPT_OF_ACCURACY, "settings", "seed"}},
    "data": {"name", "split", "n", "size"},
    "environment": {
        *("cure", "commit", "python", "packages", "processor", "cores", "threads", "gpu", "time"),
    },
}


def summary(record: RunRecord) -> RunRecord:
    """The figures of a run without its curves: what tables and comparisons are made from.

    Metrics of the epochs, findings of the diagnosis, names of classes and counts of passes are
    left out. Of the times of its epochs, the medians are kept, and the largest peak of memory.
    """
    costs: dict[str, Any] = {}
    for key, of in (("seconds", median), ("processor_seconds", median), ("peak_memory_mib", max)):
        values = [value for line in record.timing if (value := getattr(line, key)) is not None]
        costs |= {key: of(values)} if values else {}
    timing = [EpochTiming(epoch=record.timing[-1].epoch, **costs)] if record.timing else []
    evaluations = [
        result.model_dump(exclude_unset=True, include=_KEPT_OF_EVALUATION)
        for result in record.evaluations
    ]
    content = record.content() | {
        "metrics": [],
        "timing": [line.content() for line in timing],
        "evaluations": evaluations,
    }
    return RunRecord.model_validate(content)


def settings_hash(config: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that identify the settings of a run."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def write_packed(path: Path, records: Mapping[str, RunRecord]) -> None:
    """Write runs into one file: what all share once, then a line a run with what differs.

    Args:
        path: the file to write or replace (``records.jsonl``).
        records: by name of the run; :func:`summary` makes them small.
    """
    whole: dict[str, dict[str, Any]] = {}
    for name, record in records.items():
        content = record.content()
        content["evaluations"] = dict(enumerate(content["evaluations"]))
        whole[name] = json.loads(json.dumps(content))
    shared = _shared(list(whole.values()))
    lines: list[dict[str, Any]] = [{"format": PACKED_FORMAT, "shared": shared}]
    for name, content in whole.items():
        own = {"run": name, "settings_hash": settings_hash(content["config"])}
        lines.append(own | _without(content, shared))
    texts = [json.dumps(line, ensure_ascii=False, separators=(",", ":")) for line in lines]
    write_text(path, "\n".join(texts) + "\n")


def read_packed(path: Path) -> dict[str, RunRecord]:
    """The runs of a file that :func:`write_packed` wrote, by name.

    Raises:
        CheckpointError: when the file is damaged.
    """
    found = {}
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
        head, *lines = (json.loads(text) for text in texts)
        if head["format"] != PACKED_FORMAT:
            raise ValueError(f"its format is '{head['format']}'")
        for line in lines:
            name, known = line.pop("run"), line.pop("settings_hash")
            content = _merged(head["shared"], line)
            results = content["evaluations"]
            content["evaluations"] = [results[key] for key in sorted(results, key=int)]
            if settings_hash(content["config"]) != known:
                raise ValueError(f"the settings of {name} were changed")
            found[name] = RunRecord.parse(content, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it from a copy") from None
    return found


def _shared(contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all have in common, nested."""
    first, *others = contents
    found: dict[str, Any] = {}
    for key, value in first.items():
        values = [other.get(key, _MISSING) for other in others]
        if isinstance(value, dict) and all(isinstance(other, dict) for other in values):
            inner = _shared([value, *values])
            found |= {key: inner} if inner else {}
        elif all(other == value and type(other) is type(value) for other in values):
            found[key] = value
    return found


_MISSING = object()


def _without(content: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """What ``content`` has besides ``shared``."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key not in shared:
            found[key] = value
        elif isinstance(value, dict) and (inner := _without(value, shared[key])):
            found[key] = inner
    return found


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`_without`."""
    found = dict(shared)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(shared.get(key), dict)
        found[key] = _merged(shared[key], value) if both else value
    return found
