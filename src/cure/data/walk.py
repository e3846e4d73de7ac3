"""Walking folders: the images at any depth, and what is left out with its reason."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from cure.data.decode import HEIC_ADVICE, file_kind
from cure.data.images import Skipped
from cure.errors import DataError

Reasons = Counter[tuple[str, str]]
"""Number of files left out by (what they are, why)."""

_SYSTEM_FOLDERS = frozenset(["__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found"])
_SYSTEM_FILES = frozenset(["thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"])
_SYSTEM = ("hidden and system files", "they are no images of yours")


def folders_in(folder: Path) -> list[Path]:
    """The folders directly in a folder, without those of an operating system."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not _is_system(p, True))


def files_in(folder: Path) -> list[Path]:
    """The files directly in a folder, without those of an operating system."""
    return sorted(p for p in folder.iterdir() if p.is_file() and not _is_system(p, False))


def _is_system(path: Path, is_folder: bool) -> bool:
    """Whether a file or folder is hidden or made by an operating system."""
    name = path.name.lower()
    return name.startswith(".") or name in (_SYSTEM_FOLDERS if is_folder else _SYSTEM_FILES)


def outside_classes(folder: Path) -> Reasons:
    """Files left out directly in a folder, and in its system folders."""
    reasons: Reasons = Counter()
    for path in folder.iterdir():
        if _is_system(path, path.is_dir()):
            reasons[_SYSTEM] += _count(path)
        elif path.is_file():
            if file_kind(path) == "other":
                reasons[other_file(path)] += 1
            else:
                reasons["images", "they lie outside the class folders"] += 1
    return reasons


def images_below(folder: Path) -> tuple[list[Path], Reasons]:
    """The images in a folder at any depth, in order of their paths, and what was left out."""
    images: list[Path] = []
    reasons: Reasons = Counter()
    # A link to a folder above leads to images of other classes.
    seen: set[str] = set(map(str, Path(os.path.realpath(folder)).parents))

    def enter(place: Path) -> None:
        real = os.path.realpath(place)
        if real in seen:
            reasons["links", "they lead to a folder that is read already"] += 1
            return
        seen.add(real)
        try:
            inside = list(os.scandir(place))
        except OSError as error:
            raise DataError(
                f"the folder '{place}' cannot be read ({error.strerror}); change its permissions "
                "or move it away"
            ) from None
        for entry in inside:
            path, is_folder = Path(entry.path), entry.is_dir()
            if _is_system(path, is_folder):
                reasons[_SYSTEM] += _count(path)
            elif is_folder:
                enter(path)
            elif not entry.is_file():
                reasons["links", "what they point to is no file"] += 1
            else:
                kind = file_kind(path)
                if kind == "image":
                    images.append(path)
                elif kind == "heic":
                    suffix = path.suffix.lower() or "HEIC"
                    reasons[f"{suffix} files", HEIC_ADVICE] += 1
                else:
                    reasons[other_file(path)] += 1

    enter(folder)
    return sorted(images), reasons


def holds_image(folder: Path) -> bool:
    """Whether there is an image in a folder, at any depth."""
    inside = os.walk(folder)
    return any(
        file_kind(Path(place, name)) == "image" for place, _, names in inside for name in names
    )


def other_file(path: Path) -> tuple[str, str]:
    """What a file that is no image is called, and why it is left out."""
    suffix = path.suffix.lower()
    plain = re.fullmatch(r"\.\w{1,8}", suffix)
    return (f"{suffix} files" if plain else "files without a known suffix", "they are no images")


def _count(path: Path) -> int:
    """Number of files that a path is or holds."""
    if not path.is_dir():
        return 1
    return sum(len(files) for _, _, files in os.walk(path))


def as_skipped(reasons: Reasons) -> tuple[Skipped, ...]:
    """The reasons for what was left out, the most frequent first."""
    found = sorted(reasons.items(), key=lambda one: (-one[1], one[0]))
    return tuple(Skipped(count, *what) for what, count in found if count > 0)
