"""Figures of an evaluation: accuracy with its interval, NRR, distances to the nearest mistake."""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from cure.utils.stats import balanced_accuracy, median_interval, wilson

Result = dict[str, Any]


def nrr(natural: float, robust: float) -> float:
    """Natural-Robust Ratio: the harmonic mean of two accuracies in percent.

    ``2 natural robust / (natural + robust)``; 0 when both are.  Source: CURE, ICLR 2024, Sec. 5.
    """
    return 2 * natural * robust / (natural + robust) if natural + robust else 0.0


def accuracy_of(correct: Tensor, seconds: float) -> Result:
    """Accuracy in percent with its interval, from one truth value an image [N]."""
    count, right = len(correct), int(correct.sum())
    return {
        "accuracy": 100 * right / count,
        "interval": list(wilson(right, count)),
        "correct": right,
        "n": count,
        "seconds": round(seconds, 2),
    }


def pack(right: Tensor) -> str:
    """Truth values [N] as text: a bit an image, most significant first, in base 64.

    >>> import torch
    >>> unpack(pack(torch.tensor([True, False, True])), 3).tolist()
    [True, False, True]
    """
    return b64encode(np.packbits(right.cpu().numpy().astype(bool)).tobytes()).decode()


def unpack(text: str, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """The ``count`` truth values that :func:`pack` wrote."""
    bits = np.frombuffer(b64decode(text, validate=True), np.uint8)
    return np.unpackbits(bits, count=count).astype(bool)


def by_class(correct: Tensor, label: Tensor, classes: int) -> Result:
    """Accuracy of each class and their mean, in percent.

    Args:
        correct: one truth value an image [N].
        label: the class of each image [N].
        classes: number of classes.

    Returns:
        ``accuracy_by_class``: a value a class, None without an image of it;
        ``balanced_accuracy``: their mean; ``balanced_interval``: its 95 % interval
        (:func:`~cure.utils.stats.balanced_accuracy`).
    """
    counts = label.bincount(minlength=classes).tolist()
    right = label[correct].bincount(minlength=classes).tolist()
    mean, low, high = balanced_accuracy(right, counts)
    return {
        "balanced_accuracy": mean,
        "balanced_interval": [low, high],
        "accuracy_by_class": [
            100 * sure / count if count else None for sure, count in zip(right, counts, strict=True)
        ],
    }


def majority(label: Tensor, classes: Sequence[str]) -> Result:
    """The largest class and the accuracy in percent of always naming it."""
    counts = label.bincount(minlength=len(classes))
    largest = int(counts.argmax())
    return {"class": classes[largest], "accuracy": 100 * int(counts[largest]) / len(label)}


def smallest(distances: Tensor) -> Result:
    """Median of the smallest changes, with its interval, and the accuracy that they leave.

    Args:
        distances: [N]; 0 where an image was wrong as it is, infinite where nothing was found.

    Returns:
        ``median_distance`` over all images and its 95 % interval
        (:func:`~cure.utils.stats.median_interval`); None is infinite;
        ``distance_curve``: [distance, percent of the images still right] at 101 quantiles.
    """
    ordered, count = distances.sort().values, len(distances)
    median, low, high = median_interval(ordered.tolist())

    def number(value: float) -> float | None:
        return float(value) if math.isfinite(value) else None

    quantiles = [round(share * (count - 1) / 100) for share in range(101)]
    return {
        "median_distance": number(median),
        # No distance is below 0, so that is the limit where order statistics give none.
        "median_interval": [number(max(0.0, low)), number(high)],
        "distance_curve": [
            [number(float(ordered[place])), 100 * float((ordered > ordered[place]).double().mean())]
            for place in dict.fromkeys(quantiles)
        ],
    }
