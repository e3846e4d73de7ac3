"""Confidence intervals and tests: one estimator for each quantity that the package reports.

All intervals are two-sided 95 % intervals. Accuracies are in percent, differences of accuracies in
percentage points. scipy is imported where it is used, because importing it takes long.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


def wilson(correct: int, count: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a proportion, in percent.

    Args:
        correct: successes, from 0 to ``count``.
        count: trials, at least 1.
        z: quantile of the normal distribution.

    Source: Wilson, JASA 1927; unlike the normal interval it holds at 0 % and 100 %.

    >>> [round(limit, 1) for limit in wilson(0, 100)]
    [0.0, 3.7]
    """
    share = correct / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    # At the ends the limit is exact; rounding would leave 4e-17 in its place.
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == count else centre + half
    return 100 * low, 100 * high


def balanced_accuracy(correct: Sequence[int], counts: Sequence[int]) -> tuple[float, float, float]:
    """Mean of the accuracies of the classes, and its interval, in percent.

    A network that always names one class has 100 / K here, however many images that class has.
    The interval adds up the squared distances of each class's Wilson limits from its accuracy.

    Args:
        correct: images of each class that are classified right.
        counts: images of each class; a class without images is left out.

    Returns:
        balanced accuracy, lower limit, upper limit.

    Source of the interval: Zou and Donner, Statistics in Medicine 2008 (MOVER).

    >>> [round(value, 1) for value in balanced_accuracy([90, 0], [90, 10])]
    [50.0, 48.0, 63.9]
    """
    having = [(right, count) for right, count in zip(correct, counts, strict=True) if count]
    shares = [100 * right / count for right, count in having]
    limits = [wilson(right, count) for right, count in having]
    mean = statistics.fmean(shares)
    below = math.hypot(*(share - low for share, (low, _) in zip(shares, limits, strict=True)))
    above = math.hypot(*(high - share for share, (_, high) in zip(shares, limits, strict=True)))
    return mean, mean - below / len(having), mean + above / len(having)


def balanced_guessing(counts: Sequence[int]) -> float:
    """Balanced accuracy, in percent, that guessing exceeds in about one of forty cases.

    100 / K plus two standard deviations; of a network that guesses each class with probability
    1 / K.

    >>> round(balanced_guessing([100, 100]), 2), round(balanced_guessing([180, 20]), 2)
    (57.07, 61.79)
    """
    having = [count for count in counts if count]
    chance, classes = 1 / len(counts), len(having)
    variance = chance * (1 - chance) * sum(1 / count for count in having) / classes**2
    return 100 * (chance + 2 * math.sqrt(variance))


def is_unequal(counts: Sequence[int]) -> bool:
    """Whether one class is so large that accuracy says little about the others.

    It has more than twice its even share 1 / K of the images, or more than two thirds of them.

    >>> is_unequal([30, 10, 10, 10]), is_unequal([31, 10, 10, 10]), is_unequal([70, 30])
    (False, True, True)
    """
    return max(counts) > min(2 / len(counts), 2 / 3) * sum(counts)


def student_t(values: Sequence[float]) -> tuple[float, float]:
    """Student t interval of the mean of two or more values, in their unit.

    Source: Student, Biometrika 1908.

    >>> [round(limit, 3) for limit in student_t([1.0, 2.0, 3.0])]
    [-0.484, 4.484]
    """
    mean = statistics.fmean(values)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of the Student t distribution with so many degrees of freedom.

    >>> round(t_quantile(2), 4)
    4.3027
    """
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def paired_difference(
    lost: int, gained: int, count: int, z: float = Z95
) -> tuple[float, float, float]:
    """Change of an accuracy measured twice on the same images, and its interval, in points.

    ``100 (gained - lost) / n``; the interval is Wald's after adding one image of each kind.

    Args:
        lost: images that were correct the first time only.
        gained: images that were correct the second time only.
        count: all images.
        z: quantile of the normal distribution.

    Returns:
        difference, lower limit, upper limit.

    Source: Bonett and Price, J. Educ. Behav. Stat. 2012, "Adjusted Wald confidence interval for a
    difference of binomial proportions based on paired data".

    >>> [round(value, 2) for value in paired_difference(20, 10, 100)]
    [-10.0, -20.51, 0.9]
    """
    down, up = (lost + 1) / (count + 2), (gained + 1) / (count + 2)
    centre, half = up - down, z * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    low, high = max(-1.0, centre - half), min(1.0, centre + half)
    return 100 * (gained - lost) / count, 100 * low, 100 * high


def newcombe(
    first: float,
    first_interval: Sequence[float],
    second: float,
    second_interval: Sequence[float],
) -> tuple[float, float]:
    """Interval of the difference of two independent proportions, from their Wilson intervals.

    Args:
        first: proportion in percent.
        first_interval: its Wilson interval in percent.
        second: the proportion that is subtracted.
        second_interval: its interval.

    Source: Newcombe, Statistics in Medicine 1998, "Interval estimation for the difference between
    independent proportions", method 10.

    >>> [round(limit, 1) for limit in newcombe(80.0, wilson(56, 70), 60.0, wilson(48, 80))]
    [5.2, 33.4]
    """
    below = math.hypot(first - first_interval[0], second_interval[1] - second)
    above = math.hypot(first_interval[1] - first, second - second_interval[0])
    return first - second - below, first - second + above


def independent_difference(
    first: tuple[int, int], second: tuple[int, int]
) -> tuple[float, float, float]:
    """First accuracy minus the second, measured on different images, and its interval, in points.

    Args:
        first: correct images, all images.
        second: as ``first``.

    Returns:
        difference, lower limit, upper limit; see :func:`newcombe`.

    >>> [round(value, 1) for value in independent_difference((56, 70), (48, 80))]
    [20.0, 5.2, 33.4]
    """
    p, q = 100 * first[0] / first[1], 100 * second[0] / second[1]
    low, high = newcombe(p, wilson(*first), q, wilson(*second))
    return p - q, low, high


def at_least(count: int, trials: int, share: float) -> float:
    """P(X >= count) for X ~ Binomial(trials, share).

    >>> round(at_least(9, 10, 0.5), 4)
    0.0107
    """
    from scipy.special import bdtrc

    return float(bdtrc(count - 1, trials, share)) if count > 0 else 1.0


def mcnemar(lost: int, gained: int) -> float:
    """p-value of McNemar's exact two-sided test that ``lost`` and ``gained`` are equally likely.

    ``min(1, 2 P(X >= max(lost, gained)))``, X binomial with ``lost + gained`` trials and
    probability 1/2; 1 when both are 0.

    Source: McNemar, Psychometrika 1947, in its exact form.

    >>> mcnemar(9, 1)
    0.021484375
    """
    return min(1.0, 2 * at_least(max(lost, gained), lost + gained, 0.5))


def holm(probabilities: Mapping[str, float], level: float = 0.05) -> list[str]:
    """Names of the hypotheses that Holm's method rejects at ``level``, the smallest p-value first.

    Args:
        probabilities: p-values by name.
        level: probability of at least one false rejection.

    Source: Holm, Scand. J. Statist. 1979.

    >>> holm({"a": 0.001, "b": 0.03, "c": 0.04})
    ['a']
    """
    ordered = sorted(probabilities, key=lambda name: probabilities[name])
    rejected = []
    for rank, name in enumerate(ordered):
        if probabilities[name] > level / (len(ordered) - rank):
            break
        rejected.append(name)
    return rejected


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and its interval from order statistics, valid for any distribution.

    ``[x_(k), x_(n + 1 - k)]`` with the largest k for which ``P(X < k) <= 0.025``, X binomial with n
    trials and probability 1/2. Fewer than six values bound nothing: the limits are -inf and inf.

    Args:
        values: one or more numbers; infinity is allowed.

    Returns:
        median, lower limit, upper limit.

    Source: Conover, Practical Nonparametric Statistics, Sec. 3.2.

    >>> median_interval([5, 3, 9, 1, 7, 2, 8, 4, 10, 6])
    (5.5, 2, 9)
    """
    from scipy.special import bdtr

    ordered, n = sorted(values), len(values)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    k = 0
    while k < n // 2 and bdtr(k, n, 0.5) <= 0.025:
        k += 1
    low, high = (ordered[k - 1], ordered[n - k]) if k else (-math.inf, math.inf)
    return middle, low, high


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, Any] | None:
    """Spearman's rank correlation with its interval; tied values get their mean rank.

    ``tanh(atanh(rho) -+ 1.96 sqrt((1 + rho^2 / 2) / (n - 3)))``

    Returns:
        ``rho`` in [-1, 1], ``interval``, ``n``; None with fewer than 4 pairs, or when all values of
        one side are equal.

    Source: Spearman 1904; interval: Bonett and Wright, Psychometrika 2000.

    >>> rank_correlation([1, 2, 3, 4], [10, 20, 30, 40])
    {'rho': 1, 'interval': [1, 1], 'n': 4}
    """
    import numpy as np
    from scipy.stats import rankdata

    n = len(x)
    if n < 4 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    rho = float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])
    rho = min(1.0, max(-1.0, rho))
    if abs(rho) > 1 - 1e-12:
        return {"rho": round(rho), "interval": [round(rho), round(rho)], "n": n}
    half = Z95 * math.sqrt((1 + rho**2 / 2) / (n - 3))
    middle = math.atanh(rho)
    return {"rho": rho, "interval": [math.tanh(middle - half), math.tanh(middle + half)], "n": n}


def jackknife_interval(estimate: float, left_out: Sequence[float]) -> tuple[float, float]:
    """Interval of an estimate from the same estimate with each of two or more batches left out.

    Args:
        estimate: from all batches.
        left_out: estimates, each without one batch.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, Sec. 11; Student t quantile.

    >>> [round(limit, 2) for limit in jackknife_interval(2.0, [2.5, 2.0, 1.5])]
    [-0.48, 4.48]
    """
    count = len(left_out)
    centre = math.fsum(left_out) / count
    spread = math.fsum((value - centre) ** 2 for value in left_out)
    half = t_quantile(count - 1) * math.sqrt(spread * (count - 1) / count)
    return estimate - half, estimate + half
