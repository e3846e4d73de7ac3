"""scikit-learn's own tools with our estimator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from torch import nn

import cure
from cure.errors import DataError
from cure.integrations.sklearn import RobustClassifier
from helpers import bright_or_dark

NAMES = np.array(["level 9", "level 10", "level 11"])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3))


@pytest.fixture
def classifier(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RobustClassifier:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "short.yaml"
    recipe.write_text(
        "data: {source: digits, validation: 15, augment: {crop_padding: 0, flip: false}}\n"
        "method: {name: at}\n"
        "training: {epochs: 12, batch_size: 10, threads: 1}\n"
    )
    return RobustClassifier(recipe, ["threat.epsilon=0.05"], model=network())


def test_fit_predict_and_score(classifier: RobustClassifier) -> None:
    images = bright_or_dark(150, classes=3)
    test = bright_or_dark(60, "test", classes=3)
    assert is_classifier(classifier)
    with pytest.raises(NotFittedError):
        classifier.predict(test.image)
    assert classifier.fit(images.image, NAMES[images.label]) is classifier
    assert classifier.classes_.tolist() == ["level 10", "level 11", "level 9"]
    expected = classifier.run_.model()(test.image / 255).softmax(dim=1).detach()
    found = classifier.predict_proba(test.image)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    predicted = classifier.predict(test.image.numpy())
    assert predicted.tolist() == [classifier.classes_[k] for k in expected.argmax(dim=1)]
    right = float((predicted == NAMES[test.label]).mean())
    assert classifier.score(test.image, NAMES[test.label]) == pytest.approx(right)
    assert right > 0.8
    result = cure.evaluate(classifier.run_, data=(test.image, NAMES[test.label]), attacks="pgd5")
    assert result["natural"]["accuracy"] == pytest.approx(100 * right)
    assert result["threat"]["epsilon"] == 0.05


def test_cross_validation_makes_a_run_for_each_fold(
    classifier: RobustClassifier, tmp_path: Path
) -> None:
    images = bright_or_dark(150, classes=3)
    scores = cross_val_score(clone(classifier), images.image.numpy(), images.label.numpy(), cv=2)
    assert min(scores) > 0.6
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_labels_that_make_no_classes_are_refused(classifier: RobustClassifier) -> None:
    images = np.zeros((60, 8, 8), np.uint8)
    with pytest.raises(DataError, match="labels of at least two classes, got only 'cat'"):
        classifier.fit(images, ["cat"] * 60)
    with pytest.raises(DataError, match="numbers or names, not both"):
        classifier.fit(images, np.array([None, "cat"] * 30, dtype=object))
    assert not Path("runs").exists()


def test_images_of_another_kind_than_in_fit_are_refused(classifier: RobustClassifier) -> None:
    images = bright_or_dark(60, classes=3)
    classifier.set_params(overrides=["threat.epsilon=0.05", "training.epochs=1"])
    classifier.fit(images.image, images.label)
    for shape, came in (((2, 8, 8, 3), "8x8 RGB"), ((2, 16, 8), "8x16 grey")):
        with pytest.raises(DataError, match=f"expected images as in fit, 8x8 grey, got {came}"):
            classifier.predict(np.zeros(shape, np.uint8))


def test_grey_images_are_colour_for_a_classifier_of_colour(classifier: RobustClassifier) -> None:
    images = bright_or_dark(60, classes=3)
    colour = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    classifier.set_params(overrides=["threat.epsilon=0.05", "training.epochs=1"], model=colour)
    classifier.fit(images.image.expand(-1, 3, -1, -1), images.label)
    grey, wide = images.image[:5], images.image[:5].expand(-1, 3, -1, -1)
    np.testing.assert_array_equal(classifier.predict_proba(grey), classifier.predict_proba(wide))
