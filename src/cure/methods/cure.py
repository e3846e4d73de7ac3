"""CURE: mask the gradients of weights of low prominence; consistency with a slow average.

Source: Gowda, Zonooz, Arani, "Conserve-Update-Revise to Cure Generalization and Robustness
Trade-off in Adversarial Training", ICLR 2024.  The defaults are the paper's form; each difference
of the released code is a setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from cure.attacks.losses import KL, with_cross_entropy
from cure.config import MethodConfig, Section
from cure.data.images import Batch
from cure.errors import ConfigError
from cure.methods.base import METHODS, Method, Tradeoff
from cure.methods.common.losses import accuracy, kl_divergence
from cure.methods.common.revision import RevisionConfig, RevisionModel
from cure.methods.step import AdversarialBatch, Masking, Metrics, StepOutput
from cure.utils.engine import Grads

Scope = Literal["layer", "global"]

CONSISTENCY = ("natural_consistency", "adversarial_consistency")
"""The terms of L_CR: for natural and for adversarial images."""


def prominence(
    natural: Mapping[str, Tensor],
    adversarial: Mapping[str, Tensor],
    alpha: float,
    *,
    signed: bool = False,
) -> Grads:
    """Robust Gradient Prominence of every weight.

    ``RGP(w) = alpha |dCE(x)/dw| + (1 - alpha) |dCE(x_adv)/dw|``

    Args:
        natural: gradient of the natural loss by parameter name.
        adversarial: gradient of the adversarial loss, same names and shapes.
        alpha: weight of the natural term, in [0, 1].
        signed: leave out the absolute values, as the released code does.

    Source: CURE, Eq. 6.
    """
    size = (lambda gradient: gradient) if signed else torch.abs
    return {
        name: alpha * size(gradient) + (1 - alpha) * size(adversarial[name])
        for name, gradient in natural.items()
    }


def threshold(scores: Tensor, percent: float) -> Tensor:
    """A 0-dim value with exactly those scores strictly below it that lie below the percentile.

    With linear interpolation the ``percent``-th percentile of n scores lies between the order
    statistics of ranks floor(r) and ceil(r), r = percent (n - 1) / 100.  What is strictly below
    it is strictly below the upper of the two, so one partition finds it and nothing is rounded.
    """
    flat = scores.detach().flatten()
    # As written in the recipe: in binary, 64.4 * 250 / 100 is a little more than 161.
    rank = math.ceil(Fraction(str(percent)) * (flat.numel() - 1) / 100)
    if flat.device.type == "cpu":
        # NumPy's introselect is about ten times faster here than torch.kthvalue or a sort.
        return torch.from_numpy(np.partition(flat.numpy(), rank)[rank : rank + 1]).reshape(())
    # The largest of the rank + 1 smallest.  torch.kthvalue gives a tensor to one block of a GPU,
    # however large it is, and is counted among the operations that do not repeat.
    return flat.topk(rank + 1, largest=False, sorted=False).values.amax()


def rgp_mask(
    scores: Mapping[str, Tensor], percent: float, scope: Scope = "layer"
) -> dict[str, Tensor]:
    """Masks by parameter name, True for the ``percent`` % of weights with the lowest scores.

    Args:
        scores: one score a weight, by parameter name, see :func:`prominence`.
        percent: share to mask, in [0, 100).
        scope: one threshold for each tensor ("layer": Algorithm 1), or one for all ("global").

    Scores equal to the threshold are not masked, as with ``numpy.percentile`` and a strict
    comparison: a tensor whose scores are all equal has an empty mask.

    >>> rgp_mask({"weight": torch.tensor([4.0, 1.0, 3.0, 2.0])}, percent=40)
    {'weight': tensor([False,  True, False,  True])}

    Source: CURE, Algorithm 1, line 11.
    """
    if not scores:
        return {}
    if scope == "global":
        limit = threshold(torch.cat([score.flatten() for score in scores.values()]), percent)
        return {name: score < limit for name, score in scores.items()}
    return {name: score < threshold(score, percent) for name, score in scores.items()}


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """``sum_k weights[k] losses[k]`` over the names in ``weights``, 0-dim like each loss."""
    terms = [weight * losses[name] for name, weight in weights.items()]
    return sum(terms[1:], terms[0])


def mask_gradients(gradients: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Grads:
    """The gradients with 0 where a mask is True; tensors without a mask pass unchanged.

    Args:
        gradients: gradient of the total loss by parameter name.
        masks: by parameter name, same shapes, see :func:`rgp_mask`.

    >>> gradients = {"weight": torch.tensor([5.0, 6.0])}
    >>> mask_gradients(gradients, {"weight": torch.tensor([True, False])})
    {'weight': tensor([0., 6.])}

    Source: CURE, Algorithm 1, line 11.
    """
    return {
        name: gradient.masked_fill(masks[name], 0) if name in masks else gradient
        for name, gradient in gradients.items()
    }


class MaskConfig(Section):
    """Which gradients a step masks (sets to 0)."""

    kind: Literal["prominence", "random", "none"] = "prominence"
    """``random`` masks as many weights, drawn anew at each step; ``none`` masks nothing: the
    controls that show what prominence adds."""
    scope: Scope = "layer"
    """One threshold a parameter tensor (paper), or one for the network."""
    score: Literal["absolute", "signed"] = "absolute"
    """``signed`` drops the absolute values: the released code, which so masks the most negative
    gradients."""
    adversarial_loss: Literal["ce", "kl"] = "ce"
    """Loss of the adversarial term of the score: cross-entropy (Eq. 6), or the KL divergence that
    the released code takes."""
    source: Literal["prominence", "per_image", "own_gradient"] = "prominence"
    """``prominence`` scores by the gradients of the two cross-entropies (Eq. 6).  ``per_image``
    scores by those of all loss terms of the natural images and of all terms of the adversarial
    images, which saves half of the backward passes (``adversarial_term: ce`` only).
    ``own_gradient`` scores by the gradient of the total loss itself (released modes ``rgp``,
    ``rgp_old``; with ``score: signed`` the mode ``grad_mode=all``)."""
    layers: Literal["all", "not_linear", "matrices", "convs", "conv1"] = "all"
    """Tensors that are masked: all (paper); all but those of linear layers (released modes ``rgp``,
    ``rgp_old``); those of two or more dimensions; convolutions; or those with ``conv1`` in their
    name but for the first tensor (released mode ``rgp_soft``)."""
    strict_freeze: bool = False
    """Masked weights do not move by momentum and weight decay either."""


class CureConfig(MethodConfig):
    """Settings of CURE; the defaults are ResNet-18 on CIFAR-10 (Table 9)."""

    name: Literal["cure"] = "cure"
    """CURE."""
    percent: float = Field(default=30.0, ge=0, lt=100)
    """p: percentage of weights that a step masks."""
    alpha: float = Field(default=0.1, ge=0, le=1)
    """Weight of the natural gradient in the prominence; higher keeps more natural accuracy."""
    beta: NonNegativeFloat = 1.0
    """Weight of the adversarial term of the loss (paper: 1; released code: 5)."""
    gamma: NonNegativeFloat = 1.0
    """Weight of the consistency with the revision model; 0 leaves the revision model out."""
    natural_weight: NonNegativeFloat = 1.0
    """Weight of the natural cross-entropy in the loss (paper: 1); the score does not change."""
    revision_target: Literal["adversarial", "natural"] = "adversarial"
    """Image for which the revision model predicts the target of an adversarial image: the same
    image (Eq. 8), or the natural image, of which a naturally trained revision model knows more."""
    adversarial_term: Literal["kl", "ce"] = "kl"
    """KL to the natural prediction (Eq. 5), or cross-entropy on the adversarial image (released
    mode ``rgp``)."""
    attack_loss: Literal["kl", "ce+kl"] = "kl"
    """What the attack maximises: Eq. 4, or CE + alpha KL as Algorithm 1 prints."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """CURE_Eff: share of the run trained naturally first, from scratch (released code: 0.395)."""
    mask: MaskConfig = MaskConfig()
    """Which gradients are masked."""
    revision: RevisionConfig = RevisionConfig()
    """The revision model."""

    def needs_length(self) -> bool:
        """The revision model's memory must fit the training."""
        return True

    def sweep(self) -> tuple[str, ...]:
        """p, alpha, gamma (around Tables 9 and 10), r, and d in the form that the recipe gives."""
        memory = (
            "revision.decay=0.99,0.995,0.998,0.999,0.9995"
            if self.revision.horizon is None
            else "revision.horizon=0.02:0.2:log"
        )
        ranges = (
            "percent=10:50",
            "alpha=0.05:0.5:log",
            "gamma=0.1:2:log",
            "revision.rate=0.05:0.5",
        )
        return (*ranges, memory)


@METHODS.register("cure")
class CURE(Method):
    """Conserve, update, revise (CURE).

    One step, in the order of Algorithm 1:

    1. ``x_adv``: climb KL(p(x) || p(x_adv)) from x with the network in training.
    2. ``CE(x)`` and ``CE(x_adv)``, whose gradients make the prominence.
    3. With probability r the revision model moves.
    4. ``L = CE(x) + beta KL(p(x) || p(x_adv)) + gamma [KL(rev(x) || p(x)) + KL(rev(x_adv) ||
       p(x_adv))]``.
    5. The gradient of L, with 0 where the prominence is among the lowest p % of its layer
       (:func:`rgp_mask`, :func:`mask_gradients`).

    Costs 13 forward and 14 backward passes with 10 attack steps, and 2 forward passes of the
    revision model: CE(x) 1, CE(x_adv) 1 and the rest of L 2 backward passes.  The gradient of L is
    their sum, since gradients are linear; CE(x) is not differentiated a second time.  With
    ``mask.adversarial_loss: kl`` it is 15 backward passes: KL reaches both images.

    Source: CURE, ICLR 2024, Eqs. 4-8 and Algorithm 1.
    Differs from the released code: docs/methods/cure.md has the list.

    >>> import torch, cure
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> method = cure.methods.CURE(model, steps=10_000)
    >>> step = method(images, labels)
    >>> step.metrics["loss"].shape
    torch.Size([])
    """

    Config = CureConfig
    tradeoff = (
        Tradeoff("gamma", (0.3, 1.0, 3.0, 10.0), "robust"),
        Tradeoff("beta", (0.5, 1.0, 3.0, 6.0), "robust"),
        Tradeoff("percent", (10.0, 30.0, 60.0), None),
    )
    soft_labels = True

    def setup(self) -> None:
        """The revision model, and which tensors are masked."""
        config, context = self.config, self.context
        self.warmup_steps = round(config.warmup * context.epochs) * context.steps_per_epoch
        self.revision: RevisionModel | None = None
        if config.gamma:
            self.revision = RevisionModel(self.model, config.revision, context, self.warmup_steps)
        self.objective = KL if config.attack_loss == "kl" else with_cross_entropy(config.alpha)
        self.masked = self._masked_names()
        if config.mask.source == "per_image" and config.adversarial_term != "ce":
            raise ConfigError(
                "method.mask.source: per_image needs a loss whose terms belong to one image each, "
                "got adversarial_term=kl, which compares two; say method.adversarial_term=ce"
            )

    def _masked_names(self) -> list[str]:
        wanted = self.config.mask.layers
        linear = {
            f"{prefix}.{name}"
            for prefix, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear)
            for name, _ in module.named_parameters(recurse=False)
        }
        names = [
            name
            for position, (name, parameter) in enumerate(self.trainable().items())
            if wanted == "all"
            or (wanted == "not_linear" and name not in linear)
            or (wanted == "matrices" and parameter.dim() >= 2)
            or (wanted == "convs" and parameter.dim() == 4)
            or (wanted == "conv1" and "conv1" in name and position > 0)
        ]
        if not names:
            raise ConfigError(
                f"method.mask.layers: '{wanted}' selects no parameter of this model; "
                "say all, not_linear, matrices or convs"
            )
        return names

    def warnings(self) -> list[str]:
        """A warm-up must leave an epoch, and the revision model's memory must fit what follows."""
        config, total = self.config.revision, self.context.total_steps
        left = total - self.warmup_steps
        if not left:
            return [
                f"method.warmup: {self.config.warmup:g} of the run leaves no epoch of "
                f"{self.context.epochs} for CURE, so that it is trained naturally throughout; set "
                "a smaller one, or more training.epochs"
            ]
        # A horizon of 1 asks for the whole run; rounding must not make that a warning.
        if not self.config.gamma or config.ramp:
            return []
        short: list[str] = config.warnings(total)
        if short or config.memory(total) <= left * (1 + 1e-6):
            return short
        after = " after its natural warm-up" if self.warmup_steps else ""
        return [
            f"the revision model remembers {config.memory(total):,.0f} steps but the run has only "
            f"{left:,}{after}: it will stay near its start and hold the network there; set "
            "method.revision.horizon (the paper's share is 0.064) instead of the decay"
        ]

    def make_adversarial(self, batch: Batch) -> AdversarialBatch:
        """Adversarial images; then the draw that may move the revision model."""
        if batch.step < self.warmup_steps:
            return AdversarialBatch(batch.image)
        first = batch.part == 0
        if first and batch.step == self.warmup_steps > 0 and self.revision is not None:
            self.revision.restart(self.model)
        adversarial_image = self.attack(batch, self.objective)
        early = self.config.revision.update == "before_losses"
        if first and early and self.revision is not None:
            self.revision.maybe_update(self.model, batch.step)
        return AdversarialBatch(adversarial_image)

    def compute_loss(self, batch: Batch, attacked: AdversarialBatch) -> StepOutput:
        """Masked gradients for one batch (natural loss during a warm-up)."""
        return self.finish(self.compute_terms(batch, attacked), batch)

    def compute_terms(self, batch: Batch, attacked: AdversarialBatch) -> StepOutput:
        """Gradient of the total loss, and the two of which the prominence is made."""
        image, label = batch.image, batch.label
        if batch.step < self.warmup_steps:
            loss = F.cross_entropy(self.logits(image), batch.target)
            return StepOutput(loss=loss, metrics={"loss": loss.detach()})
        config = self.config
        natural, adversarial = self.logits(image), self.logits(attacked.image)
        losses = {
            "natural": F.cross_entropy(natural, batch.target),
            "ce": F.cross_entropy(adversarial, batch.target),
            "kl": kl_divergence(natural, adversarial),
            **self._consistency(image, attacked.image, natural, adversarial),
        }
        weights = {"natural": config.natural_weight, config.adversarial_term: config.beta}
        losses["consistency"] = losses[CONSISTENCY[0]] + losses[CONSISTENCY[1]]
        weights["consistency"] = config.gamma
        return StepOutput(
            terms=self._gradients(losses, weights),
            metrics={
                "loss": weighted_sum(losses, weights).detach(),
                "natural_loss": losses["natural"].detach(),
                "adversarial_loss": losses[config.adversarial_term].detach(),
                "consistency": losses["consistency"].detach(),
                "accuracy": accuracy(natural, label),
                "robust_accuracy": accuracy(adversarial, label),
            },
        )

    def finish(self, out: StepOutput, batch: Batch) -> StepOutput:
        """The gradient of the total loss, masked by the prominence over the whole batch."""
        if out.terms is None or "loss" in out.terms:
            return super().finish(out, batch)
        config, gradients = self.config, out.terms["total"]
        scores = self._scores(out.terms, batch)
        masks = rgp_mask(scores, config.percent, config.mask.scope)
        masking = None
        if masks and self.context.observed(batch.step):
            scopes: tuple[Scope, ...] = ("layer", "global")
            masking = Masking(
                gradients,
                masks,
                {scope: rgp_mask(scores, config.percent, scope) for scope in scopes},
            )
        return StepOutput(
            grads=mask_gradients(gradients, masks),
            frozen=masks if config.mask.strict_freeze else None,
            masking=masking,
            metrics=out.metrics | {"conserved": self._share(masks)},
        )

    def _consistency(
        self, image: Tensor, adversarial_image: Tensor, natural: Tensor, adversarial: Tensor
    ) -> dict[str, Tensor]:
        """Both terms of L_CR (Eq. 8), or of its form with ``revision_target: natural``."""
        if self.revision is None:
            return dict.fromkeys(CONSISTENCY, natural.new_zeros(()))
        images = [image]
        if self.config.revision_target == "adversarial":
            images.append(adversarial_image)
        targets = self.revision.logits(self.model, *images)
        pairs = ((targets[0], natural), (targets[-1], adversarial))
        return {name: kl_divergence(*pair) for name, pair in zip(CONSISTENCY, pairs, strict=True)}

    def _gradients(
        self, losses: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> dict[str, Grads]:
        """Gradient of the total loss, and those of which the prominence is made.

        The losses whose gradients make the prominence are differentiated one by one, the rest of
        the total loss at once: gradients are linear.
        """
        mask = self.config.mask
        parameters, engine = self.trainable(), self.context.engine
        if mask.kind == "prominence" and mask.source == "per_image":
            return self._gradients_per_image(losses, weights)
        if mask.kind != "prominence" or mask.source == "own_gradient":
            return {"total": engine.gradients(weighted_sum(losses, weights), parameters)}

        by_natural = engine.gradients(losses["natural"], parameters, retain=True)
        by_adversarial = engine.gradients(losses[mask.adversarial_loss], parameters, retain=True)
        weight = weights.get(mask.adversarial_loss, 0.0)
        done = {"natural", mask.adversarial_loss} if weight else {"natural"}
        rest = weighted_sum(losses, {k: v for k, v in weights.items() if k not in done})
        total = by_natural
        if weights["natural"] != 1:
            total = {name: weights["natural"] * by_natural[name] for name in parameters}
        if rest.requires_grad:
            by_rest = engine.gradients(rest, parameters)
            total = {name: total[name] + by_rest[name] for name in parameters}
        if weight:
            total = {name: total[name] + weight * by_adversarial[name] for name in parameters}
        return {"total": total, "natural": by_natural, "adversarial": by_adversarial}

    def _gradients_per_image(
        self, losses: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> dict[str, Grads]:
        """Gradient of the total loss, and of its natural and its adversarial part."""
        engine, parameters, gamma = self.context.engine, self.trainable(), self.config.gamma
        natural, adversarial = (
            engine.gradients(
                weighted_sum(losses, {name: weights[name], consistency: gamma}), parameters
            )
            for name, consistency in zip(("natural", "ce"), CONSISTENCY, strict=True)
        )
        total = {name: natural[name] + adversarial[name] for name in parameters}
        return {"total": total, "natural": natural, "adversarial": adversarial}

    def _scores(self, terms: Mapping[str, Grads], batch: Batch) -> Grads:
        """The scores that the mask is made of."""
        mask, total = self.config.mask, terms["total"]
        if "natural" in terms:
            return prominence(
                {name: terms["natural"][name] for name in self.masked},
                terms["adversarial"],
                self.config.alpha,
                signed=mask.score == "signed",
            )
        if mask.kind == "none":
            return {}
        if mask.kind == "random":
            draws = self.generator("mask", batch)
            return {
                name: torch.rand(total[name].shape, generator=draws, device=total[name].device)
                for name in self.masked
            }
        signed = mask.score == "signed"
        return {name: total[name] if signed else total[name].abs() for name in self.masked}

    def _share(self, masks: dict[str, Tensor]) -> Tensor:
        """Share of the trainable weights whose gradient the step masks, as a 0-dim tensor."""
        total = sum(parameter.numel() for parameter in self.trainable().values())
        device = self.context.engine.device
        counts = [mask.sum() for mask in masks.values()]
        return (torch.stack(counts).sum() if counts else torch.zeros((), device=device)) / total

    def after_step(self, step: int) -> Metrics:
        """The revision model's move where the released code has it."""
        late = self.config.revision.update == "after_step" and step >= self.warmup_steps
        if self.revision is not None and late:
            self.revision.maybe_update(self.model, step)
        return {}
