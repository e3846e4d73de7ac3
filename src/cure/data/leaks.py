"""Copies: images of one set that show what an image of another shows, cropped, mirrored or encoded
anew.

Every image is compared in full only with a few candidates: the nearest by a perceptual hash, and
the nearest by coarse pixels at several crops.  Of 300 test images of CIFAR-10, mirrored, moved by
up to 4 pixels, cropped by 2 pixels and resized, or saved as JPEG of quality 50, 97 % and more are
found among all 10,000; of 2,000 training images 1.4 % count as copies, and CIFAR-10 has near copies
in its splits (3.3 % of the test images: Barz and Denzler, J. Imaging 2020).

Copies that were rotated, recoloured or cropped further are looked for by the features of a trained
network, where there is one: :func:`resembling`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cure.data.images import ImageSet

COPY = 0.92
"""Similarity from which an image counts as a copy, at least; see :func:`threshold`."""

USUAL = 0.05
"""Largest share of training images that counts as copies."""

UNUSUAL = 0.005
"""Share of training images whose features are as near to a held-out image as those of a suspect."""

_COMPARED = 1000

Describe = Callable[[Tensor], Tensor]
"""Features [N, D] of length 1 of images [N, C, H, W] in [0, 1]."""

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


@dataclass(frozen=True)
class Resembling:
    """Images that a network hardly tells from one of another set.

    Attributes:
        rows: [K] int64, their positions.
        position: [K] int64, of what they resemble.
        similarity: [K] cosine of the features.
        usual: share of the training images that resemble one of that set as much.
    """

    rows: Tensor
    position: Tensor
    similarity: Tensor
    usual: float


def resembling(
    images: ImageSet, held: ImageSet, training: ImageSet, describe: Describe
) -> Resembling:
    """Look for images whose features are unusually near to those of a held-out image.

    Unusual is a cosine to the nearest held-out image, or a lead of the nearest over the next one,
    that all but :data:`UNUSUAL` of up to 1,000 training images stay below: the nearest neighbour
    of a copy stands out from the others (Lowe, IJCV 2004).

    Of 100 test photographs of Imagenette (96 pixels, features of an EfficientNet-lite0 with
    ImageNet weights) among 300, it finds 89 that were rotated by 15 degrees, 63 that were cropped
    to 70 % of the side and 80 with exchanged channels, where pixels find 6, 8 and 37; of blurred
    ones it finds 36 and pixels all (``results/bench/leaks.json``).

    Args:
        images: those that may be copies.
        held: those that may be copied, two at least.
        training: images that are no copies; they tell what is usual.
        describe: the features.
    """

    def described(some: ImageSet) -> Tensor:
        return torch.cat([describe(part.float() / 255) for part in some.parts(_PART)])

    known = described(held)

    def stand(some: ImageSet) -> tuple[Tensor, Tensor, Tensor]:
        found = []
        for part in some.parts(_PART):
            two = (describe(part.float() / 255) @ known.T).topk(2, dim=1)
            found.append((two.values[:, 0], two.values[:, 0] - two.values[:, 1], two.indices[:, 0]))
        best, lead, position = (torch.cat(one).cpu() for one in zip(*found, strict=True))
        return best, lead, position

    usual, lead, _ = stand(_some(training))
    limits = usual.quantile(1 - UNUSUAL), lead.quantile(1 - UNUSUAL)
    share = ((usual > limits[0]) | (lead > limits[1])).float().mean()
    best, lead, position = stand(images)
    rows = ((best > limits[0]) | (lead > limits[1])).nonzero().squeeze(1)
    return Resembling(rows, position[rows], best[rows], float(share))


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
    usual = nearest(_some(training), held, device).similarity.quantile(1 - USUAL)
    return max(COPY, float(usual))


def _some(images: ImageSet) -> ImageSet:
    """Up to 1,000 images, evenly spread."""
    return images.subset(torch.arange(0, len(images), -(-len(images) // _COMPARED)))


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
