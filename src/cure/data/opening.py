"""From what ``data.source`` names to the splits of the source: names, folders, files, the hub.

Nothing is decoded here: a reader (:mod:`cure.data.readers`, :mod:`cure.data.folders`) opens splits.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from cure.config import DataConfig
from cure.data.folders import read_folder, read_loose, read_table
from cure.data.labels_file import TABLES
from cure.data.readers import Splits, read_digits, read_hub, read_npz, read_parquet
from cure.errors import DataError, unknown


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


def open_source(config: DataConfig, unlabelled: bool = False) -> tuple[str, Splits]:
    """The name for results, and the splits of the source.

    Args:
        config: the data section.
        unlabelled: whether a ``.npz`` file or a folder of images may have no labels;
            ``data.labels`` is then only for images that lie in the folder itself.

    Raises:
        DataError: there is no such source, or it is none whose file names could say a class.
    """
    source = config.source
    if source == "digits":
        _check_labels(config, unlabelled)
        return source, read_digits(config)
    path, plain = Path(source).expanduser(), _is_plain(source)
    # A folder that happens to be called cifar10 does not shadow the short name; ./cifar10 does.
    local = source not in SHORT_NAMES
    root = _data_root() if plain and not (local and path.exists()) else None
    if local and path.is_dir():
        return path.resolve().name or source, _folder(path, config, unlabelled)
    if root is not None and (root / source).is_dir():
        return source, _folder(root / source, config, unlabelled)
    _check_labels(config, unlabelled)
    if local and path.is_file():
        return _file(path, config, unlabelled)
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


def _is_plain(source: str) -> bool:
    """Whether a source may be a name, of a folder in CURE_DATA for example."""
    return re.fullmatch(r"[\w-][\w.-]*", source) is not None and not source.endswith(".npz")


def _check_labels(config: DataConfig, unlabelled: bool) -> None:
    """Refuse to read classes from the file names of what is no folder."""
    if config.labels == "file_names" and not unlabelled:
        raise DataError(
            "expected a folder of image files for data.labels=file_names, got data.source="
            f"{config.source}, which is no folder here; leave data.labels out, or give the folder"
        )


def _folder(folder: Path, config: DataConfig, unlabelled: bool) -> Splits:
    loose = read_loose(folder, config) if unlabelled else None
    if unlabelled:
        config = config.model_copy(update={"labels": "found"})
    return loose or read_folder(folder, config)


def _file(path: Path, config: DataConfig, unlabelled: bool) -> tuple[str, Splits]:
    if path.suffix.lower() == ".npz":
        return path.stem, read_npz(path, config, unlabelled)
    if path.suffix.lower() == ".parquet":
        return path.stem, read_parquet([path], config)
    if path.suffix.lower() in TABLES:
        return path.resolve().parent.name, read_table(path, config)
    what = "give the folder that holds it"
    if path.suffix.lower() in (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"):
        what = "unpack it and give the folder that comes of it"
    elif path.suffix.lower() in (".npy", ".pt", ".pth", ".pkl", ".pickle", ".mat", ".h5", ".hdf5"):
        what = "write its images and labels with numpy.savez(FILE, image=..., label=...)"
    raise DataError(
        f"expected a folder or a .npz, .parquet or .csv file as data.source, got the file "
        f"'{config.source}'; {what}"
    )


def same_source(one: str, other: str) -> bool:
    """Whether two values of ``data.source`` mean the same images."""
    first, second = (Path(source).expanduser().resolve() for source in (one, other))
    return one == other or first == second
