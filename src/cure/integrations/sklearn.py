"""Training by a recipe behind ``fit``, ``predict`` and ``score`` of scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch import nn

from cure.data import as_images, to_unit
from cure.data.images import replace_labels
from cure.errors import DataError, some
from cure.runs.folder import RunFolder
from cure.training.run import Overrides, train


class RobustClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A robust image classifier as an estimator, for pipelines and cross-validation.

    Args:
        recipe: name or path, as for :func:`cure.train`.
        overrides: settings of the recipe, as for :func:`cure.train`.
        model: the network; by default the one of the recipe.  It is copied.
        run: the folder to make; by default the first free ``runs/NAME[-N]``.

    Attributes:
        classes_: labels, sorted.
        run_: the finished :class:`cure.Run`, for :func:`cure.evaluate`.

    >>> classifier = RobustClassifier("digits", {"training.epochs": 2})           # doctest: +SKIP
    >>> classifier.fit(images, labels).score(test_images, test_labels)            # doctest: +SKIP
    0.94
    """

    def __init__(
        self,
        recipe: str | Path,
        overrides: Overrides = (),
        model: nn.Module | None = None,
        run: str | Path | None = None,
    ) -> None:
        self.recipe = recipe
        self.overrides = overrides
        self.model = model
        self.run = run

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:  # noqa: N803
        """Train into a new run folder.

        Args:
            X: images, uint8 or floats in [0, 1]: [N, H, W], [N, H, W, C] or [N, C, H, W].
            y: labels [N], numbers or names.
        """
        try:
            self.classes_, label = np.unique(np.asarray(y), return_inverse=True)
        except TypeError:  # they have no order
            raise DataError(
                "expected labels that are numbers or names, not both and none left out, got "
                f"{some(sorted({type(one).__name__ for one in np.asarray(y).flat}))}; correct them"
            ) from None
        if len(self.classes_) < 2:
            raise DataError(
                f"expected labels of at least two classes, got only {some(map(str, self.classes_))}"
                "; add images of another class"
            )
        images = as_images((X, label))
        images = replace_labels(images, images.label, tuple(map(str, self.classes_)))
        self.run_ = train(
            self.recipe,
            self.overrides,
            run=self.run,
            model=self.model,
            data=images,
            quiet=True,
        )
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """Probabilities [N, K] of the classes, in the order of ``classes_``."""
        check_is_fitted(self)
        unlabelled = np.zeros(len(np.asarray(X)), int)
        images = as_images((X, unlabelled), "test", self.run_.config.data)
        kind = RunFolder.open(self.run_.path).kind
        images = images.with_channels(kind.channels)
        ours, theirs = kind.shape, images.kind.shape
        if ours != theirs:
            raise DataError(f"expected images as in fit, {ours}, got {theirs}; convert them")
        model = self.run_.model()
        with torch.no_grad():
            parts = [model(to_unit(part)).softmax(dim=1) for part in images.parts()]
        return torch.cat(parts).numpy()

    def predict(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """The most probable label of each image."""
        best = self.predict_proba(X).argmax(axis=1)
        found: NDArray[Any] = self.classes_[best]
        return found
