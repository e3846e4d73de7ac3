"""Certified accuracy in L2 of a network that is smoothed by Gaussian noise.

The smoothed network names the class that the network names most often under noise.  It is another
classifier than the network: what is certified here says nothing of the network without noise.

Source: Cohen, Rosenfeld and Kolter, "Certified adversarial robustness via randomized smoothing",
ICML 2019, algorithm CERTIFY.
"""

from __future__ import annotations

import math
import time

import torch
from scipy.stats import beta, norm
from torch import Tensor, nn

from cure.config import checked
from cure.data import ImageSet, batches
from cure.errors import ConfigError
from cure.evaluation.metrics import Result, accuracy_of
from cure.evaluation.runner import Progress, no_progress
from cure.models.checks import predicted
from cure.utils.engine import Engine
from cure.utils.modes import evaluating
from cure.utils.random import generator

SELECTION = 100
"""Draws that choose the class (n0)."""

ESTIMATION = 1000
"""Draws that bound its probability (n); the paper uses 100,000."""

ALPHA = 0.001
"""Probability that a radius is too long."""


def lower_bound(hits: int, draws: int, alpha: float = ALPHA) -> float:
    """Clopper and Pearson's lower bound of a probability, right with probability 1 - alpha.

    >>> round(lower_bound(100, 100), 4), lower_bound(0, 100)
    (0.9333, 0.0)
    """
    return float(beta.ppf(alpha, hits, draws - hits + 1)) if hits else 0.0


@torch.no_grad()
def class_counts(
    model: nn.Module, image: Tensor, sigma: float, draws: int, size: int, noise: torch.Generator
) -> Tensor:
    """How often each class is named under noise, [K] int64.

    Args:
        model: in evaluation mode.
        image: [C, H, W].
        sigma: standard deviation of the noise, for images in [0, 1]; noisy images may leave it.
        draws: how many noisy images.
        size: how many at once.
        noise: on the image's device.
    """
    counts = None
    for first in range(0, draws, size):
        shape = (min(size, draws - first), *image.shape)
        drawn = torch.randn(shape, generator=noise, device=image.device)
        logits = model(image + sigma * drawn)
        voted = predicted(logits)
        found = torch.bincount(voted[voted >= 0], minlength=logits.shape[1])
        counts = found if counts is None else counts + found
    assert counts is not None
    return counts


def certified_radius(
    model: nn.Module,
    image: Tensor,
    sigma: float,
    noise: torch.Generator,
    *,
    selection: int = SELECTION,
    estimation: int = ESTIMATION,
    alpha: float = ALPHA,
    size: int = 256,
) -> tuple[int, float] | None:
    """The class of the smoothed network, and the L2 radius in which it stays; None: it abstains."""
    top = int(class_counts(model, image, sigma, selection, size, noise).argmax())
    hits = int(class_counts(model, image, sigma, estimation, size, noise)[top])
    bound = lower_bound(hits, estimation, alpha)
    return (top, sigma * float(norm.ppf(bound))) if bound > 1 / 2 else None


def check_sigma(sigma: float) -> None:
    """Refuse what is no standard deviation.

    Raises:
        ConfigError: in one sentence.
    """
    if not 0 < checked("smoothing", sigma, float) < math.inf:
        raise ConfigError(f"smoothing: expected a standard deviation above 0, got {sigma:g}")


def smoothed_accuracy(
    model: nn.Module,
    images: ImageSet,
    sigma: float,
    *,
    engine: Engine,
    batch_size: int = 256,
    seed: int = 0,
    selection: int = SELECTION,
    estimation: int = ESTIMATION,
    progress: Progress = no_progress,
) -> Result:
    """Accuracy of the smoothed network, and at which radii it is certified.

    Args:
        model: on the engine's device.
        images: what to certify on; each takes ``selection + estimation`` passes.
        sigma: of the noise, for images in [0, 1]; 0.25 and 0.5 are customary.
        engine: device and memory layout.
        batch_size: noisy images at once.
        seed: of the noise.
        selection: see :data:`SELECTION`.
        estimation: see :data:`ESTIMATION`.
        progress: called with ("smoothing", images done, images in all).

    Returns:
        Accuracy with its interval; ``abstained`` in percent; ``points`` with accuracy certified at
        radii from 0 on in steps of sigma; settings.

    Raises:
        ConfigError: when ``sigma`` is not above 0.
    """
    check_sigma(sigma)
    began = time.perf_counter()
    radii = torch.full((len(images),), -1.0)
    abstained = 0
    with evaluating(model):
        for batch in batches(images.to(engine.device), 1):
            noise = generator(engine.device, seed, "smoothing", batch.step)
            found = certified_radius(
                model,
                engine.arrange(batch.image)[0],
                sigma,
                noise,
                selection=selection,
                estimation=estimation,
                size=batch_size,
            )
            abstained += found is None
            if found is not None and found[0] == int(batch.label):
                radii[batch.step] = found[1]
            progress("smoothing", batch.step + 1, len(images))
    # No radius can be longer than that of a class that every draw names.
    longest = sigma * float(norm.ppf(lower_bound(estimation, estimation)))
    points = []
    for step in range(int(longest / sigma) + 1):
        share = accuracy_of(radii >= step * sigma, 0.0)
        points.append({"radius": step * sigma} | {k: share[k] for k in ("accuracy", "interval")})
    return accuracy_of(radii >= 0, time.perf_counter() - began) | {
        "abstained": 100 * abstained / len(images),
        "points": points,
        "settings": {
            "norm": "L2",
            "sigma": sigma,
            "selection": selection,
            "estimation": estimation,
            "alpha": ALPHA,
        },
        "seed": seed,
    }
