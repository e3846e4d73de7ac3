"""Resized crops, colour jitter, MixUp, CutMix and label smoothing."""

from __future__ import annotations

import pytest
import torch

from cure.config import AugmentConfig
from cure.data import ImageSet
from cure.data.augment import color_jitter, mixed, resized_crop, soft_labels
from cure.data.loader import epoch


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_resized_crop_of_the_whole_area_is_nearly_the_image() -> None:
    # A horizontal ramp: of a crop of width w starting at x0, the ramp has slope w.
    ramp = torch.linspace(0, 1, 32).expand(64, 1, 32, 32).contiguous()
    found = resized_crop(ramp, 0.25, False, draws())
    slope = found[..., 16] - found[..., 15]
    width = slope.mean(dim=(1, 2)) * 31
    # Sides lie between sqrt(1/4 * 3/4) and 1; the whole range is drawn.
    assert width.min() > (0.25 * 3 / 4) ** 0.5 - 0.05
    assert width.max() <= 1.01
    assert width.max() - width.min() > 0.3
    assert found.min() >= 0
    assert found.max() <= 1


def test_resized_crops_mirror_half_of_the_images() -> None:
    ramp = torch.linspace(0, 1, 16).expand(400, 1, 16, 16).contiguous()
    found = resized_crop(ramp, 0.9, True, draws())
    mirrored = (found[..., 0].mean(dim=(1, 2)) > found[..., -1].mean(dim=(1, 2))).float().mean()
    assert 0.4 < mirrored < 0.6


def test_color_jitter_leaves_grey_images_grey_and_stays_in_range() -> None:
    image = torch.rand(8, 1, 6, 6).expand(8, 3, 6, 6)
    found = color_jitter(image, 0.4, draws())
    torch.testing.assert_close(found[:, 0], found[:, 1])
    assert found.min() >= 0
    assert found.max() <= 1
    assert not torch.equal(found, image)


def test_label_smoothing_by_hand() -> None:
    config = AugmentConfig(label_smoothing=0.3)
    image = torch.rand(2, 3, 4, 4)
    found, soft = mixed(image, soft_labels(torch.tensor([0, 2]), 3, config), config, draws())
    assert found is image
    torch.testing.assert_close(soft, torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]]))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_and_labels_are_mixed_by_the_same_share(kind: str) -> None:
    # Image n is filled with n, label n: the mean of an image must be the mean of its soft label.
    label = torch.arange(8)
    image = label.float().view(8, 1, 1, 1).expand(8, 1, 12, 12).clone()
    for seed in range(10):
        config = AugmentConfig(**{kind: 1.0})
        found, soft = mixed(image, soft_labels(label, 8, config), config, draws(seed))
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(8))
        torch.testing.assert_close(found.mean(dim=(1, 2, 3)), soft @ torch.arange(8.0))
        if kind == "cutmix":
            assert set(found.unique().tolist()) <= set(range(8))


def test_ranks_together_give_the_batch_of_one_process() -> None:
    images = ImageSet(
        torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8),
        torch.arange(24) % 3,
        ("a", "b", "c"),
        "noise",
        "train",
    )
    config = AugmentConfig(resized_crop=0.5, color_jitter=0.2, cutmix=1.0, mixup=0.4)
    options = {"batch_size": 8, "epoch": 1, "seed": 3, "augment": config}
    whole = list(epoch(images, **options))
    parts = [list(epoch(images, **options, rank=rank, world=2)) for rank in (0, 1)]
    for number, batch in enumerate(whole):
        both = [part[number] for part in parts]
        assert torch.equal(torch.cat([b.image for b in both]), batch.image)
        assert torch.equal(torch.cat([b.soft_label for b in both]), batch.soft_label)
        assert torch.equal(torch.cat([b.label for b in both]), batch.label)
    again = list(epoch(images, **options, start=2))
    assert torch.equal(again[0].image, whole[2].image)
