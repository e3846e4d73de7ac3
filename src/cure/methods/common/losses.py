"""Losses as pure functions of logits, means over the samples; ``cure.losses`` for users."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cure.attacks.losses import kl_divergence_per_sample


def kl_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Batch mean of KL(softmax(target) || softmax(logits)), both [B, K]; gradient through both.

    ``mean_i sum_k p_ik (log p_ik - log q_ik)``; detach ``target`` where it is to be fixed.

    >>> natural, adversarial = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> round(kl_divergence(natural, adversarial).item(), 4)
    0.3278
    """
    return kl_divergence_per_sample(target, logits).mean()


def accuracy(logits: Tensor, label: Tensor) -> Tensor:
    """Share of samples whose largest logit is the label's, 0-dim, without a graph."""
    return (logits.detach().argmax(dim=1) == label).float().mean()


def boosted_cross_entropy(logits: Tensor, label: Tensor, *, constants: bool = False) -> Tensor:
    """Cross-entropy plus a margin: also the likeliest wrong class shall be unlikely.

    ``mean_i [- log p_iy - log(1 - max_{k != y} p_ik)]``

    Args:
        logits: [B, K], of the adversarial images in MART.
        label: [B].
        constants: as in the released code, ``- log(1.0001 - max p + 1e-12)``, which bounds the
            second term by 9.2.  Without them ``1 - p_j`` is the sum of the other probabilities,
            computed from logits, so it neither rounds to 0 nor needs a bound.

    Source: Wang et al. (MART), ICLR 2020.

    >>> adversarial, label = torch.tensor([[0.0, 0.0]]), torch.tensor([0])
    >>> round(boosted_cross_entropy(adversarial, label).item(), 4)
    1.3863
    """
    rival = logits.scatter(1, label[:, None], -torch.inf).argmax(dim=1, keepdim=True)
    if constants:
        probability = F.softmax(logits, dim=1).gather(1, rival)
        margin = -(1.0001 - probability + 1e-12).log().mean()
    else:
        others = logits.scatter(1, rival, -torch.inf)
        margin = (logits.logsumexp(dim=1) - others.logsumexp(dim=1)).mean()
    return F.cross_entropy(logits, label) + margin


def weighted_kl(
    natural: Tensor, adversarial: Tensor, label: Tensor, *, constants: bool = False
) -> Tensor:
    """KL to the natural prediction, weighted by the probability of the wrong natural classes.

    ``mean_i (1 - p_iy(x)) KL(p_i(x) || p_i(x_adv))``; gradient through p(x), the weight included,
    and p(x_adv).

    Args:
        natural: logits [B, K] of the natural images.
        adversarial: logits [B, K] of the adversarial images.
        label: [B].
        constants: as in the released code, ``1.0000001 - p_iy`` and ``log(p_i(x_adv) + 1e-12)``.

    Source: Wang et al. (MART), ICLR 2020.

    >>> natural, adversarial = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> label = torch.tensor([0])
    >>> round(weighted_kl(natural, adversarial, label).item(), 4)
    0.0391
    """
    if constants:
        chances = F.softmax(natural, dim=1)
        logarithms = (F.softmax(adversarial, dim=1) + 1e-12).log()
        per_sample = F.kl_div(logarithms, chances, reduction="none").sum(dim=1)
        weight = 1.0000001 - chances.gather(1, label[:, None]).squeeze(1)
    else:
        per_sample = kl_divergence_per_sample(natural, adversarial)
        # The other probabilities, where 1 - p would lose its digits to a p near 1.
        weight = F.softmax(natural, dim=1).scatter(1, label[:, None], 0).sum(dim=1)
    return (weight * per_sample).mean()


def distillation(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """How far each sample's softened prediction is from the one it is to imitate, [B].

    ``T^2 KL(softmax(target / T) || softmax(logits / T))``; T^2 keeps the size of the gradient.

    Args:
        target: logits [B, K] to imitate; detach them where they are to be fixed.
        logits: [B, K].
        temperature: T above 0; 1 leaves the predictions as they are.

    Source: Hinton et al., 2015, Sec. 2.

    >>> natural, adversarial = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> round(distillation(natural, adversarial, 2.0).item(), 4)
    0.4438
    """
    return temperature**2 * kl_divergence_per_sample(target / temperature, logits / temperature)


def smoothed_cross_entropy(logits: Tensor, label: Tensor, true_mass: float) -> Tensor:
    """Cross-entropy against smoothed labels, batch mean.

    ``mean_i [- m log p_iy - (1 - m) / (K - 1) sum_{k != y} log p_ik]``

    Args:
        logits: [B, K], K at least 2.
        label: [B].
        true_mass: m, share of the true class, in [0, 1]; the other classes have the rest in equal
            parts.  (In PyTorch's label smoothing the true class has a part of the rest, too.)

    Source: Jia et al. (LAS-AT), CVPR 2022, released code.

    >>> natural, label = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    >>> round(smoothed_cross_entropy(natural, label, 0.7).item(), 4)
    0.7269
    """
    rest = (1 - true_mass) / (logits.shape[1] - 1)
    target = torch.full_like(logits, rest).scatter(1, label[:, None], true_mass)
    return F.cross_entropy(logits, target)


def soft_cross_entropy(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """``- T^2 mean_i sum_k softmax(target_i / T)_k log softmax(logits_i / T)_k``, 0-dim.

    Args:
        target: logits [B, K] to imitate, without a graph.
        logits: [B, K].
        temperature: T above 0.

    Source: Chen et al., ICLR 2021, released code.

    >>> natural, adversarial = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> round(soft_cross_entropy(natural, adversarial, 2.0).item(), 4)
    2.7726
    """
    chances = F.softmax(target / temperature, dim=1)
    return temperature**2 * F.cross_entropy(logits / temperature, chances)


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """``1/2 [KL(p || q) + KL(q || p)]`` of each sample, [B], from logits [B, K].

    The first distribution of each KL is a constant, so the gradient in the logits is
    ``(p - q) / 2`` for ``first`` and ``(q - p) / 2`` for ``second``.

    Source: released code of ST-AT.

    >>> natural, adversarial = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> round(symmetric_kl(natural, adversarial).item(), 4)
    0.3808
    """
    towards_first = kl_divergence_per_sample(first.detach(), second)
    towards_second = kl_divergence_per_sample(second.detach(), first)
    return (towards_first + towards_second) / 2


def trades_terms(
    natural: Tensor,
    adversarial: Tensor,
    label: Tensor,
    beta: float,
    target: Tensor | None = None,
) -> dict[str, Tensor]:
    """The loss of :func:`trades` as ``loss``, and its parts ``natural_loss``, ``adversarial_loss``.

    Args:
        natural: see :func:`trades`, like the next three.
        adversarial: logits.
        label: classes.
        beta: weight.
        target: soft labels [B, K] of the cross-entropy; by default ``label``.
    """
    natural_loss = F.cross_entropy(natural, label if target is None else target)
    adversarial_loss = kl_divergence(natural, adversarial)
    return {
        "loss": natural_loss + beta * adversarial_loss,
        "natural_loss": natural_loss,
        "adversarial_loss": adversarial_loss,
    }


def trades(natural: Tensor, adversarial: Tensor, label: Tensor, beta: float = 6.0) -> Tensor:
    """``CE(x) + beta KL(p(x) || p(x_adv))``, 0-dim.

    Args:
        natural: logits [B, K] of the natural images.
        adversarial: logits [B, K] of the adversarial images.
        label: classes [B].
        beta: weight of the KL term, whose gradient flows through both predictions.

    Source: Zhang et al. (TRADES), ICML 2019 (beta is its 1 / lambda).

    >>> natural, adversarial = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> label = torch.tensor([0])
    >>> round(trades(natural, adversarial, label, beta=6.0).item(), 4)
    2.0938
    """
    return trades_terms(natural, adversarial, label, beta)["loss"]


def mart_terms(
    natural: Tensor, adversarial: Tensor, label: Tensor, beta: float, *, constants: bool = False
) -> dict[str, Tensor]:
    """The loss of :func:`mart` as ``loss``, and its parts ``boosted_loss``, ``weighted_kl``."""
    boosted = boosted_cross_entropy(adversarial, label, constants=constants)
    weighted = weighted_kl(natural, adversarial, label, constants=constants)
    return {"loss": boosted + beta * weighted, "boosted_loss": boosted, "weighted_kl": weighted}


def mart(
    natural: Tensor,
    adversarial: Tensor,
    label: Tensor,
    beta: float = 5.0,
    *,
    constants: bool = False,
) -> Tensor:
    """``BCE(x_adv) + beta mean (1 - p_y(x)) KL(p(x) || p(x_adv))``, 0-dim.

    Args:
        natural: logits [B, K] of the natural images.
        adversarial: logits [B, K] of the adversarial images.
        label: classes [B].
        beta: weight of the second term, the paper's lambda.
        constants: put the released code's constants into the logarithms and the weight.

    Source: Wang et al. (MART), ICLR 2020.

    >>> natural, adversarial = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> label = torch.tensor([0])
    >>> round(mart(natural, adversarial, label, beta=5.0).item(), 4)
    1.5817
    """
    return mart_terms(natural, adversarial, label, beta, constants=constants)["loss"]
