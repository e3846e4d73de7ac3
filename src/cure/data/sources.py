"""Sources: from what ``data.source`` names to the images of a split.

The way: a reader (:mod:`cure.data.readers`) opens the splits of the source; labels are checked on
all rows; a test split is carved where there is none; only the rows that are left are decoded.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cure.config import MEMORY, DataConfig, RunConfig
from cure.data.decode import decode
from cure.data.images import ImageSet
from cure.data.readers import (
    TEST_SPLITS,
    Splits,
    Table,
    read_digits,
    read_folder,
    read_hub,
    read_npz,
)
from cure.data.splits import stratified
from cure.errors import ConfigError, DataError, unknown


class HubName(NamedTuple):
    """Where a short name leads on the Hugging Face hub."""

    repository: str
    subset: str | None
    description: str


SHORT_NAMES: dict[str, HubName] = {
    "cifar10": HubName("uoft-cs/cifar10", None, "60,000 photographs 32x32 RGB, 10 classes"),
    "cifar100": HubName("uoft-cs/cifar100", None, "60,000 photographs 32x32 RGB, 100 classes"),
    "svhn": HubName("ufldl-stanford/svhn", "cropped_digits", "house numbers 32x32 RGB, 10 classes"),
    "fashion_mnist": HubName(
        "zalando-datasets/fashion_mnist", None, "70,000 articles of clothing 28x28 grey, 10 classes"
    ),
}
"""Short names; ``$CURE_DATA/<name>`` is used in place of the hub where it exists."""

_HUB_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<subset>[\w.-]+))?")


def load(config: DataConfig, split: Literal["train", "test"]) -> ImageSet:
    """Read the training or test images, decoded once.

    A source without a test split has one carved from its training split (``test_fraction``,
    ``split_seed``, each class by its share); the training images are then the rest.
    ``data.limit`` keeps the first images of the training split after that; the validation split
    is carved later, by :func:`cure.data.splits.carve`.

    Args:
        config: the data section of a recipe.
        split: which images.

    Returns:
        The images, [N, C, H, W] uint8, with the class names of the training split.

    Raises:
        DataError: the source, its images or its labels cannot be used.
    """
    name, splits = _open(config)
    test_name = _test_split(config, splits, name)
    if config.train_split not in splits and (split == "train" or test_name is None):
        raise DataError(_no_split(config.train_split, "train_split", splits, name))

    # Test labels mean what training labels mean, so the training split is opened for both;
    # that reads its labels, not its images.
    train = splits[config.train_split]() if config.train_split in splits else None
    if split == "test" and test_name is not None:
        table = splits[test_name]()
        if train is None:
            classes = _classes(table, name, test_name)
            label = table.label
        else:
            classes = _classes(train, name, config.train_split)
            label = _relabel(table, classes, train.classes is not None, name, test_name)
        rows = np.arange(len(label))
    else:
        assert train is not None
        table, label = train, train.label
        classes = _classes(train, name, config.train_split)
        rows = _rows(label, split, test_name is None, config, name)
    if split == "train":
        _check_classes(label, rows, classes, config, name)
    image = decode(table.cells(rows.tolist()), len(rows), config.color, config.resize)
    return ImageSet(image, torch.from_numpy(label[rows]), classes, name, split)


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


def known_sources() -> list[tuple[str, str]]:
    """Names that ``data.source`` may be, each with a description, for ``cure list data``."""
    root = _data_root(check=False)
    local = sorted(path.name for path in root.iterdir() if path.is_dir()) if root else []
    known = [("digits", "1,797 handwritten digits 8x8 grey, 10 classes (in scikit-learn)")]
    for name, hub in SHORT_NAMES.items():
        place = "in CURE_DATA" if name in local else f"hub: {hub.repository}"
        known.append((name, f"{hub.description} ({place})"))
    known += [(name, "(in CURE_DATA)") for name in local if name not in dict(known)]
    return known


def _data_root(check: bool = True) -> Path | None:
    """The folder that CURE_DATA names, or None when it is not set."""
    value = os.environ.get("CURE_DATA")
    if not value:
        return None
    root = Path(value).expanduser()
    if root.is_dir():
        return root
    if check:
        raise DataError(
            f"expected a folder in the environment variable CURE_DATA, got '{value}', which is "
            "none; correct or unset it"
        )
    return None


def _open(config: DataConfig) -> tuple[str, Splits]:
    """The name for results, and the splits of the source."""
    source = config.source
    if source == "digits":
        return source, read_digits(config)
    path = Path(source).expanduser()
    # A folder that happens to be called cifar10 does not shadow the short name; ./cifar10 does.
    if source not in SHORT_NAMES:
        if path.is_dir():
            return path.resolve().name or source, read_folder(path, config)
        if path.is_file() and path.suffix.lower() == ".npz":
            return path.stem, read_npz(path, config)
        if path.is_file():
            raise DataError(
                f"expected a folder or a .npz file as data.source, got the file '{source}'; give "
                "the folder that holds it"
            )
    plain = re.fullmatch(r"[\w-][\w.-]*", source) is not None and path.suffix.lower() != ".npz"
    root = _data_root() if plain else None
    if root is not None and (root / source).is_dir():
        return source, read_folder(root / source, config)
    if source in SHORT_NAMES:
        hub = SHORT_NAMES[source]
        otherwise = (
            f"without network, set CURE_DATA to a folder with the parquet files in '{source}', or "
            "give a folder of parquet files as data.source"
        )
        return source, read_hub(hub.repository, hub.subset, config, otherwise)
    if plain:
        names = [name for name, _ in known_sources()]
        raise DataError(
            unknown("data source", source, names)
            + "; or give a hub name (owner/name), a folder or a .npz file"
        )
    match = _HUB_NAME.fullmatch(source)
    if match and path.suffix.lower() != ".npz":
        otherwise = (
            "no folder of this name is here either: correct the name or, without network, give a "
            "folder of parquet files as data.source, or a short name that CURE_DATA holds"
        )
        return source, read_hub(match["repository"], match["subset"], config, otherwise)
    raise DataError(
        f"expected a folder or .npz file as data.source, got '{source}', which does not exist; "
        "correct the path"
    )


def _test_split(config: DataConfig, splits: Splits, name: str) -> str | None:
    """The split to test on, or None when it is to be carved."""
    if config.test_split is None:
        found = (s for s in TEST_SPLITS if s in splits and s != config.train_split)
        return next(found, None)
    if config.test_split == config.train_split:
        raise DataError(
            "expected different splits for training and test, got data.train_split="
            f"{config.train_split} and the same as data.test_split; leave data.test_split out to "
            "have one carved"
        )
    if config.test_split not in splits:
        raise DataError(_no_split(config.test_split, "test_split", splits, name))
    return config.test_split


def _no_split(wanted: str, key: str, splits: Splits, name: str) -> str:
    return (
        f"expected a split '{wanted}' in '{name}', which has {', '.join(sorted(splits)) or 'none'}"
        f"; set data.{key} to one it has"
    )


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
    return rows[: config.limit] if split == "train" else rows


def _classes(table: Table, name: str, split: str) -> tuple[str, ...]:
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
    table: Table, classes: tuple[str, ...], named: bool, name: str, split: str
) -> NDArray[np.int64]:
    """Labels of the test split in the numbering of the training split.

    Raises:
        DataError: it has no images, or classes that the training split has not.
    """
    label = table.label
    where = f"split '{split}' of '{name}'"
    if len(label) == 0:
        raise DataError(f"expected images in {where}, got none; choose another data.test_split")
    _not_negative(label, where)
    if table.classes is None or not named:
        _in_range(label, len(classes), f"{where}, as in the training split")
        return label
    strange = [c for c in table.classes if c not in classes]
    if strange:
        raise DataError(
            f"expected the {len(classes)} classes of the training split in {where}, got unknown "
            f"{', '.join(repr(c) for c in strange[:5])}; test on the classes that are trained"
        )
    _in_range(label, len(table.classes), where)
    return np.array([classes.index(c) for c in table.classes], dtype=np.int64)[label]


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
