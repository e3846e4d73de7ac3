"""Features: what a network passes to its last layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cure.models.head import find_head
from cure.models.trial import traits_of
from cure.models.wrapper import core


class Features(nn.Module):
    """The features of images, [N, D] of length 1, by the layer of a network before its logits.

    Args:
        network: images [N, C, H, W] in [0, 1] to logits.
        classes: number of logits.

    Raises:
        ModelError: it has no linear layer or 1x1 convolution with so many outputs.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> Features(network, 3)(torch.rand(5, 1, 2, 2)).shape
    torch.Size([5, 8])
    """

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network = network
        inner = core(network)
        heads = traits_of(network).heads or (find_head(inner, classes),)
        self.head = inner.get_submodule(heads[-1])

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Features [N, D]; positions of feature maps and of tokens are averaged."""
        given: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
        try:
            self.network(image)
        finally:
            hook.remove()
        feature = given[-1].float()
        if feature.ndim == 4:
            feature = feature.mean((2, 3))
        elif feature.ndim == 3:
            feature = feature.mean(1)
        return F.normalize(feature.flatten(1), dim=1)
