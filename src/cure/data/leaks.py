"""Copies: images of one set that show what an image of another shows, cropped, mirrored or encoded
anew.

Every image is compared in full only with a few candidates: the nearest by a perceptual hash, and
the nearest by coarse pixels at several crops.  Of 300 test images of CIFAR-10, mirrored, moved by
up to 4 pixels, cropped by 2 pixels and resized, or saved as JPEG of quality 50, 97 % and more are
found among all 10,000; of 2,000 training images 1.4 % count as copies, and CIFAR-10 has near copies
in its splits (3.3 % of the test images: Barz and Denzler, J. Imaging 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cure.data.images import ImageSet

COPY = 0.92
"""Similarity from which an image counts as a copy, at least; see :func:`threshold`."""

USUAL = 0.05
"""Largest share of training images that counts as copies."""

_COMPARED = 1000

SIDE = 32
"""Images are compared at so many pixels a side."""

_WINDOW = 24
_CORNERS = (1, 4, 7)
_ZOOMS = (32, 34, 37)
_CANDIDATES = 3
_PART = 64


@dataclass(frozen=True)
class Nearest:
    """The image of another set that each image is most similar to.

    Similarity is the correlation of the pixels in the best alignment, -1 to 1.

    Attributes:
        position: [N] int64, of that image.
        similarity: [N].
        by_hash: [N] similarity of what the perceptual hash leads to.
        by_pixels: [N] similarity of what coarse pixels lead to.
    """

    position: Tensor
    similarity: Tensor
    by_hash: Tensor
    by_pixels: Tensor


def nearest(images: ImageSet, held: ImageSet, device: torch.device | str = "cpu") -> Nearest:
    """Look for each image among the images of another set and their mirror images.

    Args:
        images: those that may be copies.
        held: those that may be copied.
        device: where it is computed.
    """
    channels = max(images.channels, held.channels)
    images, held = images.with_channels(channels), held.with_channels(channels)
    known = torch.cat([_small(part.to(device)) for part in held.parts()])
    mirrored = torch.cat([known, known.flip(-1)])
    hashes = dhash(mirrored)
    sights = torch.cat([_sights(part) for part in torch.split(mirrored, _PART)]).flatten(0, 1)
    found = []
    for part in images.parts(_PART):
        small = _small(part.to(device))
        middle = _coarse(_windows(small)[:, len(_CORNERS) ** 2 // 2])
        near = (middle @ sights.T).view(len(small), len(mirrored), -1).amax(2)
        by_pixels = near.topk(min(_CANDIDATES, len(mirrored)), dim=1).indices
        by_hash = (dhash(small) @ hashes.T).argmax(1, keepdim=True)
        candidates = torch.cat([by_hash, by_pixels], dim=1)
        alike = torch.stack([alignment(small, mirrored[one]) for one in candidates.T], dim=1)
        best, which = alike.max(1)
        position = candidates.gather(1, which[:, None])[:, 0] % len(known)
        found.append((position, best, alike[:, 0], alike[:, 1:].amax(1)))
    return Nearest(*(torch.cat(one).cpu() for one in zip(*found, strict=True)))


def threshold(training: ImageSet, held: ImageSet, device: torch.device | str = "cpu") -> float:
    """Similarity from which an image counts as a copy of one of ``held``.

    :data:`COPY`, or more where images are alike by nature (digits): what all but :data:`USUAL` of
    up to 1,000 training images are below.
    """
    some = training.subset(torch.arange(0, len(training), -(-len(training) // _COMPARED)))
    usual = nearest(some, held, device).similarity.quantile(1 - USUAL)
    return max(COPY, float(usual))


def dhash(image: Tensor) -> Tensor:
    """The difference hash: whether each pixel of a 9x8 grey image is darker than its right one.

    Args:
        image: [N, C, H, W].

    Returns:
        [N, 64] of 1 and -1, so that a product of two counts bits: 64 - 2 x the bits that differ.

    Source: Krawetz, "Kind of like that", 2013.
    """
    grey = image.float().mean(1, keepdim=True)
    small = F.interpolate(grey, size=(8, 9), mode="bilinear", antialias=True, align_corners=False)
    return torch.where(small[..., 1:] > small[..., :-1], 1.0, -1.0).flatten(1)


def alignment(image: Tensor, other: Tensor) -> Tensor:
    """Correlation of the middle of each image with the most similar part of another one.

    The parts are all windows of its size, of the other image as it is and of two enlargements; so a
    copy is found that was moved by up to 4 of 32 pixels or cropped by up to 2.

    Args:
        image: [N, C, 32, 32] float.
        other: the same shape, one for each image.

    Returns:
        [N], -1 to 1; 1 for equal images.
    """
    edge = (SIDE - _WINDOW) // 2
    middle = image[..., edge:-edge, edge:-edge]
    middle = middle - middle.mean((1, 2, 3), keepdim=True)
    middle = middle / middle.flatten(1).norm(dim=1).clamp_min(1e-6)[:, None, None, None]
    best = (image == other).flatten(1).all(1).float() * 2 - 1
    for side in _ZOOMS:
        zoomed = F.interpolate(other, size=(side, side), mode="bilinear", align_corners=False)
        zoomed = zoomed - zoomed.mean((1, 2, 3), keepdim=True)
        # The products with all windows at once; a side of 40 has fast transforms.
        spectrum = torch.fft.rfft2(zoomed, s=(40, 40))
        spectrum = (spectrum * torch.fft.rfft2(middle, s=(40, 40)).conj()).sum(1)
        places = side - _WINDOW + 1
        product = torch.fft.irfft2(spectrum, s=(40, 40))[..., :places, :places]
        mean = F.avg_pool2d(zoomed.mean(1), _WINDOW, 1)
        variance = F.avg_pool2d(zoomed.square().mean(1), _WINDOW, 1) - mean.square()
        size = (variance.clamp_min(1e-3) * middle[0].numel()).sqrt()
        best = torch.maximum(best, (product / size).flatten(1).amax(1))
    return best


def _small(image: Tensor) -> Tensor:
    """[N, C, 32, 32] float32 in 0..255."""
    size = (SIDE, SIDE)
    if tuple(image.shape[-2:]) == size:
        return image.float()
    return F.interpolate(
        image.float(), size=size, mode="bilinear", antialias=True, align_corners=False
    )


def _windows(image: Tensor) -> Tensor:
    """[N, 9, C, 24, 24]: the middle (number 4) and around it."""
    return torch.stack(
        [
            image[..., top : top + _WINDOW, left : left + _WINDOW]
            for top in _CORNERS
            for left in _CORNERS
        ],
        dim=1,
    )


def _coarse(image: Tensor) -> Tensor:
    """[N, C * 16] of length 1: the image at 4x4 pixels without its mean."""
    small = F.adaptive_avg_pool2d(image, 4).flatten(1)
    return F.normalize(small - small.mean(1, keepdim=True), dim=1)


def _sights(image: Tensor) -> Tensor:
    """[N, 9, C * 16]."""
    windows = _windows(image)
    return _coarse(windows.flatten(0, 1)).view(*windows.shape[:2], -1)
