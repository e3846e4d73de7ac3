from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from cure.config import AugmentConfig
from cure.data import augment
from cure.errors import DataError

OFF = AugmentConfig(crop_padding=0, flip=False)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(seed: int, *shape: int) -> Tensor:
    # From 1, so that 0 can only come from the padding.
    return torch.randint(1, 256, shape, generator=seeded(seed), dtype=torch.uint8)


def possible(image: Tensor, config: AugmentConfig) -> Iterator[Tensor]:
    """All crops and mirrored crops of one image, made with torch's own padding."""
    padding = config.crop_padding
    _, height, width = image.shape
    mode = "reflect" if config.padding == "reflect" and padding else "constant"
    padded = functional.pad(image[None].double(), (padding,) * 4, mode=mode)[0].to(image.dtype)
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top : top + height, left : left + width]
            yield crop
            if config.flip:
                yield crop.flip(2)


def slow(image: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """One image at a time, with the same draws as :func:`augment`."""
    batch, _, height, width = image.shape
    padding = config.crop_padding
    mirrored = torch.zeros(batch, dtype=torch.bool)
    if config.flip:
        mirrored = torch.rand((batch, 1), generator=generator)[:, 0] < 0.5
    shift = torch.zeros(2, batch, dtype=torch.int64)
    if padding:
        shift = torch.randint(-padding, padding + 1, (2, batch, 1), generator=generator)[:, :, 0]
    results = []
    for i in range(batch):
        mode = "reflect" if config.padding == "reflect" and padding else "constant"
        padded = functional.pad(image[i : i + 1].double(), (padding,) * 4, mode=mode)[0]
        top, left = int(shift[0, i]) + padding, int(shift[1, i]) + padding
        crop = padded[:, top : top + height, left : left + width]
        results.append(crop.flip(2) if mirrored[i] else crop)
    return torch.stack(results).to(image.dtype)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 6),
    channels=st.sampled_from([1, 3]),
    height=st.integers(3, 9),
    width=st.integers(3, 9),
    padding=st.integers(0, 2),
    fill=st.sampled_from(["zeros", "reflect"]),
    flip=st.booleans(),
    as_float=st.booleans(),
)
def test_augment_equals_a_loop_over_images(
    seed, batch, channels, height, width, padding, fill, flip, as_float
) -> None:
    config = AugmentConfig(crop_padding=padding, padding=fill, flip=flip)
    image = random_images(seed, batch, channels, height, width)
    if as_float:
        image = image / 255
    before = image.clone()
    result = augment(image, config, seeded(seed))
    assert result.shape == image.shape
    assert result.dtype == image.dtype
    assert torch.equal(image, before)
    assert torch.equal(result, slow(image, config, seeded(seed)))
    assert torch.equal(result, augment(image, config, seeded(seed)))
    for one, original in zip(result, image, strict=True):
        assert any(torch.equal(one, other) for other in possible(original, config))


@pytest.mark.parametrize("as_float", [False, True])
def test_augment_off_is_the_identity(as_float: bool) -> None:
    image = random_images(0, 5, 3, 8, 8)
    image = image / 255 if as_float else image
    assert torch.equal(augment(image, OFF, seeded(0)), image)


@pytest.mark.parametrize("fill", ["zeros", "reflect"])
def test_every_crop_and_mirror_is_drawn_about_equally_often(fill: str) -> None:
    config = AugmentConfig(crop_padding=1, padding=fill, flip=True)
    one = random_images(1, 1, 1, 5, 4)
    count = 1800
    result = augment(one.expand(count, -1, -1, -1), config, seeded(2))
    hits = [sum(torch.equal(r, other) for r in result) for other in possible(one[0], config)]
    assert len(hits) == 18
    assert sum(hits) == count
    # 100 expected each, standard deviation 9.7.
    assert min(hits) > 55
    assert max(hits) < 145


def test_images_of_a_batch_are_drawn_apart_and_seeds_differ() -> None:
    image = random_images(3, 1, 3, 8, 8).expand(64, -1, -1, -1)
    result = augment(image, AugmentConfig(), seeded(0))
    assert len({r.numpy().tobytes() for r in result}) > 40
    assert not torch.equal(result, augment(image, AugmentConfig(), seeded(1)))


def test_zero_padding_may_be_wider_than_the_image() -> None:
    image = random_images(4, 200, 1, 3, 3)
    result = augment(image, AugmentConfig(crop_padding=5, flip=False), seeded(0))
    assert (result == 0).all(dim=(1, 2, 3)).any()


def test_reflection_needs_less_padding_than_the_side() -> None:
    config = AugmentConfig(crop_padding=4, padding="reflect")
    with pytest.raises(DataError, match=r"crop_padding below 4.*got 4.*padding=zeros"):
        augment(random_images(5, 1, 1, 4, 9), config, seeded(0))
