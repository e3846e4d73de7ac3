"""Densely connected networks for small images.

Source: Huang et al., Densely Connected Convolutional Networks, CVPR 2017 (DenseNet-BC); the
variant for 32x32 images has a 3x3 first convolution and no pooling after it.  Weights are
initialised as PyTorch's layers do by default, as in that lineage of code.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from cure.errors import ConfigError
from cure.models.registry import MODELS


class DenseLayer(nn.Module):
    """A 1x1 and a 3x3 convolution whose result is put before what came in."""

    def __init__(self, channels_in: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, feature: Tensor) -> Tensor:
        """Features [B, growth + channels_in, H, W] of features [B, channels_in, H, W]."""
        hidden = self.conv1(F.relu(self.bn1(feature), inplace=True))
        hidden = self.conv2(F.relu(self.bn2(hidden), inplace=True))
        return torch.cat([hidden, feature], dim=1)


class Transition(nn.Module):
    """A 1x1 convolution and 2x2 average pooling."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels_in)
        self.conv = nn.Conv2d(channels_in, channels_out, 1, bias=False)

    def forward(self, feature: Tensor) -> Tensor:
        """Features [B, channels_out, H/2, W/2] of features [B, channels_in, H, W]."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(feature), inplace=True)), 2)


class DenseNet(nn.Module):
    """A 3x3 convolution, four dense stages with transitions that halve channels and size.

    Args:
        blocks: layers of each stage.
        growth: channels that a layer adds.
        classes: number of logits.
        channels: channels of the images.
    """

    parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "stem": ("conv1",),
        "B1": ("dense1", "trans1"),
        "B2": ("dense2", "trans2"),
        "B3": ("dense3", "trans3"),
        "B4": ("dense4", "bn"),
        "classifier": ("linear",),
    }
    """See :func:`cure.models.blocks.blocks`; the transitions are made after the blocks."""

    def __init__(
        self, blocks: tuple[int, int, int, int], growth: int, classes: int, channels: int
    ) -> None:
        super().__init__()
        width = 2 * growth
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        stages: list[nn.Sequential] = []
        transitions: list[Transition] = []
        for stage, count in enumerate(blocks):
            layers = [DenseLayer(width + index * growth, growth) for index in range(count)]
            stages.append(nn.Sequential(*layers))
            width += count * growth
            if stage < len(blocks) - 1:
                transitions.append(Transition(width, width // 2))
                width //= 2
        self.dense1, self.dense2, self.dense3, self.dense4 = stages
        self.trans1, self.trans2, self.trans3 = transitions
        self.bn = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W], H and W at least 8."""
        hidden = self.trans1(self.dense1(self.conv1(image)))
        hidden = self.trans2(self.dense2(hidden))
        hidden = self.trans3(self.dense3(hidden))
        hidden = F.relu(self.bn(self.dense4(hidden)), inplace=True)
        logits: Tensor = self.linear(hidden.mean(dim=(2, 3)))
        return logits


@MODELS.register("densenet121")
def densenet121(
    classes: int,
    channels: int = 3,
    size: tuple[int, int] = (32, 32),
    *,
    growth: PositiveInt = 32,
) -> nn.Module:
    """DenseNet-121, 6.96 M parameters with ten classes.

    Raises:
        ConfigError: when the images are smaller than 8 pixels a side.
    """
    if min(size) < 8:
        raise ConfigError(
            f"expected images of at least 8 x 8 pixels for densenet121, got {size[0]} x {size[1]}; "
            "set data.resize or choose another model"
        )
    return DenseNet((6, 12, 24, 16), growth, classes, channels)
