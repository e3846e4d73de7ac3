"""What a method uses besides its batch: engine, attack, seed, length of the run, teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from cure.attacks import PGD
from cure.attacks.losses import Objective
from cure.data.images import Batch
from cure.utils.engine import Engine
from cure.utils.random import shared_generator


@dataclass
class Context:
    """Everything that a method uses besides its batch.

    Attributes:
        engine: gradients, device, precision, keyed generators.
        attack: the run's training attack.
        seed: the run's seed.
        steps_per_epoch: optimiser steps in one epoch.
        epochs: epochs of the run.
        teachers: trained networks in evaluation mode, by the name of the setting that asks for
            them (see :class:`~cure.config.TeacherConfig`).
        learning_rate: the optimiser's rate at a step.
        weight_decay: the optimiser's L2 penalty.
        natural_images: all training images as they are, batch by batch [B, C, H, W].
        observed: whether the gradient logger records a step; a method with a mask then returns its
            :class:`Masking`.
        attack_share: share of the radius and of the step size of :attr:`attack` at a step
            (``attack.warmup``).
        has_epochs: without a run: whether the caller counts epochs; None in a run.
        classes: number of classes; 0 without a run.
        attack_objective: what replaces the objective that a method gives its attack
            (``attack.objective``); None keeps it.
        two_step: what replaces a single-step attack after catastrophic overfitting.
        fallback: whether that has happened.
        fold_frozen: fold frozen BatchNorm layers into convolutions also in training passes (see
            :func:`~cure.models.fuse.folded_frozen`): the same up to rounding, in less time.
    """

    engine: Engine
    attack: PGD
    seed: int
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
    fold_frozen: bool = False
    has_epochs: bool | None = None
    classes: int = 0

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

    def generator(
        self, purpose: str, step: int, *more: int, part: int = 0, parts: int = 1
    ) -> torch.Generator:
        """A fresh generator for one purpose at one step, in the same state on every rank.

        What is drawn for samples is drawn by :func:`~cure.utils.random.draw_for_batch`, which gives
        each rank, and each part of its batch, the numbers of its own samples.

        Args:
            purpose: what is drawn.
            step: number of the optimiser's step.
            more: the rest of the key.
            part: which of ``parts`` equal parts of a rank's batch draws.
            parts: 1 for the whole batch.
        """
        rank, world = self.engine.rank * parts + part, self.engine.world * parts
        return shared_generator(self.engine.device, rank, world, self.seed, purpose, step, *more)

    def generator_for(self, purpose: str, batch: Batch) -> torch.Generator:
        """The generator of one purpose for a batch, or for a part of one."""
        if batch.parts > 1:
            return self.generator(purpose, batch.step, part=batch.part, parts=batch.parts)
        return self.generator(purpose, batch.step, *((batch.part,) if batch.part else ()))
