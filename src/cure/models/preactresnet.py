"""Residual networks with the activation before the convolution, key names of RobustBench.

Source: He et al., Identity Mappings in Deep Residual Networks, ECCV 2016.  Weights are
initialised as PyTorch's layers do by default, as in that lineage of code.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from cure.models.registry import MODELS

Shortcut = Literal["activated", "raw"]


class PreActBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, and a shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution, of the activated features
    (``activated``) or of the block's input (``raw``).  Both have the same keys, so weights of
    one load into the other without a sound; RobustBench has both.
    """

    def __init__(self, channels_in: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.from_activated = shortcut == "activated"
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or channels_in != width:
            projection = nn.Conv2d(channels_in, width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection)

    def forward(self, feature: Tensor) -> Tensor:
        """Features [B, width, H/stride, W/stride] of features [B, channels_in, H, W]."""
        activated = F.relu(self.bn1(feature), inplace=True)
        hidden: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        if self.shortcut is None:
            passed = feature
        else:
            passed = self.shortcut(activated if self.from_activated else feature)
        return hidden + passed


class PreActResNet(nn.Module):
    """A 3x3 convolution, four stages of pre-activation blocks, the mean, a linear layer.

    Args:
        blocks: how many blocks each stage has.
        classes: number of logits.
        channels: channels of the images.
        shortcut: see :class:`PreActBlock`.
        final_norm: BatchNorm and ReLU (key ``bn``) before the mean over positions.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        classes: int,
        channels: int,
        shortcut: Shortcut = "activated",
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        stages: list[nn.Sequential] = []
        channels_in = 64
        for stage, count in enumerate(blocks):
            width = 64 * 2**stage
            layers: list[nn.Module] = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(PreActBlock(channels_in, width, stride, shortcut))
                channels_in = width
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn = nn.BatchNorm2d(channels_in) if final_norm else None
        self.linear = nn.Linear(channels_in, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        hidden = self.conv1(image)
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        if self.bn is not None:
            hidden = F.relu(self.bn(hidden), inplace=True)
        logits: Tensor = self.linear(hidden.mean(dim=(2, 3)))
        return logits


@MODELS.register("preactresnet18")
def preactresnet18(
    classes: int,
    channels: int = 3,
    size: tuple[int, int] = (32, 32),  # noqa: ARG001
    *,
    shortcut: Shortcut = "activated",
    final_norm: bool = False,
) -> nn.Module:
    """PreActResNet-18, 11.17 M parameters with ten classes.

    By default as the widely copied 32x32 version (shortcut of the activated features, no last
    BatchNorm).  ``{final_norm: true}`` fits the weights of Rice et al. 2020;
    ``{shortcut: raw}`` is what RobustBench calls ``PreActBlock``.
    """
    return PreActResNet((2, 2, 2, 2), classes, channels, shortcut, final_norm)
