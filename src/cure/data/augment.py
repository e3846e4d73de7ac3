"""Augmentation of training images: a padded random crop and a mirror image, an image at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from cure.config import AugmentConfig
from cure.errors import DataError
from cure.utils.random import draw_for_batch


def augment(image: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Crop each image at random from its padded self, then mirror it with probability 1/2.

    With padding p, out[b, c, i, j] = padded[b, c, top_b + i, left_b + j], where top_b and left_b
    are uniform in 0..2p; a mirrored image has j replaced by W - 1 - j.

    Args:
        image: [B, C, H, W], any number type, not changed.
        config: padding and whether to mirror.
        generator: on the image's device; its state decides everything, in a run of several ranks
            together with which part of the batch this is.

    Returns:
        A tensor like ``image``.

    Raises:
        DataError: ``reflect`` padding as wide as the image or wider.
    """
    batch, channels, height, width = image.shape
    padding, device = config.crop_padding, image.device
    if config.padding == "reflect" and padding >= min(height, width):
        raise DataError(
            f"expected data.augment.crop_padding below {min(height, width)}, the side of the "
            f"image, to reflect it, got {padding}; lower it or set data.augment.padding=zeros"
        )
    # No padded copy is made: row and column name where each output pixel lies in the image, and
    # may lie outside it.
    row = torch.arange(height, device=device).expand(batch, height)
    column = torch.arange(width, device=device).expand(batch, width)
    if config.flip:
        chances = draw_for_batch(
            lambda shape: torch.rand(shape, generator=generator, device=device),
            (batch, 1),
            generator,
        )
        mirrored = chances < 0.5
        column = torch.where(mirrored, width - 1 - column, column)
    if padding:
        shift = draw_for_batch(
            lambda shape: torch.randint(
                -padding, padding + 1, shape, generator=generator, device=device
            ),
            (2, batch, 1),
            generator,
            dim=1,
        )
        row, column = row + shift[0], column + shift[1]
    inside = ((row >= 0) & (row < height))[:, None, :, None]
    inside = inside & ((column >= 0) & (column < width))[:, None, None, :]
    row, column = _reflect(row, height), _reflect(column, width)
    sample = torch.arange(batch, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    cropped = image[sample, channel, row[:, None, :, None], column[:, None, None, :]]
    if padding and config.padding == "zeros":
        return cropped * inside
    return cropped


def _reflect(position: Tensor, size: int) -> Tensor:
    """Positions outside 0..size-1 mirrored at the first and last pixel (and kept inside)."""
    last = size - 1
    return (last - (last - position.abs()).abs()).clamp(0, last)
