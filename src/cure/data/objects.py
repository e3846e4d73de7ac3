"""Images and labels that are Python objects: arrays, tensors, data sets, loaders."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from cure.config import DataConfig
from cure.data import labels_file
from cure.data.decode import EncodedImage, Treatment, decode, failures_text, file_cell
from cure.data.images import ImageSet, class_numbers
from cure.data.readers import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    TEST_SPLITS,
    TRAIN_SPLITS,
    VALIDATION_SPLITS,
    ImageTable,
    array_cells,
    dataset_table,
    listing,
    named_labels,
)
from cure.errors import CureError, DataError
from cure.utils.io import first_line

EXPECTED = (
    "expected (images, labels) as arrays or tensors, a TensorDataset, a data set of (image, label) "
    "items, a DataLoader of one, a datasets.Dataset, an ImageSet, or what data.source may be"
)

_IMAGES = (
    *IMAGE_COLUMNS,
    "images",
    "pixel_values",
    "x",
    "data",
    "inputs",
    *labels_file.FILE_COLUMNS,
)
_LABELS = (*LABEL_COLUMNS, "targets")


def as_images(
    given: Any, split: str = "train", config: DataConfig | None = None, limit: int | None = None
) -> ImageSet:
    """Images and labels of a Python object as an image set.

    Args:
        given: (images, labels) as NumPy arrays or tensors, images uint8 or floats in [0, 1],
            [N, H, W], [N, H, W, C] or [N, C, H, W]; a ``TensorDataset``; a data set whose items are
            (image, label) or dictionaries, images being Pillow images, arrays, tensors or paths of
            image files (also a data set of MAITE); a ``DataLoader``; a ``datasets.Dataset``; a
            dictionary of splits (``DatasetDict``); a data frame with columns of the usual names; or
            an ``ImageSet``.  Labels are whole numbers from 0, rows with a single one, or names.
        split: "train", "validation" or "test".
        config: settings for resizing and colour; by default images are taken as they are.
        limit: only the first so many images.

    Raises:
        DataError: the object is none of these, or its images or labels cannot be used.

    >>> images = as_images((np.zeros((4, 8, 8, 3), np.uint8), ["cat", "dog", "cat", "dog"]))
    >>> images.image.shape, images.classes
    (torch.Size([4, 3, 8, 8]), ('cat', 'dog'))
    """
    treatment = Treatment() if config is None else Treatment.of(config)
    if isinstance(given, ImageSet):
        if treatment.nothing:
            return given.checked().subset(slice(limit))
        pixels = given.rows(slice(None)).cpu().permute(0, 2, 3, 1).numpy()
        squeezed = pixels[..., 0] if pixels.shape[3] == 1 else pixels
        label = given.label.cpu().numpy()
        table = ImageTable(label, given.classes, partial(array_cells, squeezed, given.split))
        return _decoded(table, given.split, given.name, treatment, config, limit)
    table, classes = _table(given, split, config or DataConfig(source="memory"))
    numbers = tuple(map(str, range(len(table.classes or ()))))
    if classes is not None and table.classes in (None, numbers):
        table = replace(table, classes=classes)
    return _decoded(table, split, "memory", treatment, config, limit)


def is_object(given: Any) -> bool:
    """Whether images are given as a Python object, not by the name of their source."""
    return given is not None and not isinstance(given, str | Path)


def _decoded(
    table: ImageTable,
    split: str,
    name: str,
    treatment: Treatment,
    config: DataConfig | None,
    limit: int | None,
) -> ImageSet:
    rows = range(len(table.label))[:limit]
    if not len(rows):
        raise DataError(f"there is no image in the {split} split of '{name}'; pass some")
    if table.label.min() < 0:
        raise DataError(
            f"expected labels from 0, got {table.label.min()} for an image of '{name}'; number the "
            "classes from 0"
        )
    decoded = decode(table.cells(rows), len(rows), treatment)
    if decoded.failures and (config is None or config.damaged == "refuse"):
        raise DataError(failures_text(decoded.failures))
    label = torch.from_numpy(table.label[np.array(rows)[decoded.kept]])
    classes = table.classes or class_numbers(int(table.label.max()), len(table.label))
    findings = replace(decoded.findings, notes=table.notes)
    images = ImageSet(decoded.image, label, tuple(classes), name, split, findings)
    return images.checked()


def _table(given: Any, split: str, config: DataConfig) -> tuple[ImageTable, tuple[str, ...] | None]:
    """The object as a table, and the class names that it carries besides."""
    if hasattr(given, "columns") and hasattr(given, "to_dict"):  # a data frame
        given = {str(name): list(given[name]) for name in given.columns}
    if isinstance(given, Mapping):
        return _table_of_mapping(given, split, config)
    if isinstance(given, TensorDataset):
        return _table_of_pair(given.tensors, split), None
    if isinstance(given, DataLoader):
        return _table_of_loader(given, split, config)
    if _is_hub_dataset(given):
        return dataset_table("memory", split, given, config), None
    parts = list(given) if isinstance(given, tuple | list) else []
    batches = len(parts) > 2 and _is_array(parts[0])
    pairs = len(parts) == 2 and all(
        isinstance(one, tuple | list) and len(one) == 2 and _is_array(one[0]) for one in parts
    )
    if batches or pairs:
        raise DataError(
            f"{EXPECTED}, got {len(parts)} {'arrays' if batches else 'pairs'}; pass the pair that "
            "is meant, or {'train': (images, labels), 'test': (images, labels)}"
        )
    if len(parts) == 2 and _is_batch(given[0]):
        return _table_of_pair(given, split), None
    if isinstance(given, IterableDataset) or not hasattr(given, "__getitem__"):
        raise DataError(
            f"{EXPECTED}, got {type(given).__name__}, whose length is not known; collect its "
            "images and labels in arrays and pass them as data=(images, labels)"
        )
    if isinstance(given, str | bytes | np.ndarray | Tensor) or not hasattr(given, "__len__"):
        more = ", which has no labels" if isinstance(given, np.ndarray | Tensor) else ""
        raise DataError(f"{EXPECTED}, got {type(given).__name__}{more}; pass (images, labels)")
    return _table_of_items(given, split), _class_names(given)


def _is_array(value: Any) -> bool:
    """Whether a value is an array of several images."""
    return isinstance(value, Tensor | np.ndarray) and value.ndim > 3


def _is_batch(value: Any) -> bool:
    """Whether a value holds many images, not one item of a data set."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim >= 2
    # A tuple that ends in a label is the first of two items.
    item = isinstance(value, tuple) and len(value) == 2 and np.ndim(_scalar(value[1])) == 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and not item


def _is_hub_dataset(given: Any) -> bool:
    return type(given).__module__.split(".")[0] == "datasets" and hasattr(given, "features")


def _table_of_mapping(
    given: Mapping[Any, Any], split: str, config: DataConfig
) -> tuple[ImageTable, tuple[str, ...] | None]:
    """A dictionary of splits, or one of images and labels."""
    lower = {str(key).lower(): key for key in given}
    images = next((lower[key] for key in _IMAGES if key in lower), None)
    labels = next((lower[key] for key in _LABELS if key in lower), None)
    if images is not None and labels is not None:
        return _table_of_pair((given[images], given[labels]), split), None
    usual = {
        "train": TRAIN_SPLITS,
        "validation": VALIDATION_SPLITS,
        "test": (*TEST_SPLITS, *VALIDATION_SPLITS),
    }
    named = {
        "train": config.train_split,
        "validation": config.validation_split,
        "test": config.test_split,
    }

    def key_of(split: str) -> Any:
        name = named.get(split)
        wanted = ([name.lower()] if name else []) + list(usual.get(split, (split,)))
        return next((lower[name] for name in wanted if name in lower), None)

    found, train = key_of(split), key_of("train")
    if found is None:
        raise DataError(
            f"expected a split '{split}' in the dictionary passed as data, got "
            f"{listing(map(str, given)) or 'none'}; pass the one you mean, data=splits['...']"
        )
    table, classes = _table(given[found], split, config)
    if split != "train" and train is not None and table.classes is not None:
        # Names of a split that lacks a class would otherwise be numbered differently.
        theirs, _ = _table(given[train], "train", config)
        if theirs.classes is not None and set(table.classes) <= set(theirs.classes):
            order = np.array([theirs.classes.index(name) for name in table.classes])
            table = replace(table, label=order[table.label], classes=theirs.classes)
    return table, classes


def _table_of_loader(
    loader: DataLoader[Any], split: str, config: DataConfig
) -> tuple[ImageTable, tuple[str, ...] | None]:
    """The images that a loader gives, in the order of its data set where that is known."""
    data, sampler = loader.dataset, loader.sampler
    whole = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and sampler.num_samples == len(data)  # type: ignore[arg-type]
    )
    if not isinstance(data, IterableDataset) and loader.batch_sampler is not None:
        if isinstance(sampler, SubsetRandomSampler):
            data, whole = Subset(data, sorted(sampler.indices)), True
        if whole and type(loader.batch_sampler).__name__ == "BatchSampler" and _default(loader):
            return _table(data, split, config)
    images, labels = [], []
    for batch in loader:
        pair = batch
        if isinstance(batch, Mapping):
            pair = _pair_of_item(batch)
        if not isinstance(pair, tuple | list) or len(pair) < 2:
            raise DataError(
                f"expected batches (images, labels) from the DataLoader, got "
                f"{type(batch).__name__}; return pairs from its data set"
            )
        images.append(_array(pair[0]))
        labels.append(_array(pair[1]))
    if not images:
        raise DataError("the DataLoader passed as data gives no batch; pass one with images")
    return _table_of_pair((np.concatenate(images), np.concatenate(labels)), split), _class_names(
        loader.dataset
    )


def _default(loader: DataLoader[Any]) -> bool:
    """Whether a loader puts items together as PyTorch does by default."""
    from torch.utils.data import default_collate

    return loader.collate_fn is default_collate or "default_collate" in repr(loader.collate_fn)


def _class_names(given: Any) -> tuple[str, ...] | None:
    """Of a data set in the style of torchvision or MAITE, or of what it is a part of."""
    while isinstance(given, Subset):
        given = given.dataset
    names = getattr(given, "classes", None)
    if isinstance(names, Sequence) and not isinstance(names, str) and len(names):
        return tuple(map(str, names))
    metadata = getattr(given, "metadata", None)
    known = metadata.get("index2label") if isinstance(metadata, Mapping) else None
    if known:
        return tuple(str(known.get(number, number)) for number in range(1 + max(known)))
    return None


# Items.


def _table_of_items(given: Any, split: str) -> ImageTable:
    """A data set of (image, label) items. Each item is read twice: its label, then its image."""
    labels = _targets(given)
    if labels is None:
        labels = [_pair_of_item(_item(given, row, whole=True))[1] for row in range(len(given))]

    def cells(rows: Sequence[int]) -> Iterator[EncodedImage]:
        # Read here, one after another: a data set may not be safe in several threads.
        for row in rows:
            name = f"item {row} of {split}"
            try:
                cell = _cell(_pair_of_item(_item(given, row))[0], name)
                name = cell.name
                picture = cell.open()
            except (DataError, OSError, ValueError) as error:
                yield EncodedImage(partial(_raise, error), name)
            else:
                yield EncodedImage(partial(_same, picture), name)

    label, classes = _labels(labels, len(given))
    return ImageTable(label, classes, cells)


def _item(given: Any, row: int, whole: bool = False) -> Any:
    """An item of somebody's data set.

    Args:
        whole: whether a file that cannot be read is an error of the data set, too.

    Raises:
        DataError: the data set fails, for another reason than a file that cannot be read.
    """
    try:
        return given[row]
    except Exception as error:
        if isinstance(error, CureError) or (not whole and isinstance(error, OSError | ValueError)):
            raise
        raise DataError(
            f"item {row} of the data set passed as data fails with {type(error).__name__}: "
            f"{first_line(error)}; correct the data set, or pass it without that item"
        ) from error


def _cell(image: Any, name: str) -> EncodedImage:
    """The cell of an image, or of the path of one."""
    if isinstance(image, str | os.PathLike):
        return file_cell(Path(image).expanduser())
    return EncodedImage(partial(_as_picture, image), name)


def _raise(error: Exception) -> Any:
    raise error


def _same(value: Any) -> Any:
    return value


def _targets(given: Any) -> Any:
    """The labels that a data set of torchvision keeps beside its images, unless it changes them.

    A class that somebody derived from one may return other labels than it keeps.
    """
    read = getattr(type(given), "__getitem__", None)
    if not str(getattr(read, "__module__", "")).startswith("torchvision."):
        return None
    joint = type(getattr(given, "transforms", None)).__name__
    if given.target_transform is not None or joint not in ("NoneType", "StandardTransform"):
        return None
    targets = getattr(given, "targets", None)
    return None if targets is None or len(targets) != len(given) else targets


def _scalar(value: Any) -> Any:
    one = isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1)
    return value.item() if one else value


def _pair_of_item(item: Any) -> tuple[Any, Any]:
    """Image and label of an item: a pair, or a dictionary with the usual keys."""
    if isinstance(item, Mapping):
        image = next((item[key] for key in _IMAGES if key in item), None)
        label = next((item[key] for key in _LABELS if key in item), None)
        if image is not None and label is not None:
            return image, label
        raise DataError(
            f"expected 'image' and 'label' in the items of the data set, got "
            f"{listing(map(str, item))}; rename them"
        )
    if isinstance(item, tuple | list) and len(item) >= 2:
        return item[0], item[1]
    raise DataError(
        f"expected items (image, label) of the data set, got {type(item).__name__}; pass a data "
        "set with labels, or (images, labels)"
    )


def _as_picture(image: Any) -> Any:
    """A Pillow image of one image, with the channels first or last."""
    if isinstance(image, Image.Image):
        return image
    array = _array(image)
    if array.ndim not in (2, 3):
        raise DataError(
            f"expected an image as a Pillow image or an array [H, W], [H, W, C] or [C, H, W], got "
            f"{type(image).__name__} of shape {list(array.shape)}"
        )
    pixels = _nhwc(array[None])[0]
    return Image.fromarray(np.ascontiguousarray(_levels(pixels)))


# Arrays.


def _array(value: Any) -> NDArray[Any]:
    if isinstance(value, Tensor):
        dense = value.detach().to_dense().cpu()
        return (dense.float() if dense.dtype == torch.bfloat16 else dense).numpy()
    try:
        return np.asarray(value)
    except ValueError:
        raise DataError(
            "expected images of one size to be passed together, got several sizes; resize them, or "
            "pass a data set of (image, label) items and set data.resize"
        ) from None


def _table_of_pair(pair: Sequence[Any], split: str) -> ImageTable:
    """(images, labels)."""
    if len(pair) != 2:
        raise DataError(f"{EXPECTED}, got {len(pair)} parts; pass (images, labels)")
    given, labels = pair
    if isinstance(given, Sequence) and len(given) and not isinstance(given[0], int | float):
        pictures = list(given)

        def listed(rows: Sequence[int]) -> Iterator[EncodedImage]:
            return (_cell(pictures[row], f"image {row} of {split}") for row in rows)

        label, classes = _labels(labels, len(pictures))
        return ImageTable(label, classes, listed)
    pixels = _nhwc(_array(given))
    if pixels.size and pixels.dtype.kind in "iu" and pixels.max() == 1:
        raise DataError(
            "expected whole numbers in 0..255, got only 0 and 1, which would be nearly black; pass "
            "floats or booleans"
        )
    label, classes = _labels(labels, len(pixels))
    return ImageTable(label, classes, partial(array_cells, _levels(pixels), split))


def _nhwc(pixels: NDArray[Any]) -> NDArray[Any]:
    """[N, H, W] or [N, H, W, C], C of 3 or 4, from channels first or last."""
    if pixels.ndim == 3:
        return pixels
    if pixels.ndim != 4:
        raise DataError(
            f"expected images [N, H, W], [N, H, W, C] or [N, C, H, W], got shape "
            f"{list(pixels.shape)}; reshape them"
        )
    first, last = (pixels.shape[axis] in (1, 3, 4) for axis in (1, 3))
    if first and last:
        # Only one of both sides is as short as channels are, or the images are tiny.
        first, last = (pixels.shape[1] in (1, 3), pixels.shape[3] in (1, 3))
    if first == last:
        which = "could be either" if first else "has no side of 1 or 3"
        raise DataError(
            f"expected images [N, H, W, C] or [N, C, H, W] with C of 1 or 3, got shape "
            f"{list(pixels.shape)}, which {which}; reshape them"
        )
    nhwc = pixels if last else pixels.transpose(0, 2, 3, 1)
    return nhwc[..., 0] if nhwc.shape[3] == 1 else nhwc


def _levels(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """uint8 from uint8, bool, whole numbers in 0..255 or floats in [0, 1]."""
    if pixels.dtype == np.uint8:
        return pixels
    if not pixels.size:
        raise DataError(f"expected images with pixels, got an array of shape {list(pixels.shape)}")
    if pixels.dtype.kind not in "fiub":
        raise DataError(
            f"expected images of uint8 (0..255) or floats in [0, 1], got {pixels.dtype}; convert "
            "them"
        )
    if pixels.dtype.kind == "b":
        return pixels.astype(np.uint8) * np.uint8(255)
    low, high = float(pixels.min()), float(pixels.max())
    if not math.isfinite(high - low):
        raise DataError(
            "expected finite values in images, got not a number or infinity; correct or leave out "
            "these images"
        )
    if pixels.dtype.kind in "iu":
        if low < 0 or high > 255:
            raise DataError(
                f"expected whole numbers in 0..255, got {low:g} to {high:g}; scale the images to "
                "8 bits"
            )
        return pixels.astype(np.uint8)
    if not (low >= 0 and high <= 1):
        if low > -0.1 and high < 1.1:
            advice = "clip them to [0, 1]"
        elif low >= 0 and high <= 255:
            advice = "divide them by 255"
        else:
            advice = "undo their standardisation and give mean and std to the model instead"
        raise DataError(
            f"expected images in [0, 1], got values from {low:.6g} to {high:.6g}; {advice}"
        )
    # As ImageSet.of and torchvision's conversions: the nearest of the 256 levels.
    wide = pixels.astype(np.float32) if pixels.dtype.itemsize < 4 else pixels
    levels: NDArray[np.uint8] = np.rint(wide * 255).astype(np.uint8)
    return levels


def _labels(given: Any, count: int) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
    """Labels as numbers, and the class names where labels are names."""
    if isinstance(given, Sequence) and any(isinstance(one, Tensor) for one in given):
        given = [_array(one) for one in given]
    labels, classes = _array(given), None
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.shape[1] > 1 and labels.dtype.kind in "fiub":
        if not (((labels == 0) | (labels == 1)).all() and (labels.sum(axis=1) == 1).all()):
            raise DataError(
                f"expected one label an image, got rows of {labels.shape[1]} numbers that are not "
                "one-hot; pass one class number or name an image"
            )
        # The columns count the classes, also where the last ones have no image.
        classes = tuple(map(str, range(labels.shape[1])))
        labels = labels.argmax(axis=1)
    if labels.ndim != 1 or len(labels) != count:
        raise DataError(
            f"expected {count} labels, one an image, got shape {list(labels.shape)}; pass one "
            "class number or name an image"
        )
    if labels.dtype.kind in "OUS":
        names = [one.decode() if isinstance(one, bytes) else one for one in labels.tolist()]
        if not all(isinstance(one, str) for one in names):
            strange = next(one for one in names if not isinstance(one, str))
            raise DataError(
                f"expected labels that are numbers or names, got {strange!r}; pass one class "
                "number or name an image"
            )
        return named_labels(names)
    whole = labels.astype(np.int64) if labels.dtype.kind in "iubf" else None
    if whole is None or (labels.dtype.kind == "f" and not (whole == labels).all()):
        raise DataError(
            f"expected labels that are whole numbers or names, got {labels.dtype}; pass one class "
            "number or name an image"
        )
    return whole, classes
