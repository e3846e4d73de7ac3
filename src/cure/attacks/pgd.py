"""The one gradient-ascent loop, and the state of the network while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from cure.attacks.losses import Objective
from cure.attacks.threat import Threat, drawn, per_sample
from cure.models.fuse import folded

Start = Literal["gaussian", "uniform", "none"]


@contextmanager
def attack_mode(model: nn.Module, mode: Literal["eval", "train"] = "eval") -> Iterator[None]:
    """Lend ``model`` to an attack: no gradient for any weight, and every change undone at the end.

    Modes, ``requires_grad`` and buffers (in ``train`` mode BatchNorm would move them) come back
    as they were, also when the attack raises.  ``.grad`` is never touched.
    """
    modules = [(module, module.training) for module in model.modules()]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if mode == "train" else []
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        model.train(mode == "train")
        yield
    finally:
        for module, training in modules:
            module.training = training
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
    epsilon: float | Tensor | None = None,
    start_epsilon: float | Tensor | None = None,
) -> Tensor:
    """The image the ascent begins with: inside the ball and inside [0, 1]."""
    if start == "none":
        return image.clone()
    if generator is None:
        raise ValueError(f"a '{start}' start draws random numbers: give a generator")
    if start == "uniform":
        if start_epsilon is None:
            change = threat.sample(image, generator, epsilon)
        else:
            change = threat.project(threat.sample(image, generator, start_epsilon), epsilon)
    else:
        noise = drawn(torch.randn, image, generator)
        change = threat.project(0.001 * noise, epsilon)
    return (image + change).clamp(0, 1)


def perturb(
    forward: Callable[[Tensor], Tensor],
    objective: Callable[[Tensor], Tensor],
    image: Tensor,
    threat: Threat,
    *,
    steps: int | Tensor,
    step_size: float | Tensor,
    start: Start = "none",
    generator: torch.Generator | None = None,
    epsilon: float | Tensor | None = None,
    start_epsilon: float | Tensor | None = None,
    label: Tensor | None = None,
    patience: int | Tensor | None = None,
    noise: float = 0.0,
) -> Tensor:
    """Climb ``objective(forward(x))`` from ``image``, never leaving the ball or [0, 1].

    ``x <- clip(image + project(x + step_size * steepest(gradient) - image))``, ``steps`` times.

    Args:
        forward: images [B, C, H, W] to logits [B, K].
        objective: logits [B, K] to one number a sample [B].
        image: [B, C, H, W] in [0, 1].
        threat: the ball.
        steps: number of steps, or [B] one number a sample.
        step_size: length of a step in the threat's norm, or [B].
        start: where to begin; "gaussian" and "uniform" need ``generator``.
        generator: source of the random start, on the image's device.
        epsilon: radius, or [B]; by default the threat's.
        start_epsilon: radius of the ball that a "uniform" start is drawn from, or [B], before it
            is projected on the ball of ``epsilon``; by default that ball itself.
        label: [B]; only for ``patience``.
        patience: early stop a sample (Zhang et al., FAT, ICML 2020): how many more steps an
            already misclassified sample may take; it stops when it is misclassified with none
            left.  The test precedes the step, so 0 leaves a sample that starts misclassified.
        noise: standard deviation of normal noise added after each step, before the projection
            (FAT's omega); needs ``generator``.

    Returns:
        [B, C, H, W], detached, in the order of ``image``.

    Raises:
        ValueError: when ``patience`` comes without ``label``, or a random start without generator.
    """
    if patience is not None and label is None:
        raise ValueError("an early stop needs labels: give label together with patience")
    if noise and generator is None:
        raise ValueError("noise after the steps draws random numbers: give a generator")
    image = image.detach()
    length = per_sample(step_size, image)
    left = None
    if patience is not None:
        # A number is filled in on the device: a copy of it would be waited for.
        left = torch.zeros(image.shape[0], dtype=torch.int64, device=image.device) + patience
    alive = torch.ones(image.shape[0], dtype=torch.bool, device=image.device)
    selective = patience is not None or isinstance(steps, Tensor)
    most = int(steps.max()) if isinstance(steps, Tensor) else steps
    x = starting_point(image, threat, start, generator, epsilon, start_epsilon)
    for step in range(most):
        x.requires_grad_(True)
        with torch.enable_grad():
            logits = forward(x)
            (gradient,) = torch.autograd.grad(objective(logits).sum(), x)
        x = x.detach()
        moved = x + length * threat.steepest(gradient)
        if noise:
            assert generator is not None
            moved = moved + noise * drawn(torch.randn, x, generator)
        moved = (image + threat.project(moved - image, epsilon)).clamp(0, 1)
        if not selective:
            x = moved
            continue
        if left is not None:
            assert label is not None
            wrong = logits.detach().argmax(dim=1).ne(label)
            alive &= ~(wrong & (left == 0))
            left = left - wrong.to(left.dtype)
        go = alive if not isinstance(steps, Tensor) else alive & (step < steps.to(alive.device))
        x = torch.where(go.reshape(-1, *[1] * (x.dim() - 1)), moved, x)
    return x.detach()


@dataclass(frozen=True)
class Attack:
    """The training attack of a run: a threat with its steps, bound to no model and no objective.

    Attributes:
        threat: the ball.
        steps: steps of ascent.
        step_size: length of a step.
        start: where the ascent begins.
        mode: mode of the network meanwhile.
        precision: makes the context of each forward and backward pass (mixed precision).
        fold: compute what evaluation mode makes constant beforehand (see
            :func:`~cure.models.fuse.folded`): the same attack up to rounding, in less time.
        compile: compile the network's passes (see ``training.compile``).
    """

    threat: Threat
    steps: int
    step_size: float
    start: Start = "gaussian"
    mode: Literal["eval", "train"] = "eval"
    precision: Callable[[], AbstractContextManager[object]] = nullcontext
    fold: bool = False
    compile: bool = False

    def __call__(
        self,
        model: nn.Module,
        image: Tensor,
        label: Tensor,
        objective: Objective,
        generator: torch.Generator | None,
        *,
        steps: int | Tensor | None = None,
        step_size: float | Tensor | None = None,
        epsilon: float | Tensor | None = None,
        start_epsilon: float | Tensor | None = None,
        patience: int | Tensor | None = None,
        noise: float = 0.0,
    ) -> Tensor:
        """Adversarial images for one batch [B, C, H, W]; the keywords replace the run's settings.

        Costs ``steps`` forward and data-backward passes, and one more forward pass when the
        objective compares with the natural logits.
        """

        network = _compiled(model) if self.compile else model

        def forward(x: Tensor) -> Tensor:
            with self.precision():
                return network(x).to(image.dtype)

        # In training mode BatchNorm depends on the batch: nothing is constant.
        lent = (
            folded(model, image, self.precision)
            if self.fold and self.mode == "eval"
            else nullcontext()
        )
        with attack_mode(model, self.mode), lent:
            natural = None
            if objective.needs_natural:
                with torch.no_grad():
                    # A copy: CUDA graphs write the results of the next pass to the same place.
                    natural = forward(image).clone()
            return perturb(
                forward,
                lambda logits: objective(logits, label, natural),
                image,
                self.threat,
                steps=self.steps if steps is None else steps,
                step_size=self.step_size if step_size is None else step_size,
                start=self.start,
                generator=generator,
                epsilon=epsilon,
                start_epsilon=start_epsilon,
                label=label,
                patience=patience,
                noise=noise,
            )


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
