"""The benchmark's own images (CIFAR-10-C, CIFAR-100-C) where a user has them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cure.errors import DataError, unknown
from cure.evaluation.corruptions.constants import SEVERITIES
from cure.evaluation.corruptions.operations import CORRUPTIONS, Pixels
from cure.models.failure import reason_of
from cure.utils.io import first_line

LABELS = "labels.npy"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Published:
    """A folder with a ``.npy`` file a corruption, five times the same images, severity 1 first.

    Attributes:
        folder: where the files are.
        name: of the folder or the hub's repository, for results.
        label: [N] int64, of the images of one severity.
        images: [5 N, H, W, C] uint8 by corruption, still on disk.
    """

    folder: Path
    name: str
    label: NDArray[np.int64]
    images: dict[str, Pixels]

    def pixels(self, name: str, severity: int, first: int, last: int) -> Pixels:
        """Images ``first`` to ``last - 1`` of one corruption and severity, [B, H, W, C]."""
        if name not in self.images:
            raise DataError(f"'{self.name}' has no {name}: " + unknown("file", name, self.images))
        start = SEVERITIES.index(severity) * len(self.label)
        return np.array(self.images[name][start + first : start + last])


def open_published(source: str | Path) -> Published:
    """Read the folder, or fetch the ``.npy`` files of a repository of the Hugging Face hub.

    Files are mapped, not loaded, and never unpickled.

    Args:
        source: a folder, or ``owner/name`` where no such folder is.

    Raises:
        DataError: it is missing, or a file is not what the benchmark has.
    """
    folder = Path(source).expanduser()
    name = folder.resolve().name
    if not folder.exists() and _HUB_NAME.fullmatch(str(source)):
        folder, name = _fetched(str(source)), str(source)
    if not folder.is_dir():
        raise DataError(
            f"expected the folder of CIFAR-10-C or CIFAR-100-C (a .npy file a corruption and "
            f"{LABELS}) or a hub name (owner/name), got '{source}', which is no folder; correct it"
        )
    label = _array(folder / LABELS, (None,))
    files = [path for path in sorted(folder.glob("*.npy")) if path.stem in CORRUPTIONS]
    if not files:
        raise DataError(
            f"expected files such as gaussian_noise.npy in '{folder}', got none; name the folder "
            "that holds them"
        )
    images = {path.stem: _array(path, (None, None, None, 3)) for path in files}
    shape = next(iter(images.values())).shape
    count, rest = divmod(shape[0], len(SEVERITIES))
    for path in files:
        if rest or images[path.stem].shape != shape or not count:
            raise DataError(
                f"expected the same number of images for each of five severities in every file of "
                f"'{folder}', got {list(shape)} in {files[0].name} and "
                f"{list(images[path.stem].shape)} in {path.name}; get the files again"
            )
    label = label.astype(np.int64)
    # The official labels are repeated for each severity; some copies have them once.
    once = label[:count]
    if not any(np.array_equal(label, np.tile(once, times)) for times in (1, len(SEVERITIES))):
        raise DataError(
            f"expected {count} labels, or the same {count} five times, in '{folder / LABELS}', got "
            f"{len(label)} others; get the file again"
        )
    return Published(folder, name, once, images)


def _array(path: Path, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """A mapped array of uint8 and this shape (None: any number)."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"expected {path.name} in '{path.parent}', got none; add it") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"expected an array of numbers in '{path}', which cannot be read as one "
            f"({first_line(error)}); get the file again"
        ) from None
    fits = array.ndim == len(shape) and all(
        want is None or want == got for want, got in zip(shape, array.shape, strict=True)
    )
    # Labels may be of any whole-number type, pixels of one only.
    right = np.issubdtype(array.dtype, np.integer) if len(shape) == 1 else array.dtype == np.uint8
    if not fits or not right:
        expected = "[labels] of whole numbers" if len(shape) == 1 else "[5 N, H, W, 3] of uint8"
        raise DataError(
            f"expected {expected} in '{path}', got {list(array.shape)} of {array.dtype}; get the "
            "file again"
        )
    return array


def _fetched(name: str) -> Path:
    """The ``.npy`` files of a repository of the hub, through its ordinary cache."""
    import huggingface_hub

    try:
        place = huggingface_hub.snapshot_download(
            name, repo_type="dataset", allow_patterns=["*.npy"]
        )
    # What goes wrong inside is raised as the errors of three libraries with no common base.
    except Exception as error:
        raise DataError(
            f"expected the data set '{name}' from the Hugging Face hub, which could not be had "
            f"({reason_of(error)}); no folder of this "
            "name is here either: correct the name, or give the folder of the .npy files"
        ) from error
    # Copies keep the files where they like.
    found = sorted(Path(place).rglob(LABELS))
    return found[0].parent if found else Path(place)
