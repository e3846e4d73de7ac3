"""The contract of a training method: one batch in, a loss or finished gradients out.

A step has two halves.  ``make_adversarial`` computes the adversarial images and whatever else the
loss needs; a method changes its own state only there.  ``compute_loss`` turns the result into a
loss or gradients without changing state, so that a wrapper can call it again at other weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, Self

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from cure.attacks import PGD, Hooks
from cure.attacks.losses import Objective
from cure.config import MethodConfig
from cure.data.images import Batch
from cure.registry import METHODS as METHODS
from cure.utils.engine import Engine, Grads
from cure.utils.random import shared_generator

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class AdversarialBatch:
    """What a loss needs besides the natural batch; methods that need more derive from it.

    Attributes:
        image: adversarial images [B, C, H, W] in [0, 1], without an autograd graph.
    """

    image: Tensor

    def without_graph(self) -> Self:
        """The same for a second loss: without tensors whose graph serves one backward pass."""
        return self


Attacked = TypeVar("Attacked", bound=AdversarialBatch, default=Any)


@dataclass
class Context:
    """What a method may use besides its batch; nothing is global.

    Attributes:
        engine: gradients, device, precision, keyed generators.
        attack: the run's training attack.
        seed: the run's seed.
        classes: number of classes.
        samples: number of training images; ``Batch.index`` lies below it.
        steps_per_epoch: optimiser steps in one epoch.
        epochs: epochs of the run.
        teachers: trained networks in evaluation mode, by the name of the setting that asks for
            them (see :class:`~cure.config.TeacherConfig`).
        learning_rate: the optimiser's rate at a step.
        weight_decay: the optimiser's L2 penalty.
        natural_images: all training images as they are, batch by batch [B, C, H, W].
        observed: whether someone listens to a step: then a method that holds weights back says
            which (:class:`Masking`).
        attack_share: share of the radius and of the step size of :attr:`attack` at a step
            (``attack.warmup``).
        attack_objective: what replaces the objective that a method gives its attack
            (``attack.objective``); None keeps it.
        two_step: what replaces a single-step attack after catastrophic overfitting.
        fallback: whether that has happened.
    """

    engine: Engine
    attack: PGD
    seed: int
    classes: int
    samples: int
    steps_per_epoch: int
    epochs: int
    teachers: Mapping[str, nn.Module] = field(default_factory=dict)
    learning_rate: Callable[[int], float] = lambda step: 0.1  # noqa: ARG005
    weight_decay: float = 0.0
    natural_images: Callable[[], Iterator[Tensor]] = lambda: iter(())
    observed: Callable[[int], bool] = lambda step: False  # noqa: ARG005
    attack_share: Callable[[int], float] = lambda step: 1.0  # noqa: ARG005
    attack_objective: Objective | None = None
    two_step: PGD | None = None
    fallback: bool = False

    def attack_at(self, step: int) -> PGD:
        """The training attack at a step: smaller during ``attack.warmup``."""
        attack = self.two_step if self.fallback and self.two_step else self.attack
        share = self.attack_share(step)
        if share == 1:
            return attack
        return replace(
            attack,
            threat=replace(attack.threat, epsilon=share * attack.threat.epsilon),
            step_size=share * attack.length,
        )

    @property
    def total_steps(self) -> int:
        """Optimiser steps in the whole run."""
        return self.steps_per_epoch * self.epochs

    def generator(self, purpose: str, step: int) -> torch.Generator:
        """A fresh generator for one purpose at one step, in the same state on every rank.

        What is drawn for samples is drawn by :func:`~cure.utils.random.draw_for_batch`, which gives
        each rank the numbers of its own samples.
        """
        engine = self.engine
        return shared_generator(engine.device, engine.rank, engine.world, self.seed, purpose, step)


@dataclass(frozen=True)
class Masking:
    """The mask of a step, for the gradient logger; all by parameter name.

    Attributes:
        unmasked: the gradients before they are masked.
        mask: True where the gradient is set to 0.
        by_scope: the mask that one threshold a tensor ("layer") and that one threshold for the
            network ("global") give with the scores of this step.
    """

    unmasked: Grads
    mask: dict[str, Tensor]
    by_scope: dict[str, dict[str, Tensor]]


@dataclass
class StepOutput:
    """What a step hands to the trainer.

    Attributes:
        loss: 0-dim mean over the samples at hand, which the trainer differentiates; or
        grads: finished gradients by parameter name, as the engine gives them: averaged over ranks.
        frozen: by parameter name, True where the optimiser must not move a weight at all, neither
            by the gradient nor by momentum or weight decay.
        masking: what was held back, of a step that :attr:`Context.observed` asks for.
        metrics: detached 0-dim tensors, ``loss`` among them; averaged over the epoch and read only
            when it ends.
    """

    loss: Tensor | None = None
    grads: Grads | None = None
    frozen: dict[str, Tensor] | None = None
    masking: Masking | None = None
    metrics: Metrics = field(default_factory=dict)


class Method(nn.Module, Generic[Attacked]):
    """A way to train ``model``.

    It is a Module so that whatever it owns besides the model (a revision model, a teacher) moves,
    saves and loads by itself.  It never touches the optimiser.
    """

    Config: ClassVar[type[MethodConfig]]
    selection: ClassVar[Literal["natural", "robust"]] = "robust"
    """Which accuracy on the validation split chooses the best checkpoint."""
    soft_labels: ClassVar[bool] = False
    """Whether the loss takes ``batch.target``: labels that are mixed or smoothed."""

    def __init__(self, model: nn.Module, config: Any, context: Context) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.context = context

    def step(self, batch: Batch) -> StepOutput:
        """Loss or gradients for one batch.  The model is in training mode before and after."""
        return self.compute_loss(batch, self.make_adversarial(batch))

    @abstractmethod
    def make_adversarial(self, batch: Batch) -> Attacked:
        """Adversarial images and whatever else the loss needs; called once a step.

        State that the method owns besides the model (a revision model, a strategy network) changes
        only here and in :meth:`after_step`.
        """

    @abstractmethod
    def compute_loss(self, batch: Batch, attacked: Attacked) -> StepOutput:
        """Loss or gradients at the present weights.

        Changes nothing but BatchNorm's running statistics.  Every call after the first for the same
        images takes ``attacked.without_graph()``.
        """

    def after_step(self, step: int) -> Metrics:  # noqa: ARG002
        """What follows the optimiser's step number ``step`` (0 the first): moving averages."""
        return {}

    def on_epoch(self, epoch: int) -> None:
        """Schedules: what is true of epoch number ``epoch`` (0 the first).

        Called when an epoch begins and again when a run is resumed inside it, so it must depend
        on the number alone; what happens once belongs in :meth:`step`, keyed by ``batch.step``.
        """

    def after_epoch(self, epoch: int) -> None:
        """What follows the last step of epoch number ``epoch``, before it is validated."""

    def inference_model(self) -> nn.Module:
        """The network that is validated, saved and evaluated."""
        return self.model

    def warnings(self) -> list[str]:
        """What a user should know before the run starts, one sentence each."""
        return []

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimiser moves, by name in :attr:`model`."""
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def logits(self, image: Tensor) -> Tensor:
        """The model's logits [B, K] for images [B, C, H, W], in the run's training precision."""
        return self.context.engine.logits(self.model, image)

    def attack(self, batch: Batch, objective: Objective, hooks: Hooks | None = None) -> Tensor:
        """Adversarial images [B, C, H, W] of the batch by the run's attack on the model.

        Args:
            batch: the images and labels.
            objective: what the attack climbs.
            hooks: what the method changes about the ascent.
        """
        context = self.context
        draws = context.generator("attack", batch.step)
        return context.attack_at(batch.step)(
            self.model,
            batch.image,
            batch.target,
            context.attack_objective or objective,
            draws,
            hooks=hooks,
        )
