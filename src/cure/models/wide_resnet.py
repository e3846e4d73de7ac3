"""Wide residual networks, with the key names of TRADES and RobustBench.

Source: Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016.  Convolutions are initialised
with N(0, 2 / (kernel area x output channels)), the linear layer's bias with 0, as there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from cure.errors import ConfigError
from cure.models.registry import MODELS


class WideBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, and a shortcut.

    Where the number of channels changes, the shortcut is a 1x1 convolution of the activated
    features.
    """

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.convShortcut: nn.Conv2d | None = None
        if channels_in != width or stride != 1:
            self.convShortcut = nn.Conv2d(channels_in, width, 1, stride=stride, bias=False)

    def forward(self, feature: Tensor) -> Tensor:
        """Features [B, width, H/stride, W/stride] of features [B, channels_in, H, W]."""
        activated = F.relu(self.bn1(feature), inplace=True)
        hidden: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        passed = feature if self.convShortcut is None else self.convShortcut(activated)
        return hidden + passed


class WideStage(nn.Module):
    """Blocks of one width; the first has the stride."""

    def __init__(self, count: int, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        rest = [WideBlock(width, width, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(WideBlock(channels_in, width, stride), *rest)

    def forward(self, feature: Tensor) -> Tensor:
        """Features [B, width, H/stride, W/stride] of features [B, channels_in, H, W]."""
        result: Tensor = self.layer(feature)
        return result


class WideResNet(nn.Module):
    """A 3x3 convolution, three stages of wide blocks, BatchNorm, the mean, a linear layer.

    Args:
        count: blocks a stage.
        width: factor over the 16, 32 and 64 channels of the narrow network.
        classes: number of logits.
        channels: channels of the images.
        sub_block1: also hold a copy of the first stage that nothing uses.
    """

    def __init__(
        self, count: int, width: int, classes: int, channels: int, sub_block1: bool
    ) -> None:
        super().__init__()
        narrow, wide, wider, widest = 16, 16 * width, 32 * width, 64 * width
        self.conv1 = nn.Conv2d(channels, narrow, 3, padding=1, bias=False)
        self.block1 = WideStage(count, narrow, wide, 1)
        if sub_block1:
            self.sub_block1 = WideStage(count, narrow, wide, 1)
        self.block2 = WideStage(count, wide, wider, 2)
        self.block3 = WideStage(count, wider, widest, 2)
        self.bn1 = nn.BatchNorm2d(widest)
        self.fc = nn.Linear(widest, classes)

    def initialise(self) -> None:
        """Draw all weights from PyTorch's global generator."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                module.reset_parameters()
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        hidden = self.block3(self.block2(self.block1(self.conv1(image))))
        hidden = F.relu(self.bn1(hidden), inplace=True)
        logits: Tensor = self.fc(hidden.mean(dim=(2, 3)))
        return logits


@MODELS.register("wide_resnet")
def wide_resnet(
    classes: int,
    channels: int = 3,
    size: tuple[int, int] = (32, 32),  # noqa: ARG001
    *,
    depth: PositiveInt = 34,
    width: PositiveInt = 10,
    sub_block1: bool = False,
) -> nn.Module:
    """WideResNet-34-10 by default, 46.16 M parameters with ten classes.

    ``{depth: 28}`` is WideResNet-28-10 (36.48 M).  ``{sub_block1: true}`` adds the unused copy of
    the first stage that the TRADES code holds, for weights that contain it; its parameters never
    get a gradient.

    Raises:
        ConfigError: when ``depth`` is not 6 n + 4.
    """
    if depth < 10 or (depth - 4) % 6 != 0:
        raise ConfigError(
            f"expected a depth of 10, 16, 22, 28, 34, ... (6 n + 4) for wide_resnet, got {depth}"
        )
    # Built without storage first: the layers' own initialisation would be drawn for nothing.
    with torch.device("meta"):
        model = WideResNet((depth - 4) // 6, width, classes, channels, sub_block1)
    model.to_empty(device="cpu")
    model.initialise()
    return model
