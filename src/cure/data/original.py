"""Folders in the form of another library: ``save_to_disk``, cifar-10-batches-py, MNIST idx."""

from __future__ import annotations

import gzip
import io
import pickle
import re
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cure.config import DataConfig
from cure.data.readers import ImageTable, Splits, array_cells, dataset_table, listing
from cure.errors import DataError
from cure.utils.io import first_line

_IDX = re.compile(r"(.*?)(train|t10k|test)-(images|labels)[.-]idx[134]-ubyte(\.gz)?$", re.I)
_CIFAR = {
    "cifar-10-batches-py": ("data_batch_1", "test_batch", "batches.meta"),
    "cifar-100-python": ("train", "test", "meta"),
}


def read_original(folder: Path, config: DataConfig) -> Splits | None:
    """The splits of a folder that another library wrote, or None for any other folder.

    Raises:
        DataError: such a folder is incomplete or damaged.
    """
    for place in (folder, *(folder / name for name in (*_CIFAR, "MNIST/raw", "raw"))):
        if not place.is_dir():
            continue
        if any((place / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
            return _saved(place, config)
        if all((place / name).is_file() for name in _CIFAR["cifar-10-batches-py"]):
            return _cifar10(place, config)
        if all((place / name).is_file() for name in _CIFAR["cifar-100-python"]):
            return _cifar100(place, config)
        idx = {path: match for path in place.iterdir() if (match := _IDX.match(path.name))}
        if idx:
            return _mnist(idx, place, config)
    return None


# Hugging Face datasets.


def _saved(folder: Path, config: DataConfig) -> Splits:
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    # What goes wrong inside is raised as the errors of several libraries with no common base.
    except Exception as error:
        raise DataError(
            f"expected a data set written by save_to_disk in '{folder}', which cannot be read "
            f"({type(error).__name__}: {first_line(error)}); write it again"
        ) from error
    splits = found if isinstance(found, dict) else {config.train_split: found}
    return {
        name: partial(dataset_table, str(folder), name, data, config)
        for name, data in splits.items()
    }


# CIFAR. Its files are pickles: they are read as plain containers and arrays, and nothing of what
# they name is imported or called.


class _DataType:
    """Stands for ``numpy.dtype`` while a pickle is read."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name = name.decode("ascii") if isinstance(name, bytes) else str(name)
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        self.order = order.decode("ascii") if isinstance(order, bytes) else str(order)


class _Array:
    """Stands for ``numpy.ndarray`` while a pickle is read."""

    value: NDArray[Any]

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        if not isinstance(kind, _DataType) or not re.fullmatch(r"[uib]\d", kind.name):
            raise pickle.UnpicklingError("an array of other things than whole numbers")
        if isinstance(content, str):
            content = content.encode("latin-1")
        order: Any = "F" if fortran else "C"
        known = np.dtype(kind.name).newbyteorder({"<": "<", ">": ">"}.get(kind.order, "="))  # type: ignore[arg-type]
        self.value = np.frombuffer(content, dtype=known).reshape(shape, order=order)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", bytes(content)))
    return array


def _encode(text: str, encoding: str = "latin-1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text encoded as {encoding}")
    return text.encode("latin-1")


_SAFE: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DataType,
    ("_codecs", "encode"): _encode,
}


class _PlainUnpickler(pickle.Unpickler):
    """Reads plain containers, numbers, text, bytes and arrays of whole numbers, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _SAFE[module, name]


def read_plain_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle of plain containers and arrays.

    Nothing that the file names is imported or run.

    Raises:
        DataError: the file holds anything else, or is damaged.
    """
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError("it holds no dictionary")
    except MemoryError:
        raise
    except Exception as error:  # A damaged pickle may raise anything.
        raise DataError(
            f"expected the plain numbers and names of CIFAR in '{path}', which cannot be read "
            f"({first_line(error)}); download the file again"
        ) from None
    return {_text(key): _plain(value) for key, value in content.items()}


def _plain(value: Any) -> Any:
    return getattr(value, "value", None) if isinstance(value, _Array) else value


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _cifar10(folder: Path, config: DataConfig) -> Splits:
    names = _names(folder / "batches.meta", "label_names")
    batches = sorted(folder.glob("data_batch_*"), key=lambda path: (len(path.name), path.name))
    missing = [f"data_batch_{i}" for i in range(1, 6) if folder / f"data_batch_{i}" not in batches]
    if missing:
        raise DataError(
            f"expected data_batch_1 to data_batch_5 in '{folder}', {listing(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; unpack the archive again"
        )
    return {
        config.train_split: partial(_cifar_table, batches, "labels", names),
        "test": partial(_cifar_table, [folder / "test_batch"], "labels", names),
    }


def _cifar100(folder: Path, config: DataConfig) -> Splits:
    coarse = config.label_column == "coarse_labels"
    key, kind = ("coarse_labels", "coarse") if coarse else ("fine_labels", "fine")
    names = _names(folder / "meta", f"{kind}_label_names")
    return {
        config.train_split: partial(_cifar_table, [folder / "train"], key, names),
        "test": partial(_cifar_table, [folder / "test"], key, names),
    }


def _names(path: Path, key: str) -> tuple[str, ...]:
    names = read_plain_pickle(path).get(key)
    if not isinstance(names, list) or not names:
        raise DataError(f"expected '{key}' in '{path}', got none; download the file again")
    return tuple(_text(name) for name in names)


def _cifar_table(files: list[Path], key: str, names: tuple[str, ...]) -> ImageTable:
    pixels, labels = [], []
    for path in files:
        content = read_plain_pickle(path)
        data: Any = content.get("data")
        label: Any = content.get(key)
        fits = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2
        if not fits or data.shape[1] != 3072 or not isinstance(label, list):
            raise DataError(
                f"expected 'data' [N, 3072] of uint8 and '{key}' in '{path}', got "
                f"{listing(content) or 'nothing'}; download the file again"
            )
        if len(label) != len(data) or not all(isinstance(one, int) for one in label):
            raise DataError(
                f"expected {len(data)} whole numbers in '{key}' of '{path}', got {len(label)} "
                "entries; download the file again"
            )
        pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += label
    cells = partial(array_cells, np.concatenate(pixels), files[0].name)
    return ImageTable(np.array(labels, dtype=np.int64), names, cells, any_order=True)


# MNIST.


def _mnist(found: dict[Path, re.Match[str]], folder: Path, config: DataConfig) -> Splits:
    pairs: dict[tuple[str, str], dict[str, Path]] = {}
    for path, match in sorted(found.items()):
        split = config.train_split if match[2].lower() == "train" else "test"
        pairs.setdefault((match[1], split), {})[match[3].lower()] = path
    prefixes = sorted({prefix for prefix, _ in pairs})
    if len(prefixes) > 1:
        raise DataError(
            f"expected idx files of one data set in '{folder}', got those of {listing(prefixes)}; "
            "move the others away"
        )
    splits = {}
    for (_, split), pair in pairs.items():
        if len(pair) < 2:
            raise DataError(
                f"expected images and labels of split '{split}' in '{folder}', got only "
                f"{listing([path.name for path in pair.values()])}; add the other file"
            )
        splits[split] = partial(_idx_table, pair["images"], pair["labels"], split)
    return splits


def _idx_table(images: Path, labels: Path, split: str) -> ImageTable:
    pixels, label = _idx(images), _idx(labels)
    if pixels.ndim not in (3, 4) or label.ndim != 1 or len(label) != len(pixels):
        raise DataError(
            f"expected images [N, H, W] in '{images}' and as many labels in '{labels.name}', got "
            f"shapes {list(pixels.shape)} and {list(label.shape)}; download both files again"
        )
    cells = partial(array_cells, pixels, split)
    return ImageTable(label.astype(np.int64), None, cells, any_order=True)


def _idx(path: Path) -> NDArray[np.uint8]:
    """The array of an idx file: 0, 0, type, dimensions, sizes (big-endian), bytes."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        zeros, kind, dimensions = struct.unpack(">HBB", content[:4])
        if zeros or kind != 8:
            raise ValueError(f"its type is {kind}, not 8 (bytes)")
        shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(
            f"expected an idx file in '{path}', which cannot be read ({first_line(error)}); "
            "download it again"
        ) from None
