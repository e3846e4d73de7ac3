"""LAS-AT: a second network chooses the attack of each image and is trained by reinforcement."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from cure.attacks import PGD, PerSample, Threat
from cure.attacks.losses import CROSS_ENTROPY, KL, kl_divergence_per_sample
from cure.attacks.pgd import Start, attack_mode
from cure.attacks.threat import per_image
from cure.config import MethodConfig, ModelConfig, Section
from cure.data.images import Batch
from cure.methods.base import METHODS, Method, Tradeoff
from cure.methods.common.early_stop import EarlyStop
from cure.methods.common.losses import accuracy, smoothed_cross_entropy
from cure.methods.step import AdversarialBatch, StepOutput
from cure.models import build_model
from cure.models.trial import fitted
from cure.utils.random import derive, draw_for_batch

Form = Literal["at", "trades"]


def _ascending(bounds: tuple[int, int]) -> tuple[int, int]:
    if bounds[0] > bounds[1]:
        raise PydanticCustomError("bounds", "expected the smaller number first")
    return bounds


Bounds = Annotated[tuple[PositiveInt, PositiveInt], AfterValidator(_ascending)]


class StrategyConfig(Section):
    """The strategy network: what it may choose, and how it learns.

    Sizes are in units of an eighth of the threat's epsilon: 1/255 at the usual 8/255.  Both ends
    of a range may be chosen.
    """

    model: ModelConfig = ModelConfig(name="resnet18")
    """Its architecture, with one linear head for each attack parameter in the place of the
    classes."""
    epsilon: Bounds = (3, 15)
    """Range of the radius in units (form ``trades``: 5 to 9)."""
    steps: Bounds = (3, 14)
    """Range of the number of attack steps (form ``trades``: 7 to 14)."""
    step_size: Bounds = (1, 5)
    """Range of the length of a step in units (form ``trades``: 2 to 4)."""
    beta: Bounds = (5, 9)
    """Form ``trades``: range of the weight of an image's KL term."""
    interval: PositiveInt = 20
    """Steps of the run between two updates of the strategy network (form ``trades``: 1)."""
    reuse: bool = False
    """Update from the images that the step trains on, which is cheaper, not from images made for
    the update by actions that are drawn in training mode (released code)."""
    learning_rate: PositiveFloat = 1e-4
    """Its learning rate."""
    drops: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Shares of the run at which its learning rate is divided by 10 (form ``trades``: 0.75, 0.9;
    in form ``at`` the released drops lie beyond the last update)."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Its momentum (form ``trades``: 0.9)."""
    weight_decay: NonNegativeFloat = 0.0
    """Its L2 penalty (form ``trades``: 0.0005)."""
    clip_norm: PositiveFloat = 1.0
    """Its gradient is scaled down to this Euclidean norm when it is longer."""

    def learning_rate_at(self, progress: float) -> float:
        """The learning rate when a share ``progress`` of the run's steps is done."""
        return self.learning_rate * 0.1 ** sum(progress >= share for share in self.drops)

    @field_validator("model", mode="before")
    @classmethod
    def _by_name(cls, model: object) -> object:
        return {"name": model} if isinstance(model, str) else model


class RewardConfig(Section):
    """What a strategy is rewarded for: ``loss R1 + robust R2 + natural R3``."""

    loss: NonNegativeFloat = 1.0
    """Weight of R1, the loss of the network in training on the images that the strategy made."""
    robust: NonNegativeFloat = 4.0
    """Weight of R2, the robust accuracy, a share of 1, of a copy of that network after one step on
    these images (form ``trades``: 8)."""
    natural: NonNegativeFloat = 2.0
    """Weight of R3, the natural accuracy of the copy (form ``trades``: 4)."""
    limit: PositiveFloat = 10.0
    """R1 counts up to this value (form ``trades``: 20)."""
    steps: PositiveInt = 10
    """Steps of the attack that measures R2; each is a quarter of the threat's epsilon long."""
    restarts: PositiveInt = 2
    """Random starts of that attack."""


TRADES_DEFAULTS: dict[str, dict[str, Any]] = {
    "strategy": {
        "epsilon": (5, 9),
        "steps": (7, 14),
        "step_size": (2, 4),
        "interval": 1,
        "drops": (0.75, 0.9),
        "momentum": 0.9,
        "weight_decay": 5e-4,
    },
    "reward": {"robust": 8.0, "natural": 4.0, "limit": 20.0},
}
"""Where the defaults of the form ``trades`` differ (released code for CIFAR-10)."""


class LasAtConfig(MethodConfig):
    """Settings of LAS-AT; the defaults are LAS-PGD-AT on CIFAR-10."""

    name: Literal["las-at"] = "las-at"
    """LAS-AT."""
    form: Form = "at"
    """``at``: LAS-PGD-AT; ``trades``: LAS-TRADES, with defaults of its own."""
    true_mass: float = Field(default=0.7, gt=0, le=1)
    """Form ``at``: share of the true class in the smoothed label; the other classes have the rest
    in equal parts (CIFAR-100: 0.6; LAS-AWP: 1)."""
    strategy: StrategyConfig = StrategyConfig()
    """The strategy network."""
    reward: RewardConfig = RewardConfig()
    """Its reward."""

    def needs_length(self) -> bool:
        """Whether the strategy network's learning rate drops."""
        return bool(self.strategy.drops)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_form(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("form") != "trades":
            return raw
        filled = dict(raw)
        for name, defaults in TRADES_DEFAULTS.items():
            given = raw.get(name, {})
            if isinstance(given, Section):
                given = given.model_dump(exclude_unset=True)
            if isinstance(given, dict):
                filled[name] = defaults | given
        return filled


class StrategyNetwork(nn.Module):
    """``pi(a|x)``: for each image one categorical distribution for each attack parameter.

    Args:
        trunk: images [B, C, H, W] to numbers [B, N]; N is the size of all ranges together.  Its
            last linear layer is thus one head for each range, side by side.
        ranges: smallest and largest value, by attack parameter.

    Source: Jia et al. (LAS-AT), CVPR 2022.
    """

    def __init__(self, trunk: nn.Module, ranges: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.trunk = trunk
        self.ranges = dict(ranges)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, N] of all heads side by side."""
        logits: Tensor = self.trunk(image)
        return logits

    def heads(self, logits: Tensor) -> dict[str, Tensor]:
        """Log-probabilities [B, size of the range] by attack parameter."""
        sizes = [high - low + 1 for low, high in self.ranges.values()]
        parts = torch.split(logits, sizes, dim=1)
        return {
            name: F.log_softmax(part, dim=1) for name, part in zip(self.ranges, parts, strict=True)
        }

    def draw(self, logits: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """One action an image: values [B] by attack parameter, int64, ends of ranges included."""
        actions = {}
        for name, logarithms in self.heads(logits.detach()).items():
            # The largest of log p_k - log(exponential noise) is k with probability p_k;
            # torch.multinomial would make the host wait for a check of p.
            noise = draw_for_batch(
                partial(_exponential, logarithms, generator), logarithms.shape, generator
            )
            actions[name] = self.ranges[name][0] + (logarithms - noise.log()).argmax(dim=1)
        return actions

    def log_likelihood(self, logits: Tensor, actions: Mapping[str, Tensor]) -> Tensor:
        """``sum_heads mean_i log pi(a_i|x_i)``, 0-dim, of actions as :meth:`draw` gives them."""
        total = logits.new_zeros(())
        for name, logarithms in self.heads(logits).items():
            chosen = actions[name] - self.ranges[name][0]
            total = total + logarithms.gather(1, chosen[:, None]).mean()
        return total


def _exponential(like: Tensor, generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    return like.new_empty(shape).exponential_(generator=generator)


def size_of(ranges: Mapping[str, tuple[int, int]]) -> int:
    """Logits that a strategy network needs for these ranges."""
    return sum(high - low + 1 for low, high in ranges.values())


@dataclass(frozen=True)
class LasAtBatch(AdversarialBatch):
    """Adversarial images and the strategies that made them.

    Attributes:
        epsilon: radius of each image [B].
        steps: number of attack steps of each image [B].
        step_size: length of a step of each image [B].
        beta: form ``trades``: weight of the KL term of each image [B].
        reward: after an update of the strategy network, its reward and the parts of it by name.
    """

    epsilon: Tensor
    steps: Tensor
    step_size: Tensor
    beta: Tensor | None = None
    reward: Mapping[str, Tensor] = field(default_factory=dict)


class OwnStrategy(PerSample):
    """A radius, a number of steps and a step size for each sample.

    Args:
        epsilon: radius [B], in the threat's norm.
        steps: number of steps [B], int64; a sample whose steps are done stays where it is.
        step_size: length of a step [B].

    Source: Jia et al. (LAS-AT), CVPR 2022, released code.
    """

    def __init__(self, epsilon: Tensor, steps: Tensor, step_size: Tensor) -> None:
        super().__init__(epsilon, step_size)
        self.own_steps = steps
        self.steps = int(steps.max())

    def start(
        self,
        image: Tensor,
        threat: Threat,
        start: Start,
        generator: torch.Generator | None,
        clamp: bool,
    ) -> Tensor:
        """A uniform start is drawn in the threat's ball and projected on each sample's own."""
        if start != "uniform" or generator is None:
            return super().start(image, threat, start, generator, clamp)
        start_at = image + self.project(threat, threat.sample(image, generator))
        return start_at.clamp(0, 1) if clamp else start_at

    def accept(self, step: int, logits: Tensor, x: Tensor, moved: Tensor) -> Tensor:  # noqa: ARG002
        """``moved`` for samples that have steps left."""
        going = step < self.own_steps.to(x.device)
        return torch.where(per_image(going, x), moved, x)


@METHODS.register("las-at")
class LASAT(Method[LasAtBatch]):
    """Learnable attack strategy (LAS-AT): a second network chooses each image's attack.

    The strategy network draws a radius, a number of steps and a step size for each image, in the
    form ``trades`` also the weight beta_i of its KL term; the network is trained on
    the images made so.  At every ``strategy.interval``-th step, before that, the strategy network
    learns by REINFORCE without baseline: it draws actions a, and descends

        ``- R sum_heads mean_i log pi(a_i|x_i)``,  ``R = w1 R1 + w2 R2 + w3 R3``

    where R1 is the loss of the network in training on the images that a made, R2 and R3 are the
    robust and the natural accuracy of a copy of it that took one plain step of gradient descent
    on them, all on the batch at hand.

    Costs, with k the largest number of steps drawn in the batch (14 with the defaults), k + 1
    forward and k + 1 backward passes and one forward pass of the strategy network; form ``trades``
    k + 3 and k + 2.  An update adds k + 25 and k + 21 (``trades``: k + 26 and k + 22), 24 and 21
    of them (25 and 22) of the copy, and one forward and backward pass of the strategy network;
    ``strategy.reuse`` saves k and k (k + 1 and k).  An image whose steps are done stays in its
    batch.  The host reads the largest number of steps from the device.

    Source: Jia et al., CVPR 2022.
    Differs from the released code: docs/methods/las-at.md has the list.

    >>> import torch, cure
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    >>> images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> method = cure.methods.LASAT(model, images=[images], strategy={"model": "small_cnn"})
    >>> step = method(images, labels)
    >>> sorted(step.metrics)
    ['epsilon', 'loss', 'robust_accuracy', 'step_size', 'steps']
    """

    Config = LasAtConfig
    needs_pgd = True
    tradeoff = (Tradeoff("reward.natural", (0.5, 2.0, 8.0), None),)
    splits = False

    @property
    def period(self) -> int:
        """The strategy network learns in the last step of each interval."""
        return int(self.config.strategy.interval)

    def setup(self) -> None:
        """The strategy network, for the images of the context."""
        config, context = self.config, self.context
        strategy = config.strategy
        ranges = {
            "epsilon": strategy.epsilon,
            "steps": strategy.steps,
            "step_size": strategy.step_size,
        }
        if config.form == "trades":
            ranges["beta"] = strategy.beta
        image = next(context.natural_images(), None)
        if image is None:
            raise ValueError("the strategy network needs images to be built for: give the context")
        trunk = build_model(
            strategy.model,
            classes=size_of(ranges),
            channels=image.shape[1],
            size=(image.shape[2], image.shape[3]),
            seed=derive(context.seed, "strategy"),
        )
        self.strategy = StrategyNetwork(trunk, ranges)
        layout = fitted(context.engine, trunk)
        layout.place(self.strategy)
        self.contiguous = not layout.channels_last
        weights = torch.cat([weight.detach().flatten() for weight in self.strategy.parameters()])
        self.velocity: Tensor | None
        self.register_buffer("velocity", torch.zeros_like(weights) if strategy.momentum else None)

    # -- attacking -----------------------------------------------------------------------------

    def make_adversarial(self, batch: Batch) -> LasAtBatch:
        """Every so often a better strategy; then images by strategies drawn for this step.

        Both precede the optimiser's step, so that the reward is that of the network which the
        strategy was chosen for.
        """
        config = self.config.strategy
        due = batch.part == 0 and (batch.step + 1) % config.interval == 0
        reward: dict[str, Tensor] = {}
        if due and not config.reuse:
            logits = self._logits_of_strategy(batch.image)
            draws = self.generator("strategy update", batch)
            actions = self.strategy.draw(logits, draws)
            made = self._attacked(batch, actions, "strategy update attack")
            reward = self._improve(batch, logits, actions, made)
        with attack_mode(self.strategy), torch.no_grad():
            drawn = self.strategy.draw(
                self._logits_of_strategy(batch.image), self.generator("strategy", batch)
            )
        attacked = self._attacked(batch, drawn, "attack")
        if due and config.reuse:
            reward = self._improve(batch, self._logits_of_strategy(batch.image), drawn, attacked)
        return replace(attacked, reward=reward)

    def _logits_of_strategy(self, image: Tensor) -> Tensor:
        """Logits of the strategy network, in its present mode and its own memory layout."""
        if self.contiguous:
            image = image.contiguous()
        return self.context.engine.logits(self.strategy, image)

    def _attacked(self, batch: Batch, actions: Mapping[str, Tensor], purpose: str) -> LasAtBatch:
        """The strategies, in the units of images, and the images that they make."""
        attack = self.context.attack_at(batch.step)
        unit = attack.threat.epsilon / 8
        epsilon = unit * actions["epsilon"].to(batch.image.dtype)
        step_size = unit * actions["step_size"].to(batch.image.dtype)
        adversarial = attack(
            self.model,
            batch.image,
            batch.label,
            self.context.attack_objective
            or (KL if self.config.form == "trades" else CROSS_ENTROPY),
            self.generator(purpose, batch),
            hooks=OwnStrategy(epsilon, actions["steps"], step_size),
        )
        beta = actions["beta"].to(batch.image.dtype) if "beta" in actions else None
        return LasAtBatch(adversarial, epsilon, actions["steps"], step_size, beta)

    # -- the strategy network learns ------------------------------------------------------------

    def _improve(
        self, batch: Batch, logits: Tensor, actions: Mapping[str, Tensor], made: LasAtBatch
    ) -> dict[str, Tensor]:
        """One step of the strategy network; the reward of these actions, by name."""
        parts = self._reward_parts(batch, made)
        weights = self.config.reward
        reward = (
            weights.loss * parts["reward_loss"].clamp(0, weights.limit)
            + weights.robust * parts["reward_robust"]
            + weights.natural * parts["reward_natural"]
        )
        self._descend(-reward * self.strategy.log_likelihood(logits, actions), batch.step)
        return {"reward": reward, **parts}

    def _reward_parts(self, batch: Batch, made: LasAtBatch) -> dict[str, Tensor]:
        """R1, R2 and R3 without limit and weights, detached 0-dim tensors."""
        future, loss = self._after_one_step(batch, made)
        if self.config.form == "at":
            with attack_mode(self.model), torch.no_grad():
                loss = F.cross_entropy(self.logits(made.image), batch.label)
        future.eval()
        natural = self._right(future, batch.image, batch.label)
        robust = torch.ones_like(natural)
        draws = self.generator("reward", batch)
        threat = self.context.attack.threat
        attack = PGD(
            threat,
            self.config.reward.steps,
            threat.epsilon / 4,
            start="uniform",
            mode="train",
            precision=self.context.engine.attack_precision,
        )
        for _ in range(self.config.reward.restarts):
            hooks = EarlyStop(batch.label, patience=0)
            worst = attack(future, batch.image, batch.label, CROSS_ENTROPY, draws, hooks=hooks)
            robust &= self._right(future, worst, batch.label)
        parts = {
            "reward_loss": loss.detach(),
            "reward_robust": robust.to(loss.dtype).mean(),
            "reward_natural": natural.to(loss.dtype).mean(),
        }
        # The reward is that of the whole batch, whose strategies it judges.
        return self.context.engine.means(parts)

    def _after_one_step(self, batch: Batch, made: LasAtBatch) -> tuple[nn.Module, Tensor]:
        """A copy of the network after one step on ``made``, and its loss before that step."""
        future = copy.deepcopy(self.model)
        parameters = {
            name: parameter
            for name, parameter in future.named_parameters()
            if parameter.requires_grad
        }
        loss = self._learnt(future, batch, made).loss
        assert loss is not None
        gradients = self.context.engine.gradients(loss, parameters)
        rate, decay = self.context.learning_rate(batch.step), self.context.weight_decay
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.sub_(rate * (gradients[name] + decay * parameter))
        torch.clear_autocast_cache()  # it holds the weights before, in another precision
        return future, loss

    @torch.no_grad()
    def _right(self, model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
        """Which images [B] a network classifies right."""
        return self.context.engine.logits(model, image).argmax(dim=1) == label

    @torch.no_grad()
    def _descend(self, loss: Tensor, step: int) -> None:
        """One step of stochastic gradient descent of the strategy network, at a step of the run."""
        config = self.config.strategy
        rate = config.learning_rate_at(step / self.context.total_steps)
        parameters = dict(self.strategy.named_parameters())
        gradients = self.context.engine.gradients(loss, parameters)
        change = torch.cat([gradient.flatten() for gradient in gradients.values()])
        change = change * (config.clip_norm / (change.norm() + 1e-6)).clamp_max(1)
        if config.weight_decay:
            weights = torch.cat([parameter.flatten() for parameter in parameters.values()])
            change = change + config.weight_decay * weights
        if self.velocity is not None:
            change = self.velocity.mul_(config.momentum).add_(change)
        sizes = [parameter.numel() for parameter in parameters.values()]
        for parameter, part in zip(parameters.values(), torch.split(change, sizes), strict=True):
            parameter.sub_(rate * part.view(parameter.shape))

    # -- the network learns ---------------------------------------------------------------------

    def compute_loss(self, batch: Batch, attacked: LasAtBatch) -> StepOutput:
        """The form's loss on the images that the strategies made."""
        out = self._learnt(self.model, batch, attacked)
        drawn = {name: getattr(attacked, name) for name in self.strategy.ranges}
        for name, value in {**drawn, **attacked.reward}.items():
            out.metrics[name] = value.to(batch.image.dtype).mean()
        return out

    def _learnt(self, model: nn.Module, batch: Batch, attacked: LasAtBatch) -> StepOutput:
        """The form's loss of a network."""
        label, engine = batch.label, self.context.engine
        if self.config.form == "at":
            adversarial = engine.logits(model, attacked.image)
            loss = smoothed_cross_entropy(adversarial, label, self.config.true_mass)
            metrics = {"loss": loss.detach(), "robust_accuracy": accuracy(adversarial, label)}
            return StepOutput(loss=loss, metrics=metrics)
        natural = engine.logits(model, batch.image)
        adversarial = engine.logits(model, attacked.image)
        natural_loss = F.cross_entropy(natural, label)
        per_sample = kl_divergence_per_sample(natural, adversarial)
        assert attacked.beta is not None
        loss = natural_loss + (attacked.beta * per_sample).mean()
        return StepOutput(
            loss=loss,
            metrics={
                "loss": loss.detach(),
                "natural_loss": natural_loss.detach(),
                "adversarial_loss": per_sample.mean().detach(),
                "accuracy": accuracy(natural, label),
                "robust_accuracy": accuracy(adversarial, label),
            },
        )
