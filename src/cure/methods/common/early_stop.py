"""Attack hooks that stop each sample soon after it is misclassified, as in FAT."""

from __future__ import annotations

import torch
from torch import Tensor

from cure.attacks import Hooks
from cure.attacks.threat import drawn, per_image


class EarlyStop(Hooks):
    """Stop each sample soon after it is misclassified, and add noise after each step.

    Args:
        label: classes [B].
        patience: tau, how many more steps a misclassified sample may take, a number or [B].  The
            test precedes the step, so 0 leaves a sample that starts misclassified where it is.
        noise: omega, standard deviation of the normal noise.

    Source: Zhang et al. (FAT), ICML 2020, Algorithm 1.
    """

    def __init__(self, label: Tensor, patience: int | Tensor, noise: float = 0.0) -> None:
        self.label = label
        self.patience = patience
        self.noise = noise
        # A number is filled in on the device: copying a tensor from the host would synchronise.
        self.left = torch.zeros_like(label) + patience
        self.alive = torch.ones_like(label, dtype=torch.bool)

    def ascend(
        self, x: Tensor, direction: Tensor, step_size: float, generator: torch.Generator | None
    ) -> Tensor:
        """The step and the noise."""
        moved = super().ascend(x, direction, step_size, generator)
        if not self.noise:
            return moved
        if generator is None:
            raise ValueError("noise after the steps draws random numbers: give a generator")
        return moved + self.noise * drawn(torch.randn, x, generator)

    def accept(self, step: int, logits: Tensor, x: Tensor, moved: Tensor) -> Tensor:  # noqa: ARG002
        """``moved`` for samples that have not stopped."""
        wrong = logits.argmax(dim=1).ne(self.label)
        self.alive &= ~(wrong & (self.left == 0))
        self.left = self.left - wrong.to(self.left.dtype)
        return torch.where(per_image(self.alive, x), moved, x)
