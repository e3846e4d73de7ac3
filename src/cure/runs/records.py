"""Typed records of the files that a run folder holds, for writing and for reading.

- :class:`Status`, :class:`Outcome`, :class:`Images`, :class:`Environment`,
  :class:`TrackingIds`: JSON files of a run;
- :class:`EpochMetrics`, :class:`EpochTiming`, :class:`GradientLine`: files with a JSON object a
  line.

Results of commands are in :mod:`cure.runs.results`, the figures of many runs in one file in
:mod:`cure.runs.packed`.

Keys that this version does not know, from a newer one, are kept. A file that is damaged or lacks
a key ends with one :class:`~cure.errors.CheckpointError`. Files of version 0.1 have the same
formats; tests/fixtures/run-0.1 is one of its runs.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from cure.errors import CheckpointError
from cure.utils.io import read_json, write_json

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

    def rank(self, selection: str = "robust") -> tuple[float, float]:
        """What the best epoch has most of; between equal ones, natural accuracy decides."""
        ending = "" if self.natural_balanced is None else "_balanced"
        return getattr(self, selection + ending), getattr(self, "natural" + ending)


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
            f"next:  cure evaluate {shlex.quote(str(run))}",
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
    """What is trained inside the run at the moment: "natural start", "head", "teacher ROLE"."""

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

    @property
    def validation(self) -> int | None:
        """Number of validation images; None where nothing was noted of the images."""
        by_class = ((self.account or {}).get("images") or {}).get("validation")
        return None if by_class is None else int(sum(by_class))


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
