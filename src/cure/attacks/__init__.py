"""Adversarial changes: the threat model, the ascent loop, and what is maximised."""

from cure.attacks.losses import OBJECTIVES, Objective
from cure.attacks.pgd import Attack, attack_mode, perturb
from cure.attacks.threat import Threat

__all__ = ["OBJECTIVES", "Attack", "Objective", "Threat", "attack_mode", "perturb"]
