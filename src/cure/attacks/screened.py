"""AutoAttack after two cheap screening attacks, and an estimate that stops early.

An image that a screening attack fools inside the ball is lost: the network names another class for
an allowed change.  All other images take the whole of AutoAttack.  So the accuracy is AutoAttack's
or lower, but for AutoAttack's random starts: a batch holds other images here, so each image starts
elsewhere, as it would with another seed.

``screened-ordered`` does not attack all of what stands.  Images are taken in the order of the
margin that PGD leaves them, the smallest first, and each part of AutoAttack stops after
:data:`ENOUGH` images in a row that withstood it.  That is an estimate from above: an image that was
left out might have fallen.  Where gradients are masked the order says nothing, but a part that
fools many goes on.

Sources: probability margin (PMA): Xie et al., Towards Million-Scale Adversarial Robustness
Evaluation With Stronger Individual Attacks, arXiv 2411.15210.  Order of targets: Melamed et al.,
MALT Powers Up Adversarial Attacks, NeurIPS 2024.  Steps: APGD, Croce & Hein, ICML 2020.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from cure.attacks.autoattack import AUTOATTACK
from cure.attacks.early_exit import TARGETS, EarlyExit, PlainLayout
from cure.attacks.losses import MARGIN, lead
from cure.attacks.pgd import PGD, attack_mode
from cure.attacks.registry import EvaluationAttack, Part, add_attack
from cure.attacks.threat import Threat
from cure.utils.random import seeded

STEPS = 20
"""Of either screening attack, a target class."""
NEAREST = 4
"""Target classes."""
ENOUGH = 48
"""Images in a row that a part of AutoAttack must not fool before ``screened-ordered`` ends it."""


class ProbabilityMargin(EarlyExit, APGDAttack):  # type: ignore[misc]
    """APGD on the largest wrong probability minus that of the label."""

    def _losses(self, logits: Tensor, state: dict[str, Tensor]) -> Tensor:
        return probability_margin(logits, state["label"])


class TargetMargin(EarlyExit, APGDAttack):  # type: ignore[misc]
    """APGD on the lead of a target's logit over the label's."""

    def _losses(self, logits: Tensor, state: dict[str, Tensor]) -> Tensor:
        pair = torch.stack([state["target"], state["label"]], dim=1)
        target, own = logits.gather(1, pair).unbind(dim=1)
        lead: Tensor = target - own
        return lead


def probability_margin(logits: Tensor, label: Tensor) -> Tensor:
    """Largest wrong probability minus that of the label, [B] in [-1, 1].

    >>> probability_margin(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    tensor([0.])
    """
    probability = logits.softmax(dim=1)
    own = probability.gather(1, label[:, None]).squeeze(1)
    wrong = probability.scatter(1, label[:, None], -torch.inf).amax(dim=1)
    return wrong - own


def nearest_classes(model: nn.Module, image: Tensor, label: Tensor, norm: str) -> Tensor:
    """Other classes of each image, the one with the nearest linearised boundary first.

    The boundary to class k is ``(z_y - z_k) / ||gradient of (z_y - z_k)||`` away, in the dual
    norm.  Of many classes the nine with the highest logits are compared, as AutoAttack targets
    them.

    Args:
        model: [B, C, H, W] to logits [B, K].
        image: [B, C, H, W].
        label: [B].
        norm: "Linf" or "L2", of the distance.

    Returns:
        [B, min(K - 1, 9)] int64.
    """
    leaf = image.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = model(leaf)
        others = logits.detach().scatter(1, label[:, None], -torch.inf)
        classes = others.topk(min(TARGETS, logits.shape[1] - 1), dim=1).indices
        leads = logits.gather(1, label[:, None]) - logits.gather(1, classes)
        slopes = [
            torch.autograd.grad(lead.sum(), leaf, retain_graph=True)[0].flatten(1)
            for lead in leads.unbind(dim=1)
        ]
    order = 1 if norm == "Linf" else 2
    slope = torch.stack([torch.linalg.vector_norm(g, order, dim=1) for g in slopes], dim=1)
    distance = leads.detach() / slope.clamp_min(1e-30)
    nearest: Tensor = classes.gather(1, distance.argsort(dim=1))
    return nearest


def _apgd(kind: type[Any], model: nn.Module, image: Tensor, threat: Threat, seed: int) -> Any:
    attack = kind(
        model, n_iter=STEPS, norm=threat.norm, eps=threat.epsilon, seed=seed, device=image.device
    )
    attack.init_hyperparam(image)
    return attack


def _untargeted(
    model: nn.Module, image: Tensor, label: Tensor, threat: Threat, seed: int
) -> Tensor:
    attack = _apgd(ProbabilityMargin, model, image, threat, seed)
    found: Tensor = attack.attack_single_run(image, label)[0]
    return found


def _targeted(model: nn.Module, image: Tensor, label: Tensor, threat: Threat, seed: int) -> Tensor:
    attack = _apgd(TargetMargin, model, image, threat, seed)
    classes = nearest_classes(model, image, label, threat.norm)[:, :NEAREST]
    found = image.clone()
    index = torch.arange(len(image), device=image.device)
    for target in range(classes.shape[1]):
        attack.y_target = classes[index, target]
        made, stands, *_ = attack.attack_single_run(image[index], label[index])
        found[index] = made
        index = index[stands]
        if not len(index):
            break
    return found


def _part(attack: Any, passes: int) -> Part:
    def run(
        model: nn.Module,
        image: Tensor,
        label: Tensor,
        threat: Threat,
        seed: int,
        number: int,
    ) -> Tensor:
        with attack_mode(model), seeded(seed + number), torch.no_grad():
            made: Tensor = attack(PlainLayout(model), image.contiguous(), label, threat, seed)
            return made

    return Part(run, passes)


def margin_after_pgd(model: nn.Module, image: Tensor, label: Tensor, threat: Threat) -> Tensor:
    """Lead of the label's logit over the best other one [B], after PGD on the margin.

    Args:
        model: [B, C, H, W] to logits [B, K].
        image: [B, C, H, W] in [0, 1].
        label: [B].
        threat: the ball.
    """
    pgd = PGD(threat, STEPS, threat.epsilon / 8, start="none")
    with torch.no_grad():
        return lead(model(pgd(model, image, label, MARGIN)), label)


SCREENS = {
    "pma": _part(_untargeted, STEPS + 1),
    "malt": _part(_targeted, 1 + NEAREST * (STEPS + 1)),
}
_SETTINGS = {
    "screens": list(SCREENS),
    "steps": STEPS,
    "targets": NEAREST,
    "version": "standard",
    "parts": [*SCREENS, *AUTOATTACK.parts],
    "package": "pyautoattack",
    "package_version": version("pyautoattack"),
}
SCREENED = add_attack(
    EvaluationAttack(
        "screened",
        "AutoAttack standard for what two short APGD leave (probability margin; nearest classes): "
        "accuracy as AutoAttack's or lower, in less time",
        _SETTINGS,
        SCREENS | dict(AUTOATTACK.parts),
        label="AutoAttack (screened)",
        strength=6,
        reference=True,
        prepare=AUTOATTACK.prepare,
    )
)
ORDERED = add_attack(
    EvaluationAttack(
        "screened-ordered",
        "as screened, by margin after PGD, and each part of AutoAttack ends after "
        f"{ENOUGH} images in a row that it did not fool: an estimate from above, in a fraction of "
        "the time",
        _SETTINGS | {"order": "margin after PGD", "enough": ENOUGH},
        SCREENS | {name: replace(part, enough=ENOUGH) for name, part in AUTOATTACK.parts.items()},
        label="AutoAttack (estimate)",
        strength=5,
        prepare=AUTOATTACK.prepare,
        order=margin_after_pgd,
    )
)
