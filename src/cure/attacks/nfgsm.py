"""N-FGSM: noise, then one signed gradient step, without projection; a training attack.

Source: de Jorge et al., "Make Some Noise: Reliable and Efficient Single-Step Adversarial
Training", NeurIPS 2022.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cure.attacks.losses import CROSS_ENTROPY, Objective
from cure.attacks.pgd import PGD, Hooks, attack_mode
from cure.attacks.threat import per_sample
from cure.errors import ConfigError
from cure.models.fuse import folded


@dataclass(frozen=True)
class NFGSM(PGD):
    """``clip(x + u + epsilon sign(gradient at x + u))``, u uniform in ``noise`` epsilons.

    The image may lie up to ``(1 + noise) epsilon`` from the natural one: it serves training, not
    evaluation.  Costs one forward and one data-backward pass, and one more forward pass when the
    objective compares with the natural logits.

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
        """Adversarial images for one batch [B, C, H, W] in [0, 1].

        Raises:
            ConfigError: for hooks, which change an ascent of several steps.
            ValueError: without a generator for the noise.
        """
        if hooks is not None:
            raise ConfigError(
                f"attack.name: n-fgsm takes one step and does not offer {type(hooks).__name__}, "
                "which this method uses; say attack.name=pgd"
            )
        if generator is None:
            raise ValueError("the noise draws random numbers: give a generator")
        image = image.detach()
        epsilon = per_sample(self.threat.epsilon, image)
        fold = self.fold and self.mode == "eval"
        constants = folded(model, image, self.precision) if fold else nullcontext()
        with attack_mode(model, self.mode), constants, self.precision():
            natural = None
            if objective.needs_natural:
                with torch.no_grad():
                    natural = model(image).to(image.dtype)
            point = image + self.threat.sample(image, generator, self.noise * epsilon)
            point.requires_grad_(True)
            with torch.enable_grad():
                gain = objective(model(point).to(image.dtype), label, natural).sum()
                (gradient,) = torch.autograd.grad(gain, point)
        return (point.detach() + epsilon * gradient.sign()).clamp(0, 1)
