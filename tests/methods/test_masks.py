"""Which gradients a step masks: by hand, with exact fractions, and against NumPy's percentile."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cure.methods.cure import mask_gradients, prominence, rgp_mask, threshold

# Tenths of a percent, 0 to 99.9: as people write them.
tenths = st.integers(0, 999)


@st.composite
def score_lists(draw: st.DrawFn) -> list[float]:
    """1 to 200 float32 scores: all different, many ties, or all equal."""
    size = draw(st.integers(1, 200))
    source = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    kind = draw(st.sampled_from(["different", "ties", "signed ties", "equal"]))
    if kind == "different":
        values = source.standard_normal(size)
    elif kind == "ties":
        values = source.integers(0, 5, size).astype(float)
    elif kind == "signed ties":
        values = source.integers(-2, 3, size) / 3
    else:
        values = np.full(size, source.standard_normal())
    return values.astype(np.float32).tolist()


def below_the_percentile(scores: list[float], tenth: int) -> list[bool]:
    """Strictly below the linearly interpolated percentile, in exact fractions."""
    ordered = sorted(Fraction(score) for score in scores)
    place = Fraction(tenth, 1000) * (len(ordered) - 1)
    lower, upper = ordered[math.floor(place)], ordered[math.ceil(place)]
    limit = lower + (upper - lower) * (place - math.floor(place))
    return [Fraction(score) < limit for score in scores]


@given(score_lists(), tenths)
@settings(max_examples=150, deadline=None)
def test_masked_are_those_strictly_below_the_exact_percentile(scores, tenth):
    mask = rgp_mask({"weight": torch.tensor(scores)}, tenth / 10)["weight"]
    assert mask.dtype == torch.bool
    assert mask.tolist() == below_the_percentile(scores, tenth)


@given(score_lists(), tenths)
@settings(max_examples=150, deadline=None)
def test_mask_agrees_with_numpy_percentile(scores, tenth):
    """Where the rank is a whole number NumPy itself rounds (7 % of 101 is rank 7.000000000000001).

    There the percentile is that order statistic, and NumPy is asked for it instead.
    """
    array = np.array(scores)
    if tenth * (len(scores) - 1) % 1000 == 0:
        limit = np.sort(array)[tenth * (len(scores) - 1) // 1000]
    else:
        limit = np.percentile(array, tenth / 10)
    mask = rgp_mask({"weight": torch.tensor(scores, dtype=torch.float64)}, tenth / 10)["weight"]
    assert mask.tolist() == (array < limit).tolist()


@given(st.lists(score_lists(), min_size=1, max_size=4), tenths)
@settings(max_examples=60, deadline=None)
def test_layer_scope_has_a_threshold_a_tensor_and_global_scope_one_for_all(layers, tenth):
    scores = {f"layer{number}": torch.tensor(layer) for number, layer in enumerate(layers)}
    by_layer = rgp_mask(scores, tenth / 10, "layer")
    assert by_layer.keys() == scores.keys()
    for number, layer in enumerate(layers):
        assert by_layer[f"layer{number}"].tolist() == below_the_percentile(layer, tenth)
    together = [score for layer in layers for score in layer]
    # Whole ranks of more than 200 scores have their own test below.
    assume(len(together) <= 200 or tenth * (len(together) - 1) % 1000 != 0)
    by_all = rgp_mask(scores, tenth / 10, "global")
    flat = [value for name in scores for value in by_all[name].tolist()]
    assert flat == below_the_percentile(together, tenth)


@given(score_lists().filter(lambda scores: len(set(scores)) == len(scores)), tenths)
@settings(max_examples=40, deadline=None)
def test_number_of_masked_weights_without_ties(scores, tenth):
    count = int(rgp_mask({"weight": torch.tensor(scores)}, tenth / 10)["weight"].sum())
    assert count == -(-tenth * (len(scores) - 1) // 1000)


@pytest.mark.parametrize(("percent", "size", "count"), [(64.4, 251, 161), (8.8, 376, 33)])
def test_exact_rank_of_a_percentage_with_a_fraction(percent, size, count):
    """.644 * 250 = 161 exactly: 161 scores lie strictly below that order statistic."""
    scores = np.arange(size, dtype=np.float64)
    assert (scores < np.percentile(scores, percent)).sum() == count
    assert int(rgp_mask({"weight": torch.from_numpy(scores)}, percent)["weight"].sum()) == count


@pytest.mark.parametrize(
    ("scores", "percent", "expected"),
    [
        # Rank .3 * 9 = 2.7: between 3 and 4, so 1, 2 and 3 are below.
        ([10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 30.0, [0] * 7 + [1] * 3),
        # Rank .5 * 2 = 1: the percentile is 2 itself, which is not below itself.
        ([1.0, 2.0, 3.0], 50.0, [1, 0, 0]),
        # Rank .5 * 3 = 1.5: the percentile is 1.5, between 1 and 2.
        ([1.0, 2.0, 3.0, 1.0], 50.0, [1, 0, 0, 1]),
        # Rank .3 * 4 = 1.2 lies between equal scores: nothing is below.
        ([1.0, 1.0, 1.0, 5.0, 6.0], 30.0, [0, 0, 0, 0, 0]),
        ([3.0, 1.0, 2.0], 0.0, [0, 0, 0]),
        ([3.0, 1.0, 2.0], 99.9, [0, 1, 1]),
        ([0.0, 0.0, 0.0, 0.0], 90.0, [0, 0, 0, 0]),
        ([4.0], 90.0, [0]),
        # Signed scores: the most negative ones are masked.
        ([-5.0, 1.0, -1.0, 5.0], 50.0, [1, 0, 1, 0]),
    ],
)
def test_mask_by_hand(scores, percent, expected):
    mask = rgp_mask({"weight": torch.tensor(scores)}, percent)["weight"]
    assert mask.int().tolist() == expected


def test_threshold_has_exactly_the_scores_below_the_percentile_below_it():
    scores = torch.tensor([[4.0, 1.0], [3.0, 2.0]])
    limit = threshold(scores, 40.0)  # rank 1.2: 2.2 between 2 and 3
    assert limit.dim() == 0
    assert (scores < limit).tolist() == [[False, True], [False, True]]


def test_masks_have_the_shapes_of_the_scores():
    shapes = {"conv": (4, 3, 3, 3), "norm": (4,), "number": (), "linear": (2, 5)}
    scores = {name: torch.rand(shape) for name, shape in shapes.items()}
    for scope in ("layer", "global"):
        masks = rgp_mask(scores, 30.0, scope)
        assert {name: tuple(mask.shape) for name, mask in masks.items()} == shapes


def test_scores_that_are_not_contiguous_are_masked_where_they_are():
    scores = torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last)
    assert not scores.is_contiguous()
    mask = rgp_mask({"weight": scores}, 50.0)["weight"]  # rank 11.5
    assert torch.equal(mask, scores < 11.5)


def test_no_scores_mask_nothing():
    for scope in ("layer", "global"):
        assert rgp_mask({}, 30.0, scope) == {}
        gradients = {"weight": torch.ones(3)}
        assert mask_gradients(gradients, rgp_mask({}, 30.0, scope))["weight"].tolist() == [
            1.0,
            1.0,
            1.0,
        ]


def test_prominence_by_hand():
    natural = {"a": torch.tensor([1.0, -2.0, 0.0]), "b": torch.tensor([[-10.0]])}
    adversarial = {"a": torch.tensor([-3.0, -4.0, 5.0]), "b": torch.tensor([[20.0]])}
    absolute = prominence(natural, adversarial, 0.25)
    torch.testing.assert_close(absolute["a"], torch.tensor([2.5, 3.5, 3.75]))
    torch.testing.assert_close(absolute["b"], torch.tensor([[17.5]]))
    signed = prominence(natural, adversarial, 0.25, signed=True)
    torch.testing.assert_close(signed["a"], torch.tensor([-2.0, -3.5, 3.75]))
    torch.testing.assert_close(signed["b"], torch.tensor([[12.5]]))


def test_prominence_at_the_ends_of_alpha():
    natural, adversarial = {"a": torch.tensor([-1.0, 2.0])}, {"a": torch.tensor([3.0, -4.0])}
    assert prominence(natural, adversarial, 1.0)["a"].tolist() == [1.0, 2.0]
    assert prominence(natural, adversarial, 0.0)["a"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize(("scope", "expected"), [("layer", [[0, 2], [30, 0]]), ("global", None)])
def test_mask_gradients_by_hand(scope, expected):
    gradients = {
        "a": torch.tensor([1.0, 2.0]),
        "b": torch.tensor([30.0, 40.0]),
        "unscored": torch.tensor([-0.0, 7.0]),
    }
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([8.0, 4.0])}
    result = mask_gradients(gradients, rgp_mask(scores, 60.0, scope))
    # layer: rank .6 in each, one masked each; global: rank 1.8 of 1, 2, 4, 8, two masked.
    expected = expected or [[0, 0], [30, 40]]
    assert [result["a"].tolist(), result["b"].tolist()] == expected
    assert result["unscored"] is gradients["unscored"]


def test_mask_gradients_writes_to_no_input():
    source = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(3, 5, generator=source) for name in ("a", "b", "c")}
    scores = {name: torch.randn(3, 5, generator=source) for name in ("a", "b")}
    kept = [{name: value.clone() for name, value in part.items()} for part in (gradients, scores)]
    for scope in ("layer", "global"):
        result = mask_gradients(gradients, rgp_mask(scores, 40.0, scope))
        assert list(result) == ["a", "b", "c"]
        assert result is not gradients
        for part, before in zip((gradients, scores), kept, strict=True):
            assert part.keys() == before.keys()
            assert all(torch.equal(part[name], before[name]) for name in part)


def test_mask_gradients_puts_zero_where_a_gradient_is_not_finite():
    """A product with a mask would leave NaN there."""
    gradients = {"a": torch.tensor([math.nan, math.inf, 3.0])}
    result = mask_gradients(gradients, rgp_mask({"a": torch.tensor([0.0, 1.0, 2.0])}, 90.0))
    assert result["a"].tolist() == [0.0, 0.0, 3.0]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("ranks", [1, 3, 6])
def test_counts_of_digits_over_shards_find_the_threshold(ranks, ties):
    # What docs/scaling.md works out for a layer that no single rank holds.
    for seed in range(20):
        draws = torch.Generator().manual_seed(seed)
        scores = torch.randn(100 + 37 * seed, generator=draws).abs()
        scores = scores.round(decimals=1) if ties else scores
        shards = [shard.view(torch.int32) for shard in scores.chunk(ranks)]
        known, below = 0, math.ceil(0.3 * (len(scores) - 1))
        for shift in (24, 16, 8, 0):
            counts = torch.zeros(256, dtype=torch.int64)
            for bits in shards:  # Each rank by itself; then one sum over the ranks.
                left = bits[bits >> shift >> 8 == known]
                counts += torch.bincount(left >> shift & 255, minlength=256)
            sums = counts.cumsum(0)
            digit = int((sums <= below).sum())
            below -= int(sums[digit] - counts[digit])
            known = known << 8 | digit
        found = torch.tensor(known, dtype=torch.int32).view(torch.float32)
        assert found == threshold(scores, 30.0)
