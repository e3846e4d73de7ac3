from __future__ import annotations

import pytest
import torch

from cure.config import AugmentConfig
from cure.data import Batch, batches, epoch, steps_per_epoch
from cure.errors import DataError

AUGMENT = AugmentConfig(crop_padding=1)


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.step == b.step
        and torch.equal(a.image, b.image)
        and torch.equal(a.label, b.label)
        and torch.equal(a.index, b.index)
        for a, b in zip(first, second, strict=True)
    )


def values(found: list[Batch]) -> list[int]:
    return torch.cat([b.image[:, 0, 0, 0] * 255 for b in found]).round().int().tolist()


def test_an_epoch_has_each_image_once_and_drops_the_incomplete_batch(numbered) -> None:
    images = numbered(103)
    found = list(epoch(images, batch_size=10, epoch=2, seed=0, augment=None))
    assert len(found) == steps_per_epoch(images, 10) == 10
    assert [b.step for b in found] == list(range(20, 30))
    seen = values(found)
    assert len(seen) == len(set(seen)) == 100
    assert seen == torch.cat([b.index for b in found]).tolist()
    assert seen != sorted(seen)
    for batch in found:
        assert batch.image.dtype == torch.float32
        assert batch.image.shape == (10, 1, 4, 4)
        assert torch.equal(batch.label, images.label[batch.index])
        assert torch.equal(batch.image, images.image[batch.index].float() / 255)


def test_an_epoch_that_divides_evenly_keeps_all(numbered) -> None:
    found = list(epoch(numbered(20), batch_size=5, epoch=0, seed=0, augment=None))
    assert sorted(values(found)) == list(range(20))


@pytest.mark.parametrize("start", [0, 1, 7, 10])
@pytest.mark.parametrize("augment", [None, AUGMENT])
def test_a_resumed_epoch_gives_the_same_batches(numbered, start: int, augment) -> None:
    options = {"batch_size": 10, "epoch": 1, "seed": 5, "augment": augment}
    whole = list(epoch(numbered(103), **options))
    assert same(list(epoch(numbered(103), **options, start=start)), whole[start:])


def test_order_and_augmentation_are_keyed_by_seed_and_epoch(numbered) -> None:
    images = numbered(64)

    def orders(seed: int, number: int) -> tuple[int, ...]:
        found = epoch(images, batch_size=16, epoch=number, seed=seed, augment=None)
        return tuple(values(list(found)))

    assert len({orders(seed, number) for seed in (0, 1) for number in (0, 1)}) == 4
    assert orders(0, 0) == orders(0, 0)


def test_augmentation_differs_from_step_to_step(numbered) -> None:
    images = numbered(4, side=8)
    ramp = torch.arange(64, dtype=torch.uint8).reshape(8, 8)
    images.image[:] = ramp
    found = [
        b
        for number in (0, 1)
        for b in epoch(images, batch_size=2, epoch=number, seed=0, augment=AugmentConfig())
    ]
    assert len({b.image.numpy().tobytes() for b in found}) == 4


def test_skipped_batches_are_not_computed(numbered, monkeypatch: pytest.MonkeyPatch) -> None:
    from cure.data import loader

    calls = []
    real = loader.augmented
    monkeypatch.setattr(loader, "augmented", lambda *a: (calls.append(1), real(*a))[1])
    list(epoch(numbered(100), batch_size=10, epoch=0, seed=0, augment=AUGMENT, start=8))
    assert len(calls) == 2


def test_fewer_images_than_a_batch_is_said_at_once(numbered) -> None:
    with pytest.raises(DataError, match=r"batch of 128 images, got 100 in the train split"):
        epoch(numbered(100), batch_size=128, epoch=0, seed=0, augment=None)


def test_evaluation_batches_are_in_order_and_complete(numbered) -> None:
    found = list(batches(numbered(25), 10))
    assert values(found) == list(range(25))
    assert [len(b.label) for b in found] == [10, 10, 5]
    assert [b.step for b in found] == [0, 1, 2]
    assert torch.cat([b.index for b in found]).tolist() == list(range(25))
    assert torch.cat([b.label for b in found]).tolist() == [i % 3 for i in range(25)]


@pytest.mark.parametrize(("limit", "count"), [(7, 7), (10, 10), (13, 13), (99, 25), (None, 25)])
def test_evaluation_batches_stop_at_the_limit(numbered, limit: int | None, count: int) -> None:
    assert values(list(batches(numbered(25), 10, limit))) == list(range(count))
