"""Dominance, hypervolume, interpolation and intervals, against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cure.errors import ConfigError
from cure.experiments.pareto import (
    Right,
    check_reference,
    estimate,
    front,
    hypervolume,
    image_weights,
    natural_at,
    robust_range,
    undominated,
)


def test_dominance_by_hand() -> None:
    points = [(80.0, 40.0), (70.0, 50.0), (75.0, 45.0), (74.0, 45.0), (80.0, 39.0), (60.0, 50.0)]
    assert undominated(points) == [True, True, True, False, False, False]
    assert undominated([(1.0, 1.0), (1.0, 1.0)]) == [True, True], "equal points: neither is beaten"
    assert undominated([]) == []
    assert front(points) == [(80.0, 40.0), (75.0, 45.0), (70.0, 50.0)]


def test_hypervolume_by_hand() -> None:
    # Three steps: 80 x 10, 60 x (25 - 10), 30 x (40 - 25) of 10,000.
    steps = [(60.0, 25.0), (80.0, 10.0), (30.0, 40.0)]
    assert hypervolume(steps) == pytest.approx((800 + 900 + 450) / 100)
    assert hypervolume([*steps, (50.0, 20.0), (60.0, 25.0)]) == hypervolume(steps)
    assert hypervolume([]) == 0
    assert hypervolume([(100.0, 100.0)]) == 100
    assert hypervolume([(75.0, 0.0)]) == 0, "a network that is not robust covers nothing"
    # From (20, 10): 40 x 15 and 10 x 15 of 80 x 90; the point (80, 10) adds nothing.
    assert hypervolume(steps, (20.0, 10.0)) == pytest.approx(100 * (600 + 150) / 7200)
    assert hypervolume([(10.0, 50.0)], (20.0, 10.0)) == 0


def test_hypervolume_is_the_share_of_random_places_that_are_dominated() -> None:
    draws = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in draws.uniform(0, 90, (8, 2))]
    places = draws.uniform([10, 5], 100, (200_000, 2))
    covered = np.zeros(len(places), bool)
    for x, y in points:
        covered |= (places[:, 0] <= x) & (places[:, 1] <= y)
    assert hypervolume(points, (10.0, 5.0)) == pytest.approx(100 * covered.mean(), abs=0.5)


def test_interpolation_by_hand() -> None:
    points = [(70.0, 10.0), (50.0, 30.0), (60.0, 20.0), (40.0, 22.0)]
    assert robust_range(points) == (10.0, 30.0)
    assert natural_at(points, 20.0) == 60.0
    assert natural_at(points, 12.5) == 67.5
    assert natural_at([(70.0, 10.0), (50.0, 30.0)], 15.0) == 65.0


def test_the_reference_is_below_100() -> None:
    for reference in ((0.0, 100.0), (-1.0, 0.0), (0.0,)):
        with pytest.raises(ConfigError, match="reference: expected"):
            check_reference(reference)  # type: ignore[arg-type]


def planted(values: int = 2, seeds: int = 3, images: int = 400) -> Right:
    draws = np.random.default_rng(1)
    natural = draws.uniform(size=(values, seeds, images)) < 0.7
    robust = natural & (draws.uniform(size=(values, seeds, images)) < 0.4)
    return Right(natural.astype(float), robust.astype(float))


def test_points_are_the_shares_of_right_images() -> None:
    right = planted()
    points = right.points()
    assert points.shape == (3, 2, 2)
    assert points[2, 1, 0] == 100 * right.natural[1, 2].mean().round(12)
    assert points[2, 1, 1] == pytest.approx(100 * right.robust[1, 2].mean())
    weights = image_weights(400, 5)
    assert weights.shape == (5, 400)
    assert weights.sum(axis=1) == pytest.approx(1)
    again = right.points(weights)
    assert again.shape == (5, 3, 2, 2)
    assert again[3, 2, 1, 0] == pytest.approx(100 * (weights[3] * right.natural[1, 2]).sum())


def test_intervals_are_those_of_scipy() -> None:
    from scipy import stats

    right = planted(1, 3)
    found = estimate(right, image_weights(400, 4000), lambda points: points[0][0])
    each = 100 * right.natural[0].mean(axis=1)
    assert found.mean == pytest.approx(each.mean())
    assert found.seeds is not None
    expected = stats.t.interval(0.95, 2, each.mean(), stats.sem(each))
    assert found.seeds == pytest.approx(expected)
    # One image has the mean over seeds as its value.
    theirs = stats.bootstrap(
        (100 * right.natural[0].mean(axis=0),),
        np.mean,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert found.images == pytest.approx((theirs.low, theirs.high), abs=0.25)


def test_one_seed_has_no_interval_over_seeds() -> None:
    found = estimate(planted(2, 1), image_weights(400, 50), hypervolume)
    assert found.seeds is None
    assert found.images[0] < found.mean < found.images[1]
