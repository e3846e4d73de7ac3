"""Where the real images are, and small made-up sources."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cure.data import ImageSet

REPOSITORY = Path(__file__).resolve().parents[2]
REAL_AT_START = os.environ.get("CURE_DATA")


@pytest.fixture(autouse=True)
def no_outside_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests see CURE_DATA only where they ask for it."""
    monkeypatch.delenv("CURE_DATA", raising=False)


@pytest.fixture
def real_data(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of real image data sets, named by CURE_DATA during the test."""
    places = [Path(REAL_AT_START)] if REAL_AT_START else []
    places.append(REPOSITORY.parent / "shared" / "data")
    for place in places:
        if (place / "cifar10").is_dir():
            monkeypatch.setenv("CURE_DATA", str(place))
            return place
    pytest.skip("set CURE_DATA to a folder that holds cifar10/*.parquet to run this test")


WriteParquet = Callable[..., Path]


@pytest.fixture
def write_parquet(tmp_path: Path) -> WriteParquet:
    """Writes ``tmp_path/pictures/<file>`` with the schema metadata of Hugging Face datasets."""
    import datasets

    def write(
        split: str,
        images: Sequence[bytes],
        labels: Sequence[Any],
        names: Sequence[str] | None = ("cat", "dog"),
        columns: tuple[str, str] = ("img", "label"),
        file: str | None = None,
        label_type: Any = None,
    ) -> Path:
        folder = tmp_path / "pictures"
        folder.mkdir(exist_ok=True)
        kind = label_type or (
            datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
        )
        features = datasets.Features({columns[0]: datasets.Image(), columns[1]: kind})
        rows = [{"bytes": b, "path": f"{split}_{i}.png"} for i, b in enumerate(images)]
        table = datasets.Dataset.from_dict(
            {columns[0]: rows, columns[1]: list(labels)}, features=features
        )
        table.to_parquet(str(folder / (file or f"{split}-00000-of-00001.parquet")))
        return folder

    return write


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes images {"train/cat/a.png": picture} under ``tmp_path/photos``."""

    def write(files: dict[str, Any]) -> Path:
        folder = tmp_path / "photos"
        folder.mkdir(exist_ok=True)
        for name, image in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(image, bytes):
                path.write_bytes(image)
            else:
                image.save(path)
        return folder

    return write


@pytest.fixture
def numbered() -> Callable[..., ImageSet]:
    """An image set of which image i is filled with the value i (below 256), labels i mod K."""

    def make(count: int, classes: int = 3, side: int = 4, split: str = "train") -> ImageSet:
        image = torch.arange(count).remainder(256).to(torch.uint8)
        image = image[:, None, None, None].expand(count, 1, side, side).clone()
        label = torch.arange(count) % classes
        return ImageSet(image, label, tuple(map(str, range(classes))), "numbered", split)

    return make
