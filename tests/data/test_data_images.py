"""Image sets made of your own tensors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from pictures import picture

from cure.data import ImageSet, decode
from cure.errors import DataError

LABELS = torch.tensor([0, 2, 1])


def test_floats_become_the_nearest_of_256_levels() -> None:
    image = torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    images = ImageSet.of(image, LABELS.to(torch.int32))
    assert images.image[:, 0, 0, 0].tolist() == [0, 128, 255]
    assert images.label.dtype == torch.int64
    assert images.classes == ("0", "1", "2")
    assert (images.channels, images.size, len(images)) == (1, (2, 2), 3)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), 255.0])
def test_values_outside_the_unit_interval_are_refused(value: float) -> None:
    image = torch.full((3, 1, 2, 2), 0.5)
    image[1, 0, 0, 0] = value
    with pytest.raises(DataError, match=r"in \[0, 1\]"):
        ImageSet.of(image, LABELS)


@pytest.mark.parametrize(
    ("shape", "labels", "sentence"),
    [
        ((3, 2, 4, 4), LABELS, "C of 1 or 3"),
        ((3, 4, 4), LABELS, "C of 1 or 3"),
        ((2, 1, 4, 4), LABELS, "2 labels"),
        ((3, 1, 4, 4), LABELS.float(), "int64"),
        ((3, 1, 4, 4), LABELS - 1, "got -1 to 1"),
        ((0, 1, 4, 4), LABELS[:0], "no image"),
    ],
)
def test_what_does_not_fit_is_refused(
    shape: tuple[int, ...], labels: torch.Tensor, sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        ImageSet.of(torch.zeros(shape, dtype=torch.uint8), labels)


def test_a_label_beyond_the_class_names_is_refused() -> None:
    with pytest.raises(DataError, match="from 0 to 1"):
        ImageSet.of(torch.zeros(3, 1, 4, 4), LABELS, ["a", "b"])


def test_opaque_palettes_are_decoded_without_touching_warnings(recwarn) -> None:
    """A filter that a thread sets and another one restores would hide later notes."""
    image = picture(3).convert("P")
    image.info["transparency"] = bytes([255] * 256)
    before = list(warnings.filters)
    made = decode._convert(image, decode.Treatment())
    assert np.array_equal(made.pixels, np.asarray(picture(3).convert("P").convert("RGB")))
    assert warnings.filters == before
    assert not list(recwarn)
    assert "transparency" in image.info
