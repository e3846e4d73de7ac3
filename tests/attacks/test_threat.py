"""The ball: projection, steepest direction and uniform sampling against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cure.attacks import Threat
from cure.attacks.threat import per_sample
from cure.errors import ConfigError

NORMS = ("Linf", "L2")
seeds = st.integers(0, 2**31 - 1)
# From far inside the ball to far outside it.
scales = st.floats(-4, 3).map(lambda power: 10.0**power)
radii = st.floats(-3, 0).map(lambda power: 10.0**power)
norms = st.sampled_from(NORMS)


def changes(seed: int, scale: float, shape: tuple[int, ...] = (3, 2, 3, 3)) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal(shape)


def lengths(change: np.ndarray, norm: str) -> np.ndarray:
    """Length of each sample, by NumPy."""
    flat = change.reshape(len(change), -1)
    return np.abs(flat).max(axis=1) if norm == "Linf" else np.sqrt((flat**2).sum(axis=1))


@given(norms, seeds, scales, radii)
@settings(max_examples=40, deadline=None)
def test_projection_lands_in_the_ball_and_a_second_one_changes_nothing(norm, seed, scale, radius):
    change = torch.from_numpy(changes(seed, scale))
    once = Threat(norm, radius).project(change)
    assert (lengths(once.numpy(), norm) <= radius * (1 + 1e-12)).all()
    torch.testing.assert_close(Threat(norm, radius).project(once), once, rtol=1e-12, atol=0)


@given(norms, seeds, radii, st.floats(0.01, 0.999))
@settings(max_examples=40, deadline=None)
def test_projection_leaves_what_is_inside_as_it_is(norm, seed, radius, share):
    change = changes(seed, 1.0)
    change *= share * radius / lengths(change, norm).reshape(-1, 1, 1, 1)
    inside = torch.from_numpy(change)
    assert torch.equal(Threat(norm, radius).project(inside), inside)


@given(norms, seeds, scales, radii)
@settings(max_examples=40, deadline=None)
def test_projection_is_the_nearest_point_of_the_ball(norm, seed, scale, radius):
    """No point q of the ball lies in front of it: <change - projected, q - projected> <= 0."""
    change = changes(seed, scale)
    projected = Threat(norm, radius).project(torch.from_numpy(change)).numpy()
    for other_seed in range(20):
        other = changes(other_seed, 1.0)
        share = np.random.default_rng(other_seed).uniform(0, 1)
        other *= share * radius / lengths(other, norm).reshape(-1, 1, 1, 1)
        product = ((change - projected) * (other - projected)).reshape(len(change), -1).sum(axis=1)
        assert (product <= 1e-10 * (1 + scale) * (1 + radius)).all()


@given(norms, seeds, scales, st.lists(radii, min_size=3, max_size=3))
@settings(max_examples=40, deadline=None)
def test_projection_takes_one_radius_a_sample(norm, seed, scale, own):
    """Against the closed forms: clipping, and scaling by min(1, radius / length)."""
    change, radius = changes(seed, scale), np.array(own).reshape(-1, 1, 1, 1)
    projected = Threat(norm, 0.123).project(torch.from_numpy(change), torch.tensor(own).double())
    if norm == "Linf":
        expected = np.clip(change, -radius, radius)
    else:
        length = lengths(change, norm).reshape(-1, 1, 1, 1)
        expected = change * np.minimum(1.0, radius / length)
    # The list of radii became float32 once, before it became float64.
    np.testing.assert_allclose(projected.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_no_change_is_projected_to_no_change(norm):
    zero = torch.zeros(2, 1, 2, 2)
    assert torch.equal(Threat(norm, 0.5).project(zero), zero)


@given(seeds, st.sampled_from([1e-30, 1e-20, 1e-8, 1.0, 1e8, 1e18]))
@settings(max_examples=40, deadline=None)
def test_steepest_l2_direction_has_length_one_and_the_gradient_s_direction(seed, scale):
    gradient = changes(seed, 1.0).astype(np.float32) * np.float32(scale)
    direction = Threat("L2", 1.0).steepest(torch.from_numpy(gradient)).numpy()
    exact = gradient.astype(np.float64)
    exact /= lengths(exact, "L2").reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(direction, exact, atol=1e-6)
    np.testing.assert_allclose(lengths(direction.astype(np.float64), "L2"), 1.0, atol=1e-6)


@given(seeds, st.sampled_from([1e-30, 1.0, 1e18]))
@settings(max_examples=20, deadline=None)
def test_steepest_linf_direction_is_plus_or_minus_one(seed, scale):
    gradient = changes(seed, 1.0).astype(np.float32) * np.float32(scale)
    direction = Threat("Linf", 1.0).steepest(torch.from_numpy(gradient)).numpy()
    assert (direction == np.where(gradient > 0, 1, -1)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_direction_of_a_zero_gradient_is_zero_and_spoils_no_other_sample(norm):
    gradient = torch.zeros(3, 1, 2, 2)
    gradient[1] = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    gradient[2] = 1e-30
    direction = Threat(norm, 1.0).steepest(gradient)
    assert torch.equal(direction[0], torch.zeros(1, 2, 2))
    middle = [[0.6, 0.0], [0.0, -0.8]] if norm == "L2" else [[1.0, 0.0], [0.0, -1.0]]
    last = 0.5 if norm == "L2" else 1.0
    torch.testing.assert_close(direction[1], torch.tensor([middle]))
    torch.testing.assert_close(direction[2], torch.full((1, 2, 2), last))


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_direction_raises_a_linear_function_by_the_dual_norm(norm):
    """max <g, v> over the unit ball is the L1 norm of g for Linf and its L2 norm for L2."""
    gradient = changes(5, 2.0)
    direction = Threat(norm, 1.0).steepest(torch.from_numpy(gradient)).numpy()
    gained = (gradient * direction).reshape(3, -1).sum(axis=1)
    flat = gradient.reshape(3, -1)
    dual = np.abs(flat).sum(axis=1) if norm == "Linf" else lengths(gradient, "L2")
    np.testing.assert_allclose(gained, dual, rtol=1e-12)


@given(norms, seeds, radii)
@settings(max_examples=30, deadline=None)
def test_samples_lie_in_the_ball_of_each_image(norm, seed, radius):
    like = torch.zeros(5, 2, 3, 3, dtype=torch.float64)
    own = radius * torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    change = Threat(norm, 0.99).sample(like, torch.Generator().manual_seed(seed), own)
    assert change.shape == like.shape
    found = lengths(change.numpy(), norm)
    assert (found <= own.numpy() * (1 + 1e-12)).all()
    assert (found[1:] > 0).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dimensions", [1, 3, 12])
def test_samples_are_uniform_in_the_ball(norm, dimensions):
    """In a ball of d dimensions a uniform point has mean length d / (d + 1), in either norm.

    Its whole distribution is known too: the d-th power of the length is uniform.
    """
    count, radius = 20_000, 0.25
    like = torch.zeros(count, 1, 1, dimensions, dtype=torch.float64)
    change = Threat(norm, radius).sample(like, torch.Generator().manual_seed(11)).numpy()
    share = lengths(change, norm) / radius
    variance = dimensions / (dimensions + 2) - (dimensions / (dimensions + 1)) ** 2
    bound = 5 * (variance / count) ** 0.5
    assert abs(share.mean() - dimensions / (dimensions + 1)) < bound
    assert stats.kstest(share**dimensions, "uniform").pvalue > 1e-4
    # No side is favoured: each coordinate has mean 0.
    assert (np.abs(change.mean(axis=0)) < 5 * radius / count**0.5).all()


@pytest.mark.parametrize("norm", NORMS)
def test_samples_repeat_with_the_generator_and_only_with_it(norm):
    like = torch.zeros(2, 1, 4, 4)
    first, again, other = (
        Threat(norm, 0.1).sample(like, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("norm", NORMS)
def test_distance_by_hand(norm):
    change = torch.tensor([[[[3.0, -4.0]]], [[[0.0, 0.5]]]])
    expected = [4.0, 0.5] if norm == "Linf" else [5.0, 0.5]
    assert Threat(norm, 1.0).distance(change).tolist() == expected


def test_a_number_a_sample_broadcasts_over_the_image():
    like = torch.zeros(2, 3, 4, 4)
    assert per_sample(0.5, like) == 0.5
    spread = per_sample(torch.tensor([1.0, 2.0]), like)
    assert spread.shape == (2, 1, 1, 1)
    assert spread.flatten().tolist() == [1.0, 2.0]


def test_a_radius_that_is_no_number_is_refused():
    for radius in (None, "many", "1e400", -1, float("nan")):
        with pytest.raises(ConfigError, match="threat: expected"):
            Threat("Linf", radius)


def test_a_radius_in_pixels_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"got 8; if it is meant for pixels .* say 8/255"):
        Threat("Linf", 8)
    assert Threat("L2", 20).epsilon == 20  # of large images


def test_a_norm_has_the_names_that_it_has_in_recipes() -> None:
    assert Threat("linf").norm == Threat("l_inf").norm == "Linf"
    with pytest.raises(ConfigError, match="expected the norm Linf, L2 or L1, got 'L3'"):
        Threat("L3")
