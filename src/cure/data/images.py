"""Image sets and batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cure.data.lazy import Index, LazyImages
from cure.errors import DataError

_PART = 256
_MOST_CLASSES = 100_000


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

    @property
    def shape(self) -> str:
        """Width, height and colour, in words.

        >>> ImageKind(("cat", "dog"), 3, (96, 128)).shape
        '128x96 RGB'
        """
        height, width = self.size
        return f"{width}x{height} {'RGB' if self.channels == 3 else 'grey'}"


@dataclass(frozen=True)
class Skipped:
    """Files that were left out.

    >>> print(Skipped(20, ".heic files", "pip install pillow-heif"))
    20 .heic files skipped: pip install pillow-heif
    """

    count: int
    what: str
    reason: str

    def __str__(self) -> str:
        what = self.what
        if self.count == 1:
            for word in ("file", "image", "link"):
                what = what.replace(f"{word}s", word)
        return f"{self.count} {what} skipped: {self.reason}"


@dataclass(frozen=True)
class Findings:
    """What was found when images were read.

    Attributes:
        sizes: (height, width) of the smallest and the largest image before resizing.
        converted: number of images by conversion, such as ``grey to RGB``.
        skipped: files that were left out.
        notes: sentences, such as the order of classes.
        held_out: number of images of the validation split that was carved from the source's
            training split, damaged ones included; None where none was carved.
        labels: digest of all labels of the training split, which decide what is carved from it;
            None of images that come from another split.
    """

    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
    converted: Mapping[str, int] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    held_out: int | None = None
    labels: str | None = None


@dataclass(frozen=True)
class ImageSet:
    """Images and labels of one split: one tensor, or read when they are needed (``data.cache``).

    :meth:`rows`, :meth:`parts` and :meth:`stream` give the pixels of both kinds.

    Attributes:
        image: [N, C, H, W] uint8, 0..255, C is 1 or 3; of a lazy set a tensor on the device
            ``meta``, which has this shape and no values.
        label: [N] int64, 0..len(classes)-1.
        classes: name of each class, by label.
        name: where the images came from, for results ("cifar10", "digits", a folder).
        split: "train", "validation" or "test".
        findings: what was found when they were read; of images in memory nothing.
        lazy: where the images are when they are not in memory.

    >>> pixels, label = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])
    >>> images = ImageSet.of(pixels, label, classes=("cat", "dog"))
    >>> len(images), images.image.dtype, images.subset(slice(0, 1)).classes
    (4, torch.uint8, ('cat', 'dog'))
    """

    image: Tensor
    label: Tensor
    classes: tuple[str, ...]
    name: str
    split: str
    findings: Findings = field(default=Findings(), compare=False, repr=False)
    lazy: LazyImages | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        # Shapes and types only: reading values could wait for the device.
        image, label = self.image, self.label
        fits = image.dim() == 4 and image.shape[1] in (1, 3) and image.dtype == torch.uint8
        if not fits:
            raise DataError(
                "expected images [N, C, H, W] of uint8 with C of 1 or 3, got "
                f"{list(image.shape)} of {image.dtype}; ImageSet.of(images, labels) converts floats"
            )
        if label.shape != image.shape[:1] or label.dtype != torch.int64:
            raise DataError(
                f"expected {image.shape[0]} labels of int64, one an image, got "
                f"{list(label.shape)} of {label.dtype}"
            )

    @classmethod
    def of(
        cls,
        image: Tensor,
        label: Tensor,
        classes: Sequence[str] | None = None,
        *,
        name: str = "memory",
        split: str = "train",
    ) -> ImageSet:
        """Your own tensors as an image set.

        Args:
            image: [N, C, H, W], uint8 in 0..255 or floats in [0, 1] (kept to the nearest of the
                256 levels, as an image file would).
            label: [N] integers from 0.
            classes: name of each class; by default the numbers up to the largest label.
            name: for results.
            split: "train", "validation" or "test".

        Raises:
            DataError: for values outside [0, 1], negative labels, labels without a name, shapes
                that do not fit, or no image at all.
        """
        if image.is_floating_point():
            low, high = (float(image.min()), float(image.max())) if image.numel() else (0.0, 1.0)
            if not (low >= 0 and high <= 1):
                raise DataError(
                    f"expected images in [0, 1], got values from {low:.4g} to {high:.4g}; undo "
                    "their standardisation and give mean and std to the model instead"
                )
            image = (image * 255).round().to(torch.uint8)
        label = label if label.is_floating_point() else label.to(torch.int64)
        if classes is None:
            classes = class_numbers(int(label.max()) if label.numel() else 0, len(label))
        return cls(image, label, tuple(classes), name, split).checked()

    def checked(self) -> ImageSet:
        """The same set, once its labels were looked at (which waits for the device).

        Raises:
            DataError: when it is empty or a label has no class.
        """
        if not len(self):
            raise DataError(f"there is no image in the {self.split} split of '{self.name}'")
        lowest, highest = int(self.label.min()), int(self.label.max())
        if lowest < 0 or highest >= len(self.classes):
            raise DataError(
                f"expected labels from 0 to {len(self.classes) - 1} for the {len(self.classes)} "
                f"classes of '{self.name}', got {lowest} to {highest}; correct the labels or the "
                "class names"
            )
        return self

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

    @property
    def device(self) -> torch.device:
        """Where labels are, and where images come to."""
        return self.label.device

    @property
    def nbytes(self) -> int:
        """Memory that the images take: none where they are not in memory."""
        return self.image.nbytes if self.lazy is None else 0

    def rows(self, index: Index) -> Tensor:
        """The images at ``index``, in that order, [B, C, H, W] uint8 on the set's device."""
        if self.lazy is None:
            return self.image[index]
        return self.lazy.request(index)().to(self.device)

    def stream(self, indices: Iterable[Index]) -> Iterator[Tensor]:
        """The images at each index in turn, as :meth:`rows` gives them.

        Of a lazy set the next ones are read in other threads while these are used.
        """
        if self.lazy is None:
            yield from map(self.rows, indices)
            return
        waiting = None
        for index in indices:
            pending = self.lazy.request(index)
            if waiting is not None:
                yield waiting().to(self.device)
            waiting = pending
        if waiting is not None:
            yield waiting().to(self.device)

    def parts(self, size: int = _PART) -> Iterator[Tensor]:
        """All images in order, ``size`` at a time."""
        return self.stream(slice(k, k + size) for k in range(0, len(self), size))

    def in_memory(self) -> ImageSet:
        """The same set with its images in memory, on its device."""
        if self.lazy is None:
            return self
        return replace(self, image=self.rows(slice(None)), lazy=None)

    def limited(self, most: int | None) -> ImageSet:
        """The first so many images, or all; checked."""
        images = self.checked()
        return images if most is None else images.subset(slice(0, most))

    def digest(self) -> str:
        """What :func:`cure.models.digest` says of ``image`` and ``label``, a part at a time."""
        total = hashlib.sha256()
        for name, whole, parts in (
            ("image", self.image, self.parts()),
            ("label", self.label, iter([self.label])),
        ):
            total.update(repr((name, str(whole.dtype), tuple(whole.shape))).encode())
            for part in parts:
                total.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()

    def subset(self, index: Index, split: str | None = None) -> ImageSet:
        """The images at ``index``, in that order."""
        label, split = self.label[index], split or self.split
        if self.lazy is None:
            return replace(self, image=self.image[index], label=label, split=split)
        lazy = self.lazy.part(index)
        return replace(self, image=lazy.stand_in(), label=label, split=split, lazy=lazy)

    def with_channels(self, channels: int) -> ImageSet:
        """The same set, grey images as RGB where ``channels`` is 3."""
        if self.channels == channels or channels != 3:
            return self
        converted = {**self.findings.converted, "grey to RGB": len(self)}
        lazy = None if self.lazy is None else replace(self.lazy, shape=(3, *self.size))
        return replace(
            self,
            image=self.image.expand(-1, 3, -1, -1).contiguous(),
            findings=replace(self.findings, converted=converted),
            lazy=lazy,
        )

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on ``device``; a lazy one brings its batches there."""
        image = self.image.to(device) if self.lazy is None else self.image
        return replace(self, image=image, label=self.label.to(device))


def class_numbers(highest: int, images: int) -> tuple[str, ...]:
    """Names of classes that have none: their numbers.

    Args:
        highest: label.
        images: how many have labels.

    Raises:
        DataError: the label is so high that it numbers something else.
    """
    if highest >= max(_MOST_CLASSES, images):
        raise DataError(
            f"expected labels that number the classes from 0, got {highest:,} among {images:,} "
            "images; number them anew, or pass names as text"
        )
    return tuple(map(str, range(1 + highest)))


def replace_labels(images: ImageSet, label: Tensor, classes: tuple[str, ...]) -> ImageSet:
    """The same images with other labels and classes."""
    return replace(images, label=label, classes=classes).checked()


@dataclass(frozen=True)
class Batch:
    """What a method is given at one step.

    Attributes:
        image: [B, C, H, W] float32 in [0, 1]; models normalise inside.
        label: [B] int64.
        index: [B] int64, position in the training set, for state kept per sample.
        step: number of optimiser steps done before this one; keys every random draw of the step.
        soft_label: [B, K] probabilities, where augmentation mixes or smooths labels.
        part: number of this batch among those of one optimiser step (gradient accumulation).
        weighted: [B, K] labels times the weight of their class, where classes are weighted.
        parts: equal parts of the batch that this is one of, see :meth:`split`.
    """

    image: Tensor
    label: Tensor
    index: Tensor
    step: int
    soft_label: Tensor | None = None
    part: int = 0
    weighted: Tensor | None = None
    parts: int = 1

    def split(self, parts: int) -> list[Batch]:
        """The batch in equal parts, side by side.

        Raises:
            ValueError: when there are no ``parts`` equal parts.
        """
        size, rest = divmod(len(self.label), parts)
        if rest:
            raise ValueError(f"a batch of {len(self.label)} has no {parts} equal parts")

        def of(tensor: Tensor | None, part: int) -> Any:
            return None if tensor is None else tensor[part * size : (part + 1) * size]

        return [
            replace(
                self,
                image=of(self.image, part),
                label=of(self.label, part),
                index=of(self.index, part),
                soft_label=of(self.soft_label, part),
                weighted=of(self.weighted, part),
                part=part,
                parts=parts,
            )
            for part in range(parts)
        ]

    @property
    def target(self) -> Tensor:
        """What the cross-entropy of a loss takes: labels, soft labels or weighted labels."""
        return self.attack_target if self.weighted is None else self.weighted

    @property
    def attack_target(self) -> Tensor:
        """What an attack takes: the soft labels where there are any, else the labels."""
        return self.label if self.soft_label is None else self.soft_label
