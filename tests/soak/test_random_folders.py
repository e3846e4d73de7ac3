"""Random folders of images: every file is read, or named as skipped, or one sentence refuses.

The account of the data, which every training prints, is what is counted: images of each split and
files that were left out.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tally import count, done_or_refused, examples, mostly_done

from cure.config import DataConfig
from cure.data import account, load, load_training
from cure.errors import CureNote

SPLITS = (
    *((), (), (), (), ("train", "test"), ("train", "test"), ("train", "val"), ("train", "dev")),
    *(("training", "testing"), ("train", "valid")),
    *(("train", "validation", "test"), ("train", "dev", "eval"), ("train", "holdout"), ("test",)),
    *(("train", "val", "valid", "test"), ("train_set", "test_set"), ("train", "train2")),
)
FORMS = {
    **dict.fromkeys((".png", ".PNG", "", ".txt", ".jpg", ".dat", ".x.y"), "PNG"),
    **dict.fromkeys((".jpeg", ".JPG", ".jfif", ".jpe"), "JPEG"),
    **{".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF", ".tif": "TIFF", ".ppm": "PPM"},
}
"""Suffix -> format; some do not tell the truth."""

MODES = {
    "PNG": ("RGB", "L", "RGBA", "LA"),
    "JPEG": ("RGB", "L"),
    "BMP": ("RGB", "L"),
    "PPM": ("RGB", "L"),
}
OTHERS = {
    "notes.txt": b"text",
    ".DS_Store": b"\0\0\0\1Bud1",
    "Thumbs.db": b"\xd0\xcf\x11\xe0",
    "photo.heic": b"\0\0\0\x18ftypheic" + bytes(64),
    "clip.mp4": b"\0\0\0\x18ftypmp42" + bytes(64),
    "empty": b"",
    "empty.png": b"",
    "page.jpg": b"<html>not found</html>",
    "README": b"about",
    "list.json": b"{}",
    "archive.zip": b"PK\3\4" + bytes(30),
}
PLACES = ("", "", "", "more", "a/b", "__MACOSX", ".hidden", "train", "Ünïcode [x]")
CLASSES = ("cat", "Dog", "0", "1", "10", "test", "two words", "ümlaut", "b*[a]", "n01440764")


SETTINGS: dict[str, tuple[Any, ...]] = {
    "resize": (8, 8, 5, None),
    "damaged": ("skip", "refuse"),
    "validation": (0.3, 2, 0.2),
    "test_fraction": (0.2, 0.5),
    "validation_split": (*[None] * 9, "carve", "carve", "val", "test"),
    "test_split": (*[None] * 12, "test", "holdout"),
    "color": ("keep", "rgb", "grey"),
}


def random_case(name: str, draws: random.Random) -> str:
    """The name as it is, in capitals, or in random case."""
    mixed = "".join(draws.choice((c.lower(), c.upper())) for c in name)
    return draws.choice((name, name, name.upper(), name.capitalize(), mixed))


def write_picture(path: Path, form: str, mode: str, size: tuple[int, int], seed: int) -> None:
    channels = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8)
    Image.frombytes(mode, size, noise.tobytes()).save(path, form)


def write_folder(top: Path, draws: random.Random) -> int:
    """Write a random folder; the number of files in it.

    Hypothesis chooses the seed, so that an example is small to show and quick to draw.
    """
    count = 0

    def fresh(folder: Path, name: str) -> Path | None:
        nonlocal count
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        if path.exists():
            return None
        count += 1
        return path

    def other(folder: Path) -> None:
        name = draws.choice(sorted(OTHERS))
        path = fresh(folder, name)
        if path is not None:
            path.write_bytes(OTHERS[name])

    def picture(folder: Path, stem: str) -> None:
        suffix = draws.choice(sorted(FORMS)) if draws.random() < 0.3 else ".png"
        form = FORMS[suffix]
        path = fresh(folder, stem + suffix)
        if path is None:
            return
        mode = draws.choice(MODES.get(form, ("RGB",)))
        odd = draws.random() < mixed_sizes
        size = (draws.randint(1, 12), draws.randint(1, 12)) if odd else (8, 8)
        write_picture(path, form, mode, size, count)
        if draws.random() < damage:
            content = path.read_bytes()
            path.write_bytes(content[: draws.randint(1, len(content) - 1)])

    tidy = draws.random() < 0.5
    mixed_sizes = draws.choice((0.0, 0.0, 0.3))
    damage = draws.choice((0.0, 0.0, 0.1))
    disorder = 0.1 if tidy else 0.5
    names = draws.sample(CLASSES, draws.randint(2, 4))
    splits = draws.choice(SPLITS)
    outer = top / "deeper" / "still" if draws.random() < 0.1 else top
    for split in splits or ("",):
        root = outer / random_case(split, draws)
        for name in names:
            folder = root / name
            if draws.random() < 0.03:
                folder.mkdir(parents=True, exist_ok=True)  # an empty class
                continue
            for number in range(draws.randint(1, 6) if not tidy else 5):
                inside = draws.choice(PLACES) if draws.random() < disorder / 2 else ""
                picture(folder / inside, f"{split}{number}")
            if draws.random() < disorder:
                other(folder / draws.choice(PLACES))
        if draws.random() < disorder / 2:
            draws.choice((other, lambda folder: picture(folder, "loose")))(root)
    if draws.random() < disorder / 2:
        other(outer)
    if draws.random() < disorder / 4:
        picture(outer / draws.choice(("unlabelled", "extra")), "outside")
    return count


def files_in(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


@examples(80, 5000)
@given(
    st.integers(0, 2**32 - 1),
    st.fixed_dictionaries({name: st.sampled_from(some) for name, some in SETTINGS.items()}),
)
def try_folder(seed: int, settings: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore", CureNote)
        top = Path(place) / "photos"
        top.mkdir()
        written = write_folder(top, random.Random(seed))
        assert files_in(top) == written
        config = DataConfig(source=str(top), **settings)
        with done_or_refused("folders"):
            training, validation = load_training(config)
            found = account(training, validation, load(config, "test"))
            images = sum(map(sum, found.images.values()))
            skipped = sum(one.count for some in found.skipped.values() for one in some)
            unused = [n.split("'")[1] for n in found.notes if n.endswith("is not used")]
            beside = sum(files_in(path) for name in unused for path in top.rglob(name))
            assert images + skipped + beside == written, "\n".join(found.lines())
            count("folders", "with skipped files" if skipped else "without skipped files")


def test_no_file_of_a_random_folder_is_lost_without_a_word() -> None:
    try_folder()
    mostly_done("folders", 0.2)
