"""Extra training images, which nothing is validated or evaluated on: ``data.extra``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cure.config import MEMORY, DataConfig
from cure.data.cache import CachePlace, decode_rows
from cure.data.decode import failures_text
from cure.data.images import ImageSet, Skipped
from cure.data.leaks import UNUSUAL, Describe, nearest, resembling, threshold
from cure.data.opening import open_source
from cure.data.readers import UNLABELLED, ImageTable, composed
from cure.data.sources import load, training_split
from cure.errors import DataError, counted
from cure.utils.stats import at_least

_SHOWN = 5
_CHANCE = 0.001


@dataclass(frozen=True)
class Leaks:
    """Extra images that copy one of a held-out split.

    Attributes:
        split: "test" or "validation".
        rows: their positions among the extra images.
        copied: the positions of what they copy.
        similarity: of each pair.
        threshold: similarity from which an image counts as a copy.
        by_hash: how many the perceptual hash alone leads to.
        by_pixels: how many coarse pixels alone lead to.
        suspects: positions of further extra images that a network takes for copies; None where no
            trained network was at hand.
        suspected: the positions of what those seem to copy.
        usual: share of the training images that it takes for copies.
        compared: how many extra images there are.
    """

    split: str
    rows: tuple[int, ...]
    copied: tuple[int, ...]
    similarity: tuple[float, ...]
    threshold: float
    by_hash: int
    by_pixels: int
    suspects: tuple[int, ...] | None = None
    suspected: tuple[int, ...] = ()
    usual: float = 0.0
    compared: int = 0

    @property
    def unusual(self) -> bool:
        """Whether there are clearly more suspects than among as many training images."""
        share = max(self.usual, UNUSUAL)
        return at_least(len(self.suspects or ()), self.compared, share) < _CHANCE


@dataclass(frozen=True)
class ExtraAccount:
    """The extra images of a run.

    Attributes:
        name: of their source.
        images: how many of each class are trained on.
        share: their share of each batch.
        predicted: how many have the label that a network predicted.
        labelled_by: that network, as ``data.extra_labels`` names it.
        leaks: copies of held-out images, by split.
        action: what was done with these: ``data.extra_leaks``.
        removed: how many were left out.
        skipped: files that were left out.
        unmeasured: held-out splits that copies were not looked for in, and why.
    """

    name: str
    images: tuple[int, ...]
    share: float
    predicted: int
    labelled_by: str | None
    leaks: tuple[Leaks, ...]
    action: str
    removed: int
    skipped: tuple[Skipped, ...]
    unmeasured: Mapping[str, str]

    def lines(self) -> list[str]:
        """What was found, in plain sentences."""
        total = sum(self.images)
        counts = f"{min(self.images):,} to {max(self.images):,} a class"
        lines = [
            f"extra images '{self.name}': {total:,}, {counts}, {100 * self.share:g} % of each batch"
        ]
        if self.predicted:
            lines.append(
                f"labelled by {self.labelled_by}: {counted(self.predicted, 'extra image')}"
            )
        for one in self.leaks:
            lines.append(
                f"extra images that copy a {one.split} image: {len(one.rows):,} "
                f"({one.by_hash:,} found by perceptual hash, {one.by_pixels:,} by coarse pixels; "
                f"similarity {one.threshold:.2f} or more)"
            )
            if one.suspects is not None:
                lines.append(
                    f"further extra images that the network takes for copies of a {one.split} "
                    f"image: {len(one.suspects):,} (of training images {100 * one.usual:.1f} %)"
                )
        if self.removed:
            lines.append(
                f"left out as copies of held-out images: {counted(self.removed, 'extra image')}"
            )
        lines += [f"{one} (extra)" for one in self.skipped]
        return lines

    def warnings(self) -> list[str]:
        """What makes figures misleading, a sentence each."""
        found = [
            f"{_copies(one)}, which makes accuracies too high: see copies.png of the run, and set "
            "data.extra_leaks=remove"
            for one in self.leaks
            if one.rows and self.action == "report"
        ]
        found += [
            f"{len(one.suspects or ()):,} extra images resemble a {one.split} image more than "
            "training images do, as rotated, recoloured or cropped copies would: see copies.png of "
            "the run, and set data.extra_leaks=remove"
            for one in self.leaks
            if one.unusual and self.action != "remove"
        ]
        for split, reason in self.unmeasured.items():
            found.append(f"copies of {split} images were not looked for: {reason}")
        return found


def _copies(leaks: Leaks) -> str:
    rows = ", ".join(map(str, leaks.rows[:_SHOWN]))
    more = ", ..." if len(leaks.rows) > _SHOWN else ""
    count = len(leaks.rows)
    what = "1 extra image copies" if count == 1 else f"{count:,} extra images copy"
    return f"{what} a {leaks.split} image (number {rows}{more})"


def load_extra(config: DataConfig, training: ImageSet, place: CachePlace | None = None) -> ImageSet:
    """Read the extra images that ``data.extra`` names.

    Args:
        config: the data section.
        training: the images of the run, whose classes, size and channels they must have.
        place: where ``data.cache`` keeps them.

    Returns:
        The images, with the label :data:`UNLABELLED` where they have none.

    Raises:
        DataError: they cannot be read, or do not fit.
    """
    assert config.extra is not None
    own = config.model_copy(update={"source": config.extra})
    try:
        name, splits = open_source(own, unlabelled=True)
    except DataError as error:
        raise DataError(str(error).replace("data.source", "data.extra")) from None
    split = training_split(config, splits)
    if split is None:
        raise DataError(
            f"expected a split '{config.train_split}' in the extra images '{name}', which have "
            f"{', '.join(sorted(splits))}; name a source that has one with data.extra"
        )
    table = splits[split]()
    if not len(table.label):
        raise DataError(f"expected extra images in '{name}', got none; leave data.extra out")
    label = _labels(table, training.classes, name)
    decoded = decode_rows(table, np.arange(len(label)), own, place or CachePlace())
    if decoded.failures and (config.damaged == "refuse" or not len(decoded.kept)):
        raise DataError(failures_text(decoded.failures))
    skipped = table.skipped
    if decoded.failures:
        first = f"{decoded.failures[0].name}: {decoded.failures[0].reason}"
        skipped += (Skipped(len(decoded.failures), "damaged images", first),)
    found = ImageSet(
        decoded.image,
        torch.from_numpy(label[decoded.kept]),
        training.classes,
        name,
        "extra",
        replace(decoded.findings, skipped=skipped),
        decoded.lazy,
    ).with_channels(training.channels)
    ours, theirs = training.kind.shape, found.kind.shape
    if ours != theirs:
        raise DataError(
            f"expected extra images like the training images, {ours}, got {theirs} in '{name}'; "
            "convert them, or all images with data.resize and data.color"
        )
    return found


def _labels(table: ImageTable, classes: tuple[str, ...], name: str) -> NDArray[np.int64]:
    """Labels of extra images in the numbering of the training images."""
    label = table.label
    expected = f"expected extra images of the {len(classes)} classes of the run in '{name}'"
    if table.classes is not None:
        places = {composed(one): place for place, one in enumerate(classes)}
        strange = [one for one in table.classes if composed(one) not in places]
        if strange:
            raise DataError(
                f"{expected}, got the unknown {', '.join(map(repr, strange[:_SHOWN]))}; rename or "
                "take out these classes"
            )
        return np.array([places[composed(one)] for one in table.classes], dtype=np.int64)[label]
    outside = (label < UNLABELLED) | (label >= len(classes))
    if outside.any():
        row = int(np.argmax(outside))
        raise DataError(
            f"{expected}, with labels 0 to {len(classes) - 1} or {UNLABELLED} for none, got "
            f"{label[row]} in row {row}; take images of the same classes"
        )
    return label


def with_labels(extra: ImageSet, label: Tensor | None) -> ImageSet:
    """The extra images with the labels that a network predicted for those that have none.

    Args:
        extra: what :func:`load_extra` gave.
        label: [number of images without a label] int64, in their order; None where nothing
            predicts.

    Raises:
        DataError: some images have no label and nothing predicts one.
    """
    without = extra.label == UNLABELLED
    count = int(without.sum())
    if count and label is None:
        raise DataError(
            f"expected a label for each of the {len(extra)} extra images '{extra.name}', got none "
            f"for {count}; name a trained run that predicts them with data.extra_labels"
        )
    if label is None:
        return extra
    return replace(extra, label=extra.label.masked_scatter(without, label.to(extra.device)))


def held_out_splits(
    config: DataConfig, validation: ImageSet, place: CachePlace | None = None
) -> dict[str, ImageSet | str]:
    """The validation and test images of a run, or why the latter are not known.

    Raises:
        DataError: copies are to be refused or removed and the test images cannot be read.
    """
    test: ImageSet | str
    if config.source.startswith(MEMORY):
        test = "the images of the run were given in Python, without its test images"
    else:
        try:
            test = load(config, "test", place=place or CachePlace())
        except DataError as error:
            if config.extra_leaks != "report":
                raise
            test = str(error)
    return {"validation": validation, "test": test}


def find_leaks(
    extra: ImageSet,
    training: ImageSet,
    held: ImageSet,
    device: torch.device | str = "cpu",
    describe: Describe | None = None,
) -> Leaks:
    """Extra images that copy an image of a held-out split.

    Args:
        extra: the extra images.
        training: the images of the run; they tell how alike images are that are no copies.
        held: the images of the split.
        device: where it is computed.
        describe: features of a trained network, which find copies that pixels do not.
    """
    limit = threshold(training, held, device)
    found = nearest(extra, held, device)
    alike = found.similarity >= limit
    rows = alike.nonzero().squeeze(1)
    suspects, suspected, usual = None, (), 0.0
    if describe is not None and len(held) > 1:
        seen = resembling(extra, held, training, describe)
        further = ~alike[seen.rows]
        suspects = tuple(seen.rows[further].tolist())
        suspected = tuple(seen.position[further].tolist())
        usual = seen.usual
    return Leaks(
        held.split,
        tuple(rows.tolist()),
        tuple(found.position[rows].tolist()),
        tuple(round(value, 4) for value in found.similarity[rows].tolist()),
        limit,
        int((found.by_hash >= limit).sum()),
        int((found.by_pixels >= limit).sum()),
        suspects,
        suspected,
        usual,
        len(extra),
    )


def check_leaks(leaks: tuple[Leaks, ...]) -> None:
    """Refuse copies of held-out images.

    Raises:
        DataError: there are some.
    """
    found = [_copies(one) for one in leaks if one.rows]
    if found:
        raise DataError(
            f"expected no extra image that copies a held-out one, got {' and '.join(found)}; set "
            "data.extra_leaks=remove to leave them out"
        )
