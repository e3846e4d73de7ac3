"""Splits: which images are held out, the same in every process."""

from __future__ import annotations

import torch
from torch import Tensor

from cure.data.images import ImageSet
from cure.errors import DataError
from cure.utils.random import generator


def stratified(label: Tensor, count: int, seed: int, purpose: str) -> tuple[Tensor, Tensor]:
    """Choose ``count`` positions at random, each class by its share.

    A class of n_c among N images gives count * n_c / N of them, rounded down; what is missing then
    comes one each from the classes with the largest remainders, lower labels first.

    Args:
        label: [N] int64.
        count: 0..N.
        seed: seed of the choice.
        purpose: part of the key, so that two carvings with one seed are independent.

    Returns:
        ([N - count], [count]) int64: positions left and positions chosen, both ascending.
    """
    label = label.cpu()
    total = len(label)
    sizes = torch.bincount(label).tolist()
    # Whole numbers throughout: a share of 0.3 would round differently from one machine to another.
    takes = [count * size // total for size in sizes]
    remainders = [count * size % total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda c: (-remainders[c], c))
    for class_index in by_remainder[: count - sum(takes)]:
        takes[class_index] += 1

    chosen = torch.zeros(total, dtype=torch.bool)
    for class_index, take in enumerate(takes):
        members = (label == class_index).nonzero().squeeze(1)
        random = generator("cpu", seed, "split", purpose, class_index)
        chosen[members[torch.randperm(len(members), generator=random)[:take]]] = True
    return (~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)


def carve(train: ImageSet, count: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Carve a validation split from the training images.

    Args:
        train: the training images.
        count: images of the validation split, or their share of ``train`` when below 1; a share
            gives at least one image.
        seed: ``data.split_seed``; the same seed gives the same split in every process.

    Returns:
        (the rest, the validation split), each in the order of ``train``, classes by their share.

    Raises:
        DataError: ``count`` is not between 1 and one less than the number of training images.
    """
    rest, chosen = held_out(train.label, count, seed)
    device = train.label.device
    return train.subset(rest.to(device)), train.subset(chosen.to(device), "validation")


def held_out(label: Tensor, count: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of training images that are left and of those that validate, see :func:`carve`.

    Args:
        label: [N] int64, of the training images.
        count: as of :func:`carve`.
        seed: as of :func:`carve`.

    Raises:
        DataError: ``count`` is not between 1 and N - 1.
    """
    if 0 < count < 1:
        count = max(1, round(count * len(label)))
    if not 0 < count < len(label):
        raise DataError(
            f"expected a validation split of 1 to {len(label) - 1} images, as there are "
            f"{len(label)} training images, got data.validation={count}; choose a number in "
            "that range, or a share such as 0.1 (of an evaluation --data-option validation=0.1)"
        )
    return stratified(label, int(count), seed, "validation")
