"""ST-AT: penalise the divergence of the worst and the best prediction inside the ball."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor

from cure.attacks import PGD, attack_mode
from cure.attacks.pgd import starting_point
from cure.attacks.threat import per_image
from cure.config import MethodConfig
from cure.data.images import Batch
from cure.errors import ConfigError
from cure.methods.base import METHODS, Method, Tradeoff
from cure.methods.common.losses import accuracy, symmetric_kl
from cure.methods.step import AdversarialBatch, StepOutput
from cure.models.batch_norm import untracked


def extremes(logits: Sequence[Tensor], label: Tensor) -> tuple[Tensor, Tensor]:
    """Which prediction of each sample is the worst and which the best, [B] and [B].

    Args:
        logits: predictions [B, K] of the same samples.
        label: [B]; worst is where it is least likely.  The first wins a tie.
    """
    losses = torch.stack([F.cross_entropy(one.detach(), label, reduction="none") for one in logits])
    return losses.argmax(dim=0), losses.argmin(dim=0)


def pick(choice: Tensor, options: Sequence[Tensor]) -> Tensor:
    """``options[choice[i]][i]`` for each sample i, where the options are [B, ...] and choice [B].

    The gradient reaches what was chosen.
    """
    choice = per_image(choice, options[0])
    picked = options[0]
    for number, option in enumerate(options[1:], start=1):
        picked = torch.where(choice == number, option, picked)
    return picked


def squeezing_pair(
    forward: Callable[[Tensor], Tensor],
    image: Tensor,
    label: Tensor,
    attack: PGD,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The two images inside the ball whose predictions differ most: adversarial, collaborative.

    Each step takes, of x, x_col and x_adv, the worst and the best prediction of each sample, climbs
    their symmetric KL divergence from both points, and calls the results x_adv and x_col.

    Costs 1 + 2 steps forward and 3 steps data-backward passes: neither x nor the weights move, so
    one forward pass of x serves all steps.

    Args:
        forward: images [B, C, H, W] to logits [B, K].
        image: [B, C, H, W] in [0, 1].
        label: [B].
        attack: ball, steps, step size and random start.
        generator: source of the two random starts, x_adv first.

    Source: released code of ST-AT (Li et al., ICLR 2023).
    """
    threat = attack.threat
    image = image.detach()
    clamp = attack.clamp_start
    adversarial = starting_point(image, threat, attack.start, generator, clamp=clamp)
    collaborative = starting_point(image, threat, attack.start, generator, clamp=clamp)
    still = image.clone().requires_grad_(True)
    natural = forward(still)
    for _ in range(attack.steps):
        points = (still, collaborative.requires_grad_(True), adversarial.requires_grad_(True))
        logits = (natural, forward(points[1]), forward(points[2]))
        choices = extremes(logits, label)
        gap = symmetric_kl(*(pick(choice, logits) for choice in choices)).sum()
        slopes = torch.autograd.grad(gap, points, retain_graph=True)
        adversarial, collaborative = (
            _climb(pick(choice, points), pick(choice, slopes), image, attack) for choice in choices
        )
        # Freed before the next passes: only the graph of x is needed again.
        del logits, gap
    return adversarial, collaborative


def _climb(point: Tensor, slope: Tensor, image: Tensor, attack: PGD) -> Tensor:
    """One step uphill from ``point``, kept in the ball around ``image`` and in [0, 1]."""
    moved = point.detach() + attack.length * attack.threat.steepest(slope)
    return (image + attack.threat.project(moved - image)).clamp(0, 1)


def squeeze(
    natural: Tensor, collaborative: Tensor, adversarial: Tensor, label: Tensor, beta: float
) -> StepOutput:
    """``CE(x) + beta symKL(worst, best)`` with its parts as metrics.

    Worst and best are chosen among the three predictions of each sample, see :func:`extremes`; the
    choice has no gradient, the predictions chosen have, see :func:`symmetric_kl`.

    Args:
        natural: logits [B, K] of the natural images.
        collaborative: logits [B, K] of the collaborative images.
        adversarial: logits [B, K] of the adversarial images.
        label: [B].
        beta: weight of the symmetric KL divergence.

    Source: released code of ST-AT (Li et al., ICLR 2023).
    """
    logits = (natural, collaborative, adversarial)
    worst, best = (pick(choice, logits) for choice in extremes(logits, label))
    natural_loss = F.cross_entropy(natural, label)
    squeeze_loss = symmetric_kl(worst, best).mean()
    loss = natural_loss + beta * squeeze_loss
    return StepOutput(
        loss=loss,
        metrics={
            "loss": loss.detach(),
            "natural_loss": natural_loss.detach(),
            "squeeze_loss": squeeze_loss.detach(),
            "accuracy": accuracy(natural, label),
            "robust_accuracy": accuracy(adversarial, label),
            "collaborative_accuracy": accuracy(collaborative, label),
        },
    )


class StAtConfig(MethodConfig):
    """Settings of ST-AT."""

    name: Literal["st-at"] = "st-at"
    """Squeeze training (ST, ST-AT)."""
    beta: NonNegativeFloat = 6.0
    """Weight of the symmetric KL divergence.  The released scripts set it only for the variant with
    unlabelled images, to 6; the paper's value could not be checked."""
    attack_mode: Literal["train", "eval"] = "train"
    """Mode of the network while it is attacked, in the place of the run's ``attack.mode``.  In
    ``train`` (released code) BatchNorm uses the batch's statistics and updates no running ones."""


@dataclass(frozen=True)
class StAtBatch(AdversarialBatch):
    """Adversarial images, and ``collaborative`` images [B, C, H, W] with the best predictions."""

    collaborative: Tensor


@METHODS.register("st-at")
class STAT(Method[StAtBatch]):
    """``min CE(f(x), y) + beta symKL``, between the worst and the best prediction found: ST-AT.

    The attack moves two points, see :func:`squeezing_pair`; the loss looks for worst and best among
    x, x_col and x_adv once more, see :func:`squeeze`.  BatchNorm's running statistics see x
    and x_adv.

    Costs 24 forward and 33 backward passes with 10 attack steps: the attack's 21 and 30, the loss's
    three images 3 and 3.

    Source: Li et al., ICLR 2023, in the form of the released code.
    Differs from the released code: that computes the prediction on x again, in every attack step
    in which some sample needs its gradient (up to 34 forward passes), and leaves out its backward
    pass in the others, which with common batch sizes are few; a random start is projected on the
    ball.

    >>> import torch, cure
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> method = cure.methods.STAT(model)
    >>> step = method(images, labels)
    >>> step.metrics["loss"].shape
    torch.Size([])
    """

    Config = StAtConfig
    needs_pgd = True
    takes_objective = False
    tradeoff = (Tradeoff("beta", (1.0, 3.0, 6.0, 10.0), "robust"),)
    graphs = 3

    def setup(self) -> None:
        """Check that the attack starts away from the image."""
        if self.context.attack.start == "none":
            raise ConfigError(
                "attack.start: none leaves the two points of st-at on the image, where their "
                "divergence has no slope; say gaussian (its own) or uniform"
            )

    def make_adversarial(self, batch: Batch) -> StAtBatch:
        """Adversarial and collaborative images, by the run's attack in the method's own mode."""
        attack, image = self.context.attack_at(batch.step), batch.image

        def forward(x: Tensor) -> Tensor:
            with attack.precision():
                return self.model(x).to(image.dtype)  # type: ignore[no-any-return]

        draws = self.generator("attack", batch)
        with attack_mode(self.model, self.config.attack_mode):
            pair = squeezing_pair(forward, image, batch.label, attack, draws)
        return StAtBatch(*pair)

    def compute_loss(self, batch: Batch, attacked: StAtBatch) -> StepOutput:
        """Natural loss and squeezed gap of one batch."""
        natural, adversarial = self.logits(batch.image), self.logits(attacked.image)
        with untracked(self.model):
            collaborative = self.logits(attacked.collaborative)
        return squeeze(natural, collaborative, adversarial, batch.label, self.config.beta)
