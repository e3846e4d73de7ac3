"""Extra images: how they are read, what is refused, and how batches mix them in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture

from cure.config import AugmentConfig, DataConfig
from cure.data import Batch, ImageSet, epoch
from cure.data.extra import ExtraAccount, check_leaks, find_leaks, load_extra, with_labels
from cure.data.loader import balanced_weights, extra_images
from cure.errors import ConfigError, DataError
from cure.recipe import load_recipe
from cure.utils.random import derive


def numbered(count: int, first: int = 0, classes: int = 2, split: str = "train") -> ImageSet:
    """Images that are all of one value, their number."""
    value = torch.arange(first, first + count)
    image = value[:, None, None, None].expand(-1, 1, 4, 4).to(torch.uint8).contiguous()
    names = tuple("abcdefgh"[:classes])
    return ImageSet(image, torch.arange(count) % classes, names, "made", split)


def config(extra: object, **more: object) -> DataConfig:
    return DataConfig(source="digits", extra=str(extra), **more)


def npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **{name: np.asarray(value) for name, value in arrays.items()})
    return path


def grey(count: int = 6, side: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 1), np.uint8)


# Reading.


def test_an_npz_with_labels(tmp_path: Path) -> None:
    file = npz(tmp_path / "made.npz", image=grey(), label=[0, 1, 1, 0, 0, 1])
    found = load_extra(config(file), numbered(9))
    assert found.image[:, 0].tolist() == grey()[..., 0].tolist()
    assert found.label.tolist() == [0, 1, 1, 0, 0, 1]
    assert (found.name, found.split, found.classes) == ("made", "extra", ("a", "b"))


def test_images_without_labels_are_marked_and_take_predicted_ones(tmp_path: Path) -> None:
    whole = load_extra(config(npz(tmp_path / "a.npz", image=grey())), numbered(9))
    assert whole.label.tolist() == [-1] * 6
    part = load_extra(
        config(npz(tmp_path / "b.npz", image=grey(), label=[0, -1, 1, -1, 0, 1])), numbered(9)
    )
    assert with_labels(part, torch.tensor([1, 0])).label.tolist() == [0, 1, 1, 0, 0, 1]
    with pytest.raises(DataError, match=r"none for 2; name a trained run .* data\.extra_labels"):
        with_labels(part, None)


def test_of_several_splits_the_training_split_is_taken(tmp_path: Path) -> None:
    file = npz(
        tmp_path / "a.npz",
        x_train=grey(4),
        y_train=[0, 1, 0, 1],
        x_test=grey(2),
        y_test=[0, 1],
    )
    assert len(load_extra(config(file), numbered(9))) == 4


def test_folders_match_classes_by_name(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / "set" / name).mkdir(parents=True)
        picture(ord(name), (4, 4), "L").save(tmp_path / "set" / name / "1.png")
    found = load_extra(config(tmp_path / "set"), numbered(9, classes=3))
    assert sorted(found.label.tolist()) == [0, 1]
    assert found.classes == ("a", "b", "c")
    (tmp_path / "set" / "z").mkdir()
    picture(3, (4, 4), "L").save(tmp_path / "set" / "z" / "1.png")
    with pytest.raises(DataError, match=r"classes of the run in 'set', got the unknown 'z'"):
        load_extra(config(tmp_path / "set"), numbered(9, classes=3))


def test_class_names_from_macos_are_those_of_other_systems(tmp_path: Path) -> None:
    """The letter é as one character and as two."""
    for name in ("bee", "cafe\u0301"):
        (tmp_path / name).mkdir()
        picture(3, (4, 4), "L").save(tmp_path / name / "0.png")
    training = replace(numbered(9), classes=("caf\u00e9", "bee"))
    assert load_extra(config(tmp_path), training).label.tolist() == [1, 0]


def test_a_folder_of_loose_images_has_no_labels(tmp_path: Path) -> None:
    for number in range(3):
        picture(number, (4, 4), "L").save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("")
    found = load_extra(config(tmp_path), numbered(9))
    assert found.label.tolist() == [-1] * 3
    assert [str(one) for one in found.findings.skipped] == [
        "1 .txt file skipped: they are no images"
    ]


def test_file_names_label_loose_extra_images_and_leave_others_alone(tmp_path: Path) -> None:
    for place in ("loose/b.0.png", "loose/a.1.png", "loose/77.png", "set/a/b.0.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        picture(len(place), (4, 4), "L").save(tmp_path / place)
    loose = load_extra(config(tmp_path / "loose", labels="file_names"), numbered(9))
    assert sorted(loose.label.tolist()) == [0, 1]
    assert "names are no class" in str(loose.findings.skipped[0])
    (tmp_path / "loose" / "b.0.png").rename(tmp_path / "loose" / "8.png")
    (tmp_path / "loose" / "a.1.png").rename(tmp_path / "loose" / "9.png")
    unnamed = load_extra(config(tmp_path / "loose", labels="file_names"), numbered(9))
    assert unnamed.label.tolist() == [-1] * 3
    folders = load_extra(config(tmp_path / "set", labels="file_names"), numbered(9))
    assert folders.label.tolist() == [0]
    file = npz(tmp_path / "made.npz", image=grey(2), label=[0, 1])
    assert load_extra(config(file, labels="file_names"), numbered(9)).label.tolist() == [0, 1]


def test_a_file_that_would_need_pickle_is_refused(tmp_path: Path) -> None:
    held = np.empty(2, dtype=object)
    held[:] = [np.zeros((4, 4)), "text"]
    file = tmp_path / "a.npz"
    np.savez(file, image=held, label=np.zeros(2, int))
    with pytest.raises(DataError, match=r"cannot be read .*allow_pickle=False"):
        load_extra(config(file), numbered(9))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"image": grey(), "label": [0, 1, 2, 0, 0, 0]},
            "labels 0 to 1 or -1 for none, got 2 in r",
        ),
        (
            {"image": grey(), "label": [0, 1, -2, 0, 0, 0]},
            "got -2 in row 2; take images of the sam",
        ),
        ({"image": grey(), "label": [0, 1]}, "got 6 images in 'image' and 2 labels in 'label'"),
        ({"image": grey(side=5)}, "training images, 4x4 grey, got 5x5 grey in 'a'; convert them"),
        ({"image": np.zeros((2, 4, 4, 3), np.uint8)}, "4x4 grey, got 4x4 RGB in 'a'"),
        ({"image": grey().astype(np.int32)}, r"expected uint8 \(0..255\) or floats .* got int32"),
        ({"image": np.zeros((0, 4, 4), np.uint8)}, "expected extra images in 'a', got none"),
        ({"pixels": grey()}, "got 'pixels'; rename them"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, arrays, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_extra(config(npz(tmp_path / "a.npz", **arrays)), numbered(9))


def test_a_missing_file_is_named_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"as data\.extra, got '.*none\.npz', which does not exist"):
        load_extra(config(tmp_path / "none.npz"), numbered(9))


def test_grey_extra_images_become_rgb_where_the_training_images_are(tmp_path: Path) -> None:
    training = numbered(9).with_channels(3)
    assert load_extra(config(npz(tmp_path / "a.npz", image=grey())), training).channels == 3


@pytest.mark.parametrize("cache", ["memory", "disk", "none"])
def test_extra_images_outside_memory_are_the_same(tmp_path: Path, cache: str) -> None:
    file = npz(tmp_path / "a.npz", image=grey(300), label=np.arange(300) % 2)
    folder = str(tmp_path / "cache")
    found = load_extra(config(file, cache=cache, cache_folder=folder), numbered(9))
    assert (found.lazy is None) == (cache == "memory")
    assert found.rows(slice(None))[:, 0].tolist() == grey(300)[..., 0].tolist()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.extra_labels=runs/x"], r"expected data\.extra, whose images it labels"),
        (["data.extra=a.npz", "data.extra_labels=natural"], "a run that is trained already"),
        (["data.extra=a.npz", "data.extra_share=1"], "less than 1"),
        (["data.extra=a.npz", "data.extra_leaks=ignore"], "'report', 'remove' or 'refuse'"),
    ],
)
def test_settings_that_do_not_fit(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("digits", words)


# Batches.

TRAIN, EXTRA = numbered(40), numbered(30, first=100)


def drawn(number: int = 0, **more: object) -> list[Batch]:
    options = {"batch_size": 10, "epoch": number, "seed": 3, "augment": None} | more
    images, extra = options.pop("images", TRAIN), options.pop("extra", EXTRA)
    return list(epoch(images, extra=extra, extra_share=0.3, **options))


def values(batches: list[Batch]) -> torch.Tensor:
    return torch.stack([(255 * b.image[:, 0, 0, 0]).round().long() for b in batches])


def test_every_batch_has_its_share_and_a_pass_its_steps() -> None:
    found = drawn()
    value = values(found)
    assert value.shape == (4, 10)
    assert ((value >= 100).sum(1) == 3).all()
    index = torch.stack([b.index for b in found])
    assert torch.equal(index, torch.where(value >= 100, value - 100 + 40, value))
    labels = torch.cat([TRAIN.label, EXTRA.label])
    assert all(torch.equal(b.label, labels[b.index]) for b in found)
    own = value[value < 100]
    assert len(set(own.tolist())) == 28
    places = [(value >= 100)[row].nonzero().squeeze(1).tolist() for row in range(4)]
    assert len({tuple(place) for place in places}) > 1


def test_every_extra_image_is_used_once_before_one_is_used_again() -> None:
    row = torch.cat([value[value >= 100] for value in map(values, map(drawn, range(10)))])
    assert len(row) == 120
    for begin in range(0, 120, 30):
        assert sorted(row[begin : begin + 30].tolist()) == list(range(100, 130))
    assert row[:30].tolist() != row[30:60].tolist()


@pytest.mark.parametrize(
    "more",
    [
        {"augment": AugmentConfig(crop_padding=1)},
        {"augment": AugmentConfig(crop_padding=0, mixup=0.5)},
        {"sampler": "balanced", "class_weights": "balanced"},
    ],
)
def test_a_pass_goes_on_where_it_stopped_and_ranks_share_it(more) -> None:
    def content(batch: Batch) -> list[torch.Tensor]:
        parts = [batch.image, batch.label, batch.index, batch.soft_label, batch.weighted]
        return [part for part in parts if part is not None]

    whole = drawn(2, **more)
    for one, again in zip(whole[1:], drawn(2, start=1, **more), strict=True):
        assert all(map(torch.equal, content(one), content(again)))
    ranks = [drawn(2, rank=rank, world=2, **more) for rank in (0, 1)]
    for one, *parts in zip(whole, *ranks, strict=True):
        joined = [torch.cat(pair) for pair in zip(*map(content, parts), strict=True)]
        assert all(map(torch.equal, content(one), joined))


def test_without_extra_images_batches_are_those_of_before() -> None:
    plain = list(epoch(TRAIN, batch_size=10, epoch=0, seed=3, augment=None))
    # As version 0.2.0 drew them before there were extra images.
    expected = torch.randperm(40, generator=torch.Generator().manual_seed(derive(3, "order", 0)))
    assert torch.cat([b.index for b in plain]).tolist() == expected.tolist()


def test_class_weights_count_the_labels_of_a_batch() -> None:
    own = ImageSet(TRAIN.image, (torch.arange(40) >= 30).long(), ("a", "b"), "made", "train")
    extra = ImageSet(EXTRA.image, torch.ones(30, dtype=torch.long), ("a", "b"), "made", "extra")
    batch = drawn(0, images=own, extra=extra, class_weights="balanced")[0]
    # A batch has 7 images with 1/4 of the second class and 3 extra ones of it: 0.475 of all.
    weight = batch.weighted.sum(1)
    assert weight[batch.label == 1].unique().tolist() == pytest.approx([1 / (2 * 0.475)])
    assert weight[batch.label == 0].unique().tolist() == pytest.approx([1 / (2 * 0.525)])
    same = drawn(0, images=own, extra=own, class_weights="balanced")[0]
    plain = balanced_weights(own.label, 2)
    assert torch.allclose(same.weighted.sum(1), plain[same.label])


def test_a_share_that_rounds_to_nothing_is_refused() -> None:
    with pytest.raises(DataError, match=r"expected 1 to 9 .* got 0 with data\.extra_share=0\.01"):
        extra_images(10, 0.01)
    with pytest.raises(DataError, match="got 10"):
        extra_images(10, 0.99)


@pytest.mark.parametrize("lazy", ["train", "extra", "both"])
def test_batches_are_the_same_outside_memory(tmp_path: Path, lazy: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (600, 4, 4, 1), np.uint8)
    file = npz(tmp_path / "a.npz", image=pixels, label=np.arange(600) % 2)

    def images(cache: str) -> ImageSet:
        return load_extra(config(file, cache=cache, cache_folder=str(tmp_path / "c")), TRAIN)

    memory, disk = images("memory"), images("disk")
    pair = (disk if lazy != "extra" else memory, disk if lazy != "train" else memory)
    expected = drawn(1, images=memory, extra=memory)
    for one, other in zip(expected, drawn(1, images=pair[0], extra=pair[1]), strict=True):
        assert torch.equal(one.image, other.image)


# What is told.


def test_leaks_are_counted_told_and_refused() -> None:
    noise = np.random.default_rng(2).integers(0, 256, (60, 32, 32), np.uint8)
    image = torch.from_numpy(noise)[:, None]
    held = ImageSet(image[:20], torch.arange(20) % 2, ("a", "b"), "made", "test")
    training = ImageSet(image[20:40], torch.arange(20) % 2, ("a", "b"), "made", "train")
    extra = ImageSet(
        torch.cat([image[40:], image[5:6].flip(-1), image[7:8]]),
        torch.arange(22) % 2,
        ("a", "b"),
        "made",
        "extra",
    )
    leaks = find_leaks(extra, training, held)
    assert (leaks.rows, leaks.copied) == ((20, 21), (5, 7))
    assert (leaks.by_hash, leaks.by_pixels, leaks.split) == (2, 2, "test")
    none = find_leaks(extra.subset(slice(0, 20)), training, held)
    assert none.rows == ()
    check_leaks((none,))
    told = r"2 extra images copy a test image \(number 20, 21\)"
    with pytest.raises(DataError, match=told):
        check_leaks((none, leaks))
    account = ExtraAccount("made", (11, 11), 0.7, 0, None, (leaks,), "report", 0, (), {})
    assert account.lines() == [
        "extra images 'made': 22, 11 to 11 a class, 70 % of each batch",
        "extra images that copy a test image: 2 (2 found by perceptual hash, 2 by coarse pixels; "
        "similarity 0.92 or more)",
    ]
    assert account.warnings() == [
        "2 extra images copy a test image (number 20, 21), which makes accuracies too high: see "
        "copies.png of the run, and set data.extra_leaks=remove"
    ]
