"""N-FGSM: noise, then one signed gradient step, without projection; a training attack.

Source: de Jorge et al., "Make Some Noise: Reliable and Efficient Single-Step Adversarial
Training", NeurIPS 2022.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cure.attacks.losses import CROSS_ENTROPY, Objective
from cure.attacks.pgd import PGD, Hooks, Start
from cure.attacks.threat import Threat
from cure.errors import ConfigError


class NoisyStep(Hooks):
    """One step from uniform noise, without projection.

    Args:
        noise: size of the noise, in epsilons.
    """

    steps = 1

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def start(
        self,
        image: Tensor,
        threat: Threat,
        start: Start,  # noqa: ARG002
        generator: torch.Generator | None,
        clamp: bool,  # noqa: ARG002
    ) -> Tensor:
        """The image with noise; it may leave [0, 1]."""
        if generator is None:
            raise ValueError("the noise draws random numbers: give a generator")
        return image + threat.sample(image, generator, self.noise * threat.epsilon)

    def project(self, threat: Threat, change: Tensor) -> Tensor:  # noqa: ARG002
        """The change itself."""
        return change


@dataclass(frozen=True)
class NFGSM(PGD):
    """``clip(x + u + epsilon sign(gradient at x + u))``, u uniform in ``noise`` epsilons.

    The image may lie up to ``(1 + noise) epsilon`` from the natural one: it serves training, not
    evaluation.  Costs one forward and one data-backward pass, and one more forward pass when the
    objective compares with the natural logits.

    >>> import cure
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> image, label = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 2])
    >>> NFGSM(cure.Threat("Linf", "8/255"))(model, image, label).shape
    torch.Size([2, 1, 2, 2])

    Attributes:
        noise: size of the noise, in epsilons.
    """

    noise: float = 1.0

    def __call__(
        self,
        model: nn.Module,
        image: Tensor,
        label: Tensor,
        objective: Objective = CROSS_ENTROPY,
        generator: torch.Generator | None = None,
        *,
        hooks: Hooks | None = None,
    ) -> Tensor:
        """Adversarial images for one batch [B, C, H, W] in [0, 1]; see :class:`PGD`.

        Raises:
            ConfigError: for a variant of PGD, which takes several steps.
        """
        if hooks is not None:
            raise ConfigError(
                "attack.name: n-fgsm takes one step, and this method changes how PGD takes its "
                "steps; say attack.name=pgd"
            )
        step = replace(self, step_size=self.threat.epsilon)
        return PGD.__call__(
            step, model, image, label, objective, generator, hooks=NoisyStep(self.noise)
        )
