"""The attacks that evaluation runs, by the names that the field's tables use."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from cure.attacks.objectives import CROSS_ENTROPY, MARGIN
from cure.attacks.perturb import Attack, crafting
from cure.attacks.threat import Threat
from cure.errors import ConfigError, unknown
from cure.models.folding import folded_copy
from cure.randomness import generator

Run = Callable[[nn.Module, Tensor, Tensor, Threat, int, int], Tensor]
"""(model, image [B, C, H, W], label [B], threat, seed, number of the batch) to adversarial images:
inside the ball and [0, 1], not necessarily fooling."""


@dataclass(frozen=True)
class Part:
    """A part of an attack, which runs on the images that the parts before it left standing.

    Attributes:
        run: the attack on one batch.
        passes: about how many forward passes that takes when no image is fooled, for progress.
    """

    run: Run
    passes: int = 1


def unchanged(model: nn.Module, image: Tensor) -> nn.Module:  # noqa: ARG001
    """The network itself."""
    return model


@dataclass(frozen=True)
class EvaluationAttack:
    """A named attack with fixed settings.

    Attributes:
        name: as in result files.
        description: one line for ``cure list attacks``.
        settings: what stands in the result file; sizes as shares of epsilon where they scale.
        parts: by name, in their order; an attack of one part calls it by its own name.
        least_classes: the attack is not defined for fewer.
        prepare: (model, some images) to the network that the parts attack; whatever fools it is
            tried on the model itself.
    """

    name: str
    description: str
    settings: dict[str, Any]
    parts: Mapping[str, Part]
    least_classes: int = 2
    prepare: Callable[[nn.Module, Tensor], nn.Module] = unchanged


def pgd(steps: int) -> EvaluationAttack:
    """PGD on cross-entropy: uniform start, one restart, step epsilon / 4, last iterate.

    Source: Madry et al., ICLR 2018; the step is 2/255 at epsilon 8/255.
    """

    def run(
        model: nn.Module, image: Tensor, label: Tensor, threat: Threat, seed: int, number: int
    ) -> Tensor:
        attack = Attack(threat, steps, threat.epsilon / 4, start="uniform")
        draws = generator(image.device, seed, f"pgd{steps}", number)
        return attack(model, image, label, CROSS_ENTROPY, draws)

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
        {f"pgd{steps}": Part(run, steps)},
    )


def _cw(
    model: nn.Module, image: Tensor, label: Tensor, threat: Threat, seed: int, number: int
) -> Tensor:
    attack = Attack(threat, 20, threat.epsilon / 4, start="uniform")
    draws = generator(image.device, seed, "cw", number)
    return attack(model, image, label, MARGIN, draws)


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
    {"cw": Part(_cw, 20)},
)


def _autoattack_part(part: str) -> Run:
    def run(
        model: nn.Module,
        image: Tensor,
        label: Tensor,
        threat: Threat,
        seed: int,
        number: int,  # noqa: ARG001 - the package begins each batch with the same seed
    ) -> Tensor:
        from cure.attacks.autoattack import standard_part

        devices = [image.device.index or 0] if image.device.type == "cuda" else []
        # It seeds PyTorch's global generator: lend it the generator and the network.
        with crafting(model), torch.random.fork_rng(devices=devices):
            return standard_part(part, model, image.contiguous(), label, threat, seed)

    return run


def _prepared(model: nn.Module, image: Tensor) -> nn.Module:
    """The network with BatchNorm folded, channels innermost, without weight gradients."""
    network = folded_copy(model, image)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


AUTOATTACK = EvaluationAttack(
    "autoattack",
    "AutoAttack standard: APGD-CE, targeted APGD-DLR, targeted FAB, Square (pyautoattack)",
    {
        "version": "standard",
        "parts": ["apgd-ce", "apgd-t", "fab-t", "square"],
        "package": "pyautoattack",
        "package_version": version("pyautoattack"),
    },
    {
        "apgd-ce": Part(_autoattack_part("apgd-ce"), 102),
        "apgd-t": Part(_autoattack_part("apgd-t"), 919),
        "fab-t": Part(_autoattack_part("fab-t"), 1400),
        "square": Part(_autoattack_part("square"), 5002),
    },
    # Targeted DLR compares the true logit, the target and the two largest others.
    least_classes=4,
    prepare=_prepared,
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
