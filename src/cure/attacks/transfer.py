"""Adversarial images that are made on another network."""

from __future__ import annotations

from cure.attacks.losses import CROSS_ENTROPY, MARGIN
from cure.attacks.pgd_attacks import ascent
from cure.attacks.registry import EvaluationAttack, Part, add_attack

PARTS = {
    "pgd20": Part(ascent("transfer", CROSS_ENTROPY, 20), 20),
    "cw": Part(ascent("transfer-cw", MARGIN, 20), 20),
}
TRANSFER = add_attack(
    EvaluationAttack(
        "transfer",
        "PGD-20 and the C&W margin climbed on another network (--transfer TARGET)",
        {"steps": 20, "step_size": "epsilon/4", "start": "uniform", "parts": list(PARTS)},
        PARTS,
        strength=0,
        transferred=True,
    )
)
