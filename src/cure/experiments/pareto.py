"""Fronts of natural and robust accuracy: what dominates, hypervolume, comparison, bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cure.errors import ConfigError
from cure.utils.stats import student_t

Point = tuple[float, float]
"""Natural and robust accuracy in percent."""

Numbers = NDArray[np.float64]

BEST = 100.0
"""The largest accuracy, in percent."""


def undominated(points: Sequence[Point]) -> list[bool]:
    """Which points no other one beats: at least as good in both values and better in one.

    Args:
        points: pairs of which more is better, here natural and robust accuracy.

    Source: the Pareto front of two aims.

    >>> undominated([(70.0, 10.0), (60.0, 20.0), (55.0, 15.0)])
    [True, True, False]
    """
    return [not any(a >= x and b >= y and (a > x or b > y) for a, b in points) for x, y in points]


def hypervolume(points: Sequence[Point], reference: Point = (0.0, 0.0)) -> float:
    """Percent of the area between a reference point and (100, 100) that points dominate.

    Exact: the points are passed by falling natural accuracy, and each adds the rectangle by which
    its robust accuracy exceeds that of all before it.

    Args:
        points: natural and robust accuracy in percent.
        reference: below 100 in both; points that are not above it in both add nothing.

    Source: Zitzler and Thiele, IEEE Trans. Evol. Comput. 1999 (size of the space covered).

    >>> hypervolume([(80.0, 10.0), (50.0, 30.0)])
    18.0
    """
    area, reached = 0.0, reference[1]
    for natural, robust in sorted(points, reverse=True):
        if robust > reached and natural > reference[0]:
            area += (natural - reference[0]) * (robust - reached)
            reached = robust
    return 100 * area / ((BEST - reference[0]) * (BEST - reference[1]))


def check_reference(reference: Point) -> None:
    """Refuse a reference point with which no hypervolume is defined.

    Raises:
        ConfigError: when an accuracy is not in [0, 100).
    """
    if len(reference) != 2 or not all(0 <= value < BEST for value in reference):
        raise ConfigError(
            "reference: expected a natural and a robust accuracy from 0 to below 100, got "
            f"{','.join(f'{value:g}' for value in reference)}"
        )


def robust_range(points: Sequence[Point]) -> Point:
    """Least and largest robust accuracy of the points that no other one dominates."""
    kept = [robust for _, robust in front(points)]
    return kept[0], kept[-1]


def front(points: Sequence[Point]) -> list[Point]:
    """The undominated points by rising robust accuracy, so by falling natural accuracy.

    >>> front([(60.0, 20.0), (55.0, 15.0), (70.0, 10.0)])
    [(70.0, 10.0), (60.0, 20.0)]
    """
    kept = {p for p, good in zip(points, undominated(points), strict=True) if good}
    return sorted(kept, key=lambda point: point[1])


def natural_at(points: Sequence[Point], robust: float) -> float:
    """Natural accuracy at a robust accuracy, on straight lines between undominated points.

    Outside of :func:`robust_range` it is that of the nearest end.

    >>> natural_at([(70.0, 10.0), (60.0, 20.0)], 15.0)
    65.0
    """
    kept = front(points)
    return float(np.interp(robust, [p[1] for p in kept], [p[0] for p in kept]))


@dataclass(frozen=True)
class Right:
    """Which images the networks of one curve classify correctly.

    Attributes:
        natural: [values, seeds, images] of 0 and 1.
        robust: as ``natural``, under attack.
    """

    natural: Numbers
    robust: Numbers

    def points(self, weights: Numbers | None = None) -> Numbers:
        """Accuracies [..., seeds, values, 2] in percent.

        Args:
            weights: [..., images] share of each image; all alike by default.
        """
        n = self.natural.shape[-1]
        shares = np.full(n, 1 / n) if weights is None else weights
        both = np.stack([self.natural, self.robust])
        found = 100 * np.einsum("avsi,...i->...sva", both, shares, optimize=True)
        # A mean of zeros and ones, without the last rounding errors.
        return np.asarray(np.round(found, 9), np.float64)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with two intervals at 95 %.

    Attributes:
        mean: over seeds.
        images: percentile bootstrap over the images, seeds as they are.
        seeds: Student t over seeds; None for one seed.
    """

    mean: float
    images: tuple[float, float]
    seeds: tuple[float, float] | None

    @classmethod
    def of(cls, each: Numbers, draws: Numbers) -> Estimate:
        """From the values of all seeds [seeds], and of resampled images [draws, seeds]."""
        low, high = np.percentile(draws.mean(axis=1), (2.5, 97.5))
        seeds = student_t(each.tolist()) if len(each) > 1 else None
        return cls(float(each.mean()), (float(low), float(high)), seeds)


def image_weights(images: int, draws: int) -> Numbers:
    """Shares [draws, images] of each image in samples of ``images`` images with replacement.

    Source: Efron, Ann. Statist. 1979 (the bootstrap).
    """
    counts = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), draws)
    return np.asarray(counts / images, np.float64)


def estimate(right: Right, weights: Numbers, of: Callable[[Sequence[Point]], float]) -> Estimate:
    """A number that is made from the points of each seed, with its intervals.

    Args:
        right: the images.
        weights: see :func:`image_weights`; the same for curves that are compared.
        of: points of one seed -> the number.
    """

    def each(points: Numbers) -> Numbers:
        return np.array([of([(x, y) for x, y in seed.tolist()]) for seed in points])

    return Estimate.of(
        each(right.points()), np.stack([each(points) for points in right.points(weights)])
    )
