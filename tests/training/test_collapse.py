"""What counts as guessing: with many and with few validation images."""

import pytest

from cure.training.collapse import CollapseDetector, Guessing

FEW = Guessing([4, 3, 3], balanced=False)
MANY = Guessing([100] * 10, balanced=False)


def after(guessing: Guessing, *natural: float, start: float | None = None) -> CollapseDetector:
    """Of validations with these natural accuracies; patience 5."""
    detector = CollapseDetector(guessing, 5)
    if start is not None:
        detector.start({"natural": start})
    for accuracy in natural:
        detector.add({"natural": accuracy})
    return detector


def test_many_images_tell_that_a_network_does_not_learn() -> None:
    # 10 % and two standard deviations: 2 * sqrt(0.1 * 0.9 / 1000) = 1.897 %.
    assert MANY.limit == pytest.approx(11.897, abs=1e-3)
    assert after(MANY, *[11.8] * 5).lasting
    assert not after(MANY, *[11.8] * 4).lasting
    assert not after(MANY, *[12.0] * 5).lasting


def test_few_images_do_not_stop_a_network_that_is_learning() -> None:
    """Of ten images in three classes, guessing gets up to six right: that proves nothing."""
    assert FEW.limit == pytest.approx(63.1, abs=0.1)
    assert not after(FEW, *[60.0] * 9, start=60.0).lasting
    assert not after(FEW, *[30.0] * 9, start=60.0).lasting, "nor is a slow start given up"


def test_few_images_stop_a_network_that_had_learnt() -> None:
    assert after(FEW, 90.0, *[40.0] * 5).lasting
    assert after(FEW, *[40.0] * 5, start=90.0).lasting
    fallen = after(FEW, 90.0, 60.0)
    assert not fallen.fallen, "six of ten is not chance, so its weights are kept"


def test_naming_the_largest_class_is_chance() -> None:
    """One in six images is of the first class, which is not so many that classes are balanced."""
    unequal = Guessing([180] + [100] * 9, balanced=False)
    assert unequal.chance == pytest.approx(100 * 180 / 1080)
    assert after(unequal, *[100 * 180 / 1080] * 5).lasting
    assert not after(unequal, *[18.0] * 5).lasting
