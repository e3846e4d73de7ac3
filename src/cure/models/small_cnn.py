"""A convolutional network small enough to train adversarially on a processor in seconds."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from cure.models.registry import MODELS


class SmallCNN(nn.Module):
    """Three 3x3 convolutions with BatchNorm (the last two of stride 2), the mean, a linear layer.

    Args:
        classes: number of logits.
        channels: channels of the images.
        width: channels after the first convolution; the others double them.
    """

    def __init__(self, classes: int, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        hidden = F.relu(self.bn1(self.conv1(image)), inplace=True)
        hidden = F.relu(self.bn2(self.conv2(hidden)), inplace=True)
        hidden = F.relu(self.bn3(self.conv3(hidden)), inplace=True)
        logits: Tensor = self.linear(hidden.mean(dim=(2, 3)))
        return logits


@MODELS.register("small_cnn")
def small_cnn(
    classes: int,
    channels: int = 3,
    size: tuple[int, int] = (32, 32),  # noqa: ARG001
    *,
    width: PositiveInt = 16,
) -> nn.Module:
    """A network for demonstrations; 24 058 parameters for grey images and ten classes."""
    return SmallCNN(classes, channels, width)
