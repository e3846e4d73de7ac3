"""What attacks maximise: values computed by hand, from plain arithmetic on three logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cure.attacks import OBJECTIVES
from cure.attacks.losses import cross_entropy, kl_to_natural, margin, with_cross_entropy

logits3 = st.lists(st.floats(-20, 20), min_size=3, max_size=3)


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(value) for value in logits]
    return [power / sum(powers) for power in powers]


def kl(target: list[float], logits: list[float]) -> float:
    pairs = zip(softmax(target), softmax(logits), strict=True)
    return sum(p * math.log(p / q) for p, q in pairs)


def row(logits: list[float]) -> torch.Tensor:
    return torch.tensor([logits], dtype=torch.float64)


def test_cross_entropy_of_two_samples_by_hand():
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    values = cross_entropy(logits, torch.tensor([0, 2]))
    # log(1 + e + e^2) and log 3
    torch.testing.assert_close(
        values, torch.tensor([2.4076059644443806, 1.0986122886681098]).double()
    )


def test_kl_to_natural_by_hand_and_not_the_other_way_round():
    natural, changed = [math.log(8), 0.0, 0.0], [0.0, 0.0, 0.0]
    value = kl_to_natural(row(changed), torch.tensor([0]), row(natural))
    # p = (.8, .1, .1), q = (1/3, 1/3, 1/3): .8 ln 2.4 + .2 ln .3
    assert value.item() == pytest.approx(0.8 * math.log(2.4) + 0.2 * math.log(0.3), abs=1e-12)
    reverse = kl_to_natural(row(natural), torch.tensor([0]), row(changed)).item()
    assert reverse == pytest.approx(math.log(1 / 2.4) / 3 + 2 * math.log(1 / 0.3) / 3, abs=1e-12)


@given(logits3, logits3)
@settings(max_examples=50, deadline=None)
def test_kl_to_natural_against_plain_arithmetic(natural, changed):
    value = kl_to_natural(row(changed), torch.tensor([1]), row(natural)).item()
    assert value == pytest.approx(kl(natural, changed), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("logits", "label", "confidence", "expected"),
    [
        ([5.0, 2.0, 1.0], 0, 50.0, -53.0),
        ([5.0, 2.0, 1.0], 1, 50.0, -47.0),
        ([5.0, 2.0, 1.0], 2, 50.0, -46.0),
        ([5.0, 2.0, 1.0], 0, 0.0, -3.0),
        ([5.0, 2.0, 1.0], 2, 0.0, 0.0),
        ([5.0, 2.0, 1.0], 2, 1.0, 0.0),
        ([60.0, 2.0, 1.0], 2, 50.0, 0.0),
        ([-7.0, -9.0, -8.0], 0, 50.0, -51.0),
    ],
)
def test_margin_by_hand(logits, label, confidence, expected):
    """-max(z_y - max wrong + confidence, 0), where the wrong ones may all be negative."""
    value = margin(row(logits), torch.tensor([label]), confidence=confidence)
    assert value.tolist() == [expected]


def test_registered_margin_has_confidence_fifty():
    logits = torch.tensor([[5.0, 2.0, 1.0], [60.0, 2.0, 1.0]])
    value = OBJECTIVES["margin"](logits, torch.tensor([0, 1]), None)
    assert value.tolist() == [-53.0, 0.0]


@given(logits3, logits3, st.integers(0, 2), st.floats(0, 3))
@settings(max_examples=30, deadline=None)
def test_cross_entropy_plus_kl_adds_the_two(natural, changed, label, weight):
    objective = with_cross_entropy(weight)
    value = objective(row(changed), torch.tensor([label]), row(natural)).item()
    expected = -math.log(softmax(changed)[label]) + weight * kl(natural, changed)
    assert objective.needs_natural
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_only_kl_needs_the_natural_logits():
    needs = {name: objective.needs_natural for name, objective in OBJECTIVES.items()}
    assert needs == {"cross_entropy": False, "kl": True, "margin": False}
