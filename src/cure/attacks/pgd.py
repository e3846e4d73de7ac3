"""Projected gradient descent: the ascent loop, its hooks, and the state of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from cure.attacks.losses import CROSS_ENTROPY, Objective
from cure.attacks.threat import Threat, drawn, per_image, per_sample
from cure.config import Ratio, checked
from cure.errors import ConfigError, ModelError
from cure.models.checks import check_labels, check_range
from cure.models.fuse import folded
from cure.utils.modes import modes_kept
from cure.utils.random import generator as keyed_generator

Start = Literal["gaussian", "uniform", "none"]


@contextmanager
def attack_mode(model: nn.Module, mode: Literal["eval", "train"] = "eval") -> Iterator[None]:
    """Prepare ``model`` for an attack: no gradient for weights; every change undone at the end.

    Modes, ``requires_grad`` and buffers (in ``train`` mode BatchNorm would move them) come back
    as they were, also when the attack raises.  ``.grad`` is never touched.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if mode == "train" else []
    with modes_kept(model):
        try:
            for parameter in learning:
                parameter.requires_grad_(False)
            model.train(mode == "train")
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def starting_point(
    image: Tensor,
    threat: Threat,
    start: Start,
    generator: torch.Generator | None,
    *,
    epsilon: float | Tensor | None = None,
    clamp: bool = True,
) -> Tensor:
    """The point that the ascent begins at, inside the ball around ``image`` [B, C, H, W].

    Args:
        image: natural images in [0, 1].
        threat: the ball.
        start: ``gaussian``: image + 0.001 N(0, 1), projected; ``uniform`` in the ball; ``none``.
        generator: source of the random numbers, on the image's device.
        epsilon: radius, or one a sample [B]; by default the threat's.
        clamp: keep the point in [0, 1].

    Raises:
        ValueError: when a random start has no generator.
    """
    if start == "none":
        return image.clone()
    if generator is None:
        raise ValueError(f"a '{start}' start draws random numbers: give a generator")
    if start == "uniform":
        change = threat.sample(image, generator, epsilon)
    else:
        change = threat.project(0.001 * drawn(torch.randn, image, generator), epsilon)
    return (image + change).clamp(0, 1) if clamp else image + change


class Hooks:
    """What a variant of PGD changes about :func:`perturb`; this base class changes nothing.

    An object serves one call, so a variant may keep its state in it.
    """

    steps: int | None = None
    """Number of steps in place of the attack's."""

    def start(
        self,
        image: Tensor,
        threat: Threat,
        start: Start,
        generator: torch.Generator | None,
        clamp: bool,
    ) -> Tensor:
        """The point [B, C, H, W] that the ascent begins at."""
        return starting_point(image, threat, start, generator, clamp=clamp)

    def ascend(
        self,
        x: Tensor,
        direction: Tensor,
        step_size: float,
        generator: torch.Generator | None,  # noqa: ARG002
    ) -> Tensor:
        """One step from ``x`` along ``direction`` [B, C, H, W], before the projection."""
        return x + step_size * direction

    def project(self, threat: Threat, change: Tensor) -> Tensor:
        """The nearest change [B, C, H, W] inside the ball."""
        return threat.project(change)

    def accept(self, step: int, logits: Tensor, x: Tensor, moved: Tensor) -> Tensor:  # noqa: ARG002
        """The point after step number ``step`` (0 the first): ``moved``, or ``x`` to stay there.

        ``logits`` [B, K] are those of ``x``.
        """
        return moved


class PerSample(Hooks):
    """A radius and a step size for each sample.

    Args:
        epsilon: radius [B], in the threat's norm.
        step_size: length of a step [B].
    """

    def __init__(self, epsilon: Tensor, step_size: Tensor) -> None:
        self.epsilon = epsilon
        self.step_size = step_size

    def start(
        self,
        image: Tensor,
        threat: Threat,
        start: Start,
        generator: torch.Generator | None,
        clamp: bool,
    ) -> Tensor:
        """In each sample's own ball."""
        return starting_point(image, threat, start, generator, epsilon=self.epsilon, clamp=clamp)

    def ascend(
        self,
        x: Tensor,
        direction: Tensor,
        step_size: float,  # noqa: ARG002
        generator: torch.Generator | None,  # noqa: ARG002
    ) -> Tensor:
        """A step of each sample's own length."""
        return x + per_sample(self.step_size, x) * direction

    def project(self, threat: Threat, change: Tensor) -> Tensor:
        """On each sample's own ball."""
        return threat.project(change, self.epsilon)


def perturb(
    forward: Callable[[Tensor], Tensor],
    objective: Callable[[Tensor], Tensor],
    image: Tensor,
    threat: Threat,
    *,
    steps: int,
    step_size: float,
    start: Start = "none",
    generator: torch.Generator | None = None,
    clamp_start: bool = True,
    hooks: Hooks | None = None,
) -> Tensor:
    """Climb ``objective(forward(x))`` from ``image``, never leaving the ball or [0, 1].

    ``x <- clip(image + project(x + step_size * steepest(gradient) - image))``, ``steps`` times.

    Args:
        forward: images [B, C, H, W] to logits [B, K].
        objective: logits [B, K] to one number a sample [B].
        image: [B, C, H, W] in [0, 1].
        threat: the ball.
        steps: number of steps.
        step_size: length of a step in the threat's norm.
        start: where to begin; "gaussian" and "uniform" need ``generator``.
        generator: source of the random start, on the image's device.
        clamp_start: keep the starting point in [0, 1].
        hooks: what a variant changes.

    Returns:
        [B, C, H, W], detached, in the order of ``image``.

    Raises:
        ModelError: when the network gives no gradient.
        ValueError: when a random start has no generator.
    """
    hooks = hooks or Hooks()
    image = image.detach()
    x = hooks.start(image, threat, start, generator, clamp_start)
    for step in range(steps if hooks.steps is None else hooks.steps):
        x.requires_grad_(True)
        with torch.enable_grad():
            logits = forward(x)
            climbed = objective(logits).sum()
            if not climbed.requires_grad:
                raise ModelError(
                    "no gradient reaches the images through the network (an ONNX file, or a step "
                    "that detaches): attack a network that keeps it, or evaluate with "
                    "attacks='noise,square'"
                )
            (gradient,) = torch.autograd.grad(climbed, x)
        x = x.detach()
        moved = hooks.ascend(x, threat.steepest(gradient), step_size, generator)
        moved = (image + hooks.project(threat, moved - image)).clamp(0, 1)
        x = hooks.accept(step, logits.detach(), x, moved)
    return x.detach()


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent on the images: ``PGD(threat, steps=20)(model, images, labels)``.

    >>> import cure
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    >>> image, label = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 2])
    >>> adversarial = PGD(cure.Threat("Linf", "8/255"), steps=5)(model, image, label)
    >>> bool((adversarial - image).abs().max() <= 8 / 255 + 1e-6)
    True

    Attributes:
        threat: the ball.
        steps: steps of ascent.
        step_size: length of a step in the threat's norm; by default 2.5 epsilon / steps, with which
            every point of the ball can be reached.
        start: where the ascent begins, see :func:`starting_point`.
        clamp_start: keep the starting point in [0, 1]; some released codes clamp only after the
            first step.
        restarts: how often the attack is repeated; of each image the result with the highest
            objective is kept, at the cost of one more forward pass a restart.
        mode: mode of the network meanwhile ("train" leaves BatchNorm's running statistics alone).
        precision: makes the context of each forward and backward pass (mixed precision).
        fold: compute what evaluation mode makes constant beforehand (see
            :func:`~cure.models.fuse.folded`): the same attack up to rounding, in less time.
        compile: compile the network's passes (see ``training.compile``).

    Raises:
        ConfigError: when one of these is not as above.

    Source: Madry et al., ICLR 2018.
    """

    threat: Threat
    steps: int = 10
    step_size: float | str | None = None
    start: Start = "uniform"
    mode: Literal["eval", "train"] = "eval"
    precision: Callable[[], AbstractContextManager[object]] = nullcontext
    fold: bool = False
    compile: bool = False
    clamp_start: bool = True
    restarts: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Threat):
            raise ConfigError(f"PGD: expected threat as a cure.Threat, got {self.threat!r}")
        for name, known in (("start", get_args(Start)), ("mode", ("eval", "train"))):
            given = getattr(self, name)
            if given not in known:
                raise ConfigError(
                    f"PGD: expected {name} as one of {', '.join(known)}, got {given!r}"
                )
        for name, least in (("steps", 0), ("restarts", 1)):
            given = checked(f"PGD: {name}", getattr(self, name), int)
            if given < least:
                raise ConfigError(f"PGD: expected {name} of {least} or more, got {given}")
        try:
            valid = self.length >= 0
        except (TypeError, ValueError) as error:
            raise ConfigError(f"PGD: step_size: {error}") from None
        if not valid:
            raise ConfigError(f"PGD: expected step_size of 0 or more, got {self.step_size}")

    @property
    def length(self) -> float:
        """``step_size``, or its default."""
        if self.step_size is not None:
            given = self.step_size
            return float(Ratio(given) if isinstance(given, str) else given)
        return 2.5 * self.threat.epsilon / max(1, self.steps)

    def __call__(
        self,
        model: nn.Module,
        image: Tensor,
        label: Tensor,
        objective: Objective = CROSS_ENTROPY,
        generator: torch.Generator | None = None,
        *,
        hooks: Hooks | None = None,
    ) -> Tensor:
        """Adversarial images of one batch.

        Args:
            model: images [B, C, H, W] in [0, 1] to logits [B, K]; modes, ``requires_grad``, buffers
                and ``.grad`` are as before afterwards.
            image: [B, C, H, W] in [0, 1], on the model's device.
            label: classes [B], int64.
            objective: what is maximised, see :mod:`cure.attacks.losses`.
            generator: source of the random starts, on the image's device.  By default one with the
                fixed seed 0, so that a call repeats; give one generator to successive batches for
                starts that differ.
            hooks: what a variant changes; one object for one call, so not with ``restarts``.

        Returns:
            [B, C, H, W], detached.  Costs ``steps`` forward and data-backward passes a restart, and
            one more forward pass when the objective compares with the natural logits.

        Raises:
            ConfigError: when images leave [0, 1] or labels have another form (checked without
                ``generator`` only, since a GPU has to wait for it), or the norm is L1.
            ModelError: when the network gives no gradient.
        """
        if hooks is not None and self.restarts > 1:
            raise ConfigError(
                f"restarts: expected 1 where a method changes the steps of PGD, got {self.restarts}"
            )
        if torch.is_inference_mode_enabled() or image.is_inference() or label.is_inference():
            with torch.inference_mode(False):  # tensors of that mode have no gradient
                own = image.clone(), label.clone()
                return PGD.__call__(self, model, *own, objective, generator, hooks=hooks)
        if generator is None:
            check_range(image)
            check_labels(label, len(image))
            generator = keyed_generator(image.device, 0, "PGD")
        network = _compiled(model) if self.compile else model

        def forward(x: Tensor) -> Tensor:
            with self.precision():
                return network(x).to(image.dtype)

        # In training mode BatchNorm depends on the batch: nothing is constant.
        constants = (
            folded(model, image, self.precision)
            if self.fold and self.mode == "eval"
            else nullcontext()
        )
        with attack_mode(model, self.mode), constants:
            natural = None
            if objective.needs_natural:
                with torch.no_grad():
                    # A copy: CUDA graphs write the results of the next pass to the same place.
                    natural = forward(image).clone()

            def climbed(logits: Tensor) -> Tensor:
                return objective(logits, label, natural)

            def attempt() -> Tensor:
                return perturb(
                    forward,
                    climbed,
                    image,
                    self.threat,
                    steps=self.steps,
                    step_size=self.length,
                    start=self.start,
                    generator=generator,
                    clamp_start=self.clamp_start,
                    hooks=hooks,
                )

            best = attempt()
            for _ in range(1, self.restarts):
                other = attempt()
                with torch.no_grad():
                    better = climbed(forward(other)) > climbed(forward(best).clone())
                best = torch.where(per_image(better, best), other, best)
            return best


_networks: WeakKeyDictionary[nn.Module, Callable[[Tensor], Tensor]] = WeakKeyDictionary()


def _compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """``model``'s forward pass compiled, on a GPU as CUDA graphs; compiled at its first calls."""
    if model not in _networks:
        on_gpu = next(model.parameters()).device.type == "cuda"
        # The function must not keep the network, or neither would ever be forgotten.
        held = ref(model)

        def forward(image: Tensor) -> Tensor:
            network = held()
            assert network is not None
            logits: Tensor = network(image)
            return logits

        _networks[model] = torch.compile(
            forward, dynamic=False, mode="reduce-overhead" if on_gpu else None
        )
    return _networks[model]
