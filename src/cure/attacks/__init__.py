"""Adversarial attacks: the threat model, the ascent loop, and what is maximised."""

from cure.attacks.losses import OBJECTIVES, Objective
from cure.attacks.pgd import PGD, Hooks, PerSample, attack_mode, perturb
from cure.attacks.threat import Threat

__all__ = [
    "OBJECTIVES",
    "PGD",
    "Hooks",
    "Objective",
    "PerSample",
    "Threat",
    "attack_mode",
    "perturb",
]
