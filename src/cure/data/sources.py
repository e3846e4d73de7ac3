"""From the splits of a source (:mod:`cure.data.opening`) to the images of a split.

The way: labels are checked on all rows; a test split is carved where there is none; only the rows
that are left are decoded.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cure.config import MEMORY, DataConfig, RunConfig, Split
from cure.data.cache import CachePlace, decode_rows
from cure.data.decode import Failure, damaged, failures_text, set_side
from cure.data.images import ImageSet, Skipped
from cure.data.opening import open_source
from cure.data.readers import (
    SPLIT_NAMES,
    TEST_SPLITS,
    TRAIN_SPLITS,
    VALIDATION_SPLITS,
    ImageTable,
    Splits,
    composed,
)
from cure.data.splits import held_out, stratified
from cure.errors import ConfigError, CureNote, DataError

_PLACE = CachePlace()

CARVE = "carve"
"""Value of ``data.validation_split`` for a validation split carved from the training split."""


DECIDE_SPLITS = (
    "train_split",
    "test_split",
    "test_fraction",
    "validation",
    "validation_split",
    "split_seed",
    "limit",
)
"""Settings that decide which images of a source are trained on, validate and test."""


@dataclass(frozen=True)
class _Opened:
    """A source: its splits, and which of them is used for what.

    Attributes:
        name: for results.
        splits: all of them.
        train: the training split; None where there is none of the name.
        test: the test split; None where it is carved.
        validation: the validation split; None where it is carved.
    """

    name: str
    splits: Splits
    train: str | None
    test: str | None
    validation: str | None

    @classmethod
    def of(cls, config: DataConfig) -> _Opened:
        name, splits = open_source(config)
        train = training_split(config, splits)
        test = _test_split(config, splits, name, train)
        return cls(name, splits, train, test, _validation_split(config, splits, name, train, test))

    def notes(self, config: DataConfig) -> tuple[str, ...]:
        """Sentences on the use of the splits."""
        used = (self.train, self.test, self.validation)
        unused = [name for name in self.splits if name not in used]
        found = [f"the split '{name}' is not used" for name in unused]
        if self.validation is not None:
            found.append(
                f"the split '{self.validation}' validates; data.validation={config.validation} is "
                "not used (data.validation_split=carve uses it)"
            )
        return tuple(found)


@dataclass(frozen=True)
class _Chosen:
    """Rows of a table that make up a split, with labels in the numbering of the training split.

    ``digest`` is that of the labels of a training split, see :class:`cure.data.images.Findings`.
    """

    table: ImageTable
    label: NDArray[np.int64]
    rows: NDArray[np.int64]
    classes: tuple[str, ...]
    digest: str | None = None

    def part(self, positions: NDArray[np.int64] | slice) -> _Chosen:
        return replace(self, rows=self.rows[positions])

    def first(self, limit: int | None) -> _Chosen:
        """The first ``limit`` rows; says where they leave classes out, as in a file by class.

        Not where so few images, less than five a class, would leave some out in any order.
        """
        few = self.part(slice(limit))
        kept, whole = (len(np.unique(self.label[part.rows])) for part in (few, self))
        if kept < whole and len(few.rows) >= 5 * whole:
            warnings.warn(
                f"the first {len(few.rows):,} of {len(self.rows):,} images hold {kept} of {whole} "
                "classes, so accuracies are those of these classes; leave --limit out, or shuffle "
                "the source",
                CureNote,
                stacklevel=3,
            )
        return few


def load(
    config: DataConfig,
    split: Literal["train", "test"],
    limit: int | None = None,
    place: CachePlace = _PLACE,
) -> ImageSet:
    """Read the training or test images, decoded once.

    A source without a test split has one carved from its training split (``test_fraction``,
    ``split_seed``, each class by its share); the training images are then the rest.
    ``data.limit`` keeps the first images of the training split after that; the validation split
    is carved later, by :func:`load_split` or :func:`cure.data.splits.carve`.

    Args:
        config: the data section of a recipe.
        split: which images.
        limit: only the first so many images; no others are decoded.
        place: where ``data.cache`` keeps them.

    Returns:
        The images, [N, C, H, W] uint8, with the class names of the training split.

    Raises:
        DataError: the source, its images or its labels cannot be used.
    """
    opened = _Opened.of(config)
    chosen = _training(opened, config) if split == "train" else _test(opened, config)
    return _read(chosen.first(limit), opened, config, split, place)


def load_split(
    config: DataConfig, split: Split, limit: int | None = None, place: CachePlace = _PLACE
) -> ImageSet:
    """Read the images of one split: "train" without those that validate, "validation" or "test".

    Args:
        config: the data section of a recipe.
        split: which images.
        limit: only the first so many images; no others are decoded.
        place: where ``data.cache`` keeps them.

    Raises:
        DataError: the source, its images or its labels cannot be used.
    """
    opened = _Opened.of(config)
    if split == "test":
        chosen = _test(opened, config)
        if opened.test is None:
            note = (
                f"no test split: {len(chosen.rows):,} of {len(chosen.label):,} images are carved "
                f"as test images (data.test_fraction={config.test_fraction:g})"
            )
            chosen = replace(chosen, table=replace(chosen.table, notes=(note,)))
    elif split == "validation" and opened.validation is not None:
        chosen = _named(opened, opened.validation, "validation_split")
    else:
        chosen = _training(opened, config)
        if opened.validation is None:
            rest, held = _held_out(chosen, config)
            chosen = chosen.part(rest if split == "train" else held)
    return _read(chosen.first(limit), opened, config, split, place)


def load_training(config: DataConfig, place: CachePlace = _PLACE) -> tuple[ImageSet, ImageSet]:
    """Read the training images and those that validate.

    The validation split is the source's own (``data.validation_split``) or carved from the
    training split; both have the same classes and channels.

    Args:
        config: the data section of a recipe.
        place: where ``data.cache`` keeps them.

    Raises:
        DataError: the source, its images or its labels cannot be used.
    """
    opened = _Opened.of(config)
    chosen = _training(opened, config)
    if opened.validation is not None:
        training = _read(chosen, opened, config, "train", place)
        own = _named(opened, opened.validation, "validation_split")
        return same_kind(training, _read(own, opened, config, "validation", place))
    _, held = _held_out(chosen, config)
    images, kept = _decoded(chosen, opened, config, "train", place)
    images = replace(images, findings=replace(images.findings, held_out=len(held)))
    is_held = np.isin(kept, held)
    return (
        images.subset(torch.from_numpy(np.flatnonzero(~is_held))),
        images.subset(torch.from_numpy(np.flatnonzero(is_held)), "validation"),
    )


def carves_test(config: DataConfig) -> bool:
    """Whether the test split is carved from the training split."""
    return _Opened.of(config).test is None


def seen_before(config: DataConfig, earlier: DataConfig) -> tuple[int, int]:
    """How many images of a run an earlier run had for something else.

    Images are told apart by their place in the source, so it has to be as it was then.

    Args:
        config: the data section of the run.
        earlier: that of a run from the same source.

    Returns:
        Number of test images that the earlier run was trained on or validated with, and number of
        validation images that it was trained on.
    """
    if all(getattr(config, name) == getattr(earlier, name) for name in DECIDE_SPLITS):
        return 0, 0
    before, now = _places(earlier), _places(config)
    known = before["train"] | before["validation"]
    return len(now["test"] & known), len(now["validation"] & before["train"])


def differing_splits(wanted: DataConfig, other: DataConfig) -> str:
    """The settings that decide the splits of ``wanted`` where ``other`` has others, as words."""
    return " ".join(
        f"data.{name}={'null' if value is None else value}"
        for name in DECIDE_SPLITS
        if (value := getattr(wanted, name)) != getattr(other, name)
    )


def _places(config: DataConfig) -> dict[str, set[tuple[str | None, int]]]:
    """The name of the source's split and the row of every image, by what it is used for."""
    opened = _Opened.of(config)
    training, test = _training(opened, config), _test(opened, config)
    if opened.validation is None:
        left, kept = _held_out(training, config)
        rest, held = training.rows[left], training.rows[kept]
    else:
        rest = training.rows
        held = _named(opened, opened.validation, "validation_split").rows
    return {
        "train": {(opened.train, row) for row in rest.tolist()},
        "validation": {(opened.validation or opened.train, row) for row in held.tolist()},
        "test": {(opened.test or opened.train, row) for row in test.rows.tolist()},
    }


def _check_classes(
    label: NDArray[np.int64],
    rows: NDArray[np.int64],
    classes: tuple[str, ...],
    config: DataConfig,
    name: str,
) -> None:
    """Two classes at least, and with ``data.limit`` no class fewer than without it."""
    kept, whole = np.unique(label[rows]), np.unique(label)
    if config.limit is not None and len(kept) < len(whole):
        raise DataError(
            f"expected all {len(whole)} classes among the first {len(rows)} training images of "
            f"'{name}', got {len(kept)}; its rows may be sorted by class: raise or leave out "
            f"data.limit={config.limit}"
        )
    if len(kept) < 2:
        raise DataError(
            f"expected images of at least two classes in the training split of '{name}', got only "
            f"'{classes[int(kept[0])]}'; use more images"
        )


def _match(wanted: str, splits: Splits) -> str | None:
    """The split of that name, in any case where there is only one."""
    if wanted in splits:
        return wanted
    alike = [name for name in splits if name.lower() == wanted.lower()]
    return alike[0] if len(alike) == 1 else None


def _first_of(names: tuple[str, ...], splits: Splits, used: tuple[str | None, ...]) -> str | None:
    """The first of the usual names that a split has which is not used otherwise."""
    found = (_match(name, splits) for name in names)
    return next((name for name in found if name is not None and name not in used), None)


def training_split(config: DataConfig, splits: Splits) -> str | None:
    """The split to train on, or None where there is none of the name.

    The only split of a source (``data.parquet``) is taken unless it has the name of another one.
    """
    found = _match(config.train_split, splits)
    if found is None and config.train_split in TRAIN_SPLITS:
        unnamed = [name for name in splits if name.lower() not in SPLIT_NAMES]
        found = _first_of(TRAIN_SPLITS, splits, ())
        if found is None and len(splits) == len(unnamed) == 1:
            (found,) = unnamed
    return found


def _test_split(config: DataConfig, splits: Splits, name: str, train: str | None) -> str | None:
    """The split to test on, or None when it is to be carved."""
    if config.test_split is None:
        return _first_of((*TEST_SPLITS, *VALIDATION_SPLITS), splits, (train,))
    found = _match(config.test_split, splits)
    if config.test_split == config.train_split or (found is not None and found == train):
        raise DataError(
            "expected different splits for training and test, got data.train_split="
            f"{config.train_split} and the same as data.test_split; leave data.test_split out to "
            "have one carved"
        )
    if found is None:
        raise DataError(_no_split(config.test_split, "test_split", splits, name))
    return found


def _validation_split(
    config: DataConfig, splits: Splits, name: str, train: str | None, test: str | None
) -> str | None:
    """The split that validates, or None when it is to be carved."""
    wanted = config.validation_split
    if wanted is None:
        # With one split besides the training split, that one is for the final figures.
        real = test is not None and (config.test_split is not None or test.lower() in TEST_SPLITS)
        return _first_of(VALIDATION_SPLITS, splits, (train, test)) if real else None
    if wanted == CARVE:
        return None
    found = _match(wanted, splits)
    if found is None:
        raise DataError(_no_split(wanted, "validation_split", splits, name))
    if found in (train, test):
        other = "training" if found == train else "test"
        raise DataError(
            f"expected a split of its own to validate with, got data.validation_split={wanted}, "
            f"the {other} split; name another one, or carve"
        )
    return found


def _no_split(wanted: str, key: str, splits: Splits, name: str) -> str:
    return (
        f"expected a split '{wanted}' in '{name}', which has {', '.join(sorted(splits)) or 'none'}"
        f"; set data.{key} to one it has"
    )


def _training(opened: _Opened, config: DataConfig) -> _Chosen:
    """The training rows, with those that validation carves from them."""
    if opened.train is None:
        raise DataError(_no_split(config.train_split, "train_split", opened.splits, opened.name))
    table = opened.splits[opened.train]()
    classes = _classes(table, opened.name, opened.train)
    rows = _rows(table.label, "train", opened.test is None, config, opened.name)[: config.limit]
    _check_classes(table.label, rows, classes, config, opened.name)
    return _Chosen(table, table.label, rows, classes, _digest(table))


def _digest(table: ImageTable) -> str:
    return hashlib.blake2b(table.label.tobytes(), digest_size=16).hexdigest()


def _test(opened: _Opened, config: DataConfig) -> _Chosen:
    """The test rows."""
    if opened.test is not None:
        return _named(opened, opened.test, "test_split")
    if opened.train is None:
        raise DataError(_no_split(config.train_split, "train_split", opened.splits, opened.name))
    table = opened.splits[opened.train]()
    classes = _classes(table, opened.name, opened.train)
    rows = _rows(table.label, "test", True, config, opened.name)
    # What was left out is told of the training split, which these rows are a part of.
    told = replace(table, skipped=(), notes=())
    return _Chosen(told, table.label, rows, classes, _digest(table))


def _named(opened: _Opened, split: str, key: str) -> _Chosen:
    """All rows of a split other than the training split."""
    table = opened.splits[split]()
    if opened.train is None:
        classes, label = _classes(table, opened.name, split), table.label
    else:
        # Labels mean what training labels mean, so the labels of the training split are read too.
        train = opened.splits[opened.train]()
        classes = _classes(train, opened.name, opened.train)
        label = _relabel(table, classes, train.classes is not None, opened.name, split, key)
    return _Chosen(table, label, np.arange(len(label)), classes)


def _held_out(chosen: _Chosen, config: DataConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the training rows that are left, and of those that validate."""
    label = torch.from_numpy(chosen.label[chosen.rows])
    rest, held = held_out(label, config.validation, config.split_seed)
    return rest.numpy(), held.numpy()


def _read(
    chosen: _Chosen, opened: _Opened, config: DataConfig, split: str, place: CachePlace
) -> ImageSet:
    return _decoded(chosen, opened, config, split, place)[0]


def _decoded(
    chosen: _Chosen, opened: _Opened, config: DataConfig, split: str, place: CachePlace
) -> tuple[ImageSet, NDArray[np.int64]]:
    """The images of some rows, and the positions of those rows that could be read."""
    decoded = decode_rows(chosen.table, chosen.rows, config, place)
    failures, skipped = decoded.failures, chosen.table.skipped
    if failures and (config.damaged == "refuse" or not len(decoded.kept)):
        if split == "train":
            failures = (*failures, *_damaged_elsewhere(chosen, opened))
        raise DataError(failures_text(failures))
    if failures:
        first = f"{failures[0].name}: {failures[0].reason}"
        more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
        skipped += (Skipped(len(failures), "damaged images", first + more),)
    notes = chosen.table.notes + (opened.notes(config) if split == "train" else ())
    findings = replace(decoded.findings, skipped=skipped, notes=notes, labels=chosen.digest)
    label = torch.from_numpy(chosen.label[chosen.rows[decoded.kept]])
    images = ImageSet(
        decoded.image, label, chosen.classes, opened.name, split, findings, decoded.lazy
    )
    return images, decoded.kept


def _damaged_elsewhere(chosen: _Chosen, opened: _Opened) -> list[Failure]:
    """Damaged images that are not among the chosen rows, so that all are named at once."""
    others = np.setdiff1d(np.arange(len(chosen.label)), chosen.rows).tolist()
    found = damaged(chosen.table.cells(others))
    for name in (opened.test, opened.validation):
        if name is not None:
            table = opened.splits[name]()
            found += damaged(table.cells(range(len(table.label))))
    return found


def same_kind(first: ImageSet, second: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Two splits with the same channels: grey images become RGB where the other split is RGB.

    Raises:
        DataError: their sizes differ.
    """
    if first.size != second.size:
        (height, width), (other_height, other_width) = first.size, second.size
        raise DataError(
            f"expected images of one size in '{first.name}', but those of its {first.split} split "
            f"are {width}x{height} and those of its {second.split} split {other_width}x"
            f"{other_height} pixels; {set_side(min(height, width))}"
        )
    channels = max(first.channels, second.channels)
    return first.with_channels(channels), second.with_channels(channels)


def _rows(
    label: NDArray[np.int64], split: str, carved: bool, config: DataConfig, name: str
) -> NDArray[np.int64]:
    """Rows of the training split that make up the training or the carved test images."""
    rows = np.arange(len(label))
    if carved:
        count = round(config.test_fraction * len(label))
        if not 0 < count < len(label):
            raise DataError(
                f"expected to carve 1 to {len(label) - 1} of the {len(label)} images of '{name}' "
                f"as the test split, got {count} with data.test_fraction={config.test_fraction:g}; "
                "change it"
            )
        rest, chosen = stratified(torch.from_numpy(label), count, config.split_seed, "test")
        rows = (rest if split == "train" else chosen).numpy()
    return rows


def _classes(table: ImageTable, name: str, split: str) -> tuple[str, ...]:
    """Class names of a split whose labels are in order.

    Raises:
        DataError: no images; labels negative, beyond the names or with gaps; fewer than two
            classes.
    """
    label = table.label
    where = f"split '{split}' of '{name}'"
    if len(label) == 0:
        raise DataError(f"expected images in {where}, got none; choose another split or source")
    _not_negative(label, where)
    if table.classes is not None:
        _in_range(label, len(table.classes), where)
    present = np.unique(label)
    if len(present) < 2:
        only = table.classes[int(present[0])] if table.classes else str(present[0])
        raise DataError(
            f"expected images of at least two classes in {where}, got only '{only}'; add another "
            "class"
        )
    if table.classes is not None:
        return table.classes
    count = len(present)
    if int(present[-1]) + 1 != count:
        raise DataError(
            f"expected labels 0..{count - 1} for the {count} classes in {where}, got labels from "
            f"{present[0]} to {present[-1]}; renumber them"
        )
    return tuple(str(index) for index in range(count))


def _relabel(
    table: ImageTable, classes: tuple[str, ...], named: bool, name: str, split: str, key: str
) -> NDArray[np.int64]:
    """Labels of the test split in the numbering of the training split.

    Raises:
        DataError: it has no images, or classes that the training split has not.
    """
    label = table.label
    where = f"split '{split}' of '{name}'"
    if len(label) == 0:
        raise DataError(f"expected images in {where}, got none; choose another data.{key}")
    _not_negative(label, where)
    if table.classes is None or not named:
        _in_range(label, len(classes), f"{where}, as in the training split")
        return label
    places = {composed(c): place for place, c in enumerate(classes)}
    strange = [c for c in table.classes if composed(c) not in places]
    if strange:
        raise DataError(
            f"expected the {len(classes)} classes of the training split in {where}, got unknown "
            f"{', '.join(repr(c) for c in strange[:5])}; test on the classes that are trained"
        )
    _in_range(label, len(table.classes), where)
    return np.array([places[composed(c)] for c in table.classes], dtype=np.int64)[label]


def _not_negative(label: NDArray[np.int64], where: str) -> None:
    if label.min() < 0:
        row = int(np.argmax(label < 0))
        raise DataError(
            f"expected labels of 0 or more in {where}, got {label[row]} in row {row} (a split "
            "without labels is often marked so); choose a labelled split or column"
        )


def _in_range(label: NDArray[np.int64], count: int, where: str) -> None:
    if label.max() >= count:
        row = int(np.argmax(label >= count))
        raise DataError(
            f"expected labels 0..{count - 1} for the {count} classes in {where}, got {label[row]} "
            f"in row {row}; correct the labels or the class names"
        )


def check_not_memory(config: RunConfig) -> None:
    """Refuse to look for images that only ever were in memory."""
    if config.data.source.startswith(MEMORY):
        raise ConfigError(
            f"the run was given its images ('{config.data.source}') in Python; pass images again "
            "(data=...)"
        )
