"""What was found in the images of a run, in figures and in words."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from cure.config import DataConfig
from cure.data.cache import CachePlace
from cure.data.extra import ExtraAccount
from cure.data.images import ImageSet, Skipped
from cure.data.sources import load
from cure.errors import DataError, counted, some

FEW = 10
"""A class with fewer training images is named."""

UNEQUAL = 2.0
"""Times the mean size of the other classes above which the largest class is warned of."""

_NAMED = 5


@dataclass(frozen=True)
class DataAccount:
    """The images of a run.

    Attributes:
        name: of the source.
        classes: names by label.
        images: images of each class, by split: "train", "validation" and, where known, "test".
        sizes: (height, width) of the smallest and the largest image before resizing.
        size: (height, width) in training.
        channels: 1 (grey) or 3 (RGB).
        converted: number of images by conversion.
        skipped: files that were left out, by split.
        duplicates: images of one split whose pixels are in another, by "split and split".
        largest: name of the largest training class.
        share: its share of the training images.
        few: training classes with fewer than :data:`FEW` images.
        missing: classes without an image, by split.
        notes: sentences on classes and splits.
        untested: why the test split cannot be used.
        extra: what is told of extra images.
        labels: digest of the training split's labels, see :class:`cure.data.images.Findings`.
    """

    name: str
    classes: tuple[str, ...]
    images: Mapping[str, tuple[int, ...]]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    size: tuple[int, int]
    channels: int
    converted: Mapping[str, int]
    skipped: Mapping[str, tuple[Skipped, ...]]
    duplicates: Mapping[str, int]
    largest: str
    share: float
    few: tuple[str, ...]
    missing: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()
    untested: str | None = field(default=None)
    extra: ExtraAccount | None = None
    labels: str | None = None

    @property
    def unequal(self) -> bool:
        """Whether the largest class is more than twice as large as the others are on average."""
        return self.share * (len(self.classes) - 1) > UNEQUAL * (1 - self.share)

    def lines(self) -> list[str]:
        """What was found, in plain sentences."""
        counts = ", ".join(f"{sum(n):,} {split}" for split, n in self.images.items())
        kind = "RGB" if self.channels == 3 else "grey"
        (low, high), now = self.sizes, _size(self.size)
        found = f"{_size(low)} to {_size(high)}" if low != high else _size(low)
        sizes = now if found == now else f"{found} pixels, now {now}"
        lines = [
            f"data '{self.name}': {counts} images, {len(self.classes)} classes, {sizes} {kind}",
            f"training images a class: {self._per_class()}",
        ]
        lines += [f"{counted(n, 'image')} converted: {what}" for what, n in self.converted.items()]
        for split, skipped in self.skipped.items():
            place = "" if split == "train" else f" ({split})"
            lines += [f"{one}{place}" for one in skipped]
        return [*lines, *self.notes, *(self.extra.lines() if self.extra is not None else ())]

    def warnings(self) -> list[str]:
        """What is likely a mistake or makes figures misleading, a sentence each."""
        found = []
        if self.unequal:
            found.append(
                f"the class '{self.largest}' has {100 * self.share:.0f} % of the training images "
                f"(a fair share is {100 / len(self.classes):.0f} %): a network that always names "
                "it is as accurate; set data.sampler=balanced or training.class_weights=balanced, "
                "and compare accuracies with that share"
            )
        if self.few:
            found.append(
                f"fewer than {FEW} training images in {some(self.few)}; add images of them"
            )
        for split, names in self.missing.items():
            found.append(
                f"no {split} image of {some(names)}; figures of that split say nothing of "
                f"{'it' if len(names) == 1 else 'them'}"
            )
        for splits, count in self.duplicates.items():
            found.append(
                f"{counted(count, 'image')} of one split equal images of another ({splits}), which "
                "makes accuracies too high; remove them from one"
            )
        if self.untested is not None:
            found.append(f"the test split cannot be used: {self.untested}")
        return found + (self.extra.warnings() if self.extra is not None else [])

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def _per_class(self) -> str:
        counts = dict(zip(self.classes, self.images["train"], strict=True))
        if len(set(counts.values())) == 1:
            return f"{next(iter(counts.values())):,} each"
        if len(counts) <= 2 * _NAMED:
            return ", ".join(f"{name} {count:,}" for name, count in counts.items())
        ordered = sorted(counts, key=lambda name: counts[name])
        low, high = ordered[0], ordered[-1]
        return f"{counts[low]:,} ({low}) to {counts[high]:,} ({high})"


def account(
    training: ImageSet, validation: ImageSet, test: ImageSet | str | None = None
) -> DataAccount:
    """What is in the splits of a run.

    Args:
        training: the images to train on.
        validation: those that validate.
        test: the test images; or why they cannot be used; None where they are not known.
    """
    splits = {"train": training, "validation": validation}
    if isinstance(test, ImageSet):
        splits["test"] = test
    count = len(training.classes)
    images = {
        split: tuple(torch.bincount(found.label.cpu(), minlength=count).tolist())
        for split, found in splits.items()
    }
    findings = {split: found.findings for split, found in splits.items()}
    # A carved validation split repeats the findings of the training split.
    own = {s: f for s, f in findings.items() if s == "train" or f != findings["train"]}
    converted: Counter[str] = Counter()
    for one in own.values():
        converted.update(one.converted)
    ends = [size for one in own.values() if one.sizes for size in one.sizes] or [training.size]
    largest = max(range(count), key=lambda label: images["train"][label])
    present = {
        split: [n for n, c in zip(training.classes, counts, strict=True) if c]
        for split, counts in images.items()
    }
    missing = {
        split: tuple(name for name in training.classes if name not in names)
        for split, names in present.items()
    }
    return DataAccount(
        name=training.name,
        classes=training.classes,
        images=images,
        sizes=(min(ends, key=_area), max(ends, key=_area)),
        size=training.size,
        channels=training.channels,
        converted=dict(converted),
        skipped={split: one.skipped for split, one in own.items() if one.skipped},
        duplicates=_duplicates(splits),
        largest=training.classes[largest],
        share=images["train"][largest] / max(1, len(training)),
        few=tuple(
            name for name, n in zip(training.classes, images["train"], strict=True) if 0 < n < FEW
        ),
        missing={split: names for split, names in missing.items() if names},
        notes=tuple(dict.fromkeys(note for one in own.values() for note in one.notes)),
        untested=test if isinstance(test, str) else None,
        labels=training.findings.labels,
    )


def account_of_run(
    config: DataConfig,
    training: ImageSet,
    validation: ImageSet,
    with_test: bool,
    place: CachePlace | None = None,
) -> DataAccount:
    """The account of a run's images.

    Args:
        config: the data section.
        training: the images to train on.
        validation: those that validate.
        with_test: whether the test split is read, to count duplicates in it.
        place: where ``data.cache`` keeps it.
    """
    test: ImageSet | str | None = None
    if with_test:
        try:
            test = load(config, "test", place=place or CachePlace()).with_channels(
                training.channels
            )
        except DataError as error:
            test = str(error)
    return account(training, validation, test)


def _duplicates(splits: Mapping[str, ImageSet]) -> dict[str, int]:
    """Images whose pixels are in another split as well."""
    names = list(splits)
    hashes = {
        name: [_hash(image) for part in splits[name].parts() for image in part.cpu()]
        for name in names
    }
    found = {}
    for i, name in enumerate(names):
        seen = set(hashes[name])
        for other in names[i + 1 :]:
            if count := sum(one in seen for one in hashes[other]):
                found[f"{name} and {other}"] = count
    return found


def _hash(image: Tensor) -> bytes:
    return hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=16).digest()


def _area(size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    return size[0] * size[1], size


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
