"""How well a classifier does, with what it was asked: accuracies, intervals, settings, seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cure.attacks import Threat
from cure.attacks.suite import EvaluationAttack, evaluation_attack
from cure.data import ImageSet, batches
from cure.engine import Engine
from cure.errors import ModelError

Result = dict[str, Any]
Progress = Callable[[str, int, int], None]


def silent(name: str, done: int, count: int) -> None:
    """Tell nobody."""


def wilson(correct: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a share, in percent; 95 % by default.

    Source: Wilson, JASA 1927; unlike the normal interval it holds at 0 % and 100 %.

    >>> [round(limit, 1) for limit in wilson(0, 100)]
    [0.0, 3.7]
    """
    share = correct / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    # At the ends the limit is exact; rounding would leave 4e-17 in its place.
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == count else centre + half
    return 100 * low, 100 * high


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


def check_outputs(model: nn.Module, image: Tensor, classes: int) -> None:
    """Refuse what attacks would silently misread.

    Args:
        model: in evaluation mode.
        image: [B, C, H, W] in [0, 1], some of the images to be evaluated.
        classes: number of classes of the data.

    Raises:
        ModelError: when the output is no finite logits [B, classes].
    """
    with torch.no_grad():
        try:
            logits = model(image)
        except RuntimeError as error:
            raise ModelError(
                f"the model cannot take images of shape {list(image.shape[1:])}: "
                f"{str(error).splitlines()[0]}; resize with data.resize or name another model"
            ) from None
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(image):
        came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"expected logits of shape [{len(image)}, {classes}], got {came}")
    if logits.shape[1] != classes:
        raise ModelError(
            f"the model returns {logits.shape[1]} logits but the data has {classes} classes; "
            "name a model for these classes"
        )
    if not bool(logits.isfinite().all()):
        raise ModelError(
            "the model returns values that are not finite; its weights are damaged or its input "
            "is expected in another range than [0, 1]"
        )
    sums = logits.sum(dim=1)
    if bool((logits >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise ModelError(
            "the model returns probabilities, not logits; remove its softmax: through it, "
            "gradients vanish and attacks look weaker than they are"
        )


def measure(
    model: nn.Module,
    images: ImageSet,
    attacks: Sequence[str],
    threat: Threat,
    *,
    engine: Engine,
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress = silent,
) -> Result:
    """Natural accuracy and accuracy under each attack, of one model on one set of images.

    An image that is misclassified as it is counts as lost and is not attacked; the worst case
    combines the attacks image by image and runs nothing twice.  Several ranks share the batches,
    and each has the result of one process.

    Args:
        model: takes images in [0, 1], returns logits; used in evaluation mode, then restored.
        images: what to evaluate on.
        attacks: names from :func:`~cure.attacks.suite.evaluation_attack`; "natural" is implied.
        threat: the ball.
        engine: device and memory layout; evaluation computes in float32 whatever its precision.
        batch_size: images attacked at once.
        seed: of random starts.
        progress: told (attack, images done, images in all).

    Returns:
        {"natural": ..., "attacks": {name: ...}, "worst_case": ..., "nrr": {...}}, accuracies in
        percent with Wilson 95 % intervals.

    Raises:
        ConfigError: for an unknown attack, before anything is computed.
        DataError: when there is no image, or a label without a class.
        ModelError: when the model's output is no logits.
    """
    chosen = [evaluation_attack(name) for name in dict.fromkeys(attacks) if name != "natural"]
    images = images.checked().to(engine.device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        first = next(batches(images, batch_size))
        check_outputs(model, engine.arrange(first.image), len(images.classes))
        for attack in chosen:
            if len(images.classes) < attack.least_classes:
                raise ModelError(
                    f"{attack.name} needs at least {attack.least_classes} classes, the data has "
                    f"{len(images.classes)}; leave it out and use pgd100 and cw"
                )
        began = time.perf_counter()
        natural = _predict(model, images, engine, batch_size) == images.label
        result: Result = {"natural": accuracy_of(natural, time.perf_counter() - began)}
        progress("natural", len(images), len(images))
        verdicts = {}
        result["attacks"] = {}
        for attack in chosen:
            verdicts[attack.name], result["attacks"][attack.name] = _attack(
                model, images, natural, attack, threat, engine, batch_size, seed, progress
            )
    finally:
        for module, training in modes:
            module.training = training
    if verdicts:
        worst = torch.stack(list(verdicts.values())).all(dim=0)
        result["worst_case"] = accuracy_of(worst, 0.0) | {"over": list(verdicts)}
        del result["worst_case"]["seconds"]
    result["nrr"] = {
        name: nrr(result["natural"]["accuracy"], result["attacks"][name]["accuracy"])
        if name in verdicts
        else None
        for name in ("cw", "autoattack")
    }
    return result


@torch.no_grad()
def _predict(model: nn.Module, images: ImageSet, engine: Engine, batch_size: int) -> Tensor:
    predicted = torch.zeros_like(images.label)
    for batch in batches(images, batch_size):
        if batch.step % engine.world == engine.rank:
            predicted[batch.index] = model(engine.arrange(batch.image)).argmax(dim=1)
    return engine.total(predicted)


def _attack(
    model: nn.Module,
    images: ImageSet,
    natural: Tensor,
    attack: EvaluationAttack,
    threat: Threat,
    engine: Engine,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> tuple[Tensor, Result]:
    """Which images withstand one attack [N], and its part of the result."""
    robust = torch.zeros_like(images.label)
    targets = natural.nonzero().flatten()
    parts: dict[str, int] = {}
    furthest = 0.0
    began = time.perf_counter()
    for number, start in enumerate(range(0, len(targets), batch_size)):
        if number % engine.world != engine.rank:
            continue
        index = targets[start : start + batch_size]
        batch = next(batches(images.subset(index), len(index)))
        image = engine.arrange(batch.image)
        outcome = attack.run(model, image, batch.label, threat, seed, number)
        change = outcome.adversarial - image
        furthest = max(furthest, float(threat.distance(change).max()))
        _check_allowed(outcome.adversarial, furthest, attack.name, threat)
        with torch.no_grad():
            right = model(outcome.adversarial).argmax(dim=1) == batch.label
        robust[index] = right.to(robust.dtype)
        for part, fooled in outcome.parts.items():
            parts[part] = parts.get(part, 0) + fooled
        progress(attack.name, start + len(index), len(targets))
    robust = engine.total(robust).bool()
    (furthest,) = engine.largest(furthest)
    if engine.world > 1:
        progress(attack.name, len(targets), len(targets))
        # A rank whose images were all fooled early has not met every part.
        shares, parts = engine.gather(parts), {}
        for part, fooled in (item for share in shares for item in share.items()):
            parts[part] = parts.get(part, 0) + fooled
    result = accuracy_of(robust, time.perf_counter() - began)
    result |= {"attacked": len(targets), "largest_change": furthest, "seed": seed}
    if parts:
        result["fooled_by"] = parts
    return robust, result | {"settings": attack.settings}


def _check_allowed(adversarial: Tensor, furthest: float, name: str, threat: Threat) -> None:
    """An attack that left the ball or [0, 1] would make the number meaningless."""
    inside = bool(((adversarial >= 0) & (adversarial <= 1)).all())
    # float32 rounding of image + change; L2 adds up the rounding of many values.
    if not inside or furthest > threat.epsilon * (1 + 1e-4) + 1e-6:
        raise RuntimeError(
            f"{name} returned images outside what the threat allows "
            f"(change {furthest:.6f} for epsilon {threat.epsilon:.6f}, in [0, 1]: {inside})"
        )
