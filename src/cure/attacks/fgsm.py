"""FGSM: one step of gradient ascent."""

from __future__ import annotations

from torch import Tensor, nn

from cure.attacks.losses import CROSS_ENTROPY
from cure.attacks.pgd import PGD
from cure.attacks.registry import register
from cure.attacks.threat import Threat


@register(
    "fgsm",
    "one step of epsilon along the sign of the gradient (L2: along the gradient)",
    {"steps": 1, "step_size": "epsilon", "start": "none", "objective": "cross_entropy"},
    label="FGSM",
    strength=1,
)
def fgsm(
    model: nn.Module,
    image: Tensor,
    label: Tensor,
    threat: Threat,
    seed: int,  # noqa: ARG001
    number: int,  # noqa: ARG001
) -> Tensor:
    """Adversarial images [B, C, H, W].  Source: Goodfellow et al., ICLR 2015."""
    attack = PGD(threat, 1, threat.epsilon, start="none")
    return attack(model, image, label, CROSS_ENTROPY, None)
