"""A vision transformer for small images.

Source: Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021; the mean over patches as in
Zhai et al., Scaling Vision Transformers, 2022.  Weights are drawn from a normal distribution of
standard deviation 0.02 cut at two units, biases are 0, as is customary.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from cure.errors import ConfigError
from cure.models.registry import MODELS

Pool = Literal["mean", "cls"]


class Attention(nn.Module):
    """Self-attention with several heads."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, token: Tensor) -> Tensor:
        """Tokens [B, T, dim] of tokens [B, T, dim]."""
        batch, length, dim = token.shape
        split = self.qkv(token).view(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        # Written out: the fused kernels' gradients are not deterministic on every GPU and cannot
        # be differentiated again; the few patches of a small image need no fused kernel.
        weight = (query @ key.transpose(-2, -1) * self.scale).softmax(dim=-1)
        mixed = (weight @ value).transpose(1, 2).reshape(batch, length, dim)
        result: Tensor = self.out(mixed)
        return result


class Layer(nn.Module):
    """Attention, then two linear layers, each after LayerNorm and beside a shortcut."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, token: Tensor) -> Tensor:
        """Tokens [B, T, dim] of tokens [B, T, dim]."""
        token = token + self.attention(self.norm1(token))
        result: Tensor = token + self.mlp(self.norm2(token))
        return result


class VisionTransformer(nn.Module):
    """Patches, learned positions, layers with the norm first, LayerNorm, a linear layer.

    Args:
        classes: number of logits.
        channels: channels of the images.
        size: height and width of the images; the positions are tied to it.
        patch: pixels a side of a patch.
        dim: length of a token.
        depth: layers.
        heads: heads of attention.
        pool: "mean" of all patches, or an extra "cls" token.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        size: tuple[int, int],
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        pool: Pool,
    ) -> None:
        super().__init__()
        patches = (size[0] // patch) * (size[1] // patch)
        self.patch = nn.Conv2d(channels, dim, patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim)) if pool == "cls" else None
        self.position = nn.Parameter(torch.zeros(1, patches + (pool == "cls"), dim))
        self.layers = nn.Sequential(*(Layer(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.position, std=0.02, a=-0.04, b=0.04)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W] of the size the network was built for."""
        token = self.patch(image).flatten(2).transpose(1, 2)
        if self.cls is not None:
            token = torch.cat([self.cls.expand(len(token), -1, -1), token], dim=1)
        token = self.norm(self.layers(token + self.position))
        pooled = token.mean(dim=1) if self.cls is None else token[:, 0]
        logits: Tensor = self.linear(pooled)
        return logits


@MODELS.register("vit")
def vit(
    classes: int,
    channels: int = 3,
    size: tuple[int, int] = (32, 32),
    *,
    patch: PositiveInt = 4,
    dim: PositiveInt = 192,
    depth: PositiveInt = 6,
    heads: PositiveInt = 3,
    pool: Pool = "mean",
) -> nn.Module:
    """A small vision transformer without dropout, 2.69 M parameters at 32x32.

    Raises:
        ConfigError: when ``patch`` does not divide the image, or ``heads`` does not divide
            ``dim``.
    """
    if size[0] % patch or size[1] % patch:
        raise ConfigError(
            f"expected a patch that divides the image for vit, got patch {patch} "
            f"for images of {size[0]} x {size[1]} pixels"
        )
    if dim % heads:
        raise ConfigError(
            f"expected a number of heads that divides dim for vit, got heads {heads} for dim {dim}"
        )
    return VisionTransformer(classes, channels, size, patch, dim, depth, heads, pool)
