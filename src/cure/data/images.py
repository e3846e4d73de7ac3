"""The two shapes data takes: a whole set of images at rest, and one batch on its way."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageKind:
    """What a network must know of images to be built for them.

    Attributes:
        classes: name of each class, by label.
        channels: 1 (grey) or 3 (RGB).
        size: height and width in pixels.
    """

    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]


@dataclass(frozen=True)
class ImageSet:
    """Images and labels of one split, decoded once and held as one tensor.

    Attributes:
        image: [N, C, H, W] uint8, 0..255, C is 1 or 3.
        label: [N] int64, 0..len(classes)-1.
        classes: name of each class, by label.
        name: where the images came from, for results ("cifar10", "digits", a folder).
        split: "train", "validation" or "test".
    """

    image: Tensor
    label: Tensor
    classes: tuple[str, ...]
    name: str
    split: str

    def __len__(self) -> int:
        return self.image.shape[0]

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return self.image.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[2], self.image.shape[3]

    @property
    def kind(self) -> ImageKind:
        """Classes, channels and size."""
        return ImageKind(self.classes, self.channels, self.size)

    def subset(self, index: Tensor | slice, split: str | None = None) -> ImageSet:
        """The images at ``index``, in that order."""
        return replace(
            self, image=self.image[index], label=self.label[index], split=split or self.split
        )

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on ``device``."""
        return replace(self, image=self.image.to(device), label=self.label.to(device))


@dataclass(frozen=True)
class Batch:
    """What a method is given at one step.

    Attributes:
        image: [B, C, H, W] float32 in [0, 1]; models normalise inside.
        label: [B] int64.
        index: [B] int64, position in the training set, for state kept per sample.
        step: number of optimiser steps done before this one; keys every random draw of the step.
    """

    image: Tensor
    label: Tensor
    index: Tensor
    step: int
