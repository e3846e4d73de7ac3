"""Intervals and tests against scipy's own and against their definitions."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from scipy import stats as reference

from cure.utils import stats


def test_the_examples_of_the_docstrings_hold() -> None:
    done = doctest.testmod(stats)
    assert done.attempted >= 10
    assert done.failed == 0


@pytest.mark.parametrize(("correct", "count"), [(0, 7), (3, 7), (7, 7), (651, 1000)])
def test_wilson_is_scipys(correct: int, count: int) -> None:
    limits = reference.binomtest(correct, count).proportion_ci(0.95, "wilson")
    expected = [100 * limits.low, 100 * limits.high]
    assert stats.wilson(correct, count) == pytest.approx(expected, abs=1e-9)


def test_student_t_is_scipys() -> None:
    values = [61.5, 63.0, 60.2, 64.4]
    expected = reference.t.interval(0.95, 3, np.mean(values), reference.sem(values))
    assert stats.student_t(values) == pytest.approx(expected)


def test_the_interval_of_balanced_accuracy_covers_what_it_says() -> None:
    draws = np.random.default_rng(0)
    counts, rates = [180, 20, 40], [0.95, 0.4, 0.7]
    truth, covered = 100 * np.mean(rates), 0
    for _ in range(1000):
        right = [int(draws.binomial(n, rate)) for n, rate in zip(counts, rates, strict=True)]
        _, low, high = stats.balanced_accuracy(right, counts)
        covered += low <= truth <= high
    # Three standard errors of 1,000 draws are 2 points.
    assert 930 <= covered <= 985


def test_guessing_stays_below_its_limit() -> None:
    draws = np.random.default_rng(0)
    counts = [180, 20]
    found = [
        stats.balanced_accuracy([int(draws.binomial(n, 0.5)) for n in counts], counts)[0]
        for _ in range(1000)
    ]
    share = np.mean(np.array(found) > stats.balanced_guessing(counts))
    assert 0.005 < share < 0.05


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (4, 4), (9, 1), (3, 17)])
def test_mcnemar_is_the_two_sided_binomial_test(lost: int, gained: int) -> None:
    total = lost + gained
    expected = reference.binomtest(lost, total).pvalue if total else 1.0
    assert stats.mcnemar(lost, gained) == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 5, 6, 9, 25, 200])
def test_the_median_lies_in_its_interval_with_at_least_95_percent(n: int) -> None:
    middle, low, high = stats.median_interval(list(range(1, n + 1)))
    assert middle == (n + 1) / 2
    if n < 6:
        assert (low, high) == (-math.inf, math.inf)
        return
    below = reference.binom.cdf(low - 1, n, 0.5)
    assert below <= 0.025 < reference.binom.cdf(low, n, 0.5)
    assert high == n + 1 - low


def test_rank_correlation_is_scipys_with_ties() -> None:
    x, y = [1, 2, 2, 4, 5, 7], [2.0, 1.0, 3.0, 3.0, 9.0, 4.0]
    found = stats.rank_correlation(x, y)
    assert found is not None
    assert found["rho"] == pytest.approx(reference.spearmanr(x, y).statistic)
