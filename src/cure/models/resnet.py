"""Residual networks for small images, with the key names of RobustBench.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016; the variant for 32x32
images (3x3 first convolution, no pooling after it, all four stages) that adversarial training
uses since Madry et al. 2018.  Weights are initialised as PyTorch's layers do by default, as in
that lineage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from cure.models.registry import MODELS

Stem = Literal["cifar", "imagenet"]
Activation = Literal["relu", "silu"]
"""SiLU is smooth; Gowal et al. (2020) found it more robust than ReLU in adversarial training."""

_ACTIVATIONS: dict[Activation, Callable[..., Tensor]] = {"relu": F.relu, "silu": F.silu}


def _projection(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    """The shortcut of a block: empty (the identity) where the shape stays as it is."""
    if stride == 1 and channels_in == channels_out:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False),
        nn.BatchNorm2d(channels_out),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(
        self, channels_in: int, width: int, stride: int, activation: Activation = "relu"
    ) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[activation]
        self.conv1 = nn.Conv2d(channels_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _projection(channels_in, width, stride)

    def forward(self, feature: Tensor) -> Tensor:
        """Features [B, width, H/stride, W/stride] of features [B, channels_in, H, W]."""
        hidden = self.activation(self.bn1(self.conv1(feature)), inplace=True)
        hidden = self.bn2(self.conv2(hidden))
        return self.activation(hidden + self.shortcut(feature), inplace=True)


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a widening 1x1 convolution and a shortcut; the 3x3 one has the stride."""

    expansion = 4

    def __init__(
        self, channels_in: int, width: int, stride: int, activation: Activation = "relu"
    ) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[activation]
        channels_out = self.expansion * width
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.shortcut = _projection(channels_in, channels_out, stride)

    def forward(self, feature: Tensor) -> Tensor:
        """Features [B, 4 width, H/stride, W/stride] of features [B, channels_in, H, W]."""
        hidden = self.activation(self.bn1(self.conv1(feature)), inplace=True)
        hidden = self.activation(self.bn2(self.conv2(hidden)), inplace=True)
        hidden = self.bn3(self.conv3(hidden))
        return self.activation(hidden + self.shortcut(feature), inplace=True)


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, the mean over positions, a linear layer.

    Args:
        block: the kind of block.
        blocks: how many blocks each stage has.
        classes: number of logits.
        channels: channels of the images.
        width: channels of the first stage; each later one has twice as many.
        stem: "cifar" is a 3x3 convolution; "imagenet" is a 7x7 one of stride 2, then max-pooling
            of stride 2.
        activation: what follows BatchNorm.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        classes: int,
        channels: int,
        width: int = 64,
        stem: Stem = "cifar",
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[activation]
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.stem = stem
        self.bn1 = nn.BatchNorm2d(width)
        stages: list[nn.Sequential] = []
        channels_in = width
        for stage, count in enumerate(blocks):
            stage_width = width * 2**stage
            layers: list[nn.Module] = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(block(channels_in, stage_width, stride, activation))
                channels_in = stage_width * block.expansion
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(channels_in, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        hidden = self.activation(self.bn1(self.conv1(image)), inplace=True)
        if self.stem == "imagenet":
            hidden = F.max_pool2d(hidden, 3, stride=2, padding=1)
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        # A mean, not adaptive pooling: that one has no deterministic gradient on GPUs.
        logits: Tensor = self.linear(hidden.mean(dim=(2, 3)))
        return logits


@MODELS.register("resnet10")
def resnet10(
    classes: int,
    channels: int = 3,
    size: tuple[int, int] = (32, 32),  # noqa: ARG001
    *,
    width: PositiveInt = 16,
    stem: Stem = "cifar",
    activation: Activation = "relu",
) -> nn.Module:
    """ResNet-10 (one block a stage), narrow by default (0.31 M parameters) for quick runs."""
    return ResNet(BasicBlock, (1, 1, 1, 1), classes, channels, width, stem, activation)


@MODELS.register("resnet18")
def resnet18(
    classes: int,
    channels: int = 3,
    size: tuple[int, int] = (32, 32),  # noqa: ARG001
    *,
    stem: Stem = "cifar",
    activation: Activation = "relu",
) -> nn.Module:
    """ResNet-18, 11.17 M parameters with ten classes."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes, channels, stem=stem, activation=activation)


@MODELS.register("resnet34")
def resnet34(
    classes: int,
    channels: int = 3,
    size: tuple[int, int] = (32, 32),  # noqa: ARG001
    *,
    stem: Stem = "cifar",
    activation: Activation = "relu",
) -> nn.Module:
    """ResNet-34, 21.28 M parameters with ten classes."""
    return ResNet(BasicBlock, (3, 4, 6, 3), classes, channels, stem=stem, activation=activation)


@MODELS.register("resnet50")
def resnet50(
    classes: int,
    channels: int = 3,
    size: tuple[int, int] = (32, 32),  # noqa: ARG001
    *,
    stem: Stem = "cifar",
    activation: Activation = "relu",
) -> nn.Module:
    """ResNet-50, 23.52 M parameters with ten classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes, channels, stem=stem, activation=activation)


@MODELS.register("resnet101")
def resnet101(
    classes: int,
    channels: int = 3,
    size: tuple[int, int] = (32, 32),  # noqa: ARG001
    *,
    stem: Stem = "cifar",
    activation: Activation = "relu",
) -> nn.Module:
    """ResNet-101, 42.51 M parameters with ten classes."""
    return ResNet(Bottleneck, (3, 4, 23, 3), classes, channels, stem=stem, activation=activation)
