"""AutoAttack in the versions of its package, and the parts of the standard one alone.

Source: Croce & Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks, ICML 2020.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from cure.attacks.early_exit import AnySizeSquare, PlainLayout, standard_part
from cure.attacks.local_forward import LocalNetwork
from cure.attacks.pgd import attack_mode
from cure.attacks.registry import EvaluationAttack, Part, add_attack, unchanged
from cure.attacks.threat import Threat
from cure.models.fuse import folded_copy
from cure.utils.random import seeded

# Forward passes for an image that is never fooled; and the fewest classes: the DLR loss compares
# with the third largest logit, the targeted one with the fourth.
_COST = {
    "apgd-ce": (102, 2),
    "apgd-dlr": (102, 3),
    "apgd-t": (919, 4),
    "fab": (1400, 2),
    "fab-t": (1400, 2),
    "square": (5002, 2),
}


def package_part(
    kind: str, part: str, network: nn.Module, image: Tensor, threat: Threat, seed: int
) -> Any:
    """The package's object for one part of a version of AutoAttack, with the package's settings.

    Args:
        kind: the version: "standard", "plus" or "rand".
        part: one of its parts.
        network: in evaluation mode, takes contiguous images and gives contiguous gradients.
        image: [B, C, H, W] contiguous, what it will attack.
        threat: the ball.
        seed: of PyTorch's global generator, which is seeded at the beginning of each batch.

    Returns:
        An object whose ``perturb(image, label)`` gives [B, C, H, W]: a fooling image in the ball
        where one was found, else the image itself.
    """
    with torch.no_grad():
        classes = network(image[:1]).shape[1]
    suite = AutoAttack(
        network,
        norm=threat.norm,
        eps=threat.epsilon,
        seed=seed,
        device=image.device,
        version=kind,
    )
    attack: Any = {
        "apgd-ce": suite.apgd,
        "apgd-dlr": suite.apgd,
        "apgd-t": suite.apgd_targeted,
        "fab": suite.fab,
        "fab-t": suite.fab,
        "square": suite.square,
    }[part]
    if part == "square":
        attack = AnySizeSquare(
            network,
            norm=threat.norm,
            eps=threat.epsilon,
            seed=seed,
            device=image.device,
            n_restarts=attack.n_restarts,
            n_queries=attack.n_queries,
            p_init=attack.p_init,
            loss=attack.loss,
            resc_schedule=attack.rescale_schedule,
        )
    attack.seed = seed
    if part in ("apgd-ce", "apgd-dlr"):
        attack.loss = part.removeprefix("apgd-")
    if part in ("apgd-t", "fab-t"):
        attack.n_target_classes = min(attack.n_target_classes, classes - 1)
    if part in ("fab", "fab-t"):
        attack.targeted = part == "fab-t"
    if part == "fab-t":
        attack.n_restarts = 1
    return attack


def _part(kind: str, part: str) -> Part:
    def run(
        model: nn.Module,
        image: Tensor,
        label: Tensor,
        threat: Threat,
        seed: int,
        number: int,  # noqa: ARG001 - the package begins each batch with the same seed
    ) -> Tensor:
        # The package seeds PyTorch's global generators itself; they get their state back.
        with attack_mode(model), seeded(seed), torch.no_grad():
            plain = image.contiguous()
            if kind == "standard" and threat.norm != "L1":
                return standard_part(part, model, plain, label, threat, seed)
            attack = package_part(kind, part, PlainLayout(model), plain, threat, seed)
            found: Tensor = attack.perturb(plain, label)
            # The package's projection in L1 leaves [0, 1] by rounding.
            return found.clamp(0.0, 1.0)

    passes, least_classes = _COST[part]
    return Part(run, passes, least_classes, gradient=part != "square")


def _prepared(model: nn.Module, image: Tensor) -> nn.Module:
    """The network with BatchNorm folded, channels innermost, without weight gradients."""
    network = folded_copy(model, image)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return LocalNetwork(network, image)


def _version(
    name: str, label: str, description: str, kind: str, parts: tuple[str, ...], strength: int
) -> EvaluationAttack:
    settings = {
        "version": kind,
        "parts": list(parts),
        "package": "pyautoattack",
        "package_version": version("pyautoattack"),
    }
    return add_attack(
        EvaluationAttack(
            name,
            description,
            settings,
            {part: _part(kind, part) for part in parts},
            label=label,
            strength=strength,
            reference="square" in parts and len(parts) > 1,
            norms=("Linf", "L2", "L1"),
            # A network that draws at random is attacked as it is.
            prepare=unchanged if kind == "rand" else _prepared,
        )
    )


AUTOATTACK = _version(
    "autoattack",
    "AutoAttack",
    "AutoAttack standard: APGD-CE, targeted APGD-DLR, targeted FAB, Square (pyautoattack)",
    "standard",
    ("apgd-ce", "apgd-t", "fab-t", "square"),
    6,
)
PLUS = _version(
    "autoattack-plus",
    "AutoAttack-plus",
    "AutoAttack plus: six parts, five restarts of the untargeted ones (pyautoattack)",
    "plus",
    ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    7,
)
RAND = _version(
    "autoattack-rand",
    "AutoAttack-rand",
    "AutoAttack rand, for networks that draw at random: APGD-CE and APGD-DLR, gradients averaged "
    "over 20 draws (pyautoattack)",
    "rand",
    ("apgd-ce", "apgd-dlr"),
    5,
)
for _name, _label, _title in (
    ("apgd-ce", "APGD-CE", "APGD on cross-entropy"),
    ("apgd-t", "APGD-T", "targeted APGD on DLR"),
    ("fab-t", "FAB-T", "targeted FAB"),
    ("square", "Square", "Square, black box, 5,000 queries"),
):
    _version(_name, _label, f"{_title} alone, as in AutoAttack standard", "standard", (_name,), 3)
