"""Class names of two sides, matched by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from cure.data.images import ImageKind, ImageSet, replace_labels
from cure.data.readers import composed
from cure.errors import CureNote, DataError, some

_PLACEHOLDER = re.compile(r"(label|class)?[ _-]?\d+$", re.IGNORECASE)


def match_classes(ours: Sequence[str], theirs: Sequence[str]) -> tuple[int, ...]:
    """Position among ``theirs`` of each class of ``ours``.

    Names are compared exactly, then without case, spaces, ``_`` and ``-``, then by each of several
    names between commas ("tench, Tinca tinca").  Where one side has only numbers for names (``0``,
    ``LABEL_3``, ``class_3``) and both have as many classes, the order is taken as it is, with a
    note.  Different numbers on both sides are names that do not match.

    Args:
        ours: names of the classes of the data.
        theirs: names of the classes of the network, as many or more.

    Raises:
        DataError: names do not match, or one could be several.

    >>> match_classes(["cat", "dog"], ["Dog", "owl", "cat"])
    (2, 0)
    """
    if tuple(ours) == tuple(theirs):
        return tuple(range(len(ours)))
    exact = {name: place for place, name in enumerate(theirs)}
    if all(name in exact for name in ours):
        return tuple(exact[name] for name in ours)
    if _in_order(ours, theirs):
        # A placeholder tells nothing of an image, so the user has to see what was taken for what.
        warnings.warn(
            "classes without names are taken in their order: "
            + some((f"{a} = {b}" for a, b in zip(theirs, ours, strict=True)), most=3),
            CureNote,
            stacklevel=2,
        )
        return tuple(range(len(ours)))
    found = [_places(name, theirs) for name in ours]
    unknown = [name for name, places in zip(ours, found, strict=True) if not places]
    if unknown:
        raise DataError(
            f"the data has the classes {some(ours)}, the network knows {some(theirs)}; "
            f"{some(unknown)} {'is' if len(unknown) == 1 else 'are'} unknown to it: rename the "
            "classes of the data, or use a network trained on them"
        )
    several = [i for i, places in enumerate(found) if len(places) > 1]
    if several:
        places = found[several[0]]
        raise DataError(
            f"the class {ours[several[0]]!r} of the data could be "
            f"{' or '.join(repr(theirs[place]) for place in places[:3])} of the network; rename it "
            "to one of these"
        )
    places = [each[0] for each in found]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise DataError(
            f"several classes of the data fit the class {theirs[twice]!r} of the network; rename "
            "them to its exact names"
        )
    return tuple(places)


def relabelled(images: ImageSet, kind: ImageKind) -> ImageSet:
    """Images with the labels and channels of those that a network was trained on.

    Args:
        images: any set whose classes are among those of ``kind``, by name.
        kind: the images of training.

    Raises:
        DataError: names do not match.
    """
    images = images.with_channels(kind.channels)
    if images.classes == kind.classes:
        return images
    places = match_classes(images.classes, kind.classes)
    order = torch.from_numpy(np.array(places, dtype=np.int64)).to(images.label.device)
    return replace_labels(images, order[images.label], kind.classes)


def _numbered(names: Sequence[str]) -> bool:
    return all(_PLACEHOLDER.match(name) for name in names)


def _in_order(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether one side has placeholders alone, which say an order and no names.

    Numbers on both sides are names, unless one side counts from 0 or its numbers follow a word.
    """
    if len(ours) != len(theirs) or not (_numbered(ours) or _numbered(theirs)):
        return False
    if not (_numbered(ours) and _numbered(theirs)):
        return True
    return _counted(ours) != _counted(theirs) or not all(
        name.isdigit() for name in (*ours, *theirs)
    )


def _counted(names: Sequence[str]) -> bool:
    return [re.sub(r"\D+", "", name) for name in names] == [str(k) for k in range(len(names))]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", composed(name)).casefold()


def _places(name: str, theirs: Sequence[str]) -> list[int]:
    """Positions of the classes that a name may mean, by the strictest rule that finds one."""
    exact = [place for place, other in enumerate(theirs) if other == name]
    whole = [place for place, other in enumerate(theirs) if _plain(other) == _plain(name)]
    if exact or whole:
        return exact or whole
    parts = {_plain(part) for part in name.split(",")}
    return [
        place
        for place, other in enumerate(theirs)
        if parts & {_plain(part) for part in other.split(",")}
    ]
