"""Detect robust overfitting from the validations that a run recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cure.runs.records import EpochMetrics

LAST = 5
"""Validations that are averaged, to reduce the effect of noise."""


def robust_overfitting(
    records: Sequence[EpochMetrics], images: int, last: int = LAST
) -> str | None:
    """A warning when robust accuracy falls on validation images and still rises on training ones.

    The mean of the last ``last`` validations is compared with the highest mean of as many in a row
    that ended before them.  The warning comes when it lies more than two standard errors below,
    while training got on with adversarial images: their accuracy in training rose between the two
    stretches (``robust_accuracy``; of a method that records none, ``adversarial_loss`` fell).

    The standard error is that of the difference of two accuracies measured on different images,
    ``sqrt(p (1 - p) / n + q (1 - q) / n)``.  The images are the same ones, on which two networks of
    one run mostly agree, so the true error is smaller and the test is conservative.

    Args:
        records: of ``metrics.jsonl``, in their order; those without a validation are passed over.
        images: number of validation images.
        last: validations in a row.

    Returns:
        A sentence, or None: also with fewer than ``2 last`` validations, and for a method that
        records neither figure.

    Source of the phenomenon: Rice, Wong, Kolter, "Overfitting in adversarially robust deep
    learning", ICML 2020.  The rule is this project's.
    """
    validated = [record for record in records if record.validation is not None]
    robust = [record.validation.robust / 100 for record in validated if record.validation]
    if len(robust) < 2 * last:
        return None
    means = [sum(robust[end - last : end]) / last for end in range(last, len(robust) + 1)]
    best = max(range(len(means) - last), key=lambda place: means[place])
    high, now = means[best], means[-1]
    error = math.sqrt((high * (1 - high) + now * (1 - now)) / images)
    if high - now <= 2 * error or not _learnt(validated[best : best + last], validated[-last:]):
        return None
    first, end = validated[best].epoch, validated[best + last - 1].epoch
    return (
        f"robust overfitting: robust accuracy on validation images is {100 * now:.1f} % over the "
        f"last {last} validations, {100 * (high - now):.1f} points below that of epochs {first} to "
        f"{end} (two standard errors are {200 * error:.1f}), while it still improves in training; "
        "the best checkpoint is kept, and a shorter run, an earlier drop of the learning rate or "
        "training.averaging may end better"
    )


def _learnt(before: Sequence[EpochMetrics], after: Sequence[EpochMetrics]) -> bool:
    """Whether training improved on adversarial images from some epochs to later ones."""
    for name, sign in (("robust_accuracy", 1), ("adversarial_loss", -1)):
        if all(name in record.train for record in (*before, *after)):
            was = sum(record.train[name] for record in before) / len(before)
            now = sum(record.train[name] for record in after) / len(after)
            return bool(sign * (now - was) > 0)
    return False
