"""Random changes, which no attack may be weaker than."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cure.attacks.registry import EvaluationAttack, Part, Run, add_attack
from cure.attacks.threat import Threat
from cure.utils.random import generator

DRAWS = 10


def _noise(draw: int) -> Run:
    def run(
        model: nn.Module,  # noqa: ARG001
        image: Tensor,
        label: Tensor,  # noqa: ARG001
        threat: Threat,
        seed: int,
        number: int,
    ) -> Tensor:
        draws = generator(image.device, seed, f"noise{draw}", number)
        return (image + threat.project(_at_the_edge(threat, image, draws))).clamp(0, 1)

    return run


def _at_the_edge(threat: Threat, image: Tensor, draws: torch.Generator) -> Tensor:
    """A random change as long as the threat allows: a corner of the cube, a point of the sphere."""
    return threat.epsilon * threat.steepest(
        threat.sample(image, draws)
        if threat.norm == "Linf"
        else torch.randn(image.shape, generator=draws, device=image.device, dtype=image.dtype)
    )


NOISE = add_attack(
    EvaluationAttack(
        "noise",
        f"random changes of length epsilon, {DRAWS} draws: what an attack must be stronger than",
        {"draws": DRAWS, "where": "corners of the cube (Linf), the sphere (L2)"},
        {f"draw {number + 1}": Part(_noise(number), gradient=False) for number in range(DRAWS)},
        strength=0,
    )
)
