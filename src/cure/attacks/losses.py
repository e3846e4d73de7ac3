"""What an attack maximises, one number a sample, from logits.

Every objective has the form ``f(logits, label, natural) -> [B]`` where ``natural`` holds the
logits of the unchanged image (``None`` unless ``needs_natural``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """A function to maximise, and whether it needs the natural logits (one more forward pass)."""

    function: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    needs_natural: bool = False

    def __call__(self, logits: Tensor, label: Tensor, natural: Tensor | None) -> Tensor:
        """One number a sample, [B]."""
        return self.function(logits, label, natural)


def kl_divergence_per_sample(target: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) of each sample, [B]; gradient through both."""
    return F.kl_div(
        F.log_softmax(logits, dim=1),
        F.log_softmax(target, dim=1),
        reduction="none",
        log_target=True,
    ).sum(dim=1)


def cross_entropy(logits: Tensor, label: Tensor, natural: Tensor | None = None) -> Tensor:
    """Cross-entropy of each sample, [B]. Source: Madry et al., ICLR 2018."""
    return F.cross_entropy(logits, label, reduction="none")


def kl_to_natural(logits: Tensor, label: Tensor, natural: Tensor | None) -> Tensor:
    """KL(p(natural) || p(changed)) of each sample, [B]; labels play no part.

    Source: Zhang et al. (TRADES), ICML 2019; CURE, ICLR 2024, Eq. 4.
    """
    assert natural is not None
    return kl_divergence_per_sample(natural, logits)


def lead(logits: Tensor, label: Tensor) -> Tensor:
    """Logit of the label minus the largest other one, [B]; negative where the label loses.

    >>> lead(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1]))
    tensor([1.])
    """
    true = logits.gather(1, label[:, None]).squeeze(1)
    wrong = logits.scatter(1, label[:, None], -torch.inf).amax(dim=1)
    return true - wrong


def margin(
    logits: Tensor, label: Tensor, natural: Tensor | None = None, confidence: float = 50.0
) -> Tensor:
    """C&W margin of each sample, [B]: max(best wrong logit - true logit, up to ``confidence``).

    ``-max(z_y - max_{k != y} z_k + confidence, 0)`` as the field's Linf "C&W" columns use it.
    Source: Carlini and Wagner, S&P 2017 (loss); Linf form as in the code of MART and of CURE.
    """
    return -(lead(logits, label) + confidence).clamp_min(0)


def with_cross_entropy(kl_weight: float) -> Objective:
    """``CE + kl_weight * KL``: the objective that Algorithm 1 of CURE prints (against Eq. 4)."""
    return Objective(
        lambda logits, label, natural: (
            cross_entropy(logits, label) + kl_weight * kl_to_natural(logits, label, natural)
        ),
        needs_natural=True,
    )


CROSS_ENTROPY = Objective(cross_entropy)
KL = Objective(kl_to_natural, needs_natural=True)
MARGIN = Objective(margin)

OBJECTIVES = {"cross_entropy": CROSS_ENTROPY, "kl": KL, "margin": MARGIN}
