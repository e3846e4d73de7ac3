"""Thin modules around a network: they change what goes in or comes out, and own no weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cure.errors import ConfigError


class Wrapper(nn.Module):
    """A module without weights of its own around ``network``; :func:`core` looks through it."""

    network: nn.Module

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class Normalised(Wrapper):
    """A network that standardises its images itself: ``network((image - mean) / std)``.

    The two constants are buffers that follow the device and stay out of the state dict, so that
    weights saved with and without the wrapper are the same.

    Args:
        network: takes standardised images [B, C, H, W].
        mean: one number a channel, for images in [0, 1].
        std: one positive number a channel.

    Raises:
        ConfigError: when the two differ in length, or a standard deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(network)
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ConfigError(
                "expected mean and std with one number a channel each, and std above 0, "
                f"got mean {list(mean)} and std {list(std)}"
            )
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W] in [0, 1]."""
        logits: Tensor = self.network((image - self.mean) / self.std)
        return logits


class Selected(Wrapper):
    """A network of which some logits are taken, in another order.

    Args:
        network: returns logits [B, classes].
        places: position among them of each logit to return.
    """

    places: Tensor

    def __init__(self, network: nn.Module, places: Sequence[int]) -> None:
        super().__init__(network)
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, len(places)] of images [B, C, H, W]."""
        logits: Tensor = self.network(image)
        return logits[:, self.places]


def core(model: nn.Module) -> nn.Module:
    """The network inside all wrappers: the one whose state dict is saved and loaded.

    Call ``model`` itself for logits; the core may expect standardised images, or (networks from
    transformers) return more than logits.
    """
    while isinstance(model, Wrapper):
        model = model.network
    return model
