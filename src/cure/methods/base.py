"""The interface of a training method: a batch in, a loss or gradients out.

A step has two halves.  ``make_adversarial`` computes the adversarial images and whatever else the
loss needs; a method changes its own state only there.  ``compute_loss`` turns the result into a
loss or gradients without changing state, so that a wrapper can call it again at other weights.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Literal

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from cure.attacks import Hooks
from cure.attacks.losses import Objective
from cure.config import MethodConfig
from cure.data.images import Batch
from cure.errors import ConfigError, ModelError
from cure.methods.context import Context
from cure.methods.standalone import check_batch, standalone
from cure.methods.step import (
    AdversarialBatch,
    LoopState,
    Metrics,
    PartMean,
    Step,
    StepOutput,
    holding,
)
from cure.models.fuse import folded_frozen
from cure.registry import METHODS as METHODS

Attacked = TypeVar("Attacked", bound=AdversarialBatch, default=Any)


@dataclass(frozen=True)
class Tradeoff:
    """A setting of a method that exchanges natural for robust accuracy.

    Attributes:
        setting: its place in the ``method`` section: "beta", "reward.natural".
        values: a few values that span what is useful, in rising order.
        more: the accuracy that a higher value favours; None where that is not known.
    """

    setting: str
    values: tuple[float, ...]
    more: Literal["natural", "robust"] | None

    @property
    def key(self) -> str:
        """Its place in a recipe."""
        return f"method.{self.setting}"

    def __str__(self) -> str:
        favours = "effect not known" if self.more is None else f"higher: more {self.more}"
        return f"{self.setting} ({favours})"


class Method(nn.Module, Generic[Attacked]):
    """A training method for ``model``, in the trainer of this package or in your own loop:

    .. code-block:: python

        method = cure.methods.TRADES(model, threat=cure.Threat("Linf", "4/255"), beta=6)
        for images, labels in loader:
            step = method(images, labels)
            optimizer.zero_grad()
            step.backward()  # or accelerator.backward(step.loss), or scaler.scale(step.loss)...
            optimizer.step()
            method.update()
        robust = method.inference_model()

    Args:
        model: images [B, C, H, W] in [0, 1] to logits [B, K], on its device, in float32; it is
            trained in place.  The method puts it into training mode once; after an evaluation say
            ``method.train()``.
        config: the settings, when a recipe describes them; None for keyword arguments.
        context: what a run gives the method; None for keyword arguments.
        settings: without ``context``: the settings of ``Config`` by name, teachers as networks, and

            - ``threat``: the ball, by default Linf 8/255;
            - ``attack``: a :class:`cure.attacks.PGD`, by default 10 steps of a quarter of the
              radius from a Gaussian start;
            - ``steps``: optimiser steps of the whole training, ``len(loader) * epochs``; needed by
              methods with a schedule;
            - ``epochs``: how many epochs these are; by default schedules may change at any step;
            - ``seed``: of every random draw, which depends on it, its purpose and the step alone;
            - ``images``: training images, or batches of images and labels, for methods that need
              them (LASAT, averaging with recomputed BatchNorm);
            - ``learning_rate`` (a number, or a function of the step) and ``weight_decay`` of the
              optimiser, which LASAT simulates.

    To resume, load ``method.state_dict()`` and say :meth:`resume`.  Several processes:
    the trainer of this package averages gradients over them; here the caller has to.

    It is a Module so that whatever it owns besides the model (a revision model, a teacher) moves,
    saves and loads by itself.  It never touches the optimiser.
    """

    Config: ClassVar[type[MethodConfig]]
    selection: ClassVar[Literal["natural", "robust"]] = "robust"
    """Which accuracy on the validation split chooses the best checkpoint."""
    soft_labels: ClassVar[bool] = False
    """Whether the loss takes ``batch.target``: labels that are mixed or smoothed."""
    tradeoff: ClassVar[tuple[Tradeoff, ...]] = ()
    """Settings that exchange natural for robust accuracy, the usual one first; empty for a method
    without one."""
    needs_pgd: ClassVar[bool] = False
    """Whether it changes the steps of PGD, so that a single-step attack does not fit."""

    takes_objective: ClassVar[bool] = True
    """Whether ``attack.objective`` may replace what its attack climbs."""

    splits: ClassVar[bool] = True
    """Whether a batch may come in parts (``training.accumulation_steps``)."""
    graphs: ClassVar[int] = 2
    """Batches of images whose autograd graph is in memory at once, to estimate memory."""

    def __init__(
        self,
        model: nn.Module,
        config: Any = None,
        context: Context | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if context is None:
            config, context = standalone(type(self).__name__, self.Config, model, **settings)
        self.model = model
        self.config = config
        self.context = context
        self.progress = LoopState()
        self.setup()
        if context.has_epochs is not None:
            self.train()
            self.on_epoch(0)
            for sentence in self.warnings():
                warnings.warn(sentence, stacklevel=2)

    def setup(self) -> None:
        """Build what the method owns besides the model, from :attr:`config` and :attr:`context`."""

    # -- in a training loop --------------------------------------------------------------------

    def forward(self, images: Tensor, labels: Tensor) -> Step:
        """One step's adversarial images, loss and gradients, for your own training loop.

        Args:
            images: [B, C, H, W] in [0, 1]; standardise them inside the model (see
                :class:`cure.models.Normalised`).
            labels: classes [B] int64, or probabilities [B, K] for methods that take soft labels.

        Raises:
            ConfigError: when images or labels are not as above (checked in the first call only),
                the method takes no soft labels, or :meth:`update` was forgotten.
            ModelError: when the network returns no logits (checked in the first call only).
        """
        progress = self.progress
        learnt = self.trainable()
        if not learnt:
            raise ModelError("no weight of the network may change: set requires_grad to True")
        weight = next(iter(learnt.values()))
        if self.context.engine.device != weight.device:
            self._follow(weight.device)
        if progress.part and weight._version != progress.version:
            raise ConfigError(
                "the weights changed since the last batch: say method.update() after each "
                "optimizer.step()"
            )
        if progress.done == progress.part == 0:
            check_batch(self.model, images, labels, self.context.teachers)
        soft = labels if labels.dim() == 2 else None
        if soft is not None and not self.soft_labels:
            raise ConfigError(f"{type(self).__name__} takes no soft labels; give classes [B]")
        label = labels if soft is None else labels.argmax(dim=1)
        index = torch.arange(len(images), device=images.device)
        step = self.take_step(Batch(images, label, index, progress.done, soft, progress.part))
        progress.part, progress.version = progress.part + 1, weight._version
        return step

    def _follow(self, device: torch.device) -> None:
        """Compute where the network is: it may have been moved since the method was made."""
        for method in self.modules():
            if isinstance(method, Method):
                context = method.context
                method.context = replace(
                    context,
                    engine=replace(context.engine, device=device),
                    natural_images=_moved(context.natural_images, device),
                )

    def take_step(self, batch: Batch, parts: int = 1) -> Step:
        """The step of one batch; what :meth:`forward` and the trainer call.

        Args:
            batch: the images and labels.
            parts: work on so many equal parts one after another (gradient accumulation).
        """
        out = self.step(batch) if parts == 1 else self.step_in_parts(batch, parts)
        step = Step(out, self.trainable(), self.context.engine)
        self.progress.hold(step.frozen)
        return step

    @contextmanager
    def freeze(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Keep frozen weights and their momentum as they are during the optimiser's step.

        For methods that freeze weights (CURE's ``mask.strict_freeze``): ``with
        method.freeze(optimizer): optimizer.step()``.  A zero gradient alone does not hold a weight
        still: momentum and weight decay move it.  Of several batches in one step (gradient
        accumulation) a weight is frozen where all of them freeze it.
        """
        with holding(optimizer, self.trainable(), self.progress.frozen):
            yield
        self.progress.frozen = {}

    def update(self) -> Metrics:
        """What follows the optimiser's step: moving averages and schedules.  Call it once a step.

        Raises:
            ConfigError: when weights were to be frozen and :meth:`freeze` was not used.
        """
        progress, per_epoch = self.progress, self.context.steps_per_epoch
        if progress.frozen:
            raise ConfigError(
                "this step freezes weights, which the optimiser must not move: say `with "
                "method.freeze(optimizer): optimizer.step()`"
            )
        metrics = self.after_step(progress.done)
        progress.done, progress.part = progress.done + 1, 0
        if progress.done % per_epoch == 0:
            self.after_epoch(progress.done // per_epoch - 1)
            self.on_epoch(progress.done // per_epoch)
        return metrics

    def resume(self, done: int) -> None:
        """Go on after ``done`` optimiser steps (``method.progress.done`` when they were saved).

        Call it after ``load_state_dict``: schedules are not part of the state.
        """
        self.progress.done = done
        self.on_epoch(done // self.context.steps_per_epoch)

    # -- what a method defines -----------------------------------------------------------------

    def step(self, batch: Batch) -> StepOutput:
        """Loss or gradients for one batch.  The model is in training mode before and after."""
        attacked = self.make_adversarial(batch)
        return replace(self.compute_loss(batch, attacked), adversarial=attacked.image)

    def step_in_parts(self, batch: Batch, parts: int) -> StepOutput:
        """:meth:`step` with one of ``parts`` equal parts of the batch in memory at a time.

        Equal up to rounding for networks whose samples do not depend on each other.
        """
        mean = PartMean(self)
        for part in batch.split(parts):
            mean.add(self.compute_terms(part, self.make_adversarial(part)))
        return self.finish(mean.result(), batch)

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

    def compute_terms(self, batch: Batch, attacked: Attacked) -> StepOutput:
        """:meth:`compute_loss` as far as it is a mean over the samples; :meth:`finish` is the rest.

        A method whose gradients are no such mean, like CURE's masked ones, defines both and
        returns ``terms`` here, so that parts of a batch can be added.
        """
        return self.compute_loss(batch, attacked)

    def finish(self, out: StepOutput, batch: Batch) -> StepOutput:  # noqa: ARG002
        """Finished gradients from the terms of a whole batch."""
        return out if out.terms is None else replace(out, grads=out.terms["loss"], terms=None)

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

    @property
    def period(self) -> int:
        """Steps of which the last one costs more than the others; 1 where all cost the same."""
        return 1

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

    def generator(self, purpose: str, batch: Batch) -> torch.Generator:
        """The generator of one purpose for a batch, see :meth:`Context.generator`."""
        return self.context.generator_for(purpose, batch)

    def logits(self, image: Tensor) -> Tensor:
        """The model's logits [B, K] for images [B, C, H, W], in the run's training precision."""
        if not self.context.fold_frozen:
            return self.context.engine.logits(self.model, image)
        with folded_frozen(self.model, image):
            return self.context.engine.logits(self.model, image)

    def attack(self, batch: Batch, objective: Objective, hooks: Hooks | None = None) -> Tensor:
        """Adversarial images [B, C, H, W] of the batch by the run's attack on the model.

        Args:
            batch: the images and labels.
            objective: what the attack climbs.
            hooks: what the method changes about the ascent.
        """
        attack = self.context.attack_at(batch.step)
        objective = self.context.attack_objective or objective
        draws = self.generator("attack", batch)
        options: dict[str, Any] = {} if hooks is None else {"hooks": hooks}
        return attack(self.model, batch.image, batch.attack_target, objective, draws, **options)


def _moved(
    images: Callable[[], Iterator[Tensor]], device: torch.device
) -> Callable[[], Iterator[Tensor]]:
    """The same batches on another device."""
    return lambda: (image.to(device) for image in images())
