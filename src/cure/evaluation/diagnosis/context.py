"""Cached logits, gradients and attack results shared by checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cure.attacks import PGD, Objective, Threat, attack_mode
from cure.attacks.losses import CROSS_ENTROPY, MARGIN, cross_entropy, lead
from cure.data import ImageSet, to_unit
from cure.models.checks import check_outputs, predicted
from cure.utils.engine import Engine
from cure.utils.io import first_line
from cure.utils.random import generator, seeded

RunAttack = Callable[[Tensor, Tensor, int], Tensor]
"""(images [B, C, H, W], labels [B], number of the batch) to changed images."""

RESTARTS = 3


class _AlwaysDifferentiable(nn.Module):
    """The network on copies of its images, with a gradient by the images, if need be of zeros.

    Copies, because a network may change its input in place.  With a gradient, because autograd
    raises where none reaches the image: attacks then find zeros, and the check of gradients reports
    the cause.

    Attributes:
        connected: whether autograd finds a path from the logits to the image.
        error: what autograd raised, if it did.
    """

    def __init__(self, network: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.network = network
        self.error: str | None = None
        leaf = image.clone().requires_grad_(True)
        try:
            with torch.enable_grad():
                output = network(leaf.clone())
                self.connected = output.requires_grad
                if self.connected:
                    (gradient,) = torch.autograd.grad(output.sum(), leaf, allow_unused=True)
                    self.connected = gradient is not None
        except RuntimeError as error:
            self.connected, self.error = False, first_line(error)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K], in the images' own type."""
        if self.connected:
            logits = self.network(image.clone())
        else:
            with torch.no_grad():
                logits = self.network(image.clone())
        joined: Tensor = logits.to(image.dtype) + 0 * image.flatten(1).sum(dim=1, keepdim=True)
        return joined


class _ZeroLogits(nn.Module):
    """Zeros for logits, to check their shape: values that are not finite are left to the checks."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Any:
        """Zeros [B, K], or whatever else came out."""
        output = self.network(image.clone())
        return torch.zeros_like(output) if isinstance(output, Tensor) else output


class OtherSteps(Threat):
    """The same ball climbed along the other norm's direction.

    An Linf ball along the gradient itself, an L2 ball along its signs: the results differ where a
    gradient is wrong in its signs only, or in a few large entries.
    """

    def steepest(self, gradient: Tensor) -> Tensor:
        """A direction whose entries are about as large as those of the norm's own."""
        width = math.sqrt(gradient[0].numel())
        if self.norm == "Linf":
            return width * Threat("L2", self.epsilon).steepest(gradient)
        return gradient.sign() / width


def logit_ratio(logits: Tensor, label: Tensor, natural: Tensor | None = None) -> Tensor:  # noqa: ARG001
    """Difference of logits ratio, [B]: ``-(z_y - max_{k != y} z_k) / (z_(1) - z_(3))``.

    Its gradient does not vanish at any scale of the logits.  Needs three classes.
    Source: Croce and Hein, ICML 2020 (DLR loss).
    """
    top = logits.topk(3, dim=1).values
    ratio: Tensor = -lead(logits, label) / (top[:, 0] - top[:, 2]).clamp_min(1e-12)
    return ratio


class CheckContext:
    """Cached logits, gradients and attack results of one network and some images.

    Use it inside :meth:`evaluating`.  What several checks need is computed when it is first needed.

    Args:
        model: images [B, C, H, W] in [0, 1] to logits [B, K], on the engine's device.
        images: the images.
        threat: the ball; for L1, which has no gradient ascent here, the L2 ball of the same radius,
            which contains it.
        engine: device and memory layout.
        seed: of all draws.
        batch_size: images at once.
        expected: natural accuracy that is known of the network on such images, percent.
        other: another network for such images, whose adversarial images may transfer.

    Attributes:
        fooled: which images an attack on this ball has fooled so far, beyond PGD-20 [N].
    """

    def __init__(
        self,
        model: nn.Module,
        images: ImageSet,
        threat: Threat,
        *,
        engine: Engine,
        seed: int = 0,
        batch_size: int = 256,
        expected: float | None = None,
        other: nn.Module | None = None,
    ) -> None:
        self.images = images.checked().to(engine.device)
        self.given, self.other = model, other
        self.threat = Threat("L2", threat.epsilon) if threat.norm == "L1" else threat
        self.seed, self.batch_size, self.expected = seed, batch_size, expected
        self.engine = engine
        self.count, self.classes = len(images), len(images.classes)
        self.image, self.label = to_unit(self.images.rows(slice(None))), self.images.label
        self.fooled = torch.zeros_like(self.label, dtype=torch.bool)

    @contextmanager
    def evaluating(self) -> Iterator[CheckContext]:
        """Set evaluation mode; restore modes, buffers and global generators at the end.

        Raises:
            ModelError: when its output has not the shape of logits.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.given.buffers()]
        with seeded(self.seed), attack_mode(self.given):
            try:
                first = self.engine.arrange(self.image[:2])
                check_outputs(_ZeroLogits(self.given), first, self.classes)
                self.model = _AlwaysDifferentiable(self.given, first)
                yield self
            finally:
                with torch.no_grad():
                    for buffer, before in buffers:
                        buffer.copy_(before)

    def draws(self, purpose: str, number: int = 0) -> torch.Generator:
        """A generator of one purpose and batch."""
        return generator(self.engine.device, self.seed, "diagnosis", purpose, number)

    @torch.no_grad()
    def logits(self, image: Tensor, model: nn.Module | None = None) -> Tensor:
        """Logits [N, K] of images [N, C, H, W], batch by batch."""
        asked = model or self.model
        size = self.batch_size
        parts = (image[start : start + size] for start in range(0, len(image), size))
        return torch.cat([asked(self.engine.arrange(part)) for part in parts])

    def correct(self, image: Tensor) -> Tensor:
        """Which of the changed images [N, C, H, W] are classified right, [N]."""
        return predicted(self.logits(image)) == self.label

    @cached_property
    def natural(self) -> Tensor:
        """Logits of the images as they are [N, K]."""
        return self.logits(self.image)

    @cached_property
    def right(self) -> Tensor:
        """Which images are classified right as they are [N]."""
        return predicted(self.natural) == self.label

    def gradient(
        self, loss: Callable[[Tensor, Tensor], Tensor], target: Tensor | None = None
    ) -> Tensor:
        """Gradient of ``loss(logits, target)`` [B] by each image as it is, [N, C, H, W].

        ``target`` [N, ...] is by default the labels.
        """
        targets = self.label if target is None else target
        parts = []
        for start in range(0, self.count, self.batch_size):
            part = slice(start, start + self.batch_size)
            leaf = self.engine.arrange(self.image[part]).clone().requires_grad_(True)
            with torch.enable_grad():
                total = loss(self.model(leaf), targets[part]).sum()
            parts.append(torch.autograd.grad(total, leaf)[0])
        return torch.cat(parts)

    @cached_property
    def loss_gradient(self) -> Tensor:
        """What attacks on cross-entropy follow first, [N, C, H, W]."""
        return self.gradient(cross_entropy)

    # -- attacks -------------------------------------------------------------------------------

    def pgd(
        self,
        name: str,
        steps: int,
        step: float,
        objective: Objective = CROSS_ENTROPY,
        *,
        threat: Threat | None = None,
        model: nn.Module | None = None,
        random: bool = True,
    ) -> RunAttack:
        """PGD as evaluation runs it.

        Args:
            name: keys its draws.
            steps: how many.
            step: length as a share of epsilon.
            objective: what to climb.
            threat: the ball; by default that of the context.
            model: whose gradients; by default the network's.
            random: start anywhere in the ball, else at the image.
        """
        ball = threat or self.threat
        attack = PGD(ball, steps, step * ball.epsilon, start="uniform" if random else "none")

        def run(image: Tensor, label: Tensor, number: int) -> Tensor:
            return attack(model or self.model, image, label, objective, self.draws(name, number))

        return run

    def attacked(self, standing: Tensor, run: RunAttack, share: int = 1) -> Tensor:
        """All images [N, C, H, W], those that are ``standing`` [N] changed by ``run``.

        ``share``: how many images ``run`` makes of each at a time, so that they fit in memory.
        """
        changed = self.image.clone()
        size = max(1, self.batch_size // share)
        index = standing.nonzero().flatten()
        for number, start in enumerate(range(0, len(index), size)):
            part = index[start : start + size]
            image = self.engine.arrange(self.image[part])
            changed[part] = run(image, self.label[part], number)
        return changed

    def withstand(
        self, standing: Tensor, run: RunAttack, share: int = 1, *, in_ball: bool = True
    ) -> Tensor:
        """Which of the images that are ``standing`` [N] are still right after ``run``, [N].

        ``in_ball``: whether ``run`` stays in the ball, so that its images count in ``fooled``.
        """
        index = standing.nonzero().flatten()
        left = standing.clone()
        if len(index):
            changed = self.attacked(standing, run, share)[index]
            left[index] = predicted(self.logits(changed)) == self.label[index]
        if in_ball:
            self.fooled |= standing & ~left
        return left

    @cached_property
    def pgd20_images(self) -> Tensor:
        """Adversarial images of the right ones by the attack that evaluation calls pgd20."""
        return self.attacked(self.right, self.pgd("pgd20", 20, 1 / 4))

    @cached_property
    def after_pgd20(self) -> Tensor:
        """Which images withstand it [N]."""
        return self.right & self.correct(self.pgd20_images)

    @cached_property
    def restarts(self) -> list[Tensor]:
        """Which of these withstand 100 shorter steps, too, after each of several starts, [N]."""
        stages = [self.after_pgd20]
        for restart in range(RESTARTS):
            run = self.pgd(f"restart {restart}", 100, 1 / 10)
            stages.append(self.withstand(stages[-1], run))
        return stages[1:]

    @property
    def after_restarts(self) -> Tensor:
        """Which withstand all of these [N]."""
        return self.restarts[-1]

    @cached_property
    def after_families(self) -> dict[str, Tensor]:
        """Which of these withstand each other kind of white-box attack [N]."""
        kinds = {"margin": (MARGIN, self.threat)}
        if self.classes > 2:
            kinds["logit_ratio"] = (Objective(logit_ratio), self.threat)
        other = OtherSteps(self.threat.norm, self.threat.epsilon)
        kinds["other_steps"] = (MARGIN, other)
        return {
            name: self.withstand(
                self.after_restarts, self.pgd(name, 20, 1 / 4, objective, threat=threat)
            )
            for name, (objective, threat) in kinds.items()
        }

    @cached_property
    def after_white_box(self) -> Tensor:
        """Which images withstand every white-box attack above [N]."""
        return torch.stack([self.after_restarts, *self.after_families.values()]).all(dim=0)

    def points(self, fooled: Tensor) -> dict[str, Any]:
        """How many images [N], and how many points of accuracy that are."""
        count = int(fooled.sum())
        return {"images": count, "of": self.count, "points": round(100 * count / self.count, 2)}
