"""What a training gained: accuracies at its start and end, and whether they are worth anything."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cure.config import RunConfig
from cure.runs.records import Accuracies, EpochMetrics, MeasuredAccuracies, Outcome
from cure.training.collapse import Guessing
from cure.utils.stats import wilson

FINAL_STEPS = 20
"""Steps of the PGD that measures the start and, at the end, the best weights."""

LEAST = 5.0
"""Robust accuracy in percent below which a training is said to have gained nothing."""

GAP = 20.0
"""Points between training and validation, above which a robust accuracy is overfitted, where
chance does not explain them."""

FEW_STEPS = 500
"""Steps below which mixed images are said to be too much for a run.

With CutMix in every batch the recipe photos fell to guessing in 126 steps, and learnt in 1,008.
"""

WEAK = 5.0
"""Points between the validation attack and the final one, above which the former is weak."""

FLIPPED = 6
"""Images that only one of two attacks fools, from which chance does not explain it (sign test)."""


def guessing_limit(images: int, baseline: float) -> float:
    """Accuracy in percent that a network which guesses stays below, at 97.5 % certainty.

    Args:
        images: how many it is measured on.
        baseline: accuracy in percent of always naming the largest class.
    """
    return baseline + 196 * math.sqrt(baseline / 100 * (1 - baseline / 100) / images)


def has_gained(start: MeasuredAccuracies, end: MeasuredAccuracies, baseline: float) -> bool:
    """Whether robust accuracy rose by more than chance, and to more than guessing reaches.

    Args:
        start: before.
        end: after.
        baseline: accuracy in percent of always naming the largest class of the images.
    """
    # As if both were measured on different images.
    error = math.sqrt(sum(a.robust * (100 - a.robust) / a.n for a in (start, end)))
    rose = end.robust - start.robust > 1.96 * error
    return rose and end.robust >= LEAST and end.robust > guessing_limit(end.n, baseline)


def judge(
    start: MeasuredAccuracies,
    end: MeasuredAccuracies,
    records: Sequence[EpochMetrics],
    config: RunConfig,
    baseline: float,
) -> Outcome:
    """Whether a training gained robustness, and what is wrong with its figures.

    Args:
        start: before the first step.
        end: of the best weights.
        records: of ``metrics.jsonl``.
        config: the run.
        baseline: accuracy in percent of always naming the largest class of the validation split.
    """
    above, gained = guessing_limit(end.n, baseline), has_gained(start, end, baseline)
    warnings = []
    last = next((r for r in reversed(records) if r.validation), None)
    training = last.train.get("robust_accuracy") if last else None
    if not gained:
        warnings.append(
            f"no gain: robust accuracy went from {start.robust:.1f} % to {end.robust:.1f} % on "
            f"{end.n:,} validation images (always naming the largest class: {baseline:.1f} %); "
            f"{_likely_cause(start, end, above, training, config)}"
        )
    if training is not None and last is not None and last.validation is not None:
        robust = last.validation.robust
        above_chance = wilson(round(robust * end.n / 100), end.n)[1]
        if 100 * training > max(robust + GAP, above_chance):
            cause = (
                "running statistics of BatchNorm that lag behind the weights (try "
                "training.batch_norm=frozen), or overfitting"
                if config.training.batch_norm == "eval_attack"
                else "overfitting"
            )
            warnings.append(
                f"robust accuracy is {100 * training:.1f} % in training and "
                f"{robust:.1f} % in validation: {cause} (more images, "
                "training.averaging, data.augment.cutmix=1, or fewer epochs narrow the gap)"
            )
    best = _at_best(records)
    if best is not None and best - end.robust > max(WEAK, 100 * FLIPPED / end.n - 1e-6):
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


def _likely_cause(
    start: MeasuredAccuracies,
    end: MeasuredAccuracies,
    above: float,
    training: float | None,
    config: RunConfig,
) -> str:
    """Why a training may have gained nothing, and the setting to change.

    Args:
        start: before the first step.
        end: of the best weights.
        above: accuracy in percent from which the network does more than guess.
        training: share of the attacked training images that were right in the last epoch.
        config: the run.
    """
    if above >= 100:
        return (
            f"{end.n:,} images are too few to tell a network from one that always names the "
            "largest class: set a larger data.validation"
        )
    low, fallen = start.natural <= above, end.natural <= above
    if low and fallen and config.start != "scratch":
        return f"the starting network was at chance already: {_start_advice(config)}"
    if fallen:
        changes = ["train longer (training.epochs)"]
        if config.data.augment.mixes:
            changes.append("leave mixed images out (data.augment.cutmix=0 data.augment.mixup=0)")
        if config.attack.warmup < 0.5:
            changes.append("set attack.warmup=0.5")
        changes.append("or lower training.optimizer.learning_rate")
        how = "stayed at" if low else "fell to"
        return f"the network {how} guessing: {', '.join(changes)}"
    robust = start.robust > max(above, LEAST)
    if robust and start.natural - start.robust <= LEAST:
        return (
            f"the start withstands {config.threat.norm} {config.threat.epsilon.text} already: set "
            "a larger threat.epsilon"
        )
    if config.start == "scratch" and low and (training is None or training < 0.5):
        return (
            "random weights take a longer training (training.epochs), or a natural one first "
            "(start=natural)"
        )
    if training is not None and above < 100 * training >= 2 * max(LEAST, end.robust):
        frozen = config.training.batch_norm == "frozen"
        return (
            f"training images reach {100 * training:.1f} %, so the network learns but does not "
            f"generalise: {'' if frozen else 'set training.batch_norm=frozen, or '}give more images"
        )
    if end.robust > max(above, LEAST, start.robust):
        return (
            f"{end.n:,} images are too few to tell this difference from chance: set a larger "
            "data.validation"
        )
    if robust:
        return "the start was robust already: train longer (training.epochs), or give more images"
    if not config.attack.warmup:
        return (
            "the whole epsilon from the first step is often too much for a trained network: set "
            "attack.warmup=0.5"
        )
    return "train longer (training.epochs), or start with a smaller threat.epsilon"


def _at_best(records: Sequence[EpochMetrics]) -> float | None:
    """The robust accuracy of the validation by which the best weights were chosen."""
    found = [r.validation for r in records if r.validation]
    return max(found, key=Accuracies.rank).robust if found else None


def start_warnings(start: MeasuredAccuracies, config: RunConfig, guessing: Guessing) -> list[str]:
    """What looks wrong about the network that a training begins with.

    Args:
        start: its accuracies.
        config: the run.
        guessing: on the same images.
    """
    if config.start == "scratch":
        return []
    natural = guessing.natural(start.content())
    # Of few images guessing may get most right: half of the way from it to 100 % is no bad start.
    if guessing.learnt(natural) or natural > (guessing.chance + 100) / 2:
        return []
    over = " over classes" if guessing.balanced else ""
    return [
        f"the start has only {natural:.1f} % natural accuracy{over} (guessing: "
        f"{guessing.chance:.1f} %): {_start_advice(config)}"
    ]


def short_run_warnings(config: RunConfig, steps: int) -> list[str]:
    """What is too much for a run of so many steps from a trained network.

    Args:
        config: the run.
        steps: of the whole run.
    """
    if config.start == "scratch" or steps >= FEW_STEPS or not config.data.augment.mixes:
        return []
    return [
        f"{steps:,} steps are few to learn from mixed images: set data.augment.cutmix=auto "
        "data.augment.mixup=0, or more training.epochs"
    ]


def _start_advice(config: RunConfig) -> str:
    """What to look at when the network that a training begins with only guesses."""
    if config.starts_naturally:
        return (
            "train the start longer (natural.epochs), or set another natural.learning_rate; few "
            "images need more epochs"
        )
    first = f"natural:{config.start_path}" if config.start_path else "natural"
    if config.new_head:
        return f"its new last layer is not trained: train it first (start={first})"
    given = "remove" if config.model.mean is not None else "set"
    return (
        "check that its classes are in the order of the data and that images are standardised "
        f"once ({given} model.mean and model.std), or train it first (start={first})"
    )
