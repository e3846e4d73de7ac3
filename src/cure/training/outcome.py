"""What a training gained: accuracies at its start and end, and whether they are worth anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cure.config import RunConfig
from cure.runs.folder import RunFolder
from cure.utils.io import write_json

FILE = "outcome.json"

FINAL_STEPS = 20
"""Steps of the PGD that measures the best weights at the end."""

LEAST = 5.0
"""Robust accuracy in percent below which a training is said to have gained nothing."""

GAP = 20.0
"""Points between training and validation, above which a robust accuracy is overfitted."""

WEAK = 5.0
"""Points between the validation attack and the final one, above which the former is weak."""


class Accuracies(BaseModel):
    """Accuracies on the validation split, in percent.

    Attributes:
        natural: on natural images.
        robust: under PGD with ``steps`` steps.
        n: number of images.
        steps: steps of the attack.
    """

    natural: float
    robust: float
    n: int
    steps: int

    @classmethod
    def of(cls, found: Mapping[str, float], n: int, steps: int) -> Accuracies:
        """From what a validation returns."""
        return cls(natural=found["natural"], robust=found["robust"], n=n, steps=steps)

    def __str__(self) -> str:
        return (
            f"natural {self.natural:.1f} %, robust {self.robust:.1f} % "
            f"(PGD-{self.steps}, {self.n:,} validation images)"
        )


class Outcome(BaseModel):
    """``outcome.json`` of a run.

    Attributes:
        start: before the first step.
        end: of the best weights; None until the run is finished.
        gained: whether robust accuracy rose by more than chance and to more than a few percent.
        warnings: what is wrong with the result, a sentence each, the worst first.
    """

    start: Accuracies
    end: Accuracies | None = None
    gained: bool | None = None
    warnings: list[str] = []

    def lines(self, run: Path) -> list[str]:
        """What is printed at the end of a training."""
        assert self.end is not None
        lost = self.start.natural - self.end.natural
        won = self.end.robust - self.start.robust
        trade = f"{won:+.1f} points of robust accuracy for {-lost:+.1f} points of natural accuracy"
        return [
            *self.warnings,
            f"start: {self.start}",
            f"now:   {self.end}: {trade}",
            f"next:  cure evaluate {run}",
        ]


def read(folder: RunFolder) -> Outcome | None:
    """The outcome of a run; None where it has none (natural trainings, runs of 0.1)."""
    path = folder.path / FILE
    if not path.exists():
        return None
    return Outcome.model_validate_json(path.read_text(encoding="utf-8"))


def known(folder: RunFolder) -> bool:
    """Whether the start of the run was measured."""
    return (folder.path / FILE).exists()


def keep_start(folder: RunFolder, start: Accuracies) -> None:
    """Write the accuracies of the start."""
    if folder.writes:
        write_json(folder.path / FILE, Outcome(start=start).model_dump(mode="json"))


def keep_end(
    folder: RunFolder, end: Accuracies, records: Sequence[Mapping[str, Any]], config: RunConfig
) -> Outcome:
    """Judge a finished training, and write the result.

    Args:
        folder: the run's.
        end: of its best weights.
        records: of ``metrics.jsonl``.
        config: the run.
    """
    before = read(folder)
    # Without a measured start (a run that an earlier version began) nothing was robust.
    start = before.start if before else Accuracies(natural=0, robust=0, n=end.n, steps=end.steps)
    result = judge(start, end, records, config)
    if folder.writes:
        write_json(folder.path / FILE, result.model_dump(mode="json"))
    return result


def judge(
    start: Accuracies, end: Accuracies, records: Sequence[Mapping[str, Any]], config: RunConfig
) -> Outcome:
    """Whether a training gained robustness, and what is wrong with its figures."""
    gain, error = end.robust - start.robust, _standard_error(start, end)
    gained = gain > 1.96 * error and end.robust >= LEAST
    warnings = []
    last = next((r for r in reversed(records) if r.get("validation")), None)
    training = last["train"].get("robust_accuracy") if last else None
    if not gained:
        warnings.append(
            f"no gain: robust accuracy went from {start.robust:.1f} % to {end.robust:.1f} % on "
            f"{end.n:,} validation images; {_likely_cause(training, config)}"
        )
    if training is not None and last is not None:
        gap = 100 * training - last["validation"]["robust"]
        if gap > GAP:
            cause = (
                "running statistics of BatchNorm that lag behind the weights (try "
                "training.batch_norm=frozen), or overfitting"
                if config.training.batch_norm == "eval_attack"
                else "overfitting"
            )
            warnings.append(
                f"robust accuracy is {100 * training:.1f} % in training and "
                f"{last['validation']['robust']:.1f} % in validation: {cause} (more images, "
                "training.averaging, data.augment.cutmix=1, or fewer epochs narrow the gap)"
            )
    best = _at_best(records)
    if best is not None and best - end.robust > WEAK:
        warnings.append(
            f"the validation attack is weak: {best:.1f} % under PGD-"
            f"{config.training.validation_steps}, {end.robust:.1f} % under PGD-{end.steps}; raise "
            "training.validation_steps or attack.step_size"
        )
    elif config.training.validation_steps < 10:
        warnings.append(
            f"checkpoints were chosen under PGD-{config.training.validation_steps}, which is "
            "weaker than PGD-10; set training.validation_steps=10"
        )
    return Outcome(start=start, end=end, gained=gained, warnings=warnings)


def _likely_cause(training: float | None, config: RunConfig) -> str:
    """Why a training may have gained nothing, and the setting to change."""
    if training is not None and 100 * training >= 2 * LEAST:
        return (
            f"training images reach {100 * training:.1f} %, so the network learns but does not "
            "generalise: set training.batch_norm=frozen, or give more images"
        )
    if not config.attack.warmup:
        return (
            "the whole epsilon from the first step is often too much for a trained network: set "
            "attack.warmup=0.5"
        )
    return "train longer (training.epochs), or start with a smaller threat.epsilon"


def _standard_error(start: Accuracies, end: Accuracies) -> float:
    """Of the difference of two robust accuracies, in points, as if of different images."""
    return math.sqrt(sum(a.robust * (100 - a.robust) / a.n for a in (start, end)))


def _at_best(records: Sequence[Mapping[str, Any]]) -> float | None:
    """The highest robust accuracy of the validations."""
    robust = [r["validation"]["robust"] for r in records if r.get("validation")]
    return max(robust, default=None)


def start_warnings(start: Accuracies, config: RunConfig, classes: int) -> list[str]:
    """What looks wrong about the network that a training begins with."""
    if config.start == "scratch":
        return []
    chance = 100 / classes
    limit = chance + 200 * math.sqrt(chance / 100 * (1 - chance / 100) / start.n)
    if start.natural > limit + 0.2 * (100 - limit):
        return []
    given = "remove" if config.model.mean is not None else "set"
    return [
        f"the start has only {start.natural:.1f} % natural accuracy (guessing: {chance:.1f} %): "
        "check that its classes are in the order of the data and that images are standardised "
        f"once ({given} model.mean and model.std), or train it first (start=natural)"
    ]
