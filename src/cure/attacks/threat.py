"""Threat models: the ball of allowed changes, and projection and steepest ascent in its norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cure.config import Ratio, ThreatConfig, beyond_unit_images, norm_name
from cure.errors import ConfigError
from cure.utils.random import draw_for_batch


def per_image(value: Tensor, like: Tensor) -> Tensor:
    """One number an image [B], in a shape that broadcasts over ``like`` [B, ...]."""
    return value.reshape(-1, *[1] * (like.dim() - 1))


def per_sample(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number as it is, or one number a sample [B] so that it broadcasts over ``like`` [B, ...].

    A plain number stays one: as a tensor it would have to be copied to a GPU at every step.
    """
    if not isinstance(value, Tensor):
        return float(value)
    return per_image(value.to(like), like)


def l2_norm(change: Tensor) -> Tensor:
    """Euclidean norm of each sample of [B, ...], as [B, 1, ...]."""
    length: Tensor = change.flatten(1).norm(dim=1)
    return per_image(length, change)


def drawn(
    kind: Callable[..., Tensor],
    like: Tensor,
    generator: torch.Generator,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Random numbers by ``torch.rand`` or ``torch.randn`` for the batch ``like`` [B, ...].

    Args:
        kind: the function that draws.
        like: what the numbers are for; gives device and type.
        generator: on that device.
        shape: [B, ...] of the numbers; by default that of ``like``.
    """
    return draw_for_batch(
        lambda whole: kind(whole, generator=generator, device=like.device, dtype=like.dtype),
        like.shape if shape is None else shape,
        generator,
    )


@dataclass(frozen=True)
class Threat:
    """Images within ``epsilon`` of the natural one, inside [0, 1].

    Attributes:
        norm: "Linf" (largest change of a value), "L2" (Euclidean length of the change) or "L1" (sum
            of all changes), for evaluation by other packages; PGD has the other two.
        epsilon: radius, for images in [0, 1]; a number, or text such as ``8/255``.

    Raises:
        ConfigError: when the norm is unknown, or the radius is negative, no number, or above
            1 in Linf.

    >>> Threat("Linf", "4/255").project(torch.tensor([[0.5, -0.001]]))
    tensor([[ 0.0157, -0.0010]])
    """

    norm: Literal["Linf", "L2", "L1"] = "Linf"
    epsilon: float = Ratio("8/255")

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", norm_name(self.norm))
        if self.norm not in ("Linf", "L2", "L1"):
            raise ConfigError(f"threat: expected the norm Linf, L2 or L1, got {self.norm!r}")
        try:
            # A fraction keeps its text, for records and messages.
            epsilon = Ratio(self.epsilon) if isinstance(self.epsilon, str) else self.epsilon
        except ValueError as error:
            raise ConfigError(f"threat: {error}") from None
        if not isinstance(epsilon, int | float) or not 0 <= epsilon < float("inf"):
            raise ConfigError(f"threat: expected a finite radius of 0 or more, got {epsilon}")
        # Of the other norms, the largest sensible radius depends on the size of the images.
        if self.norm == "Linf" and (found := beyond_unit_images(self.norm, epsilon)):
            raise ConfigError(f"threat: {found}")
        object.__setattr__(self, "epsilon", epsilon)

    @classmethod
    def of(cls, section: ThreatConfig) -> Threat:
        """The threat that a section of a recipe describes; its radius keeps its text ("8/255")."""
        return cls(section.norm, section.epsilon)

    def project(self, change: Tensor, epsilon: float | Tensor | None = None) -> Tensor:
        """The nearest change [B, ...] inside the ball; ``epsilon`` may be one number a sample."""
        self._ascends()
        radius = per_sample(self.epsilon if epsilon is None else epsilon, change)
        if self.norm == "Linf":
            if isinstance(radius, Tensor):
                return torch.minimum(torch.maximum(change, -radius), radius)
            return change.clamp(-radius, radius)
        # The small number only guards 0/0: a change of length 0 stays 0.
        return change * (radius / l2_norm(change).clamp_min(1e-12)).clamp_max(1.0)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The direction of length 1 in this norm that raises the objective fastest."""
        self._ascends()
        if self.norm == "Linf":
            return gradient.sign()
        # Scaling by the largest entry first keeps tiny gradients from vanishing when squared.
        largest = per_image(gradient.abs().flatten(1).amax(dim=1), gradient)
        scaled = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
        return scaled / l2_norm(scaled).clamp_min(1e-12)

    def sample(
        self, like: Tensor, generator: torch.Generator, epsilon: float | Tensor | None = None
    ) -> Tensor:
        """A change drawn uniformly from the ball, in the shape of ``like`` [B, ...]."""
        self._ascends()
        radius = per_sample(self.epsilon if epsilon is None else epsilon, like)
        if self.norm == "Linf":
            noise = drawn(torch.rand, like, generator)
            return radius * (2 * noise - 1)
        direction = drawn(torch.randn, like, generator)
        share = drawn(torch.rand, like, generator, like.shape[:1])
        # In d dimensions a uniform point has radius u^(1/d); d is what one image holds.
        length = radius * per_sample(share ** (1 / like[0].numel()), like)
        return length * direction / l2_norm(direction).clamp_min(1e-12)

    def distance(self, change: Tensor) -> Tensor:
        """Length of each change in this norm, [B]."""
        if self.norm == "Linf":
            return change.abs().flatten(1).amax(dim=1)
        if self.norm == "L1":
            return change.abs().flatten(1).sum(dim=1)
        return l2_norm(change).flatten()

    def within(self, length: Tensor) -> Tensor:
        """Whether changes of these lengths lie in the ball, up to rounding.

        float32 rounds image + change; L2 adds up the rounding of many values.
        """
        return length <= self.epsilon * (1 + 1e-4) + 1e-6

    def _ascends(self) -> None:
        if self.norm == "L1":
            raise ConfigError(
                "threat: attacks of cure.attacks are in Linf and L2, got L1; in L1 "
                "cure.evaluate has AutoAttack and fmn"
            )
