"""Calibration error of probabilities, and the temperature that corrects it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from cure.attacks import Threat
from cure.attacks.registry import evaluation_attack
from cure.data import ImageSet
from cure.data.loader import batches
from cure.utils.engine import Engine

BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy, in bins of equal width.

    Attributes:
        ece: expected calibration error, from 0 to 1: the mean over images of
            ``|accuracy - confidence|`` of their bin.
        bins: for each bin that holds images its count, mean confidence and accuracy (0 to 1).
    """

    ece: float
    bins: list[tuple[int, float, float]]


def reliability(logits: Tensor, label: Tensor, bins: int = BINS) -> Reliability:
    """The reliability of the top probability.

    Args:
        logits: [N, classes].
        label: [N] int64.
        bins: number of bins of (0, 1].

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.

    >>> reliability(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1])).bins[0][0]
    2
    """
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    right = (predicted == label).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    found, error = [], 0.0
    for number in sorted(set(place.tolist())):
        inside = place == number
        count = int(inside.sum())
        mean, accuracy = float(confidence[inside].mean()), float(right[inside].mean())
        found.append((count, mean, accuracy))
        error += count / len(label) * abs(accuracy - mean)
    return Reliability(error, found)


def calibration_under_attack(
    model: nn.Module,
    images: ImageSet,
    threat: Threat,
    *,
    attack: str = "pgd20",
    batch_size: int = 100,
    seed: int = 0,
    engine: Engine,
) -> dict[str, Reliability]:
    """The reliability of a network on images as they are and on attacked ones.

    Every image is attacked, those that are misclassified as they are too; of each, the last
    iterate counts, whether or not it fools the network.

    Args:
        model: in evaluation mode, on the device of the engine; takes images in [0, 1].
        images: of one split.
        threat: the ball.
        attack: name of an evaluation attack with one part.
        batch_size: images at once.
        seed: of random starts.
        engine: device.

    Returns:
        By "natural" and the name of the attack.

    Raises:
        ConfigError: for an unknown attack, or one that is not defined in the threat's norm.
    """
    images = images.to(engine.device)
    (part,) = evaluation_attack(attack).defined(len(images.classes), threat).parts.values()
    found: dict[str, list[Tensor]] = {"natural": [], attack: []}
    for batch in batches(images, batch_size):
        image = engine.arrange(batch.image)
        attacked = part.run(model, image, batch.label, threat, seed, batch.step)
        with torch.no_grad():
            found["natural"].append(model(image).float().cpu())
            found[attack].append(model(attacked).float().cpu())
    label = images.label.cpu()
    return {name: reliability(torch.cat(logits), label) for name, logits in found.items()}


def fit_temperature(logits: Tensor, label: Tensor) -> float:
    """The number that logits are divided by so that cross-entropy on these images is least.

    Args:
        logits: [N, classes], of images that were not trained on.
        label: [N] int64.

    Returns:
        Between 0.01 and 100; above 1 where the network is too sure.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.

    >>> logits = torch.tensor([[4.0, 0.0]] * 4)
    >>> round(4 / fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 3)  # log(3)
    1.099
    """
    exact = logits.double()

    def loss(exponent: float) -> float:
        return float(torch.nn.functional.cross_entropy(exact / 10**exponent, label))

    found = minimize_scalar(loss, bounds=(-2, 2), method="bounded", options={"xatol": 1e-5})
    return float(10**found.x)
