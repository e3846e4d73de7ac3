"""Batches: shuffled and augmented for training, in order for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cure.config import AugmentConfig
from cure.data.augment import augmented, mixed, soft_labels
from cure.data.images import Batch, ImageSet
from cure.errors import DataError
from cure.utils.random import generator, shared_generator


def steps_per_epoch(images: ImageSet, batch_size: int) -> int:
    """Full batches in one pass; an incomplete last batch is left out.

    Raises:
        DataError: there are fewer images than one batch has.
    """
    if len(images) < batch_size:
        raise DataError(
            f"expected at least one batch of {batch_size} images, got {len(images)} in the "
            f"{images.split} split of '{images.name}'; lower training.batch_size or use more images"
        )
    return len(images) // batch_size


def epoch(
    images: ImageSet,
    *,
    batch_size: int,
    epoch: int,
    seed: int,
    augment: AugmentConfig | None,
    sampler: Literal["random", "balanced"] = "random",
    class_weights: Literal["none", "balanced"] = "none",
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    extra: ImageSet | None = None,
    extra_share: float = 0.0,
) -> Iterator[Batch]:
    """One pass over the images in random order.

    The order is keyed by (seed, "order", epoch) and the augmentation of a batch by
    (seed, "augment", step), so a pass taken up at ``start`` gives the batches that an
    uninterrupted one would have given.

    With ``extra``, a pass has as many batches as without, each with the same number of extra
    images at random places.  Every extra image is used once before one is used again, whatever
    pass that falls into; of ``images`` each pass leaves out others.

    Args:
        images: the training images; batches are made on their device.
        batch_size: images a batch.
        epoch: number of the pass, from 0.
        seed: the run's seed.
        augment: augmentation, or None for the images as they are.
        sampler: ``random`` gives every image once; ``balanced`` every class equally often.
        class_weights: ``balanced`` also gives labels weighted by :func:`balanced_weights`.
        start: batches at the beginning to skip without computing them.
        rank: with ``world``: which of so many equal parts of every batch to give, 0 the first.
        world: divides ``batch_size``.  The parts side by side are the batch that ``world=1`` gives.
        extra: more images, of the same kind and on the same device; their ``index`` in a batch
            begins at ``len(images)``.
        extra_share: share of each batch that they make up.

    Returns:
        Batches k = start, ..., steps_per_epoch - 1 of float32 images in [0, 1], with
        ``step = epoch * steps_per_epoch + k``.

    Raises:
        DataError: there are fewer images than one batch has, or a batch would have no extra image
            or no other one (at once, not at the first batch).
        ValueError: ``world`` does not divide ``batch_size`` (at once, too).
    """
    steps = steps_per_epoch(images, batch_size)
    device = images.device
    part, rest = divmod(batch_size, world)
    if rest:
        raise ValueError(f"a batch of {batch_size} has no {world} equal parts")
    drawn = 0 if extra is None else extra_images(batch_size, extra_share)

    def iterate() -> Iterator[Batch]:
        classes = len(images.classes)
        balanced = class_weights == "balanced"
        labels = images.label if extra is None else torch.cat([images.label, extra.label])
        weights = None
        if balanced and extra is None:
            weights = balanced_weights(images.label, classes)
        elif balanced and extra is not None:
            weights = _mixture_weights(images.label, extra.label, classes, drawn / batch_size)

        order = _order(images.label, sampler, seed, epoch)
        if extra is not None:
            own = order[: steps * (batch_size - drawn)].view(steps, -1)
            order = _with_extra(own, extra.label, len(images), drawn, sampler, seed, epoch)
        # Lazy and extra images are looked up on the CPU, where no queue of a GPU is waited for.
        on_cpu = images.lazy is not None or extra is not None
        wanted = order if on_cpu else order.to(device)
        order = order.to(device)
        mixing = augment is not None and augment.soft_labels
        # Images are mixed across the whole batch, which each rank makes for itself.
        mine = slice(rank * part, (rank + 1) * part)
        ours = slice(0, batch_size) if mixing else mine
        indices = (
            wanted[k * batch_size + ours.start : k * batch_size + ours.stop]
            for k in range(start, steps)
        )
        pixels = images.stream(indices) if extra is None else _from_both(images, extra, indices)
        for k, image in zip(range(start, steps), pixels, strict=True):
            step = epoch * steps + k
            whole = order[k * batch_size : (k + 1) * batch_size]
            index = whole[mine]
            label = labels[index]
            if augment is not None and mixing:
                noise = generator(device, seed, "augment", step)
                image = to_unit(augmented(image, augment, noise))
                soft = soft_labels(labels[whole], classes, augment)
                heavy = soft if weights is None else soft * weights[labels[whole]][:, None]
                # The labels of the attack and those of the loss are mixed alike.
                image, both = mixed(image, torch.stack([soft, heavy], dim=1), augment, noise)
                loss = None if weights is None else both[mine, 1]
                yield Batch(image[mine], label, index, step, both[mine, 0], weighted=loss)
                continue
            if augment is not None:
                noise = shared_generator(device, rank, world, seed, "augment", step)
                image = augmented(image, augment, noise)
            loss = None if weights is None else F.one_hot(label, classes) * weights
            yield Batch(to_unit(image), label, index, step, weighted=loss)

    return iterate()


def _order(label: Tensor, sampler: str, seed: int, epoch: int) -> Tensor:
    """The images of a pass in their order [N], on the CPU: every device sees the same one."""
    draws = generator("cpu", seed, "order", epoch)
    if sampler == "balanced":
        return balanced_order(label.cpu(), draws)
    return torch.randperm(len(label), generator=draws)


def _with_extra(
    own: Tensor, label: Tensor, first: int, drawn: int, sampler: str, seed: int, epoch: int
) -> Tensor:
    """The order of a pass with ``drawn`` extra images in each batch.

    Args:
        own: other images of each batch [steps, B - drawn].
        label: of the extra images.
        first: index of the first extra image.
        drawn: extra images a batch.
        sampler: as in :func:`epoch`.
        seed: the run's.
        epoch: number of the pass.

    Returns:
        [steps * B] on the CPU.
    """
    steps = len(own)
    more = _passes(label.cpu(), epoch * steps * drawn, steps * drawn, seed, sampler)
    both = torch.cat([own, first + more.view(steps, -1)], dim=1)
    # Mixed, so that all parts of a batch (ranks, accumulation) have some of both.
    chances = torch.rand(both.shape, generator=generator("cpu", seed, "places", epoch))
    return both.gather(1, chances.argsort(dim=1, stable=True)).flatten()


def extra_images(batch_size: int, share: float) -> int:
    """Extra images of a batch.

    Raises:
        DataError: there would be none, or nothing else.

    >>> extra_images(128, 0.7)
    90
    """
    count = round(batch_size * share)
    if not 0 < count < batch_size:
        raise DataError(
            f"expected 1 to {batch_size - 1} extra images in a batch of {batch_size}, got {count} "
            f"with data.extra_share={share:g}; change it or training.batch_size"
        )
    return count


def _passes(label: Tensor, first: int, count: int, seed: int, sampler: str) -> Tensor:
    """Numbers ``first`` to ``first + count - 1`` of an endless row of passes over the images."""
    size = len(label)

    def order(number: int) -> Tensor:
        draws = generator("cpu", seed, "extra order", number)
        if sampler == "balanced":
            return balanced_order(label, draws)
        return torch.randperm(size, generator=draws)

    before, skipped = divmod(first, size)
    last = (first + count - 1) // size
    row = torch.cat([order(number) for number in range(before, last + 1)])
    return row[skipped : skipped + count]


def _from_both(images: ImageSet, extra: ImageSet, indices: Iterator[Tensor]) -> Iterator[Tensor]:
    """The images at each index in turn; those from ``len(images)`` on are extra ones."""
    wanted = list(indices)
    here = [index < len(images) for index in wanted]

    def part(of: ImageSet, positions: Iterator[Tensor]) -> Iterator[Tensor]:
        return of.stream(one if of.lazy is not None else one.to(of.device) for one in positions)

    own = part(images, (i[h] for i, h in zip(wanted, here, strict=True)))
    more = part(extra, (i[~h] - len(images) for i, h in zip(wanted, here, strict=True)))
    for first, second, is_own in zip(own, more, here, strict=True):
        # Own images lie before the extra ones; this is where each of them belongs.
        back = (~is_own).to(torch.uint8).argsort(stable=True).argsort()
        yield torch.cat([first, second])[back.to(images.device)]


def _mixture_weights(label: Tensor, extra: Tensor, classes: int, share: float) -> Tensor:
    """:func:`balanced_weights` for batches of which a share has the labels ``extra``."""
    counts = sum(
        part * torch.bincount(one, minlength=classes).float() / len(one)
        for one, part in ((label, 1 - share), (extra, share))
    )
    assert isinstance(counts, Tensor)
    weights: Tensor = 1 / (counts * (counts > 0).sum())
    return torch.where(counts > 0, weights, 0.0)


def balanced_weights(label: Tensor, classes: int) -> Tensor:
    """The weight of each class, N / (K n_c) for n_c of N images and K classes that have images.

    The mean over the images is 1, so that the size of the loss stays.

    Args:
        label: [N] int64.
        classes: number of classes.

    Returns:
        [classes] float32; 0 for a class without images.

    >>> balanced_weights(torch.tensor([0, 0, 0, 1]), 2)
    tensor([0.6667, 2.0000])
    """
    counts = torch.bincount(label, minlength=classes).float()
    weights: Tensor = len(label) / (counts * (counts > 0).sum())
    return torch.where(counts > 0, weights, 0.0)


def balanced_order(label: Tensor, draws: torch.Generator) -> Tensor:
    """As many positions as there are images, every class equally often, in random order.

    The images of a class are dealt in random order, again and again where they are fewer than its
    share; the images of a large class that are left over are not used.  Classes without images
    have no share; shares differ by one where the number of classes does not divide N.

    Args:
        label: [N] int64, on the CPU.
        draws: on the CPU.

    Returns:
        [N] int64.
    """
    present = torch.bincount(label).nonzero().squeeze(1)
    shuffled = present[torch.randperm(len(present), generator=draws)]
    share, rest = divmod(len(label), len(present))
    chosen = []
    for place, one in enumerate(shuffled.tolist()):
        members = (label == one).nonzero().squeeze(1)
        wanted = share + (place < rest)
        rounds = -(-wanted // len(members))
        dealt = [members[torch.randperm(len(members), generator=draws)] for _ in range(rounds)]
        chosen.append(torch.cat(dealt)[:wanted] if dealt else members[:0])
    order = torch.cat(chosen)
    return order[torch.randperm(len(order), generator=draws)]


def batches(images: ImageSet, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """The images in order and as they are, with the incomplete last batch, for evaluation.

    Args:
        images: any split; batches are made on its device.
        batch_size: images a batch.
        limit: only the first so many images.

    Returns:
        Batches of float32 images in [0, 1]; ``step`` is the number of the batch, from 0.
    """
    count = len(images) if limit is None else min(limit, len(images))
    parts = [slice(k, min(k + batch_size, count)) for k in range(0, count, batch_size)]
    for step, (part, image) in enumerate(zip(parts, images.stream(parts), strict=True)):
        index = torch.arange(part.start, part.stop, device=images.device)
        yield Batch(to_unit(image), images.label[part], index, step)


def to_unit(image: Tensor) -> Tensor:
    """uint8 0..255 as float32 in [0, 1]; floats are in [0, 1] already."""
    return image if image.is_floating_point() else image.to(torch.float32) / 255
