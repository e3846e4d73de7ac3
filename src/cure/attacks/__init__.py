"""Adversarial changes: the threat model, the ascent loop, and what is maximised."""

from cure.attacks.objectives import OBJECTIVES, Objective
from cure.attacks.pgd import Attack, crafting, perturb
from cure.attacks.threat import Threat

__all__ = ["OBJECTIVES", "Attack", "Objective", "Threat", "crafting", "perturb"]
