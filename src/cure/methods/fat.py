"""FAT: adversarial images that stop soon after they are misclassified."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt

from cure.attacks.losses import CROSS_ENTROPY, KL
from cure.config import MethodConfig
from cure.data.images import Batch
from cure.methods.base import METHODS, Method, Tradeoff
from cure.methods.common.early_stop import EarlyStop
from cure.methods.common.losses import accuracy, mart_terms, trades_terms
from cure.methods.common.outputs import two_image_output
from cure.methods.step import AdversarialBatch, StepOutput

Form = Literal["ce", "trades", "mart"]
Share = Annotated[float, Field(ge=0, lt=1)]

RISES: dict[Form, tuple[float, ...]] = {
    "ce": (50 / 120, 90 / 120),
    "trades": (30 / 85, 50 / 85, 70 / 85),
    "mart": (20 / 90, 40 / 90, 60 / 90, 80 / 90),
}
"""When tau grows by one, as shares of the run: the released code's epochs of each form."""


class FatConfig(MethodConfig):
    """Settings of FAT; the defaults are its cross-entropy form."""

    name: Literal["fat"] = "fat"
    """Friendly adversarial training."""
    form: Form = "ce"
    """``ce``: FAT; ``trades``, ``mart``: FAT for TRADES and FAT for MART, with the loss and the
    attack's objective of those methods."""
    beta: NonNegativeFloat = 6.0
    """Weight of the KL term in the forms ``trades`` and ``mart`` (released code: 6)."""
    constants: bool = False
    """Form ``mart``: the released constants in the loss, see MART."""
    tau: NonNegativeInt = 0
    """Steps that a misclassified image may still take, at the beginning of the run."""
    tau_rises: tuple[Share, ...] | None = None
    """Shares of the run after which tau grows by one; by default those of the form's released code:
    epochs 50, 90 of 120; 30, 50, 70 of 85; 20, 40, 60, 80 of 90.  Empty: tau stays."""
    omega: NonNegativeFloat = 0.0
    """Standard deviation of normal noise added after every attack step (released code: 0.001 in the
    form ``ce``, else 0)."""

    def needs_length(self) -> bool:
        """Whether tau grows."""
        return self.tau_rises is None or len(self.tau_rises) > 0

    def tau_at(self, epoch: int, epochs: int) -> int:
        """Tau in epoch number ``epoch`` (0 the first) of a run of ``epochs``."""
        rises = RISES[self.form] if self.tau_rises is None else self.tau_rises
        return self.tau + sum(epoch / epochs >= share for share in rises)


@METHODS.register("fat")
class FAT(Method):
    """Friendly adversarial training (FAT): AT, TRADES or MART with an attack that stops early.

    Before each attack step each image is classified: one that is misclassified stops
    for good when it has no step left, else it has one less left and goes on like one that is right.
    Tau, the number left at the start, grows over the run; tau at the number of attack steps is the
    plain method.

    Costs what the plain method costs, with 10 attack steps 11 forward and 11 backward passes
    (``ce``), 13 and 12 (``trades``), 12 and 12 (``mart``): images that have stopped stay in their
    batch.

    Source: Zhang et al., ICML 2020, Algorithm 1.
    Differs from the released code: keeps the order of the samples; one natural forward pass less
    in the forms ``ce`` and ``mart``, whose attack does not compare with it; natural before
    adversarial images in the form ``mart``; noise after the steps (``omega``) by setting; a random
    start is projected on the ball.

    >>> import torch, cure
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> method = cure.methods.FAT(model, steps=1000)
    >>> step = method(images, labels)
    >>> sorted(step.metrics)
    ['loss', 'robust_accuracy']
    """

    Config = FatConfig
    needs_pgd = True
    tradeoff = (Tradeoff("tau", (0, 1, 2, 4), "robust"),)

    def setup(self) -> None:
        """The attack's objective, and tau of the first epoch."""
        config, context = self.config, self.context
        self.objective = KL if config.form == "trades" else CROSS_ENTROPY
        self.tau = config.tau_at(0, context.epochs)

    def on_epoch(self, epoch: int) -> None:
        """Tau of this epoch."""
        self.tau = self.config.tau_at(epoch, self.context.epochs)

    def make_adversarial(self, batch: Batch) -> AdversarialBatch:
        """Friendly images: the attack stops early."""
        hooks = EarlyStop(batch.label, self.tau, self.config.omega)
        return AdversarialBatch(self.attack(batch, self.objective, hooks))

    def compute_loss(self, batch: Batch, attacked: AdversarialBatch) -> StepOutput:
        """The form's loss on friendly images."""
        label, config = batch.label, self.config
        if config.form == "ce":
            friendly = self.logits(attacked.image)
            loss = F.cross_entropy(friendly, label)
            metrics = {"loss": loss.detach(), "robust_accuracy": accuracy(friendly, label)}
            return StepOutput(loss=loss, metrics=metrics)
        natural, friendly = self.logits(batch.image), self.logits(attacked.image)
        if config.form == "trades":
            terms = trades_terms(natural, friendly, label, config.beta)
        else:
            terms = mart_terms(natural, friendly, label, config.beta, constants=config.constants)
        return two_image_output(terms, natural, friendly, label)
