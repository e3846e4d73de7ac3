"""Learning rate as a pure function of the progress of the run, without stored state."""

from __future__ import annotations

import math

from cure.config import ScheduleConfig, TrainingConfig


def progress_at(training: TrainingConfig, step: int, steps_per_epoch: int) -> float:
    """Share of the schedule of the learning rate that is done at a step.

    >>> progress_at(TrainingConfig(epochs=4), 6, 2)
    0.75
    >>> progress_at(TrainingConfig(epochs=8, schedule_from=4), 12, 2)
    0.5
    """
    first = training.schedule_from * steps_per_epoch
    return max(0, step - first) / (training.epochs * steps_per_epoch - first)


def learning_rate(training: TrainingConfig, progress: float) -> float:
    """The optimiser's rate when a share ``progress`` of the run's steps is done."""
    return training.optimizer.learning_rate * rate_factor(training.schedule, progress)


def momentum(training: TrainingConfig, progress: float) -> float:
    """The optimiser's momentum when a share ``progress`` of the run's steps is done.

    Only ``one_cycle_cosine`` changes it: from 0.95 to 0.85 at the peak of the rate, and back.
    """
    if training.schedule.name == "one_cycle_cosine":
        return _cosine(training.schedule, progress, 0.95, 0.85, 0.95)
    return training.optimizer.momentum


def _cosine(
    schedule: ScheduleConfig, progress: float, first: float, peak: float, last: float
) -> float:
    """From ``first`` to ``peak`` and on to ``last``, each by half a cosine."""
    if progress < schedule.peak:
        start, end, share = first, peak, progress / schedule.peak
    else:
        start, end, share = peak, last, (progress - schedule.peak) / (1 - schedule.peak)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def rate_factor(schedule: ScheduleConfig, progress: float) -> float:
    """Factor on the peak learning rate.

    Args:
        schedule: the schedule.
        progress: steps done over steps in the run, in [0, 1).
    """
    if schedule.warmup and progress < schedule.warmup:
        return progress / schedule.warmup
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "piecewise":
        return schedule.factor ** sum(progress >= milestone for milestone in schedule.milestones)
    if schedule.name == "cosine":
        since = (progress - schedule.warmup) / (1 - schedule.warmup)
        return 0.5 * (1 + math.cos(math.pi * since))
    if schedule.name == "one_cycle_cosine":
        return _cosine(schedule, progress, 1 / 25, 1.0, 1 / 250_000)
    if progress < schedule.peak:
        return progress / schedule.peak
    return (1 - progress) / (1 - schedule.peak)
