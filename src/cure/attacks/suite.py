"""The attacks that evaluation runs, by the names that the field's tables use."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from cure.attacks.objectives import CROSS_ENTROPY, MARGIN
from cure.attacks.perturb import Attack, crafting
from cure.attacks.threat import Threat
from cure.errors import ConfigError, unknown
from cure.randomness import derive, generator


@dataclass(frozen=True)
class Outcome:
    """What an attack did to a batch of images.

    Attributes:
        adversarial: [B, C, H, W], inside the ball and [0, 1]; not necessarily fooling.
        parts: for attacks made of parts, how many images each of them fooled first.
    """

    adversarial: Tensor
    parts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationAttack:
    """A named attack with fixed settings.

    Attributes:
        name: as in result files.
        description: one line for ``cure list attacks``.
        settings: what stands in the result file; sizes as shares of epsilon where they scale.
        run: (model, image, label, threat, seed, batch number) to an outcome.
        least_classes: the attack is not defined for fewer.
    """

    name: str
    description: str
    settings: dict[str, Any]
    run: Callable[[nn.Module, Tensor, Tensor, Threat, int, int], Outcome]
    least_classes: int = 2


def pgd(steps: int) -> EvaluationAttack:
    """PGD on cross-entropy: uniform start, one restart, step epsilon / 4, last iterate.

    Source: Madry et al., ICLR 2018; the step is 2/255 at epsilon 8/255.
    """

    def run(
        model: nn.Module, image: Tensor, label: Tensor, threat: Threat, seed: int, number: int
    ) -> Outcome:
        attack = Attack(threat, steps, threat.epsilon / 4, start="uniform")
        draws = generator(image.device, seed, f"pgd{steps}", number)
        return Outcome(attack(model, image, label, CROSS_ENTROPY, draws))

    return EvaluationAttack(
        f"pgd{steps}",
        f"PGD on cross-entropy, {steps} steps of epsilon/4, uniform start, last iterate",
        {
            "steps": steps,
            "step_size": "epsilon/4",
            "start": "uniform",
            "restarts": 1,
            "objective": "cross_entropy",
        },
        run,
    )


def _cw(
    model: nn.Module, image: Tensor, label: Tensor, threat: Threat, seed: int, number: int
) -> Outcome:
    attack = Attack(threat, 20, threat.epsilon / 4, start="uniform")
    draws = generator(image.device, seed, "cw", number)
    return Outcome(attack(model, image, label, MARGIN, draws))


CW = EvaluationAttack(
    "cw",
    "PGD on the C&W margin with confidence 50, 20 steps of epsilon/4: the field's Linf 'C&W'",
    {
        "steps": 20,
        "step_size": "epsilon/4",
        "start": "uniform",
        "restarts": 1,
        "objective": "margin",
        "confidence": 50,
    },
    _cw,
)

AUTOATTACK_PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")


class PlainLayout(nn.Module):
    """A network whose input gradients are laid out channel by channel.

    AutoAttack reshapes gradients in a way that fails on images stored with the channel innermost.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        # A copy, so that the hook sees the gradient that comes out of the network.
        inside = image.clone()
        if inside.requires_grad:
            inside.register_hook(torch.Tensor.contiguous)  # type: ignore[no-untyped-call]
        logits: Tensor = self.model(inside)
        return logits


def _autoattack(
    model: nn.Module, image: Tensor, label: Tensor, threat: Threat, seed: int, number: int
) -> Outcome:
    """The standard version, part by part on the images that still stand."""
    from pyautoattack import AutoAttack

    with torch.no_grad():
        classes = model(image[:1]).shape[1]
    image = image.contiguous()
    adversarial = image.clone()
    standing = torch.arange(len(label), device=image.device)
    parts: dict[str, int] = {}
    logging.getLogger("auto-attack").setLevel(logging.CRITICAL)
    devices = [image.device.index or 0] if image.device.type == "cuda" else []
    # It seeds PyTorch's global generator and calls backward: lend it the model and the generator.
    with crafting(model), torch.random.fork_rng(devices=devices):
        suite = AutoAttack(
            PlainLayout(model),
            norm=threat.norm,
            eps=threat.epsilon,
            seed=derive(seed, "autoattack", number) % 2**31,
            device=image.device,
            version="standard",
        )
        suite.apgd_targeted.n_target_classes = min(9, classes - 1)
        suite.fab.n_target_classes = min(9, classes - 1)
        for part in AUTOATTACK_PARTS:
            if not len(standing):
                break
            suite.attacks_to_run = [part]
            found, prediction = suite.run_standard_evaluation(
                image[standing], label[standing], batch_size=len(standing)
            )
            fooled = prediction != label[standing]
            adversarial[standing[fooled]] = found[fooled]
            parts[part] = int(fooled.sum())
            standing = standing[~fooled]
    return Outcome(adversarial, parts)


AUTOATTACK = EvaluationAttack(
    "autoattack",
    "AutoAttack standard: APGD-CE, targeted APGD-DLR, targeted FAB, Square (pyautoattack)",
    {
        "version": "standard",
        "parts": list(AUTOATTACK_PARTS),
        "package": "pyautoattack",
        "package_version": version("pyautoattack"),
    },
    _autoattack,
    # Targeted DLR compares the true logit, the target and the two largest others.
    least_classes=4,
)

KNOWN = {"natural": "accuracy on unchanged images"} | {
    attack.name: attack.description for attack in (pgd(20), pgd(100), CW, AUTOATTACK)
}


def evaluation_attack(name: str) -> EvaluationAttack:
    """The attack called ``name``: ``cw``, ``autoattack``, or ``pgdK`` with any number of steps.

    Raises:
        ConfigError: when the name is unknown.
    """
    if name == "cw":
        return CW
    if name == "autoattack":
        return AUTOATTACK
    steps = re.fullmatch(r"pgd-?([1-9][0-9]{0,4})", name)
    if steps is None:
        raise ConfigError(unknown("attack", name, KNOWN))
    return pgd(int(steps[1]))
