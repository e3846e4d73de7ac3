"""Augmentation of training images: crops, mirror images, colour; and mixing of whole batches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cure.config import AugmentConfig
from cure.errors import DataError
from cure.utils.random import draw_for_batch


def augmented(image: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """All augmentation of single images that ``config`` asks for.

    Args:
        image: [B, C, H, W] uint8.
        config: the augmentation.
        generator: on the image's device; its state decides everything.

    Returns:
        [B, C, H, W]: uint8 after a padded crop and mirroring alone, else float32 in [0, 1].
    """
    if config.resized_crop is None:
        image = augment(image, config, generator)
    else:
        image = resized_crop(image.float() / 255, config.resized_crop, config.flip, generator)
    if config.color_jitter:
        unit = image if image.is_floating_point() else image.float() / 255
        image = color_jitter(unit, config.color_jitter, generator)
    return image


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


def _uniform(count: int, columns: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), [columns, count]: a row for each use, a column for each image."""
    return draw_for_batch(
        lambda shape: torch.rand(shape, generator=generator, device=like.device),
        (columns, count),
        generator,
        dim=1,
    )


def resized_crop(image: Tensor, smallest: float, flip: bool, generator: torch.Generator) -> Tensor:
    """A random part of each image, resized to the size of the image (bilinear).

    The share of the area is uniform in [smallest, 1] and the aspect ratio log-uniform in
    [3/4, 4/3]; a side longer than the image is cut to it.

    Args:
        image: [B, C, H, W] float.
        smallest: least share of the area, in (0, 1].
        flip: also mirror with probability 1/2.
        generator: on the image's device.

    Returns:
        A tensor like ``image``.

    Source: Szegedy et al., CVPR 2015; the form of torchvision's RandomResizedCrop.
    """
    area, ratio, x, y, mirror = _uniform(len(image), 5, generator, image)
    side = (smallest + (1 - smallest) * area).sqrt()
    stretch = ((2 * ratio - 1) * math.log(4 / 3)).exp().sqrt()
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    transform = image.new_zeros(len(image), 2, 3)
    sign = torch.where(mirror < 0.5, -1.0, 1.0) if flip else torch.ones_like(mirror)
    transform[:, 0, 0], transform[:, 1, 1] = width * sign, height
    transform[:, 0, 2], transform[:, 1, 2] = (2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height)
    grid = F.affine_grid(transform, list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)


def color_jitter(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast and saturation of each image by factors in 1 +- strength.

    Args:
        image: [B, C, H, W] float in [0, 1].
        strength: largest relative change, in [0, 1).
        generator: on the image's device.

    Returns:
        A tensor like ``image``, in [0, 1].
    """
    factors = 1 + strength * (2 * _uniform(len(image), 3, generator, image) - 1)
    brightness, contrast, saturation = factors.view(3, -1, 1, 1, 1)
    image = image * brightness
    grey = image.mean(dim=1, keepdim=True)
    image = grey + (image - grey) * saturation
    level = image.mean(dim=(1, 2, 3), keepdim=True)
    changed: Tensor = level + (image - level) * contrast
    return changed.clamp(0, 1)


def soft_labels(label: Tensor, classes: int, config: AugmentConfig) -> Tensor:
    """Labels [B] as rows [B, K] that sum to 1, after label smoothing."""
    target = F.one_hot(label, classes).float()
    return (1 - config.label_smoothing) * target + config.label_smoothing / classes


def mixed(
    image: Tensor, target: Tensor, config: AugmentConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images and their labels after MixUp or CutMix.

    Each image is mixed with another of the batch; one share for the batch.  With both MixUp and
    CutMix, each batch draws which of the two.

    Args:
        image: [B, C, H, W] float in [0, 1], the whole batch.
        target: [B, ...] float, of each image: what is mixed in the same shares, as soft labels.
        config: their alphas.
        generator: on the image's device.

    Returns:
        Images like ``image``, and the mixed ``target``.

    Source: MixUp: Zhang et al., ICLR 2018.  CutMix: Yun et al., ICCV 2019.
    """
    if not config.mixes:
        return image, target
    draws = torch.Generator().manual_seed(
        int(torch.randint(2**62, (), generator=generator, device=image.device))
    )
    cutmix = config.cutmix_alpha
    cut = cutmix > 0 and (not config.mixup or float(torch.rand((), generator=draws)) < 0.5)
    alpha = cutmix if cut else config.mixup
    # Beta(a, a) as a ratio of two gamma variables, which take a generator.
    pair = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=draws)
    share = float(pair[0] / pair.sum().clamp_min(1e-300))
    other = torch.randperm(len(image), generator=draws).to(image.device)
    if cut:
        height, width = image.shape[-2:]
        h, w = (round(side * math.sqrt(1 - share)) for side in (height, width))
        top = int(torch.randint(height - h + 1, (), generator=draws))
        left = int(torch.randint(width - w + 1, (), generator=draws))
        patch = (..., slice(top, top + h), slice(left, left + w))
        image, theirs = image.clone(), image[other]
        image[patch] = theirs[patch]
        share = 1 - h * w / (height * width)
    else:
        image = share * image + (1 - share) * image[other]
    return image, share * target + (1 - share) * target[other]
